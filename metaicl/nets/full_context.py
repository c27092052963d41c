"""LSTMs that let an embedding know the other rows: full-context embeddings of a support and of queries.

The cells are written out: masked rows are as absent, everything has a second derivative, and compiles.
"""

import torch
from torch import Tensor, nn

from metaicl.checks import check_count


class BidirectionalLSTM(nn.Module):
    """Rows plus what an LSTM makes of them from left to right, plus what another makes of them from right to left.

    Args:
        dim: D, of rows and of hidden states.

    Reference:
        Vinyals et al. 2016, arXiv:1606.04080, appendix A.2: g(x_i) = h_i (forward) + h_i (backward) + g'(x_i).
    """

    def __init__(self, dim: int) -> None:
        """Build two cells."""
        super().__init__()
        self.from_row = nn.ModuleList(_gates(dim, dim) for _ in range(2))
        self.from_hidden = nn.ModuleList(nn.Linear(dim, 4 * dim, bias=False) for _ in range(2))

    def forward(self, rows: Tensor, real: Tensor) -> Tensor:
        """Embed rows (B, N, D), of which real (B, N) count: (B, N, D)."""
        order = list(range(rows.shape[1]))
        passes = (self._read(0, rows, real, order), self._read(1, rows, real, order[::-1]))
        return rows + passes[0] + passes[1]

    def _read(self, which: int, rows: Tensor, real: Tensor, order: list[int]) -> Tensor:
        given = self.from_row[which](rows)
        hidden = cell = torch.zeros_like(rows[:, 0])
        read = [hidden] * len(order)
        for n in order:
            new_hidden, new_cell = _step(given[:, n] + self.from_hidden[which](hidden), cell)
            keep = real[:, n, None]
            hidden, cell = torch.where(keep, new_hidden, hidden), torch.where(keep, new_cell, cell)
            read[n] = hidden
        return torch.stack(read, 1)


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
        """Build the cell."""
        super().__init__()
        self.steps = check_count("steps", steps)
        self.from_query = _gates(dim, dim)
        self.from_read = nn.Linear(2 * dim, 4 * dim, bias=False)

    def forward(self, queries: Tensor, keys: Tensor, real: Tensor) -> Tensor:
        """Queries (B, Q, D) that have read keys (B, N, D), of which real (B, N) count: (B, Q, D)."""
        given = self.from_query(queries)
        hidden = cell = torch.zeros_like(queries)
        for _ in range(self.steps):
            scores = hidden @ keys.mT * keys.shape[-1] ** -0.5
            scores = scores.masked_fill(~real[:, None], torch.finfo(scores.dtype).min)
            weights = scores.softmax(-1) * real[:, None]  # zeros, not an average of nothing, where no row is real
            hidden, cell = _step(given + self.from_read(torch.cat([hidden, weights @ keys], -1)), cell)
            hidden = hidden + queries
        return hidden


def _gates(n_in: int, dim: int) -> nn.Linear:
    """Pre-activations of input, forget, cell and output gates; forget gates start at sigmoid(1)."""
    linear = nn.Linear(n_in, 4 * dim)
    with torch.no_grad():
        linear.bias[dim : 2 * dim] += 1
    return linear


def _step(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden state and cell (..., D) after gates (..., 4D)."""
    enter, forget, candidate, leave = gates.chunk(4, -1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
    return leave.sigmoid() * cell.tanh(), cell
