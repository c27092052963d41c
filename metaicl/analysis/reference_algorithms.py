"""Reference algorithms with at most one free number, in closed form, for any prefix and any query.

Ridge, least squares, gradient descent of K steps and averaging are one thing: with the eigenvalues s and eigenvectors
V of the support's Gram matrix X'X, each has weights V f(s) V'X'y, and f is all that tells them apart. So a prefix is
decomposed once, and every other value of a penalty or a rate costs one matrix product.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaicl.analysis.answers import as_answers, real_prefix, shape_of, zero_answer
from metaicl.checks import check_positive
from metaicl.episode import Examples
from metaicl.functional import (
    class_weights,
    masked_mean,
    present_classes,
    prototypes,
    raw_features,
    squared_distances,
    without_absent,
)
from metaicl.learner import Learner
from metaicl.learners.reference.simple import Constant, Logistic, NearestNeighbors
from metaicl.spec import TaskSpec
from metaicl.task import EVAL_SEED, EpisodeStream, TaskDistribution
from metaicl.training import device_of, dtype_of

STEPS = (1, 2, 3, 5, 10)
"""How many steps of gradient descent the library offers."""

LARGEST_LINEAR = 64
"""Inputs with more features get no linear references: a Gram matrix for each prefix of each episode would not fit."""

_RANK = 1e-10  # eigenvalues below this share of the largest one count as zero

Number = float | Tensor
"""A free number, or G of them as a tensor (G, 1, 1, 1): answers then have a leading axis G."""

Filter = Callable[[Tensor, Tensor, Number], Tensor]
"""Eigenvalues s (B, D), real rows (B, 1) and the free number to f(s) (B, D), or (G, B, D) for G numbers."""


@dataclass(frozen=True)
class Reference:
    """An algorithm to hold a learner against.

    Args:
        name: For tables and figures.
        read: A prefix (B, k rows; the empty one is a single masked row) to a state; references that share the
            function share the state.
        answer: (state, inputs (B, Q, *x_shape), the free number) -> means or class probabilities (B, Q, K), float64.
        symbol: Of the free number; "" where there is none.
        grid: Values of the free number to search, at least three, rising, evenly spaced in the logarithm; empty where
            there is none.
        learner: The learner behind the answers, where there is one.

    Raises:
        ValueError: If the grid is no such values.
    """

    name: str
    read: Callable[[Examples], Any]
    answer: Callable[[Any, Tensor, Number], Tensor]
    symbol: str = ""
    grid: tuple[float, ...] = ()
    learner: Learner | None = None

    def __post_init__(self) -> None:
        """Check the grid: the search, its interval and the ends it names rest on it."""
        if len(self.grid) == 0:
            return
        logs = np.log([check_positive("grid", value) for value in self.grid])
        steps = np.diff(logs)
        if len(logs) < 3 or not bool((steps > 0).all() and np.ptp(steps) < 1e-3 * steps.mean()):
            raise ValueError(
                f"grid of {self.name!r} must be at least three numbers that rise, evenly spaced in the logarithm, such "
                f"as numpy.geomspace(low, high, 33); got {len(logs)}: {tuple(self.grid[:6])}"
            )


class Spectrum(NamedTuple):
    """A support seen along the eigenvectors of its Gram matrix, float64.

    Attributes:
        values: s, eigenvalues of X'X (B, D), rising; those that are zero up to rounding are zero.
        vectors: V (B, D, D), eigenvectors in columns.
        cross: V'X'y (B, D, K).
        count: Real rows (B, 1), at least 1.
        center: Subtracted from inputs (B, 1, D); 0 without a bias.
        middle: Added to outputs (B, 1, K); 0 without a bias.
    """

    values: Tensor
    vectors: Tensor
    cross: Tensor
    count: Tensor
    center: Tensor
    middle: Tensor


def read_spectrum(prefix: Examples, *, spec: TaskSpec, bias: bool = False) -> Spectrum:
    """Decompose a prefix; with `bias` its rows are centered first, so that a bias is fitted and not penalized."""
    x, y = raw_features(prefix.x, spec).double(), _numbers(prefix, spec)
    center = masked_mean(x, prefix.real, 1)[:, None] * bias
    middle = masked_mean(y, prefix.real, 1)[:, None] * bias
    real = prefix.real[..., None]
    x, y = (x - center) * real, (y - middle) * real
    values, vectors = torch.linalg.eigh(x.mT @ x)
    values = torch.where(values > _RANK * values[:, -1:], values, 0.0)
    count = prefix.real.sum(1, keepdim=True).clamp(min=1).double()
    return Spectrum(values, vectors, vectors.mT @ (x.mT @ y), count, center, middle)


def least_squares(values: Tensor, count: Tensor, parameter: Number) -> Tensor:
    """f(s) = 1 / s, and 0 at s = 0: the least-squares weights of smallest norm."""
    return torch.where(values > 0, 1 / torch.where(values > 0, values, 1.0), 0.0)


def ridge(values: Tensor, count: Tensor, parameter: Number) -> Tensor:
    """f(s) = 1 / (s + penalty): minimizes |X w - y|^2 + penalty |w|^2."""
    return 1 / (values + parameter)


def averaging(values: Tensor, count: Tensor, parameter: Number) -> Tensor:
    """f(s) = 1 / k: weights X'y / k (Garg et al. 2022)."""
    return torch.ones_like(values) / count


