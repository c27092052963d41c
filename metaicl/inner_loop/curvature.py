"""Learned linear maps of gradients, made of small matrices: meta-curvature and Kronecker factors."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from metaicl.inner_loop.parameters import dotless
from metaicl.inner_loop.rates import not_bound


class GradientMap(nn.Module, ABC):
    """A preconditioner with learned matrices for each tensor. It starts as the identity.

    Give it to an `InnerOptimizer` as `precondition`; `bind` makes the matrices. A subclass writes `start` and
    `transform`.
    """

    def __init__(self) -> None:
        """Nothing to learn before `bind`."""
        super().__init__()
        self.factors = nn.ModuleDict()

    @abstractmethod
    def start(self, value: Tensor) -> list[Tensor]:
        """Factors of the identity for a tensor of this shape, dtype and device."""

    @abstractmethod
    def transform(self, gradient: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """The gradient of one tensor, mapped by its factors; shape as it came."""

    def bind(self, params: Mapping[str, Tensor]) -> Self:
        """A copy with identities for tensors of these shapes."""
        bound = copy.deepcopy(self)
        starts = {dotless(name): self.start(value.detach()) for name, value in params.items()}
        bound.factors = nn.ModuleDict({name: nn.ParameterList(factors) for name, factors in starts.items()})
        return bound

    def forward(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Transformed gradients, shapes as they came.

        Raises:
            RuntimeError: If `bind` was not called, or for tensors of other names.
        """
        for name in gradients:
            if dotless(name) not in self.factors:
                raise not_bound("matrices", name, [key[1:].replace("/", ".") for key in self.factors])
        factors = {name: list(self.factors[dotless(name)]) for name in gradients}  # type: ignore[arg-type]  # a ParameterList
        return {name: self.transform(gradient, factors[name]) for name, gradient in gradients.items()}


class Curvature(GradientMap):
    """A preconditioner that multiplies the gradient of each tensor by a learned matrix along each axis.

    A vector is scaled by element. A matrix (out, in) is multiplied from both sides, a convolution
    (out, in, height, width) along out, in and the places of its kernel together. All start as the identity. Give it to
    an `InnerOptimizer` as `precondition`; `bind` makes the matrices.

    Reference:
        Park & Oliva, 2019, arXiv:1902.03356, section 3.1 and equations 8 to 10.
    """

    def start(self, value: Tensor) -> list[Tensor]:
        """Ones for a vector, else a matrix for each axis."""
        if value.ndim <= 1:
            return [torch.ones_like(value)]
        sizes = [value.shape[0], value.shape[1], value[0, 0].numel()][: min(value.ndim, 3)]
        return [_identity(size, value) for size in sizes]

    def transform(self, gradient: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """The gradient of one tensor, multiplied along each axis."""
        if gradient.ndim <= 1:
            return factors[0] * gradient
        if gradient.ndim == 2:
            return factors[0] @ gradient @ factors[1].T
        along_out = torch.einsum("po,oif->pif", factors[0], gradient.flatten(2))
        along_in = torch.einsum("qi,pif->pqf", factors[1], along_out)
        return (along_in @ factors[2].T).view_as(gradient)


class Kronecker(GradientMap):
    """A preconditioner that maps the gradient of each tensor by one Kronecker product, positive semi-definite.

    A gradient G (n, m) becomes L'L G R'R with learned L (n, n) and R (m, m). A matrix is taken as it is, a vector as
    (n, 1), so that its elements are mixed too; the filters of a convolution (out, in, height, width) share one map of
    (in, height * width). All start as the identity. Give it to an `InnerOptimizer` as `precondition`; `bind` makes the
    matrices.

    Reference:
        Arnold, Iqbal & Sha, 2021, arXiv:1910.13603, in the linear and positive form of the authors' code; their
        deeper meta-optimizers put nonlinearities between several such maps.
    """

    def start(self, value: Tensor) -> list[Tensor]:
        """L and R."""
        return [_identity(size, value) for size in _as_matrices(value).shape[-2:]]

    def transform(self, gradient: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """L'L G R'R."""
        left, right = factors
        return (left.mH @ left @ _as_matrices(gradient) @ right.mH @ right).view_as(gradient)


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _as_matrices(value: Tensor) -> Tensor:
    return value.flatten(2) if value.ndim > 2 else value.reshape(len(value), -1) if value.ndim else value.view(1, 1)
