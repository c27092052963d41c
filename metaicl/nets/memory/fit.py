"""A least-squares fit of the mesa memory, and how a token, or a chunk of them, is written into it."""

from typing import NamedTuple

import torch
from torch import Tensor


class Fit(NamedTuple):
    """A least-squares fit.

    Attributes:
        weights: Phi (..., V, K).
        inverse: R (..., K, K), symmetric and positive definite.
    """

    weights: Tensor
    inverse: Tensor


def write_chunk(queries: Tensor, keys: Tensor, values: Tensor, decay: Tensor, fit: Fit) -> tuple[Tensor, Fit]:
    """Tokens (..., n, size) with logarithms of gates (..., n): reads (..., n, V) and the fit after them."""
    since = decay.cumsum(-1)
    rise = (-0.5 * since).exp()[..., None]
    keys, values = rise * keys, rise * values
    reach = fit.inverse @ keys.mT  # (..., K, n)
    gram = keys @ reach + torch.eye(keys.shape[-2], dtype=keys.dtype, device=keys.device)
    factor = torch.linalg.cholesky_ex(gram).L
    residual = torch.linalg.solve_triangular(factor, values - keys @ fit.weights.mT, upper=False)
    gain = torch.linalg.solve_triangular(factor, reach.mT, upper=False)  # (..., n, K)
    reads = queries @ fit.weights.mT + (queries @ gain.mT).tril() @ residual
    inverse = (fit.inverse - gain.mT @ gain) * (-since[..., -1, None, None]).exp()
    return reads, Fit(fit.weights + residual.mT @ gain, symmetric(inverse))


def write_token(fit: Fit, key: Tensor, value: Tensor, gate: Tensor | None) -> Fit:
    """One token, key (..., K) and value (..., V), with gamma (...).

    R is made symmetric each time: what rounding adds on one side only would grow as 1 / gamma^t, whatever the keys.
    """
    prior = fit.inverse if gate is None else fit.inverse / gate[..., None, None]
    reach = (prior @ key[..., None])[..., 0]
    gain = reach / (1 + (key * reach).sum(-1, keepdim=True))
    error = value - (fit.weights @ key[..., None])[..., 0]
    weights = fit.weights + error[..., :, None] * gain[..., None, :]
    return Fit(weights, symmetric(prior - reach[..., :, None] * gain[..., None, :]))


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part of a matrix."""
    return (matrix + matrix.mT) / 2


def unless_unread(inverse: Tensor, start: Tensor, keys: Tensor, gates: Tensor) -> Tensor:
    """R after tokens in the dtype it had before, and exactly what it was where no token has a key or a gate."""
    changed = (gates != 0).any(-1) | (keys != 0).flatten(-2).any(-1)
    return torch.where(changed[..., None, None], inverse.to(start), start)