def gradient_descent(values: Tensor, count: Tensor, parameter: Number, *, steps: int) -> Tensor:
    """f(s) = (1 - (1 - rate s / k)^K) / s: K steps from zero on |X w - y|^2 / (2 k)."""
    shrink, total, power = parameter / count, torch.zeros_like(values), torch.ones_like(values)
    for _ in range(steps):
        total, power = total + shrink * power, power * (1 - shrink * values)
    return total


def from_learner(name: str, learner: Learner) -> Reference:
    """A learner as a reference without a free number; it reads and answers on its device and in its dtype."""

    def read(prefix: Examples) -> Any:
        return learner.adapt(prefix.to(device_of(learner), dtype_of(learner)))

    def answer(state: Any, x: Tensor, parameter: Number) -> Tensor:
        x = x.to(device_of(learner), dtype_of(learner) if x.is_floating_point() else None)
        return as_answers(learner.predict(state, x), learner.spec).to("cpu")

    return Reference(name, read, answer, learner=learner)


def reference_library(tasks: TaskDistribution) -> dict[str, Reference]:
    """The references that fit a distribution: its own `references()` first, then the classical algorithms.

    An own reference that has the name of a classical one, as a ridge that knows the noise, is "ridge of the tasks".

    Regression: zero, mean of the support, averaging, gradient descent of 1, 2, 3, 5 and 10 steps, ridge with and
    without a bias, least squares (minimum norm), 1 and 3 nearest neighbors, a Gaussian kernel smoother. Classification:
    equal probabilities, class frequencies, softmax over distances to the class means, ridge on one-hot labels (cut to
    probabilities), logistic regression, neighbors and smoother. Linear ones need at most 64 features, and numbers.
    """
    spec = tasks.spec
    first = EpisodeStream(tasks, seed=EVAL_SEED, split="train", n_shot=2, n_query=1)[0].support
    scale = float(raw_features(first.x, spec).double().square().mean()) or 1.0
    found = [_zero(spec)]
    found.append(from_learner("mean" if spec.kind == "regression" else "class frequencies", Constant(spec)))
    if spec.x_kind != "tokens" and math.prod(spec.x_shape) <= LARGEST_LINEAR:
        found += _linear(spec, scale)
    if spec.kind == "classification":
        found += [_nearest_mean(spec, scale), from_learner("logistic", Logistic(spec))]
    found += [from_learner(f"{k}-NN", NearestNeighbors(spec, k=k)) for k in (1, 3)]
    found.append(_smoother(spec, scale))
    classical = {one.name: one for one in found}
    given = {f"{name} of the tasks" if name in classical else name: one for name, one in tasks.references().items()}
    return {name: from_learner(name, one) for name, one in given.items()} | classical


def as_references(references: Mapping[str, Reference | Learner], spec: TaskSpec) -> dict[str, Reference]:
    """What a user gave, checked.

    Raises:
        TypeError: If a value is neither a `Reference` nor a learner.
        ValueError: If there is none, or a learner was built for other tasks; later, if answers have another shape.
    """
    if not references:
        raise ValueError("references must name at least one algorithm; None takes reference_library(tasks)")
    found = {}
    for name, one in references.items():
        if isinstance(one, Learner):
            if shape_of(one.spec) != shape_of(spec):
                raise ValueError(
                    f"references[{name!r}] was built for (kind, inputs, outputs) = {shape_of(one.spec)}; "
                    f"the tasks have {shape_of(spec)}"
                )
            one = from_learner(name, one)
        if not isinstance(one, Reference):
            raise TypeError(f"references[{name!r}] must be a Learner or a Reference; got {type(one).__name__}")
        answer = partial(_checked_answer, name=name, answer=one.answer, size=spec.output_size)
        found[name] = replace(one, name=name, answer=answer)  # free numbers are kept by the name of their reference
    return found


