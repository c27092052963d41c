"""Checks of task distributions: addressed, balanced, disjoint, and without a word in the order of the rows."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaicl.checks import check_episode, class_counts
from metaicl.episode import Episode, Examples
from metaicl.exam.case import SEED, numbers
from metaicl.exam.randomness import global_generators_used
from metaicl.leakage import audit_leakage, discrete_inputs
from metaicl.learner import Learner
from metaicl.spec import TaskSpec
from metaicl.task import SPLITS, EpisodeStream, Split, TaskDistribution, derive_generator

_ORDER_TASKS = 300
_SIGMAS = 4.0


@dataclass(frozen=True)
class TaskCase:
    """What a check of a task distribution is given.

    Args:
        tasks: The distribution.
        n_shot: Support rows to ask for.
        n_query: Query rows to ask for.
    """

    tasks: TaskDistribution
    n_shot: int
    n_query: int

    def fresh(self) -> "TaskCase":
        """Itself: a distribution holds data and is not copied."""
        return self

    def stream(self, split: Split = "train", *, seed: int = SEED, chunk_size: int = 25) -> EpisodeStream:
        """An addressed stream of its episodes."""
        sizes = {"n_shot": self.n_shot, "n_query": self.n_query}
        return EpisodeStream(self.tasks, seed=seed, split=split, chunk_size=chunk_size, **sizes)

    def sample(self, *address: str | int, n_tasks: int = 3) -> Episode:
        """Tasks straight from the sampler."""
        source = derive_generator(SEED, *address)
        return self.tasks.sample(n_tasks, split="train", n_shot=self.n_shot, n_query=self.n_query, generator=source)


def check_spec(case: TaskCase) -> None:
    """`spec` is a TaskSpec and the episodes of every split fit it."""
    spec = getattr(case.tasks, "spec", None)
    if not isinstance(spec, TaskSpec):
        raise AssertionError(
            f"spec must be a TaskSpec; got {type(spec).__name__}. Hint: set it in the class or in __init__"
        )
    for split in SPLITS:
        episode = case.stream(split)[0]
        if len(episode) != 25:
            raise AssertionError(f"sample(25, split={split!r}) must give B = 25 tasks; got {len(episode)}")
        check_episode(episode, case.tasks.spec)
    missing = [name for name in case.tasks.identity if name not in episode.latents]
    if missing:
        raise AssertionError(
            f"identity names latents that are not there: {missing}; there are {sorted(episode.latents)}"
        )


def check_counts(case: TaskCase) -> None:
    """n_shot and n_query are honored: per class (n_way times as many per task in a stream), per task in regression."""
    episode, spec = case.sample("counts", n_tasks=8), case.tasks.spec
    for name, part, asked in (("n_shot", episode.support, case.n_shot), ("n_query", episode.query, case.n_query)):
        unit, expected, found = "task", asked, part.real.sum(1)
        if spec.n_way is not None and spec.ordered:  # classes come as they come, as in `check_episode`
            unit, expected = f"task (n_way = {spec.n_way} times as many in a stream)", asked * spec.n_way
        elif spec.n_way is not None:
            unit, found = "class", class_counts(part, spec.n_way)
        if bool((found != expected).any()):
            low, high = int(found.min()), int(found.max())
            raise AssertionError(f"{name} = {asked} must give {expected} real rows per {unit}; got {low} to {high}")


def check_deterministic(case: TaskCase) -> None:
    """Equal generators give equal episodes, whatever was sampled in between; different ones do not."""
    first = case.sample("a").fingerprint()
    other = case.sample("b").fingerprint()
    if case.sample("a").fingerprint() != first:
        raise AssertionError(
            "the same generator gave another episode. Hint: draw from `generator` only, and keep no state in between"
        )
    if other == first:
        raise AssertionError("two generators gave the same episode. Hint: draw from `generator`")


def check_addressed(case: TaskCase) -> None:
    """Tasks of a stream are the same for any batch size and any number of workers."""
    stream = case.stream()
    expected = list(stream.batches(3, 67, batch_size=1))
    for batch_size, workers in ((7, 0), (64, 0), (64, 2)):
        batches = stream.batches(3, 67, batch_size=batch_size, workers=workers)
        got = [one for batch in batches for one in batch]
        wrong = sum(_bare(a, b) != _bare(b, a) for a, b in zip(expected, got, strict=True))
        if wrong:
            raise AssertionError(
                f"{wrong} of {len(got)} tasks differ between batches of 1 and batches of {batch_size} with {workers} "
                "workers. Hint: sample must depend on its arguments only"
            )


def _bare(task: Episode, other: Episode) -> str:
    """A fingerprint of one task without what depends on the tasks beside it: padding, and latents of several shapes."""
    support, query = (part if part.mask is None else _unpadded(part) for part in (task.support, task.query))
    shared = {name: value for name, value in task.latents.items() if name in other.latents}
    return Episode(support, query, shared).fingerprint()


def _unpadded(part: Examples) -> Examples:
    real = part.real[0]
    return Examples(part.x[:, real], part.y[:, real], ids=None if part.ids is None else part.ids[:, real])


def check_rows_disjoint(case: TaskCase) -> None:
    """No query row occurs in the support of its task, nor any row twice; `ids` decide, content where there are none."""
    episode = case.sample("rows", n_tasks=25)
    for name, part in (("support", episode.support), ("query", episode.query)):
        if discrete_inputs(part.x, case.tasks) and part.ids is None:
            continue
        repeated = sum(_repeated(part, task) for task in range(len(part)))
        if repeated:
            raise AssertionError(
                f"{repeated} rows of the {name} occur twice in their task. Hint: draw without replacement"
            )
    named = episode.support.ids is not None and episode.query.ids is not None
    _require_no_leaks(case, "in the support, by source row" if named else "in the support, by content")


def check_splits_disjoint(case: TaskCase) -> None:
    """No identity, source row, class or row content occurs in two splits."""
    _require_no_leaks(case, "in two splits")


def check_global_rng(case: TaskCase) -> None:
    """Sampling neither reads nor seeds the global generators."""
    used = global_generators_used(lambda: case.sample("rng"))
    if used:
        raise AssertionError(
            f"sample changed the global generator of {' and '.join(used)}. Hint: draw from `generator`"
        )


def check_bad_counts(case: TaskCase) -> None:
    """Counts that are no positive integers, and unknown splits, are refused before anything is sampled."""
    for name in ("n_shot", "n_query"):
        for value in (0, -1, 2.5, True):
            _require_refused(f"{name} = {value!r}", functools.partial(_stream, case, **{name: value}))
    _require_refused("split = 'meta-test'", functools.partial(_stream, case, split="meta-test"))


def check_row_order(case: TaskCase) -> None:
    """The place of a row says nothing about its label, in families that are no streams."""
    if case.tasks.spec.ordered:
        return
    parts = [(e.support, e.query) for e in case.stream().batches(0, _ORDER_TASKS, batch_size=25)]
    for name, examples in zip(("support", "query"), zip(*parts, strict=True), strict=True):
        if any(part.n_rows != examples[0].n_rows or part.mask is not None for part in examples):
            continue  # in a ragged family, places do not correspond
        labels = torch.cat([_as_labels(part, case.tasks.spec) for part in examples])
        statistic, freedom = _chi_square(labels)
        bound = _highest(freedom, labels.shape[1])
        if statistic > bound:
            raise AssertionError(
                f"the place of a {name} row tells its label: chi-square {statistic:.0f} over {len(labels)} tasks, "
                f"about {freedom:.0f} expected and at most {bound:.0f} allowed. Hint: shuffle the rows of every task"
            )


def check_references(case: TaskCase) -> None:
    """`references` gives learners of the family's spec with finite answers."""
    episode = case.sample("references")
    for name, learner in case.tasks.references().items():
        if not isinstance(learner, Learner) or learner.spec != case.tasks.spec:
            raise AssertionError(
                f"references()[{name!r}] must be a Learner with the spec of the tasks; got {learner!r}"
            )
        found = learner.predict(learner.adapt(episode.support), episode.query.x)
        values = torch.cat(
            [numbers(found, learner, episode.query.x).flatten(), found.log_prob(episode.query.y).flatten()]
        )
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise AssertionError(f"references()[{name!r}] gives {bad} of {values.numel()} numbers that are NaN or Inf")


