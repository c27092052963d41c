"""Several fingerprints beside each other: one table, one figure."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metaicl.analysis.fingerprint_plot import label_plainly
from metaicl.analysis.fingerprint_result import Fingerprint, show
from metaicl.plots import COLORS, GRAY, INK, STYLE

_DARK = 0.55  # of the color scale, below which numbers are white


def fingerprint_table(found: Mapping[str, Fingerprint]) -> str:
    """One line for each learner: nearest reference, distance, ties, free number, where along the prefix."""
    rows: list[Sequence[str]] = [("learner", "nearest", "distance / to zero", "free number", "along the prefix")]
    for name, one in found.items():
        fit = one.fits.get(one.best)
        where = ", ".join(f"{ref} {a}-{b}" if a != b else f"{ref} {a}" for ref, a, b in one.stretches[:4])
        where += ", ..." if len(one.stretches) > 4 else ""
        number = "" if fit is None else f"{fit.symbol} = {fit.overall}"
        rows.append((name, " ~ ".join((one.best, *one.overall_ties)), show(one.overall[one.best]), number, where))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def draw_fingerprints(found: Mapping[str, Fingerprint], path: str | os.PathLike[str] | None = None) -> Figure:
    """Learners by references, the overall relative distances as a heat map, and the risks of all learners.

    Args:
        found: Fingerprints by the names to show, on the same tasks and episodes.
        path: Where to write it, if anywhere.

    Raises:
        ValueError: If there are none, or they were not taken on the same episodes.
    """
    if len({one.episodes for one in found.values()}) != 1:
        raise ValueError("draw_fingerprints needs fingerprints taken on the same episodes, at least one")
    first = next(iter(found.values()))
    shared = [name for name in first.overall if all(name in one.overall for one in found.values())]
    references = sorted(shared, key=lambda name: min(one.overall[name].mean for one in found.values()))
    with matplotlib.rc_context({**STYLE, "figure.facecolor": "white"}):
        figure = Figure(figsize=(7.4 + 0.62 * len(references), 2.4 + 0.42 * len(found)), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[0.62 * len(references) + 1.0, 4.2])
        _draw_map(figure, left, found, references)
        _draw_risks(right, found)
    if path is not None:
        figure.savefig(path, dpi=160, facecolor="white")
    return figure


def _draw_map(figure: Figure, axes: Axes, found: Mapping[str, Fingerprint], references: Sequence[str]) -> None:
    values = np.array([[one.overall[ref].mean for ref in references] for one in found.values()]).clip(1e-6, None)
    norm = LogNorm(max(1e-6, values.min()), 2.0)
    image = axes.imshow(values, aspect="auto", cmap=colormaps["cividis"], norm=norm)
    for i, one in enumerate(found.values()):
        for j, ref in enumerate(references):
            color = "white" if norm(values[i, j]) < _DARK else INK
            weight = "bold" if ref == one.best else "normal"
            text = f"{values[i, j]:.2g}" if values[i, j] < 10 else f"{values[i, j]:.0f}"
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=8, weight=weight)
    axes.set_xticks(range(len(references)), references, rotation=40, ha="right", color=INK)
    axes.set_yticks(range(len(found)), list(found), color=INK)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    task = next(iter(found.values())).task
    axes.set_title(f"{task}: distance to reference algorithms / to zero (bold: nearest)")
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.05, extend="max")
    label_plainly(bar.ax, (1, 2, 5) if values.min() > 0.05 else (1,))
    bar.outline.set_visible(False)  # type: ignore[operator]  # matplotlib's stubs take the outline for a patch list


def _draw_risks(axes: Axes, found: Mapping[str, Fingerprint]) -> None:
    first = next(iter(found.values()))
    for i, (name, one) in enumerate(found.items()):
        style: Any = {"color": COLORS[i % len(COLORS)], "linestyle": ("-", "--", ":", "-.")[i // len(COLORS) % 4]}
        axes.plot(one.lengths, [value.mean for value in one.risk["learner"]], label=name, **style)
    if "Bayes" in first.risk:
        bayes = [value.mean for value in first.risk["Bayes"]]
        axes.plot(first.lengths, bayes, label="Bayes", color=GRAY, linestyle="--")
    axes.set_yscale("log")
    label_plainly(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    unit = "squared error per output" if first.kind == "regression" else "Brier score"
    axes.set(title="Risk", xlabel="rows seen", ylabel=unit)
    axes.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
