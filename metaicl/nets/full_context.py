"""LSTMs that let an embedding know the other rows: full-context embeddings of a support and of queries."""

import torch
from torch import Tensor, nn

from metaicl.checks import check_count
from metaicl.nets.lstm import BidirectionalLSTM, lstm_step


class SupportLSTM(nn.Module):
    """Rows plus what an LSTM makes of them from left to right, plus what another makes of them from right to left.

    Args:
        dim: D, of rows and of hidden states.

    Reference:
        Vinyals et al. 2016, arXiv:1606.04080, appendix A.2: g(x_i) = h_i (forward) + h_i (backward) + g'(x_i).
    """

    def __init__(self, dim: int) -> None:
        """Build the cells."""
        super().__init__()
        self.cells = BidirectionalLSTM(dim, dim)

    def forward(self, rows: Tensor, real: Tensor) -> Tensor:
        """Embed rows (B, N, D), of which real (B, N) count: (B, N, D)."""
        return rows + self.cells(rows, real).unflatten(-1, (2, -1)).sum(-2)


class AttentionalLSTM(nn.Module):
    """Queries that read a set of keys some times, by attention, before they are compared with it.

    Args:
        dim: D.
        steps: K, how often the set is read.

    Reference:
        Vinyals et al. 2016, arXiv:1606.04080, appendix A.1. Differs: attention over h . g / sqrt(D), so that it
        does not start saturated; the LSTM starts from a hidden state of zeros, which reads the mean key.
    """

    def __init__(self, dim: int, *, steps: int = 3) -> None:
        """Build the cell; its forget gate starts near sigmoid(1)."""
        super().__init__()
        self.steps = check_count("steps", steps)
        self.from_query = nn.Linear(dim, 4 * dim)  # the gates are those of `lstm_step`
        self.from_read = nn.Linear(2 * dim, 4 * dim, bias=False)
        with torch.no_grad():
            self.from_query.bias[2 * dim : 3 * dim] += 1

    def forward(self, queries: Tensor, keys: Tensor, real: Tensor) -> Tensor:
        """Queries (B, Q, D) that have read keys (B, N, D), of which real (B, N) count: (B, Q, D)."""
        given = self.from_query(queries)
        hidden = memory = torch.zeros_like(queries)
        for _ in range(self.steps):
            scores = hidden @ keys.mT * keys.shape[-1] ** -0.5
            scores = scores.masked_fill(~real[:, None], torch.finfo(scores.dtype).min)
            weights = scores.softmax(-1) * real[:, None]  # zeros, not an average of nothing, where no row is real
            hidden, memory = lstm_step(given + self.from_read(torch.cat([hidden, weights @ keys], -1)), memory)
            hidden = hidden + queries
        return hidden
