"""What makes two groups of rows alike: fixed keys for the search, a learned encoder for the weights."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metaicl.functional import masked_mean, raw_features, unit_rows
from metaicl.learners.retrieval.bank import Found, MemoryBank
from metaicl.learners.retrieval.content import arbitrary_keys, content_ids
from metaicl.learners.retrieval.exclusion import Exclusion
from metaicl.learners.retrieval.retriever import Oracle
from metaicl.learners.retrieval.words import (
    SKETCH,
    bag_values,
    bags,
    exact_numbers,
    search_bags,
    sketches,
    unit_weights,
    word_weights,
)
from metaicl.nets.backbones import MLP
from metaicl.spec import TaskSpec

_FREQUENCIES = 256


class SearchKeys(nn.Module):
    """Fixed unit keys (..., K) of groups of rows; their inner product is the similarity. Nothing here is trained.

    Classification: the mean of the rows' raw features; for texts, of their unit word counts, beyond 1,024 words as a
    sketch of that size, see `Retriever`. Many texts are equally alike, and rounding must not say which is found: their
    numbers are multiples of 2**-12. Regression: the kernel mean embedding of the joint rows
    (x, y) in random Fourier features of a Gaussian kernel of width one, which tells any two distributions apart;
    words share 1,024 places there.

    Args:
        spec: The tasks.

    Reference:
        Gretton et al. 2012, "A kernel two-sample test", section 2.2; Rahimi & Recht, 2007, for the features.
    """

    def __init__(self, spec: TaskSpec) -> None:
        """Draw the features, the same ones every time."""
        super().__init__()
        self.spec = spec
        self.frequencies: Tensor
        self.phases: Tensor
        generator = torch.Generator().manual_seed(0)
        frequencies = torch.randn(_row_size(spec), _FREQUENCIES, generator=generator)
        phases = 2 * math.pi * torch.rand(_FREQUENCIES, generator=generator)
        self.register_buffer("frequencies", frequencies)
        self.register_buffer("phases", phases)

    def forward(self, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
        """Keys of groups x (..., N, *x_shape), y (..., N, y_dim) and real (..., N), which may have more leading axes.

        For classification y is not read.
        """
        if self.spec.vocabulary is not None and self.spec.kind == "classification":
            return exact_numbers(sketches(*self._words(x, real), self.spec.vocabulary))
        features = _flat_rows(self.spec, x)
        if self.spec.kind == "regression":
            features = torch.cos(torch.cat([features, y], -1) @ self.frequencies + self.phases)
        weights = real.to(features.dtype)
        total = (weights[..., None, :] @ features)[..., 0, :]
        return unit_rows(total / weights.sum(-1, keepdim=True).clamp(min=1))

    def values(self, x: Tensor) -> Mapping[str, Tensor]:
        """What a bank has to hold beside the keys of groups x (M, R, *x_shape), so that `search` can rank by words."""
        if not self._are_sketches:
            return {}
        values = bag_values(x, self._importance())
        return {**values, "word_weights": exact_numbers(values["word_weights"])}

    def search(
        self, bank: MemoryBank, queries: Tensor, x: Tensor, real: Tensor, k: int, *, exclude: Exclusion
    ) -> Found:
        """The k items of a bank that are most like the groups with rows x, `real` and keys `queries` (..., G, K)."""
        if not self._are_sketches:
            return bank.search(queries, k, exclude=exclude)
        words, weights = self._words(x, real)
        whole = exact_numbers(bags(words, unit_weights(words, weights), self.spec.vocabulary or 0))
        return search_bags(bank, queries, whole, k, exclude=exclude)

    @property
    def _are_sketches(self) -> bool:
        return self.spec.kind == "classification" and (self.spec.vocabulary or 0) > SKETCH

    def _importance(self) -> Tensor:
        return self.frequencies.new_ones(self.spec.vocabulary or 0)

    def _words(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Words (..., N T) of groups, and their weights."""
        weights = word_weights(x, self._importance(), real)
        return x.expand(weights.shape).flatten(-2).contiguous(), weights.flatten(-2)


