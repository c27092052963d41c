"""Networks that score pairs of a query and a class, without ever writing the pairs (Q, C, 2D) down."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaicl.checks import check_count
from metaicl.nets.norm import mixes_rows

_CONTRAST = 2.0  # of the start of a pair module, over torch's default: distances then tell a few classes apart at once
_SHARPNESS = 10.0  # of the start of a neural tensor layer, as that of cosines in `Similarity`
SLOW = 0.02
"""What matrices between embeddings are multiples of where they start in the right place, as the identity does."""
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


class PairConv(nn.Module):
    """A convolutional net on concatenated pairs (class, query) of feature maps with one output.

    Twice 3 x 3 convolution, norm, ReLU and 2 x 2 max-pooling, then an MLP. The first convolution is linear in the
    concatenation, as in `PairMLP`, so its two parts are computed once per class and once per query. Pairs need
    O(Q C F h w) numbers; without autograd only for some queries at a time, unless the norm mixes rows.

    A fresh module without norm is minus a random distance, largest where class and query coincide. The output has no
    bias: a constant common to all classes changes no softmax over them.

    Args:
        shape: (channels, h, w) of a map.
        filters: F of both convolutions; None takes the channels of the maps.
        hidden: Widths of the hidden layers of the MLP.
        norm: Makes a normalization layer for a number of channels; None leaves it out. The paper has batch norm, which
            mixes pairs; group norm would take from a pair by how much its members differ.

    Raises:
        ValueError: If the shape is not that of a map, or a width is below one.

    Reference:
        Sung et al. 2018, arXiv:1711.06025, figure 2. Differs: no norm unless asked for; odd sides are rounded up in
        pooling; a padding of one throughout.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        filters: int | None = None,
        hidden: Sequence[int] = (8,),
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        """Build the layers."""
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"shape must be (channels, h, w) of a feature map; got {tuple(shape)}")
        channels, height, width = shape
        filters = check_count("filters", channels if filters is None else filters)
        norm = _no_norm if norm is None else norm
        self.channels, self.first = channels, nn.Conv2d(2 * channels, filters, 3, padding=1)
        second = nn.Conv2d(filters, filters, 3, padding=1)
        layers = [norm(filters), *_pooled(), second, norm(filters), *_pooled(), nn.Flatten()]
        n_in = filters * (-(-height // 4)) * (-(-width // 4))
        for n_out in hidden:
            layers += [nn.Linear(n_in, check_count("hidden", n_out)), nn.ReLU()]
            n_in = n_out
        last = nn.Linear(n_in, 1, bias=False)
        self.rest = nn.Sequential(*layers, last)
        self._numbers = filters * height * width
        with torch.no_grad():
            of_class, of_query = self.first.weight.split(channels, 1)
            of_class *= _CONTRAST
            of_query.copy_(-of_class)
            last.weight.copy_(-last.weight.abs())
            for layer in (self.first, *self.rest):
                if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, classes: Tensor, queries: Tensor) -> Tensor:
        """Scores (B, Q, C) of classes (B, C, channels, h, w) and queries (B, Q, channels, h, w)."""
        of_class, of_query = self.first.weight.split(self.channels, 1)
        parts = []
        for maps, weight, bias in ((classes, of_class, self.first.bias), (queries, of_query, None)):
            convolved = F.conv2d(maps.flatten(0, 1), weight, bias, padding=1)
            parts.append(convolved.unflatten(0, maps.shape[:2]))
        here, asked = parts[0][:, None], parts[1]

        def score(some: Tensor) -> Tensor:
            pairs = here + some[:, :, None]  # (B, some, C, F, h, w)
            return self.rest(pairs.flatten(0, 2)).view(pairs.shape[:3])

        if mixes_rows(self.rest):
            return score(asked)
        return in_chunks(score, asked, classes.shape[0] * classes.shape[1] * self._numbers)


def _pooled() -> tuple[nn.Module, nn.Module]:
    return nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()  # in this order, the same for a quarter of the places


def _no_norm(channels: int) -> nn.Module:
    """What stands where a norm would."""
    return nn.Identity()


class NeuralTensor(nn.Module):
    """A neural tensor layer: w . ReLU(c' M^[1:h] q), h bilinear forms of a class c and a query q.

    Needs O(C h D) numbers for the classes and O(Q C h) for the pairs; the latter, without autograd, only for some
    queries at a time. The output has no bias: a constant common to all classes changes no softmax over them.

    Args:
        dim: D, the size of a row.
        n_slices: h.

    Reference:
        Socher et al. 2013, "Reasoning with neural tensor networks for knowledge base completion", equation 1, its
        bilinear part. The slices start as a partition of the identity plus noise, and w positive: a fresh layer is
        about 10 c'q / sqrt(D), and training starts from there. The slices are small multiples of what is trained: in
        steps of a common size, h D^2 numbers that start in the right place would be lost before an encoder has moved.
    """

    def __init__(self, dim: int, *, n_slices: int = 100) -> None:
        """Draw the slices."""
        super().__init__()
        n_slices = check_count("n_slices", n_slices)
        places = torch.arange(max(n_slices, dim))
        forms = 0.1 / dim * torch.randn(n_slices, dim, dim)
        forms[places % n_slices, places % dim, places % dim] += 1
        self.raw_slices = nn.Parameter(forms / SLOW)
        # Where there are more slices than features, places recur.
        size = _SHARPNESS * dim**-0.5 * min(1.0, dim / n_slices)
        self.weight = nn.Parameter(size * (1 + 0.1 * torch.randn(n_slices)))

    @property
    def slices(self) -> Tensor:
        """M (h, D, D)."""
        return SLOW * self.raw_slices

    def forward(self, classes: Tensor, queries: Tensor) -> Tensor:
        """Scores (B, Q, C) of classes (B, C, D) and queries (B, Q, D)."""
        slices = self.slices
        n_slices, dim = slices.shape[:2]
        projected = classes @ slices.transpose(0, 1).flatten(1)  # (B, C, h D)
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
