"""Implicit gradients: the derivative of where an inner loop ended, by its optimality and not by its path."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from metaicl.checks import check_count, check_positive
from metaicl.inner_loop.attached import attach, can_move, differentiable_once, same_autocast
from metaicl.inner_loop.loop import Loss
from metaicl.inner_loop.parameters import Params
from metaicl.inner_loop.solvers import ConjugateGradient, Neumann, Product, Solver, is_active, none_active
from metaicl.second_order import twice_differentiable


@dataclass(frozen=True)
class Proximal:
    """The inner problem: argmin over w of loss(w) + strength / 2 |w - start|^2.

    Args:
        loss: Function of (params, *data) giving a scalar; it sees one task. Deterministic.
        strength: Pull towards the start, > 0.

    Raises:
        ValueError: If the strength is no positive number.

    Reference:
        Rajeswaran et al. 2019, arXiv:1909.04630, equation 3.
    """

    loss: Loss
    strength: float

    def __post_init__(self) -> None:
        """Check the strength."""
        check_positive("Proximal.strength", self.strength)

    def objective(self, start: Params) -> Loss:
        """The regularized loss, as a function of the same arguments; `start` has no axis B."""

        def regularized(weights: Params, *data: Any) -> Tensor:
            distance = sum((weights[name] - value).square().sum() for name, value in start.items())
            return self.loss(weights, *data) + 0.5 * self.strength * distance

        return regularized

    def gradients(self, weights: Params, shared: Params, data: Sequence[Any]) -> dict[str, Tensor]:
        """Gradients of the plain loss at weights with leading axis B."""

        def one_task(weights: Params, *task_data: Any) -> dict[str, Tensor]:
            return grad(lambda at: self.loss({**shared, **at}, *task_data))(dict(weights))

        in_dims = (0, *(None if part is None else 0 for part in data))
        with twice_differentiable():
            return vmap(one_task, in_dims=in_dims)(dict(weights), *data)

    def slopes(self, weights: Params, start: Params, shared: Params, data: Sequence[Any]) -> dict[str, Tensor]:
        """Gradients of the regularized loss at weights with leading axis B; zero at the solution."""
        plain = self.gradients(weights, shared, data)
        return {name: plain[name] + self.strength * (weights[name] - value) for name, value in start.items()}


def minimize_tasks(
    problem: Proximal,
    start: Params,
    data: Sequence[Any],
    *,
    lr: float,
    steps: int,
    tolerance: float | Tensor,
    shared: Params | None = None,
) -> dict[str, Tensor]:
    """Gradient descent on the inner problem of B tasks until each is near its minimum; no graph is kept.

    Args:
        problem: What to minimize.
        start: Where all tasks start, without axis B.
        data: As in `implicit_tasks`.
        lr: Step size; convergence needs one below 2 / (largest curvature + strength).
        steps: Largest number of steps.
        tolerance: A task whose slope has fallen to this part of its first one stands still; a scalar.
        shared: As in `implicit_tasks`.

    Returns:
        Weights with leading axis B.
    """
    n_tasks = len(next(part for part in data if part is not None))
    with torch.no_grad():
        begin = {name: value.detach() for name, value in start.items()}
        weights = {name: value.expand(n_tasks, *value.shape) for name, value in begin.items()}
        first: Tensor | None = None
        for _ in range(check_count("steps", steps, minimum=0)):
            slopes = problem.slopes(weights, begin, shared or {}, data)
            size = _pack(slopes).norm(dim=1)
            first = size if first is None else first
            active = is_active(size, tolerance * first)
            if none_active(active):
                break
            moving = {name: active.view(-1, *[1] * (slope.ndim - 1)) for name, slope in slopes.items()}
            weights = {n: w - lr * torch.where(moving[n], slopes[n], 0.0) for n, w in weights.items()}
    return weights


def implicit_tasks(
    problem: Proximal,
    solution: Params,
    start: Params,
    data: Sequence[Any],
    *,
    shared: Params | None = None,
    solver: Solver | None = None,
    tolerance: float | Tensor = 0.0,
) -> dict[str, Tensor]:
    """A solution of the inner problem, with the derivative that it would have if it were exact.

    With H the Hessian of the loss at the solution and v what the outer loss sends back, the start receives
    strength * u and every other tensor s of the loss -d(grad loss . u) / ds, where (H + strength I) u = v. Memory is
    that of one gradient, however many steps found the solution, and nothing of those steps is kept.

    Args:
        problem: What was minimized.
        solution: Where the minimizer ended, leading axis B; from any method, its graph is not used.
        start: Where it started, without axis B.
        data: What the loss needs beside the weights, leading axis B; None entries are passed on.
        shared: More tensors that the loss finds among its parameters by name.
        solver: None takes five conjugate gradients, as the paper.
        tolerance: Relative residual at which a task's solver stops; a scalar, maybe one that falls as training goes on.

    Returns:
        The solution. Its derivative is exact up to the distance to the true solution and the solver's residual, see
        `diagnose`. It reaches `start`, `shared` and those tensors of `data` that want a gradient. There is no second
        derivative: to ask for one is a RuntimeError.

    Reference:
        Rajeswaran et al. 2019, arXiv:1909.04630, lemma 1 and Algorithm 2.
    """
    shared = shared or {}
    leaves, structure = tree_flatten((dict(start), dict(shared), tuple(data)))
    n_learned = len(start) + len(shared)
    moving = [i for i, leaf in enumerate(leaves) if _wants_gradient(leaf, known=i < n_learned)]
    fixed = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    names, found = list(start), [solution[name].detach() for name in start]
    solve, autocast = _ready(solver, problem), same_autocast()

    def pull(saved: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        weights, inputs = dict(zip(names, saved[: len(names)], strict=True)), saved[len(names) :]

        def slope(*values: Tensor) -> dict[str, Tensor]:
            filled = list(fixed)
            for i, value in zip(moving, values, strict=True):
                filled[i] = value
            begin, shared, data = tree_unflatten(filled, structure)
            slopes = problem.gradients(weights, shared, data)
            return {name: problem.strength * begin[name] - slopes[name] for name in names}

        _, shared, data = tree_unflatten(fixed, structure)
        v = _pack(dict(zip(names, cotangents, strict=True)))
        with autocast():
            u = _unpack(solve(_hessian(problem, weights, shared, data), v, tolerance).value, weights)
            _, pulled = vjp(slope, *inputs)  # type: ignore[misc]
            return (*(None for _ in names), *(differentiable_once(value, saved) for value in pulled(u)))

    inputs = (*found, *(leaves[i] for i in moving))
    return dict(zip(names, attach(found, inputs, pull), strict=True))


@dataclass(frozen=True)
class Diagnosis:
    """How inexact an implicit gradient is; the error of the meta-gradient is bounded by a constant times the sum.

    Args:
        stationarity: |grad loss + strength (w - start)| of each task (B,): how far the inner loop is from its end.
        residual: Relative residual of the linear system (B,).
        iterations: Products with the Hessian, long (B,).

    Reference:
        Pedregosa, 2016, arXiv:1602.02355, theorem 1: the error is linear in both.
    """

    stationarity: Tensor
    residual: Tensor
    iterations: Tensor


def diagnose(
    problem: Proximal,
    solution: Params,
    start: Params,
    data: Sequence[Any],
    v: Params,
    *,
    shared: Params | None = None,
    solver: Solver | None = None,
    tolerance: float | Tensor = 0.0,
) -> Diagnosis:
    """What `implicit_tasks` would do with the outer gradient `v` (leading axis B), in numbers; no graph."""
    with torch.no_grad():
        weights = {name: solution[name].detach() for name in start}
        rest = problem.slopes(weights, start, shared or {}, data)
        product = _hessian(problem, weights, shared or {}, data)
        found = _ready(solver, problem)(product, _pack({name: v[name] for name in start}), tolerance)
        return Diagnosis(_pack(rest).norm(dim=1), found.residual, found.iterations)


def _hessian(problem: Proximal, weights: Params, shared: Params, data: Sequence[Any]) -> Product:
    """The product v -> (H + strength I) v: H is symmetric, so one pass back through the gradient multiplies by it."""
    _, pulled = vjp(lambda at: problem.gradients(at, shared, data), dict(weights))  # type: ignore[misc]

    def product(v: Tensor) -> Tensor:
        return _pack(pulled(_unpack(v, weights))[0]) + problem.strength * v

    return product


def _ready(solver: Solver | None, problem: Proximal) -> Solver:
    if isinstance(solver, Neumann) and solver.step is None:
        return replace(solver, step=1 / problem.strength)
    return ConjugateGradient() if solver is None else solver


def _pack(tensors: Params) -> Tensor:
    return torch.cat([value.reshape(len(value), -1) for value in tensors.values()], 1)


def _unpack(packed: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    sizes = [value[0].numel() for value in like.values()]
    parts = packed.split(sizes, 1)
    return {name: part.view_as(value) for (name, value), part in zip(like.items(), parts, strict=True)}


def _wants_gradient(leaf: Any, *, known: bool) -> bool:
    return can_move(leaf) and (known or leaf.requires_grad)