class GivenKeys(nn.Module):
    """Keys that alone decide what is found."""

    def values(self, x: Tensor) -> Mapping[str, Tensor]:
        """Nothing beside them."""
        return {}

    def search(
        self, bank: MemoryBank, queries: Tensor, x: Tensor, real: Tensor, k: int, *, exclude: Exclusion
    ) -> Found:
        """The k items of a bank for these keys."""
        return bank.search(queries, k, exclude=exclude)


class OracleKeys(GivenKeys):
    """Unit keys (..., K) of groups of rows: the mean of codes that a function gives for their inputs.

    Args:
        function: See `Oracle`.
    """

    def __init__(self, function: Oracle) -> None:
        """Keep the function."""
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
        """Keys of groups x (..., N, *x_shape) and real (..., N), which may have more leading axes; y is not read."""
        codes = self.function(x).to(y.dtype)
        return unit_rows(masked_mean(codes.expand(*real.shape, codes.shape[-1]), real, real.ndim - 1))


class RandomKeys(GivenKeys):
    """Unit keys (..., K) of groups of rows that say nothing about them, but are the same for the same group.

    A search with them retrieves at random without a random state: the control of every claim about retrieval.

    Args:
        spec: The tasks.
    """

    def __init__(self, spec: TaskSpec) -> None:
        """Keep the spec."""
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
        """Keys of groups x (..., N, *x_shape) and real (..., N), which may have more leading axes; y is not read."""
        group = (content_ids(x, self.spec) * real).sum(-1)  # the order of the rows and absent rows change nothing
        return arbitrary_keys(group, y.dtype)


class GroupEncoder(nn.Module):
    """A learned summary of a group of rows: the mean of an encoder over them.

    Args:
        spec: The tasks.
        encoder: (rows, raw features [+ y_dim for regression]) -> (rows, D); None builds an MLP of width 64. The raw
            features of a text are word counts in 1,024 places, which the words of a larger vocabulary share.
    """

    def __init__(self, spec: TaskSpec, *, encoder: nn.Module | None = None) -> None:
        """Build the encoder where none is given."""
        super().__init__()
        self.spec = spec
        self.encoder = MLP((_row_size(spec), 64, 64)) if encoder is None else encoder

    def forward(self, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
        """Summaries (..., D) of groups x (..., N, *x_shape), y (..., N, y_dim) and real (..., N)."""
        features = _flat_rows(self.spec, x)
        if self.spec.kind == "regression":
            features = torch.cat([features, y], -1)
        features = features.to(next((p.dtype for p in self.encoder.parameters()), features.dtype))  # tokens have none
        codes = self.encoder(features.flatten(0, -2)).unflatten(0, features.shape[:-1])
        return masked_mean(codes.expand(*real.shape, codes.shape[-1]), real, real.ndim - 1)


def search_keys(spec: TaskSpec, retriever: str, oracle: Oracle | None) -> SearchKeys | OracleKeys | RandomKeys:
    """What the fixed search of a retriever compares; the true classes of an oracle without a function need no keys."""
    if oracle is not None:
        return OracleKeys(oracle)
    return RandomKeys(spec) if retriever in ("random", "oracle") else SearchKeys(spec)


def _row_size(spec: TaskSpec) -> int:
    """Numbers in a row: raw features, and targets for regression."""
    size = 1024 if spec.x_kind == "tokens" else math.prod(spec.x_shape)
    return size + (spec.output_size if spec.kind == "regression" else 0)


def _flat_rows(spec: TaskSpec, x: Tensor) -> Tensor:
    leading = x.shape[: x.ndim - len(spec.x_shape)]
    features = raw_features(x.reshape(1, -1, *spec.x_shape), spec)
    return features.reshape(*leading, features.shape[-1])
