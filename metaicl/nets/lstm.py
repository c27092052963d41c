"""LSTM cells, written out: rows with gaps, second derivatives, `vmap` and compilation all work."""

import torch
from torch import Tensor, nn

from metaicl.checks import check_count


class BidirectionalLSTM(nn.Module):
    """One layer of LSTM cells in both directions over sequences with gaps.

    Args:
        n_in: Size of the inputs.
        hidden: Size of each direction's state; forget gates start at sigmoid(1).
    """

    def __init__(self, n_in: int, hidden: int) -> None:
        """Draw the weights of both directions as torch does; the gates are those of `lstm_step`."""
        super().__init__()
        self.hidden = check_count("hidden", hidden)
        bound = hidden**-0.5
        self.from_input = nn.Parameter(torch.empty(2, n_in, 4 * hidden).uniform_(-bound, bound))
        self.from_state = nn.Parameter(torch.empty(2, hidden, 4 * hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(2, 1, 4 * hidden))
        with torch.no_grad():
            self.bias[..., 2 * hidden : 3 * hidden] = 1.0

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """States (rows, T, 2 hidden) of inputs x (rows, T, n_in); a place that is not real is skipped, and zero."""
        n_rows, n_tokens = real.shape
        drive = (x.flatten(0, 1) @ self.from_input).unflatten(1, (n_rows, n_tokens)) + self.bias[:, None]
        drive = torch.stack([drive[0], drive[1].flip(1)])  # both directions step together
        here = torch.stack([real, real.flip(1)])[..., None]
        state = memory = drive.new_zeros(2, n_rows, self.hidden)
        if not n_tokens:
            return drive.new_zeros(n_rows, 0, 2 * self.hidden)
        course = []
        for t in range(n_tokens):
            next_state, next_memory = lstm_step(drive[:, :, t] + state @ self.from_state, memory)
            memory = torch.where(here[:, :, t], next_memory, memory)
            state = torch.where(here[:, :, t], next_state, state)
            course.append(state)
        forward, backward = torch.stack(course, 2)
        return torch.cat([forward, backward.flip(1)], -1) * real[..., None]


def lstm_step(gates: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """State and memory (..., H) after pre-activations (..., 4H) of what is new, enters, is kept and leaves.

    Reference:
        Hochreiter & Schmidhuber, 1997, with the forget gate of Gers, Schmidhuber & Cummins, 2000.
    """
    size = memory.shape[-1]
    enter, keep, leave = torch.sigmoid(gates[..., size:]).chunk(3, -1)
    memory = keep * memory + enter * torch.tanh(gates[..., :size])
    return leave * torch.tanh(memory), memory
