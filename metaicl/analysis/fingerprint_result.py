"""What a fingerprint holds: distances to every reference at every prefix, fitted numbers, and a verdict."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from metaicl.analysis.fingerprint_plot import draw_fingerprint
from metaicl.analysis.parameter_fits import Estimate
from metaicl.files import atomic_write
from metaicl.statistics import Array, Interval

FAR = 0.25
"""A relative distance beyond which a verdict says that no reference is near; zero answers have 1."""


@dataclass(frozen=True)
class Nearest:
    """The nearest reference at one prefix.

    Args:
        length: Rows in the prefix.
        reference: Its name. Of references that give the same answers up to rounding, one without a free number.
        ties: Other references that are not significantly farther (paired over seeds and episodes, Holm-corrected over
            all pairs of references); those that give the same answers are among them.
        runner_up: The next nearest.
        gap: Relative distance of the runner-up less that of the nearest, paired, each cut at 10.
    """

    length: int
    reference: str
    ties: tuple[str, ...]
    runner_up: str
    gap: Interval


@dataclass(frozen=True)
class CloserLook:
    """The linear map in a learner's answers after one prefix length, on fresh inputs. Regression only.

    Args:
        length: Rows in the prefix.
        r2: Share of the variance of the learner's answers that a linear map explains, pooled over episodes.
        weight_difference: ILWD to each reference, E|w_A - w_B|^2, mean over outputs.
        weight_norm: E|w_A|^2 of the learner, the ILWD to zero.
        cosine: Mean cosine of d answer / d input to each reference; empty where there are no derivatives.
        slope_difference: Mean |d answer_A / d input - d answer_B / d input|, likewise.
        slope_norm: Mean |d answer_A / d input| of the learner; None where there are no derivatives.
        eigenvalues: Of the support's Gram matrix, the mean of each bin, rising.
        gain: The learner's gain s f(s) in each bin: 1 is least squares, s / (s + penalty) ridge, 0 ignores the support.
        gains: The gain of each reference in each bin, by the same estimate.
    """

    length: int
    r2: Interval
    weight_difference: Mapping[str, Interval]
    weight_norm: float
    cosine: Mapping[str, Interval]
    slope_difference: Mapping[str, Interval]
    slope_norm: float | None
    eigenvalues: tuple[float, ...]
    gain: tuple[Interval, ...]
    gains: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class ParameterFit:
    """The free number of a reference at which it is nearest to the learner.

    Args:
        symbol: Its name.
        overall: One number for all prefixes (mean relative distance).
        by_length: One for each prefix length.
    """

    symbol: str
    overall: Estimate
    by_length: Mapping[int, Estimate]


@dataclass(frozen=True)
class Fingerprint:
    """Which reference algorithm a learner's answers are nearest to, and where along the prefix. `str` is the table.

    Args:
        learner: Its name.
        task: Of the distribution.
        kind: "regression" or "classification".
        measure: What a distance is: "squared difference per output" or "total variation".
        n_seeds: Learners, one for each training seed.
        n_episodes: Episodes measured; as many others served to fit the free numbers.
        n_shot: Support rows, per class in classification.
        seed: Address of the episodes.
        split: Which tasks.
        episodes: SHA-256 of the measured episodes.
        lengths: Prefix lengths, 0 .. N.
        risk: Squared error per output (Brier score in classification) at each length, of the learner under "learner"
            and of each reference.
        distance: Distance of the answers to each reference at each length: SPD in regression.
        relative: The same over the distance to zero (uniform) answers, linearized ratios; from length 1.
        overall: Mean of `relative` over the lengths from 1, nearest reference first.
        overall_ties: References that are not significantly farther overall than the first, corrected likewise.
        fits: For references with a free number.
        nearest: From length 1.
        closer: At some lengths; empty in classification.
        notes: What was not measured, and why.
        values: The distances (S, E) of every seed and episode whose means are `overall`, for paired comparisons of
            learners on the same episodes. They are linearized ratios, so that single ones may be negative.
    """

    learner: str
    task: str
    kind: str
    measure: str
    n_seeds: int
    n_episodes: int
    n_shot: int
    seed: int
    split: str
    episodes: str
    lengths: tuple[int, ...]
    risk: Mapping[str, tuple[Interval, ...]]
    distance: Mapping[str, tuple[Interval, ...]]
    relative: Mapping[str, tuple[Interval, ...]]
    overall: Mapping[str, Interval]
    overall_ties: tuple[str, ...]
    fits: Mapping[str, ParameterFit]
    nearest: tuple[Nearest, ...]
    closer: tuple[CloserLook, ...]
    notes: tuple[str, ...]
    values: Mapping[str, Array] = field(repr=False, compare=False)

    @property
    def best(self) -> str:
        """The nearest reference overall."""
        return next(iter(self.overall))

    @property
    def stretches(self) -> list[tuple[str, int, int]]:
        """Where along the prefix which reference is nearest: (name, first length, last length)."""
        found = []
        for name, group in groupby(self.nearest, key=lambda one: one.reference):
            lengths = [one.length for one in group]
            found.append((name, lengths[0], lengths[-1]))
        return found

    @property
    def verdict(self) -> str:
        """The finding in a few sentences."""
        best, value = self.best, self.overall[self.best]
        opening = f"{self.learner} answers most like {self._labeled(best)}"
        if value.mean > FAR:
            opening = f"{self.learner} is near none of the references; the nearest is {self._labeled(best)}"
        ties = ", ".join(self._labeled(name) for name in self.overall_ties)
        clear = f"not distinguishable from {ties}" if ties else "significantly nearer than every other reference"
        where = ", ".join(
            f"{name} at {first}" if first == last else f"{name} at {first}-{last}"
            for name, first, last in self.stretches
        )
        unit = f"a distance of {show(value)} where {'zero' if self.kind == 'regression' else 'uniform'} answers have 1"
        text = f"{opening}: {unit}; {clear}. Nearest along the prefix: {where}."
        linear = [look for look in self.closer if look.length >= 1]
        if linear:
            last = linear[-1]
            text += f" A linear map explains {show(last.r2)} of its answers after {last.length} rows."
        return text

    def _labeled(self, name: str) -> str:
        fit = self.fits.get(name)
        return name if fit is None else f"{name} ({fit.symbol} = {fit.overall})"

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, without `values`; numbers that are not finite are None."""
        found = asdict(replace(self, values={}))
        del found["values"]
        return {**_plain(found), "best": self.best, "verdict": self.verdict}

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a file."""
        atomic_write(Path(path), json.dumps(self.to_dict(), indent=1).encode())

    def plot(self, path: str | os.PathLike[str] | None = None, *, at: int | None = None) -> Figure:
        """The fingerprint as one picture; written to `path` (.png, .svg, .pdf) if one is given.

        Args:
            path: The file.
            at: Which closer look to draw; None takes the one nearest to the middle of the prefix.
        """
        figure = draw_fingerprint(self, at=at)
        if path is not None:
            figure.savefig(path, dpi=160, facecolor="white")
        return figure

    def __str__(self) -> str:
        """Verdict and table."""
        picked = _pick(self.lengths[1:], 6)
        rows: list[Sequence[str]] = [("reference", "free number", "overall", *(f"k={k}" for k in picked))]
        for name, value in self.overall.items():
            fit = self.fits.get(name)
            cells = [f"{self.relative[name][k - 1].mean:.3g}" for k in picked]
            cells = [f"{cell}{self._mark(name, k)}" for cell, k in zip(cells, picked, strict=True)]
            rows.append((name, "" if fit is None else f"{fit.symbol} = {fit.overall}", show(value), *cells))
        rows.append(("risk of the learner", "", "", *(f"{self.risk['learner'][k].mean:.3g}" for k in picked)))
        counts = f"{self.n_seeds} seed{'s' * (self.n_seeds > 1)}, {self.n_episodes} episodes"
        zero = "zero" if self.kind == "regression" else "uniform"
        head = f"Fingerprint of {self.learner} on {self.task}: {self.measure}, over that to {zero} answers; {counts}"
        foot = "* nearest, ~ not significantly farther (95 %, Holm-corrected); k is the number of rows seen"
        parts = [head, self.verdict, "", _table(rows), foot]
        closer = self._closer_table()
        parts += [closer] if closer else []
        return "\n".join([*parts, *(f"note: {note}" for note in self.notes)])

    def _mark(self, name: str, length: int) -> str:
        one = self.nearest[length - 1]
        return "*" if name == one.reference else "~" if name in one.ties else " "

    def _closer_table(self) -> str:
        if not self.closer:
            return ""
        rows: list[Sequence[str]] = [
            ("rows seen", "R2 of a linear map", "nearest by weights", "ILWD / |w|^2", "cosine")
        ]
        for look in self.closer:
            name = min(look.weight_difference, key=lambda one: look.weight_difference[one].mean)
            apart = look.weight_difference[name].mean
            share = f"{apart / look.weight_norm:.3g}" if look.weight_norm > 0 else "-"
            cosine = f"{look.cosine[name].mean:.4f}" if look.cosine else "-"
            rows.append((str(look.length), show(look.r2), name, share, cosine))
        return "\n" + _table(rows)


def show(one: Interval) -> str:
    """A mean with its interval, three digits each."""
    if one.low is None or one.high is None:
        return f"{one.mean:.3g}"
    return f"{one.mean:.3g} [{one.low:.3g}, {one.high:.3g}]"


def _pick(lengths: Sequence[int], n: int) -> list[int]:
    """At most `n` of the lengths, evenly, both ends included."""
    if len(lengths) <= n:
        return list(lengths)
    return [lengths[round(i * (len(lengths) - 1) / (n - 1))] for i in range(n)]


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
