"""What an evaluation adds up over its batches: metrics, calibration, seconds and memory."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.utils._pytree as pytree
from numpy.typing import NDArray
from torch import Tensor, nn

from metaicl.episode import Examples
from metaicl.functional import HALF_PRECISION
from metaicl.learner import Learner
from metaicl.metrics import calibration
from metaicl.peak_memory import read_peak, start_peak
from metaicl.prequential import Answer, answer_in_order, counts_of, in_single, score
from metaicl.spec import TaskSpec

T = TypeVar("T")


@dataclass
class Tally:
    """The sums of one evaluation.

    Args:
        name: Of the learner, for messages.
        spec: What the tasks look like.
        prequential: Each query row is answered from all rows before it, see `metaicl.prequential`.
    """

    name: str
    spec: TaskSpec
    prequential: bool
    metrics: dict[str, list[Tensor]] = field(default_factory=dict)
    counts: NDArray[np.float64] | None = None
    seconds: list[tuple[float, float]] = field(default_factory=list)
    n_episodes: int = 0
    state_bytes: int = 0
    peak_bytes: int | None = None

    def add(self, learner: Learner, support: Examples, query: Examples, y: Tensor) -> None:
        """Judge a learner on a batch of tasks.

        Args:
            learner: In eval mode.
            support: On its device and in its dtype.
            query: Likewise.
            y: The targets of the query in the dtype they were drawn in, which a learner in half precision is judged by.

        Raises:
            FloatingPointError: If an answer is NaN or infinite.
        """
        held = start_peak(query.x.device)
        try:
            state, adapting = _timed(lambda: learner.adapt(support), query.x.device)
            answers, predicting = _timed(lambda: self._answers(learner, state, support, query), query.x.device)
            peak = read_peak(query.x.device, held)
            if any(parameter.dtype in HALF_PRECISION for parameter in learner.parameters()):
                answers = in_single(answers, y.to(query.y.device))
            values = score(answers, self.spec, first_episode=self.n_episodes)
        except FloatingPointError as error:
            last = self.n_episodes + query.n_tasks - 1
            raise FloatingPointError(f"{self.name} failed in episodes {self.n_episodes} to {last}: {error}") from error
        for metric, value in values.items():
            self.metrics.setdefault(metric, []).append(value)
        counts = counts_of(answers, self.spec)
        if counts is not None:
            self.counts = counts if self.counts is None else self.counts + counts
        self.seconds.append((adapting / query.n_tasks, predicting / query.n_tasks))
        self.state_bytes = max(self.state_bytes, _bytes_of(state) // query.n_tasks)
        if peak is not None:
            self.peak_bytes = max(self.peak_bytes or 0, peak)
        self.n_episodes += query.n_tasks

    def result(self) -> dict[str, Any]:
        """The fields of an `Evaluation` that were added up here."""
        adapting, predicting = np.median(np.array(self.seconds), axis=0).tolist()
        return {
            "metrics": {name: torch.cat(values).numpy() for name, values in self.metrics.items()},
            "calibration": None if self.counts is None else calibration(self.counts, self.spec.kind),
            "adapt_seconds": adapting,
            "predict_seconds": predicting,
            "state_bytes": self.state_bytes,
            "peak_memory_bytes": self.peak_bytes,
        }

    def _answers(self, learner: Learner, state: Any, support: Examples, query: Examples) -> list[Answer]:
        if self.prequential:
            return answer_in_order(learner, state, support, query)
        return [Answer(learner.predict(state, query.x), query)]


def _timed(function: Callable[[], T], device: torch.device) -> tuple[T, float]:
    _wait(device)
    start = time.perf_counter()
    result = function()
    _wait(device)
    return result, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes_of(state: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in _tensors_of(state))


def _tensors_of(state: Any) -> Iterator[Tensor]:
    """The tensors of a state: in tuples, lists and dicts, in fields of dataclasses, and those of modules."""
    for leaf in pytree.tree_leaves(state):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, nn.Module):
            yield from (*leaf.parameters(), *leaf.buffers())
        elif is_dataclass(leaf):  # an object to pytrees, where nobody registered it
            yield from _tensors_of([getattr(leaf, one.name) for one in fields(leaf)])
