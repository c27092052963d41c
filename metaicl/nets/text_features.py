"""Text features that need no download: counted on meta-training texts, or computed by a function of your own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metaicl.checks import check_count, check_positive
from metaicl.functional import unit_rows

_POWER_STEPS, _SPARE = 4, 20  # of the randomized factorization


class FrozenFeatures(nn.Module):
    """Any function of rows as an encoder without trained parameters.

    The function is no part of checkpoints: who loads one gives the function again. If it is a module, it is kept in
    evaluation mode and moves to other devices with the encoder, but its parameters are not the encoder's.

    Args:
        function: (rows, *x_shape) -> (rows, D), numbers of any floating dtype; a tensor or an array.
        dim: D.

    Raises:
        TypeError: If `function` cannot be called.
    """

    def __init__(self, function: Callable[[Tensor], Any], dim: int) -> None:
        """Keep the function out of reach of parameters() and state_dict()."""
        super().__init__()
        if not callable(function):
            raise TypeError(f"function must be callable, (rows, *x_shape) -> (rows, D); got {function!r}")
        self.dim = check_count("dim", dim)
        self._held = (function.eval() if isinstance(function, nn.Module) else function,)  # in a tuple: not a child

    def forward(self, x: Tensor) -> Tensor:
        """Features (rows, D) of x (rows, *x_shape), in the default dtype where they are not floating point.

        Raises:
            ValueError: If the function gives something else.
        """
        with torch.no_grad():
            features = torch.as_tensor(self._held[0](x), device=x.device)
        if features.shape != (x.shape[0], self.dim):
            raise ValueError(f"function must give (rows, D) = {(x.shape[0], self.dim)}; got {tuple(features.shape)}")
        return features if features.is_floating_point() else features.to(torch.get_default_dtype())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenFeatures":
        for function in self._held:
            if isinstance(function, nn.Module):
                function._apply(fn)
        return super()._apply(fn, recurse)


class TfIdf(nn.Module):
    """Unit-length TF-IDF vectors (rows, vocabulary) of texts; nothing to train.

    Args:
        documents: Token ids (documents, T), 0 = padding, that document frequencies are counted on: those of
            meta-training classes and no others.
        vocabulary: Number of token ids.
    """

    def __init__(self, documents: Tensor, vocabulary: int) -> None:
        """Count documents per token."""
        super().__init__()
        self.idf: Tensor
        self.register_buffer("idf", inverse_document_frequencies(documents, vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors (rows, vocabulary) of token ids (rows, T); an empty text is the origin."""
        weights = self.idf[tokens] * (tokens != 0)
        return unit_rows(weights.new_zeros(len(tokens), len(self.idf)).scatter_add(1, tokens, weights))


def document_frequencies(documents: Tensor, vocabulary: int) -> Tensor:
    """Documents (documents, T) that hold each token, float (vocabulary,); 0 for padding."""
    document, place = documents.nonzero(as_tuple=True)
    pairs = torch.unique(document * vocabulary + documents[document, place].long())
    return torch.bincount(pairs % vocabulary, minlength=vocabulary).to(torch.get_default_dtype())


def inverse_document_frequencies(documents: Tensor, vocabulary: int) -> Tensor:
    """log((1 + documents) / (1 + documents with the token)) + 1, (vocabulary,): least for tokens of all documents."""
    return ((1 + len(documents)) / (1 + document_frequencies(documents, vocabulary))).log() + 1


def smooth_inverse_frequencies(documents: Tensor, vocabulary: int, *, smoothing: float = 1e-3) -> Tensor:
    """Importances a / (a + p(token)), (vocabulary,), in (0, 1]; p is the token's share of all (document, token) pairs.

    Args:
        documents: Token ids (documents, T), 0 = padding.
        vocabulary: Number of token ids.
        smoothing: a.

    Reference:
        Arora, Liang & Ma, 2017, "A simple but tough-to-beat baseline for sentence embeddings", section 3. Differs:
        a token counts once per document.
    """
    found = document_frequencies(documents, vocabulary)
    smoothing = check_positive("smoothing", smoothing)
    return smoothing / (smoothing + found / found.sum().clamp(min=1))


