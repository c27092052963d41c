"""What the heads of a Transformer do: copying, induction or nothing in particular, with intervals and a picture."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from metaicl.analysis.answers import batches, check_learners, draw_episodes, still
from metaicl.analysis.attention_maps import AttentionMaps, attention_maps
from metaicl.episode import Episode
from metaicl.files import atomic_write
from metaicl.functional import raw_features, squared_distances
from metaicl.learner import Learner
from metaicl.plots import COLORS, FAINT, INK, figure_with_panels
from metaicl.spec import TaskSpec
from metaicl.statistics import Interval, intervals
from metaicl.task import EVAL_SEED, Split, TaskDistribution
from metaicl.training import place

_MEASURES = ("matching", "following", "entropy")


@dataclass(frozen=True)
class AttentionScores:
    """What each head of each layer does at the query, `measure[layer][head]`, with intervals over seeds and episodes.

    Args:
        matching: Attention to the support input that is nearest to the query's (copying score).
        following: Attention to the token after it (induction score): its target where inputs and targets are tokens of
            their own, the next row where a row is one token. Queries nearest to the last of such rows, which
            nothing follows, are left out.
        entropy: Of the attention, in nats.
        chance: What equal attention would give to any one token.
        most: Entropy of equal attention, in nats.
    """

    matching: Mapping[str, tuple[Interval, ...]]
    following: Mapping[str, tuple[Interval, ...]]
    entropy: Mapping[str, tuple[Interval, ...]]
    chance: float
    most: float

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a file."""
        atomic_write(Path(path), json.dumps(asdict(self), indent=1).encode())

    def __str__(self) -> str:
        """A line for each head."""
        width = max(map(len, self.matching))
        lines = [f"{'layer':{width}s}  head  {'matching':>20s}  {'following':>20s}  {'entropy, nats':>20s}"]
        for layer in self.matching:
            for head in range(len(self.matching[layer])):
                cells = [_cell(getattr(self, measure)[layer][head]) for measure in _MEASURES]
                lines.append(f"{layer:{width}s}  {head:4d}  " + "  ".join(f"{cell:>20s}" for cell in cells))
        lines.append(f"equal attention: {self.chance:.3f} to any token, {self.most:.2f} nats")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Bars with intervals for every head; the dashed line is equal attention."""
        heads = [(layer, head) for layer, values in self.matching.items() for head in range(len(values))]
        titles = ("Attention to the nearest input", "Attention to the token after it", "Entropy of attention, nats")
        lines = (self.chance, self.chance, self.most)
        with figure_with_panels(3, width=10.5, height=max(2.4, 0.3 * len(heads) + 1.1)) as (figure, *panels):
            for axes, measure, title, line in zip(panels, _MEASURES, titles, lines, strict=True):
                for y, (layer, head) in enumerate(heads):
                    one = getattr(self, measure)[layer][head]
                    color = COLORS[list(self.matching).index(layer) % len(COLORS)]
                    axes.barh([y], [one.mean], color=color, height=0.7)
                    if one.ends is not None:
                        axes.plot(one.ends, [y, y], color=INK, linewidth=1.5)
                axes.axvline(line, color=INK, linestyle="--", linewidth=1)
                labels = [f"{layer}, head {head}" for layer, head in heads] if axes is panels[0] else []
                axes.set_yticks(range(len(heads)), labels or [""] * len(heads))
                axes.set_ylim(len(heads) - 0.4, -0.6)
                axes.grid(axis="y", visible=False)
                axes.tick_params(axis="y", length=0)
                axes.set_xlim(left=0)
                axes.set_title(title)
            return _saved(figure, path)


def attention_scores(
    learner: Learner | Sequence[Learner],
    tasks: TaskDistribution,
    *,
    n_shot: int,
    n_query: int = 4,
    n_episodes: int = 500,
    split: Split = "test",
    seed: int = EVAL_SEED,
    batch_size: int = 100,
) -> AttentionScores:
    """Say what every head looks at when a query is asked, on addressed episodes.

    Args:
        learner: See `attention_maps`; or several trained alike from different seeds.
        tasks: With inputs that have a distance (see `raw_features`).
        n_shot: Support rows, per class in classification.
        n_query: Queries of each episode.
        n_episodes: E.
        split: Which tasks.
        seed: The address.
        batch_size: Tasks answered together.

    Raises:
        TypeError: If a learner has no attention to look at.
        ValueError: If it does not fit the tasks, or is looped, or nothing follows any row that is nearest to a query.

    Reference:
        Olsson et al. 2022, arXiv:2209.11895, for induction heads. Differs: the earlier token is the nearest one, as
        inputs seldom return exactly.
    """
    learners = check_learners(learner, tasks)
    episode = draw_episodes(tasks, n_shot=n_shot, n_query=n_query, start=0, stop=n_episodes, split=split, seed=seed)
    found: dict[tuple[str, str], list[Tensor]] = {}
    n_seen = 0
    for one in learners:
        parts = []
        with still(one, seed):
            for part in batches(episode, batch_size):
                part = place(part, one)
                maps = attention_maps(one, part.support, part.query.x)
                parts.append(_measure(maps, part, tasks.spec))
                n_seen = int(maps.scores[next(iter(maps.scores))][0, 0, -1].isfinite().sum())
        for key in parts[0]:
            found.setdefault(key, []).append(torch.cat([part[key] for part in parts]))
    for name in [name for measure, name in found if measure == "followed"]:
        share = torch.cat(found.pop(("followed", name))).mean()  # of queries that count
        if float(share) == 0:
            raise ValueError(
                "attention_scores needs queries whose nearest row is followed by another one; got none with n_shot = "
                f"{n_shot} and n_episodes = {n_episodes}. Raise one of them"
            )
        found["following", name] = [values / share for values in found["following", name]]
    values = {key: torch.stack(seeds).double().cpu().numpy() for key, seeds in found.items()}  # (S, E, heads)
    columns = {key: [matrix[..., head] for head in range(matrix.shape[-1])] for key, matrix in values.items()}
    most = float(np.log(n_seen))
    tables: dict[str, dict[str, tuple[Interval, ...]]] = {measure: {} for measure in _MEASURES}
    for (measure, layer), matrices in columns.items():
        tables[measure][layer] = tuple(intervals(matrices, bounds=(0.0, most if measure == "entropy" else 1.0)))
    return AttentionScores(**tables, chance=1 / n_seen, most=most)


def draw_maps(maps: AttentionMaps, path: str | os.PathLike[str] | None = None, *, task: int = 0) -> Figure:
    """The attention of each layer in one task, mean over heads; gray is what a token cannot see, queries come last."""
    with figure_with_panels(len(maps.weights), width=3.4 * len(maps.weights) + 0.6, height=3.6) as (figure, *panels):
        image: Any = None
        for axes, (name, weights) in zip(panels, maps.weights.items(), strict=True):
            hidden = maps.scores[name][task, 0].isneginf()
            values = weights[task].mean(0).masked_fill(hidden, torch.nan).double().cpu().numpy()
            cmap = colormaps["cividis"].with_extremes(bad=FAINT)
            image = axes.imshow(values, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
            axes.axhline(len(values) - maps.n_query - 0.5, color=INK, linewidth=1)
            axes.grid(visible=False)
            axes.tick_params(length=0)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True))
            axes.set(title=name, xlabel="token looked at")
        panels[0].set_ylabel("token that looks")
        bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.015)
        bar.set_label("attention, mean over heads")
        bar.outline.set_visible(False)
        return _saved(figure, path)


def _measure(maps: AttentionMaps, episode: Episode, spec: TaskSpec) -> dict[tuple[str, str], Tensor]:
    """Each measure of each layer (B, heads), mean over queries."""
    rows, queries = (raw_features(part.x, spec) for part in (episode.support, episode.query))
    nearest = maps.inputs.to(rows.device)[squared_distances(queries, rows).argmin(-1)]  # (B, Q), places
    found = {}
    for name, weights in maps.of_queries().items():
        after = torch.nn.functional.pad(weights, (0, 1))  # nothing comes after the last token
        for measure, values, index in (("matching", weights, nearest), ("following", after, nearest + 1)):
            index = index[:, None, :, None].expand(-1, weights.shape[1], -1, 1)
            found[measure, name] = values.gather(-1, index).mean((-2, -1))
        followed = nearest + 1 < weights.shape[-1] - maps.n_query
        found["followed", name] = followed.to(weights.dtype).mean(-1)
        found["entropy", name] = torch.special.entr(weights).sum(-1).mean(-1)
    return found


def _cell(one: Interval) -> str:
    ends = "" if one.ends is None else f" [{one.ends[0]:.3f}, {one.ends[1]:.3f}]"
    return f"{one.mean:.3f}{ends}"


def _saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=160, facecolor="white")
    return figure
