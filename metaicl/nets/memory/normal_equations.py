"""Gated least squares for any gate: the normal equations of every token, solved one by one in double precision.

With a gate the covariance of the keys is A_t = gamma_t A_{t-1} + k_t k_t^T. Its sums have decays at most one, so that
nothing overflows however fast the past fades, and errors in A fade with it. (Its inverse grows as the past fades.)

The regularizer fades too. Where keys leave a direction alone it soon falls below rounding, and A is singular to the
dtype. A multiple of the identity as small as the rounding of the keys is added to A before it is solved with: answers
stay finite, and well-conditioned problems do not notice.
"""

import torch
from torch import Tensor

from metaicl.nets.memory.delta import decay_between


def precision_of(inverse: Tensor) -> Tensor:
    """A (..., K, K) in float64 from its inverse."""
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(inverse.double()).L)


def inverse_of(precision: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of A (..., K, K), symmetric, with its condition held to what stays positive definite in `dtype`."""
    factor = _factor(precision, torch.finfo(dtype).eps, torch.finfo(dtype).tiny)
    inverse = torch.cholesky_inverse(factor)
    return ((inverse + inverse.mT) / 2).to(dtype)


def write_by_normal_equations(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor], weights: Tensor, precision: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Write a chunk of tokens and read each one.

    As Phi_0 is the least-squares map of the tokens before, Phi_t - Phi_0 is that of the residuals within the chunk:
    Phi_t q_t = Phi_0 q_t + sum_{i <= t} gamma_{i+1} ... gamma_t (v_i - Phi_0 k_i) k_i^T A_t^-1 q_t.

    Args:
        tokens: Queries (..., n, K), keys (..., n, K), values (..., n, V) and logarithms of gates (..., n).
        weights: Phi_0 (..., V, K).
        precision: A_0 (..., K, K), in float64.

    Returns:
        Reads (..., n, V), Phi_n and A_n.
    """
    dtype = weights.dtype
    query, key, value, log_gate = (one.double() for one in tokens)
    size, since = key.shape[-1], log_gate.cumsum(-1)
    left = decay_between(since)
    pairs = (key[..., :, None] * key[..., None, :]).flatten(-2)
    within = (left @ pairs).unflatten(-1, (size, size))
    precisions = since.exp()[..., None, None] * precision[..., None, :, :] + within  # (..., n, K, K)
    precisions = (precisions + precisions.mT) / 2
    # keys of dtype are off by eps, which puts eps^2 of their squares where exact keys would have nothing
    smallest = max(torch.finfo(dtype).eps ** 1.5, torch.finfo(torch.float64).eps)
    factors = _factor(precisions, smallest, torch.finfo(dtype).tiny)
    asked = torch.cholesky_solve(query[..., None], factors)[..., 0]
    residual = value - key @ weights.double().mT
    reads = query @ weights.double().mT + (left * (asked @ key.mT)) @ residual
    gain = torch.cholesky_solve(key.mT, factors[..., -1, :, :])  # (..., K, n)
    change = (left[..., -1, :, None] * residual).mT @ gain.mT
    return reads.to(dtype), (weights.double() + change).to(dtype), precisions[..., -1, :, :]


def _factor(precision: Tensor, smallest: float, tiny: float) -> Tensor:
    """The Cholesky factor of A + c I, with c relative to the trace of A."""
    size = precision.shape[-1]
    floor = (4 * size * smallest * precision.diagonal(dim1=-2, dim2=-1).sum(-1)).clamp(min=tiny)
    eye = torch.eye(size, dtype=precision.dtype, device=precision.device)
    return torch.linalg.cholesky_ex(precision + floor[..., None, None] * eye).L
