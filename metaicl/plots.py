"""The figures of a report, one function each; every learner keeps its color in all of them.

Each function returns a matplotlib figure, or None where the report has nothing to draw. No figure touches pyplot or
its global state.
"""

import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator, ScalarFormatter

from metaicl.findings import Findings
from metaicl.statistics import intervals

COLORS = ("#0072b2", "#d55e00", "#009e73", "#b8558d", "#c98a00", "#3a9fd8", "#7b4ea3", "#7a7a00")
"""After Okabe and Ito 2008, "Color universal design"; learners beyond the eighth reuse them with broken lines."""
GRAY = "#6f7378"
INK = "#1b1e22"
FAINT = "#d9dce0"

_UP = {"accuracy": "higher is better", "mse": "lower is better"}
_NAMES = {"accuracy": "Accuracy", "mse": "Squared error"}
_UNITS = {"accuracy": "accuracy", "mse": "mse, units of y²"}
_SHOWN_ROWS = 20  # a bin with fewer rows is noise
_DASHES = ("-", "--", ":", "-.")
_WIDTH = 26  # characters of a line of a name
_INSIDE = 5  # entries of a legend that fit into the axes
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
}
"""Restrained, without a background: pages put their own behind it."""


def learner_styles(findings: Findings) -> dict[str, dict[str, Any]]:
    """Color and line style of every learner of the report; references are gray."""
    roles = {result.learner: result.role for result in findings.results}
    styles, taken = {}, {"learner": 0, "reference": 0}
    for name, role in roles.items():
        i = taken[role]
        taken[role] += 1
        if role == "learner":
            styles[name] = {"color": COLORS[i % len(COLORS)], "linestyle": _DASHES[i // len(COLORS) % len(_DASHES)]}
        else:
            styles[name] = {"color": GRAY, "linestyle": _DASHES[(i + 1) % len(_DASHES)]}
    return styles


def plot_shots(findings: Findings, task: str, *, legend: bool = True) -> Figure | None:
    """Per-shot curves with 95 % bands, on the same tasks and nested supports."""
    shots = findings.shots(task)
    if len(shots) < 2:
        return None
    metric, learners = findings.metric(task), _present(findings, task)
    with figure_with_panels() as (figure, axes):
        for name, style in learners:
            found = intervals([findings.values(task, name, shots=k) for k in shots], bounds=findings.bounds(task))
            axes.plot(shots, [one.mean for one in found], marker="o", markersize=4, label=name_text(name), **style)
            low = [one.mean if one.low is None else one.low for one in found]
            high = [one.mean if one.high is None else one.high for one in found]
            axes.fill_between(shots, low, high, color=style["color"], alpha=min(0.15, 1 / len(learners)), linewidth=0)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(shots)
        per = "class" if metric == "accuracy" else "task"
        _label(axes, f"{_NAMES[metric]} against shots", f"support rows per {per}", f"{_UNITS[metric]}, {_UP[metric]}")
        return _finish(figure, axes, legend)


def plot_differences(findings: Findings, task: str) -> Figure | None:
    """Paired differences to the baseline with 95 % intervals, one line each."""
    baseline = findings.baseline(task)
    found = {} if baseline is None else findings.differences(task, baseline=baseline)
    if not found:
        return None
    metric, styles = findings.metric(task), learner_styles(findings)
    names = [first for first, _ in found][::-1]
    with figure_with_panels(height=max(1.6, 0.45 * len(names) + 1.2)) as (figure, axes):
        axes.axvline(0, color=INK, linewidth=1)
        for y, name in enumerate(names):
            one, color = found[name, str(baseline)], styles[name]["color"]
            if one.low is not None and one.high is not None:
                axes.plot([one.low, one.high], [y, y], color=color, linewidth=2.5, solid_capstyle="round")
            axes.plot([one.mean], [y], marker="o", markersize=7, color=color, linestyle="none")
        axes.set_yticks(range(len(names)), [name_text(name) for name in names], color=INK)
        axes.locator_params(axis="x", nbins=5)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.grid(axis="y", visible=False)
        side = "right" if metric == "accuracy" else "left"
        title = name_text(f"Paired difference to {baseline}", 34)
        _label(axes, title, f"difference in {_UNITS[metric]}, {side} is better", "")
        return _finish(figure, axes, False)


def plot_cost(findings: Findings, task: str, *, legend: bool = True) -> Figure | None:
    """The primary metric against the seconds to adapt and predict, per task."""
    metric, styles = findings.metric(task), learner_styles(findings)
    rows = [row for row in findings.rows(task) if row.metrics is not None]
    if not rows:
        return None
    with figure_with_panels() as (figure, axes):
        for row in rows:
            assert row.metrics is not None
            one = row.metrics[metric]
            cost = 1e3 * ((row.adapt_seconds or 0) + (row.predict_seconds or 0))
            gap = None if one.low is None or one.high is None else [[one.mean - one.low], [one.high - one.mean]]
            marker = "D" if row.role == "reference" else "o"
            color, label = styles[row.learner]["color"], name_text(row.learner)
            axes.errorbar([cost], [one.mean], gap, fmt=marker, color=color, label=label)
        low, high = axes.dataLim.intervalx
        axes.set_xscale("log")
        axes.set_xlim(low / 3, high * 3)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        y = f"{_UNITS[metric]}, {_UP[metric]}"
        _label(axes, f"{_NAMES[metric]} against cost", "adapt and predict, ms per task", y)
        return _finish(figure, axes, legend)


def plot_training(findings: Findings, task: str, *, legend: bool = True) -> Figure | None:
    """Training loss against updates, one line per seed, smoothed by a running median."""
    with figure_with_panels() as (figure, axes):
        seen: list[float] = []
        for name, style in _present(findings, task):
            for i, result in enumerate(findings.of(task, name)):
                steps = np.array(result.history.get("step", ()), dtype=np.float64)
                loss = np.array(result.history.get("loss", ()), dtype=np.float64)
                if len(steps) < 2 or len(loss) != len(steps):
                    continue
                smooth = _running_median(loss)
                seen += smooth[np.isfinite(smooth)].tolist()
                label = name_text(name) if i == 0 else None
                axes.plot(steps, smooth, label=label, linewidth=1.3, alpha=0.85, **style)
        if not seen:
            return None
        low, high = np.quantile(seen, [0.0, 0.98])
        axes.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.1 * (high - low) + 1e-9)
        _label(axes, "Training, one line per seed", "updates", "training loss, running median")
        return _finish(figure, axes, legend)


def plot_calibration(findings: Findings, task: str, *, legend: bool = True) -> Figure | None:
    """What was promised against what happened; the diagonal is perfect."""
    found = {name: findings.pooled_calibration(task, name) for name, _ in _present(findings, task)}
    if not any(one is not None and max(one.count) >= _SHOWN_ROWS for one in found.values()):
        return None
    with figure_with_panels() as (figure, axes):
        axes.plot([0, 1], [0, 1], color=GRAY, linewidth=1)
        for name, style in _present(findings, task):
            one = found[name]
            if one is None:
                continue
            kept = [i for i, count in enumerate(one.count) if count >= _SHOWN_ROWS]
            promised, observed = [one.promised[i] for i in kept], [one.observed[i] for i in kept]
            axes.plot(promised, observed, marker="o", markersize=3.5, label=name_text(name), **style)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
        if findings.metric(task) == "accuracy":
            _label(axes, "Calibration of confidence", "confidence in the top class", "accuracy")
        else:
            _label(axes, "Calibration of prediction intervals", "level of the central interval", "share of y inside")
        return _finish(figure, axes, legend)


def plot_examples(findings: Findings, task: str, *, legend: bool = True) -> Figure | None:
    """Example tasks that have a picture in coordinates: curves with each learner's prediction, or points by class."""
    cards = findings.tasks[task]["examples"]
    if not cards or cards[0]["kind"] not in ("curve", "plane"):
        return None
    with figure_with_panels(len(cards), width=3.4 * len(cards), height=2.9) as (figure, *panels):
        for i, (card, axes) in enumerate(zip(cards, panels, strict=True)):
            if card["kind"] == "curve":
                _draw_curve(axes, card, {n: (s, _sketch(findings, task, n, i)) for n, s in _present(findings, task)})
                _label(axes, f"Task {i + 1}", "x", "y" if i == 0 else "")
            else:
                _draw_plane(axes, card)
                _label(axes, f"Task {i + 1}", "first input", "second input" if i == 0 else "")
        return _finish(figure, panels[-1], legend and cards[0]["kind"] == "curve")


def task_figures(findings: Findings, task: str, *, legend: bool = False) -> Iterator[tuple[str, Figure]]:
    """All figures of a task distribution that there is something to draw for, with their captions."""
    drawers: Mapping[str, Callable[[], Figure | None]] = {
        "Per-shot curves. Bands are 95 % intervals.": lambda: plot_shots(findings, task, legend=legend),
        "Paired differences. Lines are 95 % intervals.": lambda: plot_differences(findings, task),
        "What a better answer costs. Bars are 95 % intervals.": lambda: plot_cost(findings, task, legend=legend),
        "Training curves.": lambda: plot_training(findings, task, legend=legend),
        "Promise and frequency, pooled over all query rows; bins with fewer than 20 rows are left out.": lambda: (
            plot_calibration(findings, task, legend=legend)
        ),
    }
    for caption, draw in drawers.items():
        figure = draw()
        if figure is not None:
            yield caption, figure


def name_text(name: str, width: int = _WIDTH) -> str:
    """A name as a label: at most two lines, the middle of a longer one left out, and no formula read into it."""
    lines = textwrap.wrap(name, width) or [" "]
    text = "\n".join(lines if len(lines) <= 2 else [name[:width], f"…{name[1 - width :]}"]).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # labels that begin so are hidden in legends


@contextmanager
def figure_with_panels(n_panels: int = 1, *, width: float = 5.2, height: float = 3.4) -> Iterator[tuple[Any, ...]]:
    """An empty figure of `width` by `height` inches and its axes side by side; draw and save inside the context."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield (figure, *np.atleast_1d(figure.subplots(1, n_panels)))


def _present(findings: Findings, task: str) -> list[tuple[str, dict[str, Any]]]:
    styles = learner_styles(findings)
    return [(name, styles[name]) for name in findings.learners(task, finished=True)]


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)


def _finish(figure: Figure, axes: Axes, legend: bool) -> Figure:
    handles, labels = axes.get_legend_handles_labels()
    lines = 1 + any("\n" in label for label in labels)
    if not legend or not labels:
        return figure
    if lines == 1 and len(labels) <= _INSIDE:
        axes.legend(fontsize=9)
        return figure
    width, height = figure.get_size_inches()
    columns = max(1, int(width / 2.5))
    figure.set_size_inches(width, height + 0.2 * lines * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, fontsize=9)
    return figure


def _running_median(values: Any) -> Any:
    window = max(1, len(values) // 25)
    padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)


def _sketch(findings: Findings, task: str, learner: str, index: int) -> Mapping[str, Any] | None:
    """What the first seed of a learner says about example `index`."""
    found = findings.of(task, learner)[0].sketches
    return found[index] if index < len(found) else None


def _draw_curve(axes: Axes, card: Mapping[str, Any], learners: Mapping[str, tuple[dict[str, Any], Any]]) -> None:
    grid, alpha = np.array(card["grid"]), min(0.1, 0.6 / max(len(learners), 1))
    for name, (style, sketch) in learners.items():
        if sketch is not None:
            mean, scale = (np.array(sketch[part], dtype=float) for part in ("mean", "scale"))  # None becomes NaN
            axes.fill_between(grid, mean - 2 * scale, mean + 2 * scale, color=style["color"], alpha=alpha, linewidth=0)
            axes.plot(grid, mean, linewidth=1.6, label=name_text(name), **style)
    support, query = np.array(card["support"]), np.array(card["query"])
    axes.plot(query[:, 0], query[:, 1], "o", markersize=3.5, markerfacecolor="none", color=GRAY)
    axes.plot(support[:, 0], support[:, 1], "o", markersize=6, color=INK)
    y = np.concatenate([support[:, 1], query[:, 1]])
    margin = 0.25 * float(np.ptp(y)) or 1.0
    axes.set_ylim(y.min() - margin, y.max() + margin)


def _draw_plane(axes: Axes, card: Mapping[str, Any]) -> None:
    for name, size, alpha in (("query", 14, 0.45), ("support", 46, 1.0)):
        points = np.array(card[name])
        colors = [COLORS[int(label) % len(COLORS)] for label in points[:, 2]]
        axes.scatter(points[:, 0], points[:, 1], s=size, c=colors, alpha=alpha, linewidths=0)
