"""Iterative solvers of A u = v for B tasks at once, by products with A alone; they stop by themselves, task by task."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metaicl.checks import check_count, check_positive

Product = Callable[[Tensor], Tensor]
"""v (B, P) -> A v (B, P), one symmetric matrix per task."""


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Args:
        value: u (B, P).
        residual: |v - A u| / |v| of each task (B,), as the iteration tracks it.
        iterations: Products with A that each task used, long (B,).
    """

    value: Tensor
    residual: Tensor
    iterations: Tensor


class Solver(ABC):
    """A solver with a limit of iterations. A task whose residual is below the tolerance no longer changes."""

    @abstractmethod
    def __call__(self, product: Product, v: Tensor, tolerance: float | Tensor = 0.0) -> Solution:
        """Solve A u = v.

        Args:
            product: Multiplies by A.
            v: Right-hand sides (B, P).
            tolerance: Relative residual at which a task is done; a scalar. 0 uses all iterations.
        """


@dataclass(frozen=True)
class ConjugateGradient(Solver):
    """Conjugate gradients, for a positive definite A.

    Args:
        iterations: Largest number of products with A.

    Raises:
        TypeError, ValueError: If `iterations` is no positive int.

    Reference:
        Hestenes & Stiefel, 1952; for implicit meta-gradients Rajeswaran et al. 2019, arXiv:1909.04630, section 3.
    """

    iterations: int = 5

    def __post_init__(self) -> None:
        """Check the limit."""
        check_count("ConjugateGradient.iterations", self.iterations)

    def __call__(self, product: Product, v: Tensor, tolerance: float | Tensor = 0.0) -> Solution:
        """Solve A u = v; see `Solver`."""
        value, rest, direction = torch.zeros_like(v), v, v
        size = start = v.square().sum(1)
        used = torch.zeros(len(v), dtype=torch.long, device=v.device)
        for _ in range(self.iterations):
            active = is_active(size, start * tolerance**2)
            if none_active(active):
                break
            image = product(direction)
            curvature = (direction * image).sum(1)
            # Rounding, or a Hessian that is not positive definite: such a direction is left out.
            active = active & ~(curvature <= 0)  # what is NaN comes through
            step = torch.where(active, size / torch.where(active, curvature, 1.0), 0.0)[:, None]
            value, rest = value + step * direction, rest - step * image
            fresh = rest.square().sum(1)
            ratio = torch.where(active, fresh / torch.where(active, size, 1.0), 0.0)[:, None]
            direction = torch.where(active[:, None], rest + ratio * direction, direction)
            size, used = torch.where(active, fresh, size), used + active
        return Solution(value, _relative(size, start), used)


@dataclass(frozen=True)
class Neumann(Solver):
    """The Neumann series: u = step * sum_j (I - step A)^j v, which converges for step < 2 / largest eigenvalue.

    Args:
        iterations: Largest number of products with A.
        step: Scale of A. None takes 1 / proximal strength where `implicit_tasks` calls: then the iteration is the
            fixed point of u = (v - H u) / strength, which converges while the strength exceeds the largest |H|.

    Raises:
        TypeError, ValueError: If a setting is out of range.
        FloatingPointError: From a call outside of compiled graphs, if the series diverges.

    Reference:
        Lorraine, Vicol & Duvenaud, 2020, arXiv:1911.02590, section 4.
    """

    iterations: int = 20
    step: float | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        check_count("Neumann.iterations", self.iterations)
        if self.step is not None:
            check_positive("Neumann.step", self.step)

    def __call__(self, product: Product, v: Tensor, tolerance: float | Tensor = 0.0) -> Solution:
        """Solve A u = v; see `Solver`."""
        if self.step is None:
            raise ValueError("Neumann.step must be a finite number > 0 here; got None")
        start = size = v.square().sum(1)
        value, rest = torch.zeros_like(v), v
        used = torch.zeros(len(v), dtype=torch.long, device=v.device)
        for _ in range(self.iterations):
            active = is_active(size, start * tolerance**2)
            if none_active(active):
                break
            move = torch.where(active[:, None], self.step * rest, 0.0)
            value, rest = value + move, rest - product(move)
            size, used = rest.square().sum(1), used + active
        if not torch.compiler.is_compiling() and bool((size > start).any()):
            raise FloatingPointError(
                f"the Neumann series diverges: its residual grew to {float(_relative(size, start).max()):.1e} of the "
                f"right-hand side; give a step below 2 / the largest eigenvalue (now {self.step:.3g}), or take "
                "ConjugateGradient"
            )
        return Solution(value, _relative(size, start), used)


def is_active(size: Tensor, enough: Tensor) -> Tensor:
    """Whether each task goes on. A right-hand side of zero is done at once; what is not finite has to come through."""
    return ~((size <= enough) & size.isfinite())


def none_active(active: Tensor) -> bool:
    """Whether the iteration can stop; a compiled graph has a fixed length, and finished tasks stand still in it."""
    return not torch.compiler.is_compiling() and not bool(active.any())


def _relative(size: Tensor, start: Tensor) -> Tensor:
    return torch.where(start == 0, 0.0, size / torch.where(start == 0, 1.0, start)).sqrt()