def _require_no_leaks(case: TaskCase, kind: str) -> None:
    report = audit_leakage(case.tasks, seed=SEED, n_episodes=100, n_shot=case.n_shot, n_query=case.n_query)
    if any(count for name, count in report.counts.items() if kind in name):
        raise AssertionError(str(report))


def _repeated(part: Examples, task: int) -> int:
    rows = part.x[task].flatten(1) if part.ids is None else part.ids[task, :, None]
    rows = rows[part.real[task]]
    return len(rows) - len(torch.unique(rows, dim=0))


def _stream(case: TaskCase, **asked: Any) -> EpisodeStream:
    return EpisodeStream(case.tasks, **{"seed": 0, "split": "train", "n_shot": 1, "n_query": 1, **asked})


def _require_refused(what: str, action: Callable[[], EpisodeStream]) -> None:
    try:
        action()
    except (TypeError, ValueError):
        return
    raise AssertionError(f"EpisodeStream accepts {what}. Hint: it must raise TypeError or ValueError")


def _as_labels(part: Examples, spec: TaskSpec) -> Tensor:
    """Labels (B, N): the classes, or whether a target lies above the median of its task."""
    if spec.kind == "classification":
        return part.y
    first = part.y[..., 0]
    return (first > first.median(1, keepdim=True).values).long()


def _chi_square(labels: Tensor) -> tuple[float, float]:
    """The statistic of labels (B, N) against rows that are exchangeable within their task, and its expectation."""
    n_tasks, n_rows = labels.shape
    one_hot = torch.nn.functional.one_hot(labels).double()
    one_hot = one_hot[..., one_hot.sum((0, 1)) > 0]
    observed, share = one_hot.sum(0), one_hot.mean((0, 1))
    statistic = ((observed - n_tasks * share).square() / (n_tasks * share)).sum()
    return float(statistic), float(n_rows * (one_hot.shape[-1] - 1))


def _highest(expected: float, n_rows: int) -> float:
    """What the statistic exceeds with a chance below 1e-4, where the labels of every task are the same, shuffled.

    The rows of a task then exclude each other: (N - 1) / N of the statistic is a chi-square of so many times fewer
    degrees of freedom. Its cube root is nearly normal (Wilson and Hilferty 1931), also where degrees are few.
    """
    share = (n_rows - 1) / n_rows
    freedom = max(expected * share, 1.0)
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + _SIGMAS * spread**0.5) ** 3 / max(share, 0.5)
