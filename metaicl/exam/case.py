"""One learner before the exam: private copies of learner and episodes, and how two answers are compared."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, biject_to

from metaicl.checks import check_answer
from metaicl.episode import Episode, Examples
from metaicl.exam.randomness import private_randomness
from metaicl.learner import Learner, Prepares
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream, TaskDistribution, check_distribution
from metaicl.training import dtype_of

SEED = 1_000_003
_N_TASKS = 3
_JITTER = 0.05

TOLERANCES = {torch.float64: (1e-6, 1e-8), torch.float32: (1e-3, 1e-4)}
"""Relative and absolute tolerance of every comparison, by the dtype of the answer; float32 for any narrower one."""


@dataclass(frozen=True)
class Case:
    """What a check is given. Every check gets a fresh one and may do with it as it likes.

    The learner is in eval mode and in float64 where it can be, so that a difference cannot be put down to rounding.
    Its trainable parameters are moved a little at random: a head that starts at zero would make every comparison
    of two answers an easy one.

    Args:
        learner: The copy under test.
        native: The same learner in the precision it came with.
        tasks: Where the episodes come from.
        episode: B = 3 tasks; the query is what learners are asked.
        extra: More labeled rows of the same tasks.
        short: Other tasks with fewer support rows.
        build: What built the learner, where it was not given ready.
    """

    learner: Learner
    native: Learner
    tasks: TaskDistribution
    episode: Episode
    extra: Examples
    short: Episode
    build: Callable[..., Learner] | None = None

    def fresh(self) -> "Case":
        """A copy that shares no tensor with this one."""
        learner, native = copy.deepcopy(self.learner), copy.deepcopy(self.native)
        episode, extra, short = copy.deepcopy((self.episode, self.extra, self.short))
        return replace(self, learner=learner, native=native, episode=episode, extra=extra, short=short)

    def answer(self) -> Tensor:
        """The learner's answer to its episode."""
        return answer(self.learner, self.episode.support, self.episode.query.x)


def _refuse_complex(learner: Learner) -> None:
    found = [name for name, value in learner.named_parameters() if value.is_complex()]
    if found:
        raise TypeError(
            f"the exam judges real parameters; {type(learner).__name__} has complex ones, such as {found[:3]}. Keep "
            "their real and imaginary parts, and join them by torch.view_as_complex"
        )


def build_case(learner: Learner | Callable[..., Learner], tasks: TaskDistribution) -> Case:
    """Copy or build the learner, prepare it if it has to be, and draw the episodes.

    Raises:
        TypeError: If `learner` is neither a learner nor builds one, or has complex parameters.
        ValueError: If it was built for another spec.
    """
    check_distribution(tasks)
    build = None if isinstance(learner, Learner) else learner
    with private_randomness():
        return _case(copy.deepcopy(learner if build is None else build(tasks.spec)), tasks, build)


def _case(learner: Any, tasks: TaskDistribution, build: Callable[..., Learner] | None) -> Case:
    if not isinstance(learner, Learner):
        raise TypeError(f"learner must be a Learner or a function spec -> Learner; it gave {type(learner).__name__}")
    _refuse_complex(learner)
    if learner.spec != tasks.spec:
        raise ValueError(f"learner must be built for the tasks' spec {tasks.spec}; got {learner.spec}")
    if isinstance(learner, Prepares):
        learner.prepare(tasks, seed=SEED)
    learner.eval()
    _jitter(learner)
    regression = tasks.spec.kind == "regression"
    episode, extra = _draw(learner, tasks, 0, n_shot=4 if regression else 2, n_query=8 if regression else 2)
    short, _ = _draw(learner, tasks, 1, n_shot=2 if regression else 1, n_query=8 if regression else 2)
    precise = _in_float64(learner, episode)
    if precise is None:
        return Case(learner, learner, tasks, episode, extra, short, build)
    wide = torch.float64
    return Case(precise, learner, tasks, episode.to(dtype=wide), extra.to(dtype=wide), short.to(dtype=wide), build)


def answer(learner: Learner, support: Examples, x: Tensor) -> Tensor:
    """Everything a learner says about inputs x (B, Q), as numbers (B, Q, K)."""
    return numbers(learner.predict(learner.adapt(support), x), learner, x)


