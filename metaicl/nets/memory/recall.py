"""Memories as nets of one or two layers: what they recall, the gradients of one token, features of keys, and Muon."""

import math
from collections.abc import Callable
from itertools import combinations_with_replacement

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-6
_SCHULZ = (3.4445, -4.7750, 2.0315)


def recall(weights: tuple[Tensor, ...], keys: Tensor, *, norm: bool = False) -> Tensor:
    """What a memory answers to keys (..., n, K): (..., n, V).

    Args:
        weights: One matrix (..., V, K), or two (..., hidden, K) and (..., V, hidden) with a GELU between them.
        keys: What is asked.
        norm: The answer is the key plus the normalized output (V = K).
    """
    return recall_by(lambda layer, x: x @ weights[layer].mT, len(weights), keys, norm=norm)


def recall_by(apply: Callable[[int, Tensor], Tensor], n_layers: int, keys: Tensor, *, norm: bool) -> Tensor:
    """`recall` where `apply(layer, x)` stands for the product with the weights, which may differ between keys."""
    out = apply(0, keys)
    if n_layers == 2:
        out = apply(1, F.gelu(out))
    return keys + _standardize(out)[0] if norm else out


def factors(weights: tuple[Tensor, ...], keys: Tensor, values: Tensor, *, norm: bool) -> list[tuple[Tensor, Tensor]]:
    """The gradient of each token's loss, 1/2 |recall(k) - v|^2, for each layer as an outer product d a^T.

    Args:
        weights: As in `recall`.
        keys: (..., n, K).
        values: (..., n, V).
        norm: As in `recall`.

    Returns:
        For each layer d (..., n, out) and a (..., n, in).
    """
    first = keys @ weights[0].mT
    inner = F.gelu(first) if len(weights) == 2 else keys
    out = inner @ weights[1].mT if len(weights) == 2 else first
    if norm:
        scaled, scale = _standardize(out)
        error = keys + scaled - values
        error = error - error.mean(-1, keepdim=True) - scaled * (error * scaled).mean(-1, keepdim=True)
        error = error * scale
    else:
        error = out - values
    if len(weights) == 1:
        return [(error, keys)]
    return [(error @ weights[1] * _gelu_slope(first), keys), (error, inner)]


class PolynomialFeatures(nn.Module):
    """Features of rows (..., n, D) whose inner products are sum_{i=1}^degree (a . b)^i / i!.

    They are all monomials of degree 1 to `degree`, each scaled by the root of its multinomial coefficient.

    Args:
        size: D.
        degree: Highest degree.

    Reference:
        Behrouz et al. 2025, arXiv:2505.23735 (ATLAS), section 3.1, with Taylor coefficients of the exponential.
    """

    def __init__(self, size: int, degree: int) -> None:
        """List the monomials, as buffers: a compiled graph takes no tensors that are made while it is traced."""
        super().__init__()
        self.orders = range(2, degree + 1)
        for order in self.orders:
            places, ways = _monomials(size, order)
            self.register_buffer(f"places_{order}", places, persistent=False)
            self.register_buffer(f"ways_{order}", ways, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (..., n, `feature_count(size, degree)`)."""
        parts = [x]
        for order in self.orders:
            places, ways = self.get_buffer(f"places_{order}"), self.get_buffer(f"ways_{order}")
            monomials = x.index_select(-1, places[:, 0])
            for place in range(1, order):
                monomials = monomials * x.index_select(-1, places[:, place])
            parts.append(monomials * (ways.to(x) / math.factorial(order)).sqrt())
        return torch.cat(parts, -1)


def feature_count(size: int, degree: int) -> int:
    """How many features `PolynomialFeatures` makes of `size` numbers."""
    return math.comb(size + degree, degree) - 1


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of matrices (..., m, n) towards one by Newton-Schulz steps; zero stays zero.

    Five steps leave the singular values that are not tiny beside the largest within .68 to 1.13.

    Reference:
        Jordan et al. 2024, "Muon", with its quintic polynomial.
    """
    a, b, c = _SCHULZ
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    wide = wide * (wide.square().sum((-2, -1), keepdim=True) + _EPS**2).rsqrt()
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrix.shape[-2] <= matrix.shape[-1] else wide.mT


def _standardize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with mean 0 and variance 1, and the factor that made the variance so; written out for higher derivatives."""
    centered = x - x.mean(-1, keepdim=True)
    scale = (centered.square().mean(-1, keepdim=True) + _EPS).rsqrt()
    return centered * scale, scale


def _gelu_slope(x: Tensor) -> Tensor:
    density = (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


def _monomials(size: int, order: int) -> tuple[Tensor, Tensor]:
    """The coordinates of each monomial of this order, long (n, order), and in how many orders they stand, long (n,)."""
    index = list(combinations_with_replacement(range(size), order))
    ways = [math.factorial(order) // math.prod(math.factorial(one.count(i)) for i in set(one)) for one in index]
    return torch.tensor(index), torch.tensor(ways)
