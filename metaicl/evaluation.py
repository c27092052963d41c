"""Judging one learner on fixed, addressed episodes."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metaicl.checks import check_built_for, check_count, check_device
from metaicl.episode import Episode, Examples
from metaicl.evaluation_tally import Tally
from metaicl.learner import Learner
from metaicl.metrics import Calibration, metric_bounds
from metaicl.number_text import interval_text
from metaicl.prefixes import first_shots
from metaicl.prequential import is_prequential
from metaicl.statistics import interval
from metaicl.task import (
    EVAL_SEED,
    EpisodeStream,
    Split,
    TaskDistribution,
    check_distribution,
    check_is_learner,
    derive_seed,
)
from metaicl.training import device_of, isolated_randomness, place, training_mode


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What one learner did on one fixed set of episodes.

    Args:
        learner: Its name.
        kind: "regression" or "classification".
        metrics: For each metric its value on each episode, float64 (E,).
        calibration: Pooled over all query rows; None where the distribution has no `cdf`.
        fingerprint: SHA-256 over all rows of all episodes, whatever the batch size. Two evaluations with the same
            fingerprint were made on the same data; how they were asked about it, `prequential` says.
        n_shot: Support rows per class or per task.
        n_query: Query rows, likewise.
        split: Which tasks.
        seed: The address of the episodes.
        batch_size: Tasks adapted together; the seconds depend on it.
        adapt_seconds: Seconds to adapt to one task, the median over batches of (seconds of the batch / B).
        predict_seconds: Seconds to predict the query of one task, likewise; with what is learned on the way, where it
            is prequential.
        parameters: Numbers in the parameters of the learner.
        state_bytes: Bytes of adapted state per task, what is kept between `adapt` and `predict`: tensors in tuples,
            lists, dicts and dataclasses, and those of modules.
        peak_memory_bytes: The most memory that adapting to and answering a batch held beyond what was there before;
            see `metaicl.peak_memory`. None where nobody keeps such a count.
        device: Where it ran.
        transductive: The learner's answer to a query may depend on the other queries.
        prequential: Each query row was predicted from the support and all query rows before it.
    """

    learner: str
    kind: str
    metrics: Mapping[str, NDArray[np.float64]]
    calibration: Calibration | None
    fingerprint: str
    n_shot: int
    n_query: int
    split: str
    seed: int
    batch_size: int
    adapt_seconds: float
    predict_seconds: float
    parameters: int
    state_bytes: int
    peak_memory_bytes: int | None
    device: str
    transductive: bool
    prequential: bool = False

    def __eq__(self, other: object) -> bool:
        """Whether every field is the same, and every value on every episode."""
        if not isinstance(other, Evaluation):
            return NotImplemented
        mine, theirs = ({one.name: getattr(each, one.name) for one in fields(each)} for each in (self, other))
        ours, others = mine.pop("metrics"), theirs.pop("metrics")
        same = mine == theirs and ours.keys() == others.keys()
        return same and all(np.array_equal(values, others[name], equal_nan=True) for name, values in ours.items())

    __hash__ = None  # type: ignore[assignment]  # it holds arrays

    @property
    def n_episodes(self) -> int:
        """E, the number of episodes."""
        return len(next(iter(self.metrics.values())))

    def mean(self, metric: str) -> float:
        """The mean of a metric over the episodes."""
        return float(self.metrics[metric].mean())

    def __str__(self) -> str:
        """Each metric with its 95 % interval over the episodes: what another draw of tasks would give this learner."""
        found = {
            name: interval(values[None], bounds=metric_bounds(name, self.kind)) for name, values in self.metrics.items()
        }
        metrics = ", ".join(f"{name} {interval_text(one)}" for name, one in found.items())
        rows = f"{self.n_shot} support and {self.n_query} query rows" + " per class" * (self.kind == "classification")
        rows += ", prequential" * self.prequential
        return f"{self.learner}: {metrics} ({self.n_episodes} {self.split} episodes, {rows})"