def numbers(distribution: Distribution, learner: Learner, x: Tensor) -> Tensor:
    """A prediction as numbers (B, Q, K).

    They are the log-probabilities of all classes, mean and log-scale of a Gaussian, or for any other density three
    targets of its support and its logarithm there.
    """
    shape, spec = x.shape[:2], learner.spec
    if spec.kind == "classification":
        labels = [torch.full(shape, c, device=x.device) for c in range(spec.output_size)]
        found = torch.stack([distribution.log_prob(label) for label in labels], -1)
    elif isinstance(distribution, Independent) and isinstance(distribution.base_dist, Normal):
        found = torch.cat([distribution.mean, distribution.stddev.log()], -1)
    else:
        dtype = x.dtype if x.is_floating_point() else precision_of(learner)
        targets = _targets(distribution, torch.zeros(*shape, spec.output_size, dtype=dtype, device=x.device))
        found = torch.cat([*targets, *(distribution.log_prob(target)[..., None] for target in targets)], -1)
    assert found.shape[:2] == shape, f"a prediction for x of (B, Q) = {tuple(shape)} has shape {tuple(found.shape)}"
    return found.detach()


def _targets(distribution: Distribution, like: Tensor) -> list[Tensor]:
    """Targets (B, Q, y_dim) to ask a density at: -1, 0 and 1, mapped into its support where that is smaller."""
    try:
        support = distribution.support
        while hasattr(support, "base_constraint"):  # of independent outputs, of the parts of a mixture
            support = support.base_constraint  # type: ignore[union-attr]  # it has one
        if support is None or support.is_discrete:
            return [torch.full_like(like, value) for value in (0.0, 1.0)]
        into = biject_to(support)
    except NotImplementedError:  # it does not say, or nothing maps there
        return [torch.full_like(like, value) for value in (-1.0, 0.0, 1.0)]
    shape = into.inverse_shape(like.shape)
    return [into(like.new_full(shape, value)).expand_as(like) for value in (-1.0, 0.0, 1.0)]


def difference(expected: Tensor, got: Tensor) -> str | None:
    """Where two tensors differ by more than the tolerance of their dtype; None if they do not."""
    if expected.shape != got.shape:
        return f"shapes {tuple(expected.shape)} and {tuple(got.shape)} differ"
    rtol, atol = TOLERANCES.get(torch.promote_types(expected.dtype, got.dtype), TOLERANCES[torch.float32])
    if expected.dtype != got.dtype:
        rtol, atol = TOLERANCES[torch.float32]
    expected, got = expected.double(), got.double()
    apart = ~torch.isclose(got, expected, rtol=rtol, atol=atol, equal_nan=True)
    if not bool(apart.any()):
        return None
    gaps = torch.where(apart, (got - expected).abs().nan_to_num(torch.inf), 0.0)
    where = torch.unravel_index(gaps.argmax(), gaps.shape)
    pair = f"{float(expected[where]):.6g} and {float(got[where]):.6g}"
    index = tuple(int(i) for i in where)
    return f"{int(apart.sum())} of {apart.numel()} numbers differ, most at {index}: {pair} (rtol {rtol}, atol {atol})"


def require_answer(found: object, spec: TaskSpec, x: Tensor, method: str = "predict") -> None:
    """Raise an AssertionError if a method returned anything else than a distribution for inputs x (B, Q)."""
    try:
        check_answer(found, spec, tuple(x.shape[:2]), method)
    except (TypeError, ValueError) as error:
        raise AssertionError(str(error)) from error


def require_same(what: str, expected: Tensor, got: Tensor, hint: str) -> None:
    """Raise an AssertionError with the largest difference if two answers differ."""
    found = difference(expected, got)
    if found is not None:
        raise AssertionError(f"{what}: {found}. Hint: {hint}")


def precision_of(learner: Learner) -> torch.dtype:
    """The floating dtype of a learner's parameters, float32 if it has none."""
    return dtype_of(learner) or torch.float32


def fixed_generator() -> torch.Generator:
    """A generator for the choices of a check: the same ones at every run."""
    return torch.Generator().manual_seed(SEED)


def _draw(
    learner: Learner, tasks: TaskDistribution, index: int, *, n_shot: int, n_query: int
) -> tuple[Episode, Examples]:
    stream = EpisodeStream(tasks, seed=SEED, split="train", n_shot=n_shot, n_query=n_query, chunk_size=_N_TASKS)
    device = next((p.device for p in learner.parameters()), None)
    episode = stream[index].to(device, precision_of(learner))
    half = episode.query.n_rows // 2
    extra = episode.query.rows(slice(half, None))
    return replace(episode, query=episode.query.rows(slice(half))), extra


def _jitter(learner: Learner) -> None:
    source = fixed_generator()
    with torch.no_grad():
        for value in learner.parameters():
            if value.requires_grad and value.is_floating_point():
                value += _JITTER * torch.randn(value.shape, generator=source).to(value)


def _in_float64(learner: Learner, episode: Episode) -> Learner | None:
    """The learner in float64, or None where it does not work in it; the check `float64` says why."""
    wide = episode.to(dtype=torch.float64)
    try:
        found = answer(copy.deepcopy(learner).double(), wide.support, wide.query.x)
    except Exception:
        return None
    return copy.deepcopy(learner).double() if found.dtype == torch.float64 else None
