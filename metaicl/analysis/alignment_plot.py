"""Alignment panels: how close two learners are, along training or along a change of the tasks."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metaicl.analysis.alignment import Alignment
from metaicl.analysis.fingerprint_plot import label_plainly
from metaicl.plots import COLORS, GRAY, STYLE
from metaicl.statistics import Interval


def draw_alignments(
    found: Mapping[int, Alignment] | Mapping[float, Alignment],
    path: str | os.PathLike[str] | None = None,
    *,
    xlabel: str = "updates",
    names: tuple[str, str] = ("trained", "reference"),
) -> Figure:
    """Three panels with 95 % bands: both losses, the cosine of the slopes, and the differences of answers and slopes.

    Args:
        found: Alignments by what the horizontal axis shows, such as the updates of `follow`.
        path: Where to write it, if anywhere.
        xlabel: What that is.
        names: Of the learner and of the one it is compared with.

    Raises:
        ValueError: If there are fewer than two alignments.

    Reference:
        von Oswald et al. 2022, arXiv:2212.07677, figure 2. Differs: the difference of slopes is in proportion to the
        reference's.
    """
    if len(found) < 2:
        raise ValueError(f"draw_alignments needs alignments at two places or more; got {len(found)}")
    found = dict(sorted(found.items()))
    with matplotlib.rc_context({**STYLE, "figure.facecolor": "white"}):
        figure = Figure(figsize=(10.5, 3.0), layout="constrained")
        losses, cosine, differences = figure.subplots(1, 3)
        looks = list(found.values())
        for side, (color, style) in enumerate(((COLORS[0], "-"), (GRAY, "--"))):
            _curve(losses, found, [one.losses[side] for one in looks], label=names[side], color=color, linestyle=style)
        losses.set(title="half the squared error", yscale="log")
        label_plainly(losses, (1, 2, 3, 5))
        _curve(cosine, found, [one.cosine for one in looks], color=COLORS[0])
        cosine.axhline(1, color=GRAY, linestyle="--")
        lowest = min(0.0, *(one.cosine.mean for one in looks))
        cosine.set(title="cosine of slopes", ylim=(lowest - 0.02, 1.04))
        answers, slopes = [one.answer_difference for one in looks], [one.slope_difference for one in looks]
        _curve(differences, found, answers, label="of answers", color=COLORS[0])
        sizes = [one.slope_norm.mean for one in looks]
        _curve(differences, found, slopes, sizes, label="of slopes / size", color=COLORS[1])
        differences.set(title="differences", ylim=(0, None))
        for axes in (losses, cosine, differences):
            axes.set_xlabel(xlabel)
        for axes in (losses, differences):
            axes.legend()
    if path is not None:
        figure.savefig(path, dpi=160, facecolor="white")
    return figure


def _curve(
    axes: Axes,
    places: Iterable[float],
    values: Sequence[Interval],
    sizes: Sequence[float] | None = None,
    *,
    color: str,
    label: str = "",
    linestyle: str = "-",
) -> None:
    """A mean over its size and its band, where there is one; nothing where the size is zero."""
    divided = [
        tuple(end / size if size else math.nan for end in (one.mean, *(one.ends or (one.mean, one.mean))))
        for one, size in zip(values, sizes or [1.0] * len(values), strict=True)
    ]
    mean, low, high = zip(*divided, strict=True)
    axes.plot(list(places), mean, linestyle, color=color, label=label)
    axes.fill_between(list(places), low, high, color=color, alpha=0.15, linewidth=0)
