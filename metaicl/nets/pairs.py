"""Networks that score pairs of a query and a class, without ever writing the pairs (Q, C, 2D) down."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from metaicl.checks import check_count

_CONTRAST = 2.0  # of the start of a pair module, over torch's default: distances then tell a few classes apart at once
_PAIR_NUMBERS = 2**22  # hidden numbers of pairs worked on at a time: 16 MiB in float32


class PairMLP(nn.Module):
    """An MLP on concatenated pairs (class, query) with one output.

    The first layer is linear in the concatenation, W [c; q] + b = (W_c c + b) + W_q q: its two parts are computed once
    per class and once per query, and added for each pair. That is the same function as on the concatenation.
    Hidden layers need O(Q C H) numbers; without autograd only for some queries at a time.

    The last layer has no bias: a constant common to all classes changes no softmax over them.

    A fresh module is minus a random distance, largest where class and query coincide: the first layer starts as
    W [c; q] = V (c - q), hidden biases at zero, the last layer negative. From torch's default start the module has to
    find out first that it is to compare.

    Args:
        dim: D, the size of a row.
        hidden: Widths H of the hidden layers, at least one.

    Raises:
        ValueError: If there is no hidden layer, or one of no width.
    """

    def __init__(self, dim: int, *, hidden: Sequence[int] = (128,)) -> None:
        """Build the layers."""
        super().__init__()
        if not hidden:
            raise ValueError("hidden must name at least one layer's width; got none")
        widths = [check_count("hidden", width) for width in hidden]
        self.dim, self.first = dim, nn.Linear(2 * dim, widths[0])
        layers: list[nn.Module] = [nn.ReLU()]
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        last = nn.Linear(widths[-1], 1, bias=False)
        self.rest = nn.Sequential(*layers, last)
        self._width = max(widths)
        with torch.no_grad():
            of_class, of_query = self.first.weight.split(dim, 1)
            of_class *= _CONTRAST
            of_query.copy_(-of_class)
            last.weight.copy_(-last.weight.abs())
        for module in (self.first, *self.rest):
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, classes: Tensor, queries: Tensor) -> Tensor:
        """Scores (B, Q, C) of classes (B, C, D) and queries (B, Q, D)."""
        of_class, of_query = self.first.weight.split(self.dim, 1)
        classes = (classes @ of_class.mT + self.first.bias)[:, None]

        def score(rows: Tensor) -> Tensor:
            return self.rest(classes + rows[:, :, None]).squeeze(-1)

        return in_chunks(score, queries @ of_query.mT, classes.shape[0] * classes.shape[2] * self._width)


class NeuralTensor(nn.Module):
    """A neural tensor layer: w . ReLU(c' M^[1:h] q), h bilinear forms of a class c and a query q.

    Needs O(C h D) numbers for the classes and O(Q C h) for the pairs; the latter, without autograd, only for some
    queries at a time. The output has no bias: a constant common to all classes changes no softmax over them.

    Args:
        dim: D, the size of a row.
        n_slices: h.

    Reference:
        Socher et al. 2013, "Reasoning with neural tensor networks for knowledge base completion", equation 1, its
        bilinear part. A slice starts as u u' + noise for a random u, and w starts positive: a fresh layer finds a
        query more like a class the more random projections of the two agree, and training starts from there.
    """

    def __init__(self, dim: int, *, n_slices: int = 100) -> None:
        """Draw the slices."""
        super().__init__()
        n_slices = check_count("n_slices", n_slices)
        directions = torch.randn(n_slices, dim)
        noise = torch.randn(n_slices, dim, dim)
        self.slices = nn.Parameter((directions[:, :, None] * directions[:, None] + 0.1 * noise) / dim**0.5)
        self.weight = nn.Parameter((1 + 0.1 * torch.randn(n_slices)) / n_slices)

    def forward(self, classes: Tensor, queries: Tensor) -> Tensor:
        """Scores (B, Q, C) of classes (B, C, D) and queries (B, Q, D)."""
        n_slices, dim = self.slices.shape[:2]
        projected = classes @ self.slices.transpose(0, 1).flatten(1)  # (B, C, h D)
        projected = projected.unflatten(-1, (n_slices, dim)).flatten(1, 2).mT  # (B, D, C h)

        def score(rows: Tensor) -> Tensor:
            return (rows @ projected).unflatten(-1, (-1, n_slices)).relu() @ self.weight

        return in_chunks(score, queries, projected.shape[0] * projected.shape[2])


def in_chunks(score: Callable[[Tensor], Tensor], queries: Tensor, numbers_per_query: int) -> Tensor:
    """`score` of rows (B, Q, ...), some at a time, so that what it holds in between stays within 16 MiB or one query.

    Args:
        score: Rows (B, some, ...) to scores (B, some, C), each row by itself.
        queries: (B, Q, ...).
        numbers_per_query: What `score` holds for one query of each task, in numbers.
    """
    size = max(1, _PAIR_NUMBERS // max(1, numbers_per_query))
    if size >= queries.shape[1]:
        return score(queries)
    return torch.cat([score(rows) for rows in queries.split(size, 1)], 1)
