"""What a probe may look for: quantities of the rows before each position of a stream, or secrets of the sampler.

Every target is a function (stream, latents) -> (B, T, P), float64: position t is about the rows 0 .. t - 1, and x_t.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from metaicl.checks import check_positive
from metaicl.episode import Examples

Target = Callable[[Examples, Mapping[str, Tensor]], Tensor]


def moment(stream: Examples, latents: Mapping[str, Tensor]) -> Tensor:
    """The moment vector sum_{i < t} x_i y_i^T, flattened: (B, T, D y_dim)."""
    _, cross = _moments(stream)
    return cross.flatten(2)


def least_squares_weights(stream: Examples, latents: Mapping[str, Tensor]) -> Tensor:
    """Weights of the least-squares fit of smallest norm to the rows before t: (B, T, D y_dim)."""
    gram, cross = _moments(stream)
    return (torch.linalg.pinv(gram, rtol=1e-10, hermitian=True) @ cross).flatten(2)


def ridge_weights(penalty: float) -> Target:
    """Weights of the ridge fit to the rows before t, as a target."""
    return partial(_ridge_weights, penalty=check_positive("penalty", penalty))


def true_weights(stream: Examples, latents: Mapping[str, Tensor]) -> Tensor:
    """The sampler's own weights, the same at every position: (B, T, D y_dim)."""
    if "weights" not in latents:
        raise ValueError(f"true_weights needs episodes with latents['weights']; these have {sorted(latents)}")
    weights = latents["weights"].double().flatten(1)
    return weights[:, None].expand(-1, stream.n_rows, -1)


def own_target(stream: Examples, latents: Mapping[str, Tensor]) -> Tensor:
    """y_t itself: (B, T, y_dim)."""
    return stream.y.double()


def last_target(stream: Examples, latents: Mapping[str, Tensor]) -> Tensor:
    """y_{t-1}, zero at t = 0: (B, T, y_dim); what copying from the row before would give."""
    y = stream.y.double()
    return torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)


def preconditioned_input(penalty: float) -> Target:
    """(S_t S_t^T + penalty I)^-1 x_t with S_t the inputs before t, as a target (B, T, D).

    Reference:
        von Oswald et al. 2023, arXiv:2309.05858, proposition 2 (there penalty = 1 / lambda).
    """
    return partial(_preconditioned_input, penalty=check_positive("penalty", penalty))


def _ridge_weights(stream: Examples, latents: Mapping[str, Tensor], *, penalty: float) -> Tensor:
    gram, cross = _moments(stream)
    return torch.linalg.solve(_plus(gram, penalty), cross).flatten(2)


def _preconditioned_input(stream: Examples, latents: Mapping[str, Tensor], *, penalty: float) -> Tensor:
    gram, _ = _moments(stream)
    return torch.linalg.solve(_plus(gram, penalty), stream.x.double().flatten(2)[..., None])[..., 0]


def _moments(stream: Examples) -> tuple[Tensor, Tensor]:
    """X'X (B, T, D, D) and X'y (B, T, D, y_dim) of the rows before each position."""
    if not stream.y.is_floating_point():
        raise ValueError("targets made of moments are for regression; got class labels")
    x, y = stream.x.double().flatten(2), stream.y.double()
    gram = (x[..., None] * x[..., None, :]).cumsum(1)
    cross = (x[..., None] * y[..., None, :]).cumsum(1)
    return _shifted(gram), _shifted(cross)


def _shifted(sums: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], 1)


def _plus(gram: Tensor, penalty: float) -> Tensor:
    return gram + penalty * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