def _checked_answer(
    state: Any, x: Tensor, parameter: Number, *, name: str, answer: Callable[[Any, Tensor, Number], Tensor], size: int
) -> Tensor:
    """A reference's answer, once it is known to have the right shape: another one might broadcast in silence."""
    found, wanted = answer(state, x, parameter), (*x.shape[:2], size)
    leads = ((), (1,), (len(parameter),)) if isinstance(parameter, Tensor) else ((),)
    if not isinstance(found, Tensor) or tuple(found.shape) not in [(*lead, *wanted) for lead in leads]:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"references[{name!r}] must answer (B, Q, K) = {wanted}, with a leading axis G for G free numbers given as "
            f"(G, 1, 1, 1); got {got}"
        )
    return found


def _zero(spec: TaskSpec) -> Reference:
    name = "zero" if spec.kind == "regression" else "uniform"
    return Reference(name, real_prefix, lambda state, x, parameter: zero_answer(spec, x))


def _linear(spec: TaskSpec, scale: float) -> list[Reference]:
    plain, with_bias = partial(read_spectrum, spec=spec), partial(read_spectrum, spec=spec, bias=True)
    penalties, rates = _grid(1e-4 * scale, 1e3 * scale, 36), _grid(3e-3 / scale, 4 / scale, 33)

    def make(name: str, filter: Filter, read: Any = plain, symbol: str = "", grid: Any = ()) -> Reference:
        return Reference(name, read, partial(_linear_answer, filter=filter, spec=spec), symbol, grid)

    ridges = [make("ridge", ridge, symbol="λ", grid=penalties)]
    if spec.kind == "classification":
        return ridges
    descents = [make(f"GD-{k}", partial(gradient_descent, steps=k), symbol="η", grid=rates) for k in STEPS]
    return [
        make("averaging", averaging),
        *descents,
        *ridges,
        make("ridge + bias", ridge, with_bias, symbol="λ", grid=penalties),
        make("least squares", least_squares),
    ]


def _nearest_mean(spec: TaskSpec, scale: float) -> Reference:
    def read(prefix: Examples) -> tuple[Tensor, Tensor]:
        present = present_classes(prefix.y, spec.output_size, prefix.real)
        return prototypes(raw_features(prefix.x, spec).double(), prefix.y, spec.output_size, prefix.real), present

    def answer(state: tuple[Tensor, Tensor], x: Tensor, parameter: Number) -> Tensor:
        centers, present = state
        scores = -parameter * squared_distances(raw_features(x, spec).double(), centers)
        return torch.softmax(without_absent(scores, present), -1)

    return Reference("nearest mean", read, answer, "β", _grid(1e-3 / scale, 1e1 / scale, 33))


def _smoother(spec: TaskSpec, scale: float) -> Reference:
    """Nadaraya 1964 and Watson 1964, with the kernel exp(-|x - x'|^2 / (2 h^2)); softmax attention by distance."""

    def read(prefix: Examples) -> tuple[Tensor, Tensor, Tensor]:
        return raw_features(prefix.x, spec).double(), _numbers(prefix, spec), prefix.real

    def answer(state: tuple[Tensor, Tensor, Tensor], x: Tensor, parameter: Number) -> Tensor:
        rows, y, real = state
        scores = -squared_distances(raw_features(x, spec).double(), rows) / (2 * parameter**2)
        scores = scores.masked_fill(~real[:, None], -1e300)
        found = torch.softmax(scores, -1) @ (y * real[..., None])
        return found if spec.kind == "regression" else found + 1 / spec.output_size

    size = math.sqrt(scale)
    return Reference("kernel smoother", read, answer, "h", _grid(0.05 * size, 20 * size, 33))


def _linear_answer(state: Spectrum, x: Tensor, parameter: Number, *, filter: Filter, spec: TaskSpec) -> Tensor:
    if isinstance(parameter, Tensor):
        parameter = parameter[..., 0]  # eigenvalues have one axis less than answers
    along = (raw_features(x, spec).double() - state.center) @ state.vectors
    found = along @ (filter(state.values, state.count, parameter)[..., None] * state.cross) + state.middle
    if spec.kind == "regression":
        return found
    scores = (found + 1 / spec.output_size).clamp(min=1e-12)
    return scores / scores.sum(-1, keepdim=True)


def _numbers(prefix: Examples, spec: TaskSpec) -> Tensor:
    """Targets as numbers (B, N, K), float64: one-hot labels less 1 / C, so that knowing nothing is zero."""
    if spec.kind == "regression":
        return prefix.y.double()
    return class_weights(prefix.y, spec.output_size, None, torch.float64) - 1 / spec.output_size


def _grid(low: float, high: float, n: int) -> tuple[float, ...]:
    return tuple(np.geomspace(low, high, n).tolist())
