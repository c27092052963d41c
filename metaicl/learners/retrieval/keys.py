"""What makes two groups of rows alike: fixed keys for the search, a learned encoder for the weights."""

import math

import torch
from torch import Tensor, nn

from metaicl.functional import masked_mean, raw_features, unit_rows
from metaicl.nets.backbones import MLP
from metaicl.spec import TaskSpec

_FREQUENCIES = 256


def search_keys(spec: TaskSpec, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
    """Fixed unit keys (..., K) of groups of rows; their inner product is the similarity.

    Classification: the mean of the rows' raw features. Regression: the kernel mean embedding of the joint rows
    (x, y) in random Fourier features, which tells apart any two distributions of rows.

    Args:
        spec: The tasks.
        x: (..., N, *x_shape).
        y: (..., N, y_dim) for regression; not read for classification.
        real: bool (..., N), the rows of the group; may have more leading axes than x.

    Reference:
        Gretton et al. 2012, "A kernel two-sample test", section 2.2; Rahimi & Recht, 2007, for the features.
    """
    features = _flat_rows(spec, x)
    if spec.kind == "regression":
        features = _fourier(torch.cat([features, y], -1))
    weights = real.to(features.dtype)
    total = (weights[..., None, :] @ features)[..., 0, :]
    return unit_rows(total / weights.sum(-1, keepdim=True).clamp(min=1))


class GroupEncoder(nn.Module):
    """A learned summary of a group of rows: the mean of an encoder over them.

    Args:
        spec: The tasks.
        encoder: (rows, raw features [+ y_dim for regression]) -> (rows, D); None builds an MLP of width 64.
    """

    def __init__(self, spec: TaskSpec, *, encoder: nn.Module | None = None) -> None:
        """Build the encoder where none is given."""
        super().__init__()
        self.spec = spec
        size = 1024 if spec.x_kind == "tokens" else math.prod(spec.x_shape)
        size += spec.output_size if spec.kind == "regression" else 0
        self.encoder = MLP((size, 64, 64)) if encoder is None else encoder

    def forward(self, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
        """Summaries (..., D) of groups x (..., N, *x_shape), y (..., N, y_dim) and real (..., N)."""
        features = _flat_rows(self.spec, x)
        if self.spec.kind == "regression":
            features = torch.cat([features, y], -1)
        features = features.to(next((p.dtype for p in self.encoder.parameters()), features.dtype))  # tokens have none
        codes = self.encoder(features.flatten(0, -2)).unflatten(0, features.shape[:-1])
        return masked_mean(codes.expand(*real.shape, codes.shape[-1]), real, real.ndim - 1)


def _flat_rows(spec: TaskSpec, x: Tensor) -> Tensor:
    leading = x.shape[: x.ndim - len(spec.x_shape)]
    return raw_features(x.reshape(-1, *leading[-1:], *spec.x_shape), spec).reshape(*leading, -1)


def _fourier(rows: Tensor) -> Tensor:
    """Random Fourier features of the kernel exp(-|a - b|^2 / 2), the same on every call."""
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.randn(rows.shape[-1], _FREQUENCIES, generator=generator).to(rows)
    phases = (2 * math.pi * torch.rand(_FREQUENCIES, generator=generator)).to(rows)
    return torch.cos(rows @ frequencies + phases)