def evaluate(
    learner: Learner,
    tasks: TaskDistribution,
    *,
    n_shot: int,
    n_query: int,
    n_episodes: int = 600,
    split: Split = "test",
    seed: int = EVAL_SEED,
    batch_size: int = 50,
    device: str | torch.device | None = None,
    name: str | None = None,
    prequential: bool | None = None,
) -> Evaluation:
    """Judge a learner on the first `n_episodes` tasks of the stream (seed, split), in eval mode and without gradients.

    The learner's training mode and device are restored afterwards. Batch size and device change no episode.

    Args:
        learner: Trained or not.
        tasks: Where the episodes come from.
        n_shot: Support rows per class, or per task in regression.
        n_query: Query rows, likewise.
        n_episodes: E.
        split: Which tasks.
        seed: The address; leave it alone to be comparable with everyone else.
        batch_size: Tasks adapted together.
        device: Where to run; by default where the learner's parameters are.
        name: For messages and reports; by default the class name.
        prequential: Predict each query row from the support and all query rows before it, then learn from it; see
            `metaicl.prequential.answer_in_order`. None does so where `tasks.spec.ordered`. False answers all queries
            from the support alone.

    Raises:
        FloatingPointError: If a prediction is NaN or infinite, naming learner and episode.
        ValueError: If a count is out of range or a distribution has not the batch shape (B, Q).
        TypeError: If learner, tasks or `prequential` are something else.
    """
    return evaluate_shots(
        learner,
        tasks,
        shots=(check_count("n_shot", n_shot),),
        n_query=n_query,
        n_episodes=n_episodes,
        split=split,
        seed=seed,
        batch_size=batch_size,
        device=device,
        name=name,
        prequential=prequential,
    )[n_shot]


def evaluate_shots(
    learner: Learner,
    tasks: TaskDistribution,
    *,
    shots: Sequence[int],
    n_query: int,
    n_episodes: int = 600,
    split: Split = "test",
    seed: int = EVAL_SEED,
    batch_size: int = 50,
    device: str | torch.device | None = None,
    name: str | None = None,
    prequential: bool | None = None,
) -> dict[int, Evaluation]:
    """Evaluate at several numbers of shots on the same tasks, queries and nested supports, so that curves are paired.

    The largest support is drawn once and `first_shots` cuts it. See `evaluate` for the other arguments.

    Args:
        learner: Trained or not.
        tasks: Where the episodes come from.
        shots: Support rows per class, or per task in regression; each at least 1.
        n_query: Query rows, likewise.
        n_episodes: E.
        split: Which tasks.
        seed: The address of the episodes.
        batch_size: Tasks adapted together.
        device: Where to run.
        name: For messages and reports.
        prequential: See `evaluate`.

    Returns:
        An evaluation for each number of shots; they share one fingerprint, that of the largest support.
    """
    name = name or type(learner).__name__
    _check_served(learner, tasks, name)
    n_episodes = check_count("n_episodes", n_episodes)
    in_order = is_prequential(prequential, tasks.spec)
    shots = sorted({check_count("shots", k) for k in shots})
    if not shots:
        raise ValueError("shots must name at least one number of support rows; got none")
    stream = EpisodeStream(tasks, seed=seed, split=split, n_shot=shots[-1], n_query=n_query)
    digest, tallies = hashlib.sha256(), {k: Tally(name, tasks.spec, in_order) for k in shots}
    with _evaluating(learner, device, seed):
        used = device_of(learner)
        for episode in stream.batches(0, n_episodes, batch_size=batch_size):
            _chain(digest, episode)
            y, episode = episode.query.y, place(episode, learner)
            for k, tally in tallies.items():
                support = episode.support if k == shots[-1] else first_shots(episode.support, k, tasks.spec)
                tally.add(learner, support, episode.query, y)
    common: dict[str, Any] = {"learner": name, "kind": tasks.spec.kind, "fingerprint": digest.hexdigest()}
    common |= {"n_query": n_query, "split": split, "seed": seed, "batch_size": batch_size, "device": str(used)}
    common |= {"parameters": sum(p.numel() for p in learner.parameters()), "transductive": learner.traits.transductive}
    common |= {"prequential": in_order}
    return {k: Evaluation(n_shot=k, **common, **tally.result()) for k, tally in tallies.items()}


def _check_served(learner: Learner, tasks: TaskDistribution, name: str) -> None:
    check_is_learner(learner)
    check_distribution(tasks)
    check_built_for(name, learner.spec, tasks.spec)


@contextmanager
def _evaluating(learner: Learner, device: str | torch.device | None, seed: int) -> Iterator[None]:
    """Eval mode on `device`, no gradients, own randomness; afterwards modes and device are as they were."""
    home = device_of(learner)
    there = home if device is None else check_device(device)
    try:
        if there != home:
            learner.to(there)
        with torch.no_grad(), training_mode(learner, False), isolated_randomness(derive_seed(seed, "learner"), there):
            yield
    finally:
        if there != home:
            learner.to(home)


def _chain(digest: Any, episode: Episode) -> None:
    """Add each task's real rows to the digest: neither padding nor the cut into batches shows in it."""
    for task in episode:
        support, query = (_bare(part) for part in (task.support, task.query))
        digest.update(Episode(support, query).fingerprint().encode())


def _bare(examples: Examples) -> Examples:
    if examples.mask is None:
        return Examples(examples.x, examples.y)
    real = examples.mask[0]
    return Examples(examples.x[:, real], examples.y[:, real])
