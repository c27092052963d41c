"""The fingerprint as one picture."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from metaicl.plots import COLORS, GRAY, INK, STYLE

_FLOOR = 1e-6  # relative distances below it are drawn as this
_SHOWN = 16  # references in the map, the nearest ones
_COMPARED = 4  # references beside the learner in a curve


def draw_fingerprint(found: Any, *, at: int | None = None) -> Figure:
    """Draw a `Fingerprint`.

    Top: relative distance to each reference at each prefix, and its mean over prefixes. Bottom: risk; the fitted
    penalty of ridge; the gain along the eigenvectors of the support. What was not measured has no panel.

    Args:
        found: The fingerprint.
        at: Which closer look to draw; None takes the one nearest to the middle of the prefix.
    """
    names = list(found.overall)[:_SHOWN]
    panels = [_draw_risk]
    panels += [_draw_fits] if found.fits else []
    panels += [_draw_gains] if any(look.gain for look in found.closer) else []
    with matplotlib.rc_context({**STYLE, "figure.facecolor": "white"}):
        height = 1.2 + 0.27 * len(names) + 4.1
        figure = Figure(figsize=(11.5, height), layout="constrained")
        halves: Any = figure.subfigures(2, 1, height_ratios=[1.2 + 0.27 * len(names), 4.1])
        upper, lower = halves
        left, right = upper.subplots(1, 2, width_ratios=[2.6, 1], sharey=True)
        _draw_map(upper, left, found, names)
        _draw_overall(right, found, names)
        for draw, axes in zip(panels, np.atleast_1d(lower.subplots(1, len(panels))), strict=True):
            draw(axes, found, at)
    return figure


def _draw_map(figure: Any, axes: Axes, found: Any, names: Sequence[str]) -> None:
    lengths = found.lengths[1:]
    values = np.array([[one.mean for one in found.relative[name]] for name in names]).clip(_FLOOR, None)
    low = max(_FLOOR, 10 ** np.floor(np.log10(values.min())))
    image = axes.imshow(
        values,
        aspect="auto",
        cmap=colormaps["cividis"],
        norm=LogNorm(low, 2.0),
        interpolation="nearest",
        extent=(lengths[0] - 0.5, lengths[-1] + 0.5, len(names) - 0.5, -0.5),
    )
    rows = {name: i for i, name in enumerate(names)}
    best = [(one.length, rows[one.reference]) for one in found.nearest if one.reference in rows]
    ties = [(one.length, rows[name]) for one in found.nearest for name in one.ties if name in rows]
    size = min(34.0, 900.0 / len(lengths))
    if ties:
        axes.scatter(*zip(*ties, strict=True), s=size, facecolors="none", edgecolors="white", linewidths=1.1)
    axes.scatter(*zip(*best, strict=True), s=size, c="white", edgecolors=INK, linewidths=0.8)
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=2))
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set(xlabel="rows seen   (filled: nearest;  open: not significantly farther)")
    axes.set(title=f"{found.learner} on {found.task}: distance to reference algorithms")
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.04, extend="both")
    bar.set_label("distance / distance to zero" if found.kind == "regression" else "distance / distance to uniform")
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_minor_locator(NullLocator())


def _draw_overall(axes: Axes, found: Any, names: Sequence[str]) -> None:
    left = max(_FLOOR, min(found.overall[name].mean for name in names) / 10)  # an interval may reach zero
    for i, name in enumerate(names):
        one = found.overall[name]
        color = COLORS[0] if i == 0 or name in found.overall_ties else GRAY
        if one.low is not None:
            axes.plot([max(one.low, left), max(one.high, left)], [i, i], color=color, linewidth=2.5)
        axes.plot([max(one.mean, left)], [i], marker="o", markersize=6, color=color)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", length=0)
    counts = f"{found.n_seeds} seed{'s' * (found.n_seeds > 1)}, {found.n_episodes} episodes"
    axes.set(xlabel="mean over prefixes, 95 % interval", title=counts)


def _draw_risk(axes: Axes, found: Any, at: int | None) -> None:
    names = [name for name in found.overall if name != found.best][: _COMPARED - 1]
    bayes = [name for name in found.risk if name == "Bayes" and name != found.best and name not in names]
    shown = [found.best, *names, *bayes]
    top = max(one.mean for one in found.risk["learner"])
    for i, name in enumerate(shown):
        style = {"color": COLORS[(i + 1) % len(COLORS)], "linestyle": ("--", ":", "-.")[i % 3]}
        _band(axes, found.lengths, found.risk[name], name, style, fill=False)
    _band(axes, found.lengths, found.risk["learner"], found.learner, {"color": COLORS[0], "linewidth": 2.2}, fill=True)
    unit = "squared error per output" if found.kind == "regression" else "Brier score"
    axes.set(title="Risk", xlabel="rows seen", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    positive = [one.mean for name in ("learner", *shown) for one in found.risk[name] if one.mean > 0]
    if positive:
        axes.set_yscale("log")
        axes.set_ylim(max(min(positive) / 1.6, 1e-6 * top), 1.8 * top)
        label_plainly(axes)
    _legend(axes)


def _draw_fits(axes: Axes, found: Any, at: int | None) -> None:
    """The fitted number of the nearest reference that has one; of ridge if that is about as near."""
    name = next(name for name in found.overall if name in found.fits)
    if "ridge" in found.fits and found.overall["ridge"].mean < 2 * found.overall[name].mean:
        name = "ridge"
    fit = found.fits[name]
    lengths = list(fit.by_length)
    middle = np.array([fit.by_length[k].value for k in lengths])
    low, high = (np.array([getattr(fit.by_length[k], end) for k in lengths]) for end in ("low", "high"))
    open_ended = np.array([bool(fit.by_length[k].edge) for k in lengths])
    axes.fill_between(lengths, low, high, color=COLORS[0], alpha=0.18, linewidth=0)
    axes.plot(lengths, middle, color=COLORS[0], marker="o", markersize=3.5, label="for each prefix")
    if open_ended.any():
        axes.plot(np.array(lengths)[open_ended], middle[open_ended], "v", color=COLORS[1], label="at the grid's end")
    axes.axhline(fit.overall.value, color=INK, linestyle="--", label=f"overall: {fit.symbol} = {fit.overall}")
    axes.set_yscale("log")
    span = [*middle[~open_ended], fit.overall.value]
    axes.set_ylim(min(span) / 8, max(span) * 8)
    _legend(axes)
    label_plainly(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=f"{name}: nearest {fit.symbol}", xlabel="rows seen", ylabel=fit.symbol)


def _draw_gains(axes: Axes, found: Any, at: int | None) -> None:
    """How strongly each direction of the support is followed; the shape of the curve is the algorithm."""
    wanted = found.lengths[-1] / 2 if at is None else at
    look = min((one for one in found.closer if one.gain), key=lambda one: (abs(one.length - wanted), -one.length))
    s = np.array(look.eigenvalues)
    linear = [name for name in found.overall if name in _LINEAR and name in look.gains]
    shown = linear[:3] + [name for name in ("GD-1", "least squares") if name in linear[3:]]
    for i, name in enumerate(shown):
        style: Any = {"color": COLORS[(i + 1) % len(COLORS)], "linestyle": ("--", ":", "-.")[i % 3]}
        axes.plot(s, look.gains[name], label=name, linewidth=1.4, **style)
    middle = np.array([one.mean for one in look.gain])
    error = [[one.mean - (one.mean if one.low is None else one.low) for one in look.gain]]
    error += [[(one.mean if one.high is None else one.high) - one.mean for one in look.gain]]
    axes.errorbar(s, middle, error, fmt="o", markersize=4.5, color=COLORS[0], label=found.learner, zorder=3)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(min(0.0, 1.1 * middle.min()), max(1.25, 1.15 * middle.max()))
    title = f"Gain after {look.length} rows (1 = least squares)"
    axes.set(title=title, xlabel="eigenvalue s of the support's Gram matrix", ylabel="gain s f(s)")
    _legend(axes)


_LINEAR = frozenset(
    {"averaging", "ridge", "ridge + bias", "least squares", *(f"GD-{k}" for k in (1, 2, 3, 5, 10))}
)  # whose gain is a function of the eigenvalue


def _band(
    axes: Axes, lengths: Sequence[int], values: Sequence[Any], name: str, style: Mapping[str, Any], *, fill: bool
) -> None:
    axes.plot(lengths, [one.mean for one in values], label=name, **style)
    if fill and values[0].low is not None:
        low, high = [one.low for one in values], [one.high for one in values]
        axes.fill_between(lengths, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _legend(axes: Axes) -> None:
    """Below the panel, where no curve can cross it."""
    axes.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, handlelength=2.4)


def label_plainly(axes: Axes, steps: Sequence[float] = (1, 2, 5)) -> None:
    """Labels such as .2 and 5 instead of powers of ten, at these multiples of them."""
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
