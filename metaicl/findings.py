"""What the results of a comparison say: intervals, paired differences, regret."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from metaicl.checks import check_choice
from metaicl.evaluation import Evaluation
from metaicl.metrics import Calibration, metric_bounds, pooled, primary_metric
from metaicl.results import Result, Role, Status
from metaicl.statistics import Array, Bounds, Interval, family_intervals, interval, paired


@dataclass(frozen=True)
class Row:
    """One learner on one task distribution, over its finished seeds.

    Args:
        learner: Its name.
        role: "learner" or "reference".
        status: "finished" if any seed finished.
        note: What did not finish and why; "" if everything did.
        seeds: The finished seeds; (None,) for a learner that draws nothing.
        metrics: The interval of each metric.
        calibration: Pooled over rows, episodes and seeds.
        difference: Paired difference to the baseline in the primary metric, p-value Holm-corrected over the
            distribution's learners; None for the baseline itself.
        regret: How much worse than the first reference in the primary metric, on the same episodes; None without one.
        train_seconds: Mean over seeds; None where nothing was trained here.
        adapt_seconds: Per task, mean over seeds.
        predict_seconds: Per task, mean over seeds.
        parameters: Numbers in the parameters.
        state_bytes: Bytes of adapted state per task.
        peak_memory_bytes: Of evaluating a batch, the highest over seeds; None where it is not known.
        transductive: An answer may depend on the other queries.
    """

    learner: str
    role: Role
    status: Status
    note: str = ""
    seeds: tuple[int | None, ...] = ()
    metrics: Mapping[str, Interval] | None = None
    calibration: Calibration | None = None
    difference: Interval | None = None
    regret: Interval | None = None
    train_seconds: float | None = None
    adapt_seconds: float | None = None
    predict_seconds: float | None = None
    parameters: int | None = None
    state_bytes: int | None = None
    peak_memory_bytes: int | None = None
    transductive: bool | None = None

    @property
    def seeds_text(self) -> str:
        """How many training runs the interval covers; a single one is never passed off as certainty."""
        if not self.seeds:
            return "-"
        if self.seeds == (None,):
            return "fixed"
        return str(len(self.seeds)) if len(self.seeds) > 1 else "n/a (1 seed)"


@dataclass(frozen=True, repr=False)
class Findings:
    """Results with the questions one asks of them. `Report` adds the ways to show them.

    Args:
        protocol: How the comparison was made: split, seeds, episodes, versions, device ...
        tasks: For each task distribution its card: spec, n_shot, n_query, baseline, example tasks.
        results: One per (task, learner, seed), in the order of the tables.

    Raises:
        ValueError: If two results on one task distribution were made on different episodes, or only one of them is
            prequential.
    """

    protocol: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    results: tuple[Result, ...]
    _rows: dict[str, list[Row]] = field(default_factory=dict, init=False, compare=False)  # what `rows` has computed
    _gaps: dict[tuple[str, str | None, str | None], dict[tuple[str, str], Interval]] = field(
        default_factory=dict, init=False, compare=False
    )  # what `differences` has

    def __post_init__(self) -> None:
        """Refuse to compare what was not judged on the same episodes."""
        for task in self.tasks:
            seen: dict[str, str] = {}
            ways: dict[bool, str] = {}
            for result in self._finished(task):
                for evaluation in result.evaluations.values():
                    seen.setdefault(evaluation.fingerprint, result.learner)
                    ways.setdefault(evaluation.prequential, result.learner)
            if len(seen) > 1:
                found = ", ".join(f"{name} on {fingerprint[:12]}" for fingerprint, name in seen.items())
                raise ValueError(f"results on {task!r} must be on the same episodes to be compared; got {found}")
            if len(ways) > 1:
                found = f"{ways[True]} answered row by row, {ways[False]} all queries at once"
                raise ValueError(f"results on {task!r} must be all prequential or none to be compared; got {found}")
        unknown = sorted({result.task for result in self.results} - set(self.tasks))
        if unknown:
            raise ValueError(f"every result needs the card of its task distribution; there is none for {unknown}")

    def learners(self, task: str, *, finished: bool = False) -> list[str]:
        """Names in the order of the table."""
        self._card(task)
        chosen = self._finished(task) if finished else [result for result in self.results if result.task == task]
        return list(dict.fromkeys(result.learner for result in chosen))

    def metric(self, task: str) -> str:
        """The metric that tables and tests lead with."""
        return primary_metric(self._card(task)["spec"]["kind"])

    def bounds(self, task: str, metric: str | None = None) -> Bounds:
        """The lowest and the highest value of a metric on an episode, where its intervals end."""
        return metric_bounds(metric or self.metric(task), self._card(task)["spec"]["kind"])

    def shots(self, task: str) -> list[int]:
        """The numbers of shots of the per-shot curves; one number where there is no curve."""
        return sorted({shots for result in self._finished(task) for shots in result.evaluations})

    def values(self, task: str, learner: str, metric: str | None = None, *, shots: int | None = None) -> Array:
        """Per-episode values (S, E) of a finished learner, one row per seed."""
        metric = metric or self.metric(task)
        found = self._evaluations(task, learner, shots)
        check_choice("metric", metric, found[0].metrics)
        return np.stack([evaluation.metrics[metric] for evaluation in found])

    def interval(self, task: str, learner: str, metric: str | None = None, *, shots: int | None = None) -> Interval:
        """The mean and its 95 % interval; see `metaicl.statistics.intervals`."""
        return interval(self.values(task, learner, metric, shots=shots), bounds=self.bounds(task, metric))

    def best(self, task: str) -> str | None:
        """The learner with the best mean (a reference where nothing else finished); None where nothing did."""
        names = self.learners(task, finished=True)
        own = [name for name in names if self.of(task, name)[0].role == "learner"] or names
        sign = 1 if self.metric(task) == "accuracy" else -1
        return max(own, key=lambda name: sign * self.values(task, name).mean(), default=None)

    def baseline(self, task: str) -> str | None:
        """What differences are taken to: the declared baseline where it finished, or else the best learner."""
        declared = self._card(task).get("baseline")
        return declared if declared in self.learners(task, finished=True) else self.best(task)

    def reference(self, task: str) -> str | None:
        """The first reference that finished: what regret is taken to."""
        return next((result.learner for result in self._finished(task) if result.role == "reference"), None)

    def differences(
        self, task: str, *, baseline: str | None = None, metric: str | None = None
    ) -> dict[tuple[str, str], Interval]:
        """Paired differences first - second on the same seeds and episodes, p-values Holm-corrected as one family.

        Args:
            task: Name of the task distribution.
            baseline: The second of every pair; None compares all pairs. One that was not declared in `compare` may have
                been chosen for what these results show: the family is then all pairs too.
            metric: By default the primary one.

        Returns:
            Intervals by pair; without pairs of learners that finished no seed in common.
        """
        names = self.learners(task, finished=True)
        if baseline is not None:
            check_choice("baseline", baseline, names)
            pairs = [(name, baseline) for name in names if name != baseline]
        else:
            pairs = [(first, second) for i, first in enumerate(names) for second in names[i + 1 :]]
        asked, key = set(pairs), (task, baseline, metric)
        if baseline is not None and baseline != self._card(task).get("baseline"):
            others = [name for name in names if name != baseline]
            pairs += [(first, second) for i, first in enumerate(others) for second in others[i + 1 :]]
        if key not in self._gaps:  # tables, plots and sentences ask for the same ones, of many learners for long
            gaps = {pair: self._paired(task, *pair, metric) for pair in pairs}
            matrices = {pair: matrix for pair, matrix in gaps.items() if matrix is not None}
            found = family_intervals(list(matrices.values()), bounds=self._gap_bounds(task, metric))
            self._gaps[key] = dict(zip(matrices, found, strict=True))
        return {pair: one for pair, one in self._gaps[key].items() if pair in asked}

    def regret(self, task: str, learner: str, metric: str | None = None) -> Interval | None:
        """How much worse than the first reference on the same episodes; positive is worse, None without a reference."""
        reference, metric = self.reference(task), metric or self.metric(task)
        if reference is None or reference == learner:
            return None
        gap = self._paired(task, learner, reference, metric)
        bounds = self._gap_bounds(task, metric)
        return None if gap is None else interval(-gap if metric == "accuracy" else gap, bounds=bounds)

    def rows(self, task: str) -> list[Row]:
        """The table of one task distribution."""
        if task not in self._rows:
            baseline = self.baseline(task)
            differences = {} if baseline is None else self.differences(task, baseline=baseline)
            names = self.learners(task)
            self._rows[task] = [self._row(task, name, differences.get((name, str(baseline)))) for name in names]
        return list(self._rows[task])

    def pooled_calibration(self, task: str, learner: str) -> Calibration | None:
        """Calibration over the query rows of all episodes and seeds; None where the predictions cannot tell."""
        found = [evaluation.calibration for evaluation in self._evaluations(task, learner, None)]
        return pooled([one for one in found if one is not None])

    def of(self, task: str, learner: str) -> list[Result]:
        """The finished results of a learner, by seed.

        Raises:
            ValueError: If there are none.
        """
        check_choice("learner", learner, self.learners(task, finished=True))
        return [result for result in self._finished(task) if result.learner == learner]

    def _card(self, task: str) -> Mapping[str, Any]:
        return self.tasks[check_choice("task", task, self.tasks)]

    def _finished(self, task: str) -> list[Result]:
        return [result for result in self.results if result.task == task and result.status == "finished"]

    def _evaluations(self, task: str, learner: str, shots: int | None) -> list[Evaluation]:
        shots = int(self._card(task)["n_shot"]) if shots is None else shots
        found = [result.evaluations[shots] for result in self.of(task, learner) if shots in result.evaluations]
        if not found:
            raise ValueError(f"{learner!r} was not evaluated at {shots} shots on {task!r}; there is {self.shots(task)}")
        return found

    def _paired(self, task: str, first: str, second: str, metric: str | None) -> Array | None:
        """The difference first - second (S, E) on the seeds that both finished; None where there is no such seed."""
        seeds = [[result.seed for result in self.of(task, name)] for name in (first, second)]
        values = [self.values(task, name, metric) for name in (first, second)]
        if None not in seeds[0] and None not in seeds[1]:
            common = [seed for seed in seeds[0] if seed in seeds[1]]
            if not common:
                return None
            values = [one[[own.index(seed) for seed in common]] for one, own in zip(values, seeds, strict=True)]
        return paired(*values)

    def _gap_bounds(self, task: str, metric: str | None) -> Bounds:
        low, high = self.bounds(task, metric)
        return low - high, high - low

    def _row(self, task: str, learner: str, difference: Interval | None) -> Row:
        results = [result for result in self.results if result.task == task and result.learner == learner]
        missing = [result for result in results if result.status != "finished"]
        note = "; ".join(dict.fromkeys(_why(result) for result in missing))
        finished = [result for result in results if result.status == "finished"]
        if not finished:
            return Row(learner, results[0].role, results[0].status, note)
        evaluations = self._evaluations(task, learner, None)
        peaks = [one.peak_memory_bytes for one in evaluations if one.peak_memory_bytes is not None]
        trained = [result.train_seconds for result in finished if result.train_seconds is not None]
        return Row(
            learner,
            finished[0].role,
            "finished",
            note,
            seeds=tuple(result.seed for result in finished),
            metrics={name: self.interval(task, learner, name) for name in evaluations[0].metrics},
            calibration=self.pooled_calibration(task, learner),
            difference=difference,
            regret=self.regret(task, learner),
            train_seconds=float(np.mean(trained)) if trained else None,
            adapt_seconds=float(np.mean([one.adapt_seconds for one in evaluations])),
            predict_seconds=float(np.mean([one.predict_seconds for one in evaluations])),
            parameters=evaluations[0].parameters,
            state_bytes=evaluations[0].state_bytes,
            peak_memory_bytes=max(peaks) if peaks else None,
            transductive=evaluations[0].transductive,
        )


def _why(result: Result) -> str:
    seed = "" if result.seed is None else f" (seed {result.seed})"
    return f"{result.status}{seed}: {result.reason}"
