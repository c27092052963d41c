"""Meta-curvature: a learned linear map of each gradient, one small matrix per axis."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from metaicl.inner_loop.parameters import dotless


class Curvature(nn.Module):
    """A preconditioner that multiplies the gradient of each tensor by a learned matrix along each axis.

    A vector is scaled by element. A matrix (out, in) is multiplied from both sides, a convolution
    (out, in, height, width) along out, in and the places of its kernel together. All start as the identity. Give it to
    an `InnerOptimizer` as `precondition`; `bind` makes the matrices.

    Reference:
        Park & Oliva, 2019, arXiv:1902.03356, section 3.1 and equations 8 to 10.
    """

    def __init__(self) -> None:
        """Nothing to learn before `bind`."""
        super().__init__()
        self.factors = nn.ModuleDict()

    def bind(self, params: Mapping[str, Tensor]) -> Self:
        """A copy with identities for tensors of these shapes."""
        bound = type(self)()
        bound.factors = nn.ModuleDict({dotless(name): _factors(value) for name, value in params.items()})
        return bound

    def forward(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Transformed gradients, shapes as they came."""
        factors = {name: list(self.factors[dotless(name)]) for name in gradients}  # type: ignore[arg-type]  # a ParameterList
        return {name: _transform(gradient, factors[name]) for name, gradient in gradients.items()}


def _factors(value: Tensor) -> nn.ParameterList:
    like = {"dtype": value.dtype, "device": value.device}
    if value.ndim <= 1:
        return nn.ParameterList([nn.Parameter(torch.ones(value.shape, **like))])
    sizes = [value.shape[0], value.shape[1], value[0, 0].numel()][: min(value.ndim, 3)]
    return nn.ParameterList([nn.Parameter(torch.eye(size, **like)) for size in sizes])


def _transform(gradient: Tensor, factors: list[Tensor]) -> Tensor:
    if gradient.ndim <= 1:
        return factors[0] * gradient
    if gradient.ndim == 2:
        return factors[0] @ gradient @ factors[1].T
    along_out = torch.einsum("po,oif->pif", factors[0], gradient.flatten(2))
    along_in = torch.einsum("qi,pif->pqf", factors[1], along_out)
    return (along_in @ factors[2].T).view_as(gradient)