def cooccurrence_vectors(documents: Tensor, vocabulary: int, *, dim: int = 100, smoothing: float = 0.75) -> Tensor:
    """Token vectors (vocabulary, D) such that tokens met in the same company are close; unseen tokens are the origin.

    The factors of the positive pointwise mutual information of tokens of the same document,

        PPMI_ij = max(0, log p(i, j) / (p(i) q(j))),    q(j) ~ p(j)^smoothing,

    U S^(1/2) of its leading singular values, scaled to unit mean square over the seen tokens.

    Args:
        documents: Token ids (documents, T), 0 = padding; of meta-training classes and no others.
        vocabulary: Number of token ids.
        dim: D; there must be more token ids than that.
        smoothing: Of the context distribution.

    Raises:
        ValueError: If `dim` is not below `vocabulary`.

    Reference:
        Levy, Goldberg & Dagan, 2015, "Improving distributional similarity with lessons learned from word embeddings",
        equations 3 and 7 and section 3.3 (eigenvalue weighting 1/2). Differs: the window is the document. The
        factorization is that of Halko, Martinsson & Tropp, 2011, arXiv:0909.4061, algorithm 4.4, from a fixed seed.
    """
    if check_count("dim", dim) >= check_count("vocabulary", vocabulary, minimum=2):
        raise ValueError(f"dim must be below the {vocabulary} token ids; got {dim}")
    seen, renamed = torch.unique(documents, return_inverse=True)  # work on these alone; padding is the first
    if not seen.numel() or seen[0] != 0:
        seen, renamed = torch.cat([seen.new_zeros(1), seen]), renamed + 1
    left, values = _leading_factors(_positive_information(renamed, len(seen), smoothing), dim)
    found = left * values.sqrt() * (seen != 0)[:, None]
    found = found * (found.square().sum() / max((len(seen) - 1) * dim, 1) + 1e-12).rsqrt()
    vectors = found.new_zeros(vocabulary, dim)
    vectors[seen.long(), : found.shape[1]] = found
    return vectors


def _positive_information(documents: Tensor, vocabulary: int, smoothing: float) -> Tensor:
    """The sparse matrix PPMI (vocabulary, vocabulary) of pairs of different tokens."""
    codes = [documents.new_zeros(0, dtype=torch.long)]  # documents of one token have no pairs
    for distance in range(1, documents.shape[1]):
        one, other = documents[:, :-distance].long(), documents[:, distance:].long()
        kept = (one != 0) & (other != 0) & (one != other)
        codes += [one[kept] * vocabulary + other[kept], other[kept] * vocabulary + one[kept]]
    code, counts = torch.unique(torch.cat(codes), return_counts=True)
    row, column, counts = code // vocabulary, code % vocabulary, counts.to(torch.get_default_dtype())
    total = counts.new_zeros(vocabulary).index_add(0, row, counts)
    context = total**smoothing
    share, context = total / total.sum().clamp(min=1), context / context.sum().clamp(min=1)
    information = (counts / counts.sum().clamp(min=1) / (share[row] * context[column])).log()
    kept = information > 0
    places = torch.stack([row[kept], column[kept]])
    return torch.sparse_coo_tensor(
        places, information[kept], (vocabulary, vocabulary), is_coalesced=True, check_invariants=True
    )


def _leading_factors(matrix: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Left singular vectors (n, dim) and singular values (dim,) of a sparse square matrix, by subspace iteration."""
    size = min(dim + _SPARE, matrix.shape[0])
    transposed = matrix.t().coalesce()
    basis = torch.randn(matrix.shape[0], size, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(torch.sparse.mm(matrix, torch.sparse.mm(transposed, basis)))[0]
    image = torch.sparse.mm(transposed, basis)  # matrix ~ basis @ image.mT
    squares, small = torch.linalg.eigh(image.mT @ image)  # ascending
    left = basis @ small.flip(1)
    return left[:, :dim], squares.flip(0).clamp(min=0).sqrt()[:dim]
