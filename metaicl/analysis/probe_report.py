"""Probes of every layer at every position, each beside its controls: a table and a heat map."""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

from metaicl.analysis.answers import check_learners, draw_episodes
from metaicl.analysis.prefix_activations import prefix_activations
from metaicl.analysis.probe_targets import Target
from metaicl.analysis.probes import probe, shuffled
from metaicl.collation import concatenate
from metaicl.files import atomic_write
from metaicl.learner import Learner
from metaicl.plots import STYLE
from metaicl.statistics import Interval
from metaicl.task import EVAL_SEED, Split, TaskDistribution
from metaicl.training import device_of, isolated_randomness

Tables = Mapping[str, Mapping[str, Mapping[str, tuple[Interval, ...]]]]


@dataclass(frozen=True)
class ProbeReport:
    """R^2 of probes: `r2[target][subject][module]` holds an interval for each position, or one if they are pooled.

    The subjects are "trained", "shuffled" (the same activations, targets of other episodes) and one for each control.

    Args:
        r2: On held-out episodes, from position 1: position t has seen t rows.
        kind: "linear" or "mlp".
        n_episodes: Fitting, choosing and held-out ones together.
        n_rows: Of a stream, before the last position.
        pooled: Whether one probe read all positions of a stream.
    """

    r2: Tables
    kind: str
    n_episodes: int
    n_rows: int
    pooled: bool = False

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a file."""
        atomic_write(Path(path), json.dumps(asdict(self), indent=1).encode())

    def __str__(self) -> str:
        """R^2 at the last position: targets by subjects and modules."""
        place = "on all positions, for the last" if self.pooled else "at the last position"
        lines = [f"R2 of {self.kind} probes {place}, held-out episodes, with 95 % intervals"]
        for target, subjects in self.r2.items():
            for subject, modules in subjects.items():
                for module, values in modules.items():
                    one = values[-1]
                    lines.append(
                        f"  {target:24s}{subject:16s}{module:32s}{one.mean:7.3f} [{one.low:.3f}, {one.high:.3f}]"
                    )
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Heat maps, modules by positions; a row of panels for each target, a column for each subject."""
        targets, subjects = list(self.r2), list(next(iter(self.r2.values())))
        modules = list(next(iter(self.r2[targets[0]].values())))
        size = (2.0 + 3.0 * len(subjects), 0.9 + len(targets) * (0.95 + 0.3 * len(modules)))
        with matplotlib.rc_context({**STYLE, "figure.facecolor": "white"}):
            figure = Figure(figsize=size, layout="constrained")
            panels = figure.subplots(len(targets), len(subjects), squeeze=False, sharex=True, sharey=True)
            image: Any = None
            for i, target in enumerate(targets):
                for j, subject in enumerate(subjects):
                    axes = panels[i, j]
                    values = [[one.mean for one in self.r2[target][subject][module]] for module in modules]
                    extent = (self.n_rows + 0.5 - len(values[0]), self.n_rows + 0.5, len(modules) - 0.5, -0.5)
                    image = axes.imshow(
                        np.clip(values, 0, 1), vmin=0, vmax=1, cmap=colormaps["cividis"], aspect="auto", extent=extent
                    )
                    axes.grid(visible=False)
                    axes.tick_params(length=0)
                    axes.set_title(f"{target}: {subject}", fontsize=9.5)
                    axes.set_yticks(range(len(modules)), modules, fontsize=8)
                    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            figure.supxlabel("rows seen", fontsize=10)
            bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.015)
            bar.set_label(f"R² of a {self.kind} probe, held out")
            bar.outline.set_visible(False)
        if path is not None:
            figure.savefig(path, dpi=160, facecolor="white")
        return figure


def probe_layers(
    learner: Learner,
    tasks: TaskDistribution,
    *,
    names: Sequence[str],
    targets: Mapping[str, Target],
    controls: Mapping[str, Learner],
    n_shot: int,
    kind: Literal["linear", "mlp"] = "linear",
    pooled: bool = False,
    positions: slice | None = None,
    sees_target: bool = False,
    call: int = -1,
    n_episodes: int = 1000,
    split: Split = "test",
    seed: int = EVAL_SEED,
) -> ProbeReport:
    """Probe modules of a learner while it answers every row of addressed streams from the rows before it.

    Args:
        learner: Whose prefix answers run through the modules, such as `CausalInContextTransformer`. One that has no
            `predict_prefixes` answers one prefix at a time.
        tasks: What it reads.
        names: Modules or patterns, such as "transformer.blocks.*"; each must output (B, T, H) with a place per row.
            Of several matches all are probed.
        targets: By name; see `metaicl.analysis.probe_targets`.
        controls: Learners of the same make that cannot know: untrained (see `untrained`), or trained on one fixed task.
            They are probed alike on the same episodes. A control with shuffled targets is always there.
        n_shot: Rows of the stream.
        kind: "linear" or "mlp".
        pooled: One probe for all positions of a stream, as in the paper, instead of one for each; see `probe`.
        positions: Which places of an output are the rows, where there are more: see `prefix_activations`. None finds
            the inputs among interleaved tokens.
        sees_target: Probe places that know their own target, such as `positions=slice(1, None, 2)` of interleaved
            tokens; elsewhere such activations are refused, for a probe would read what is to be predicted.
        call: Of modules that are called more than once (loops), which call; see `collect_activations`.
        n_episodes: Half fit, a quarter chooses, a quarter is judged.
        split: Which tasks.
        seed: The address.

    Raises:
        TypeError: If a learner is none.
        ValueError: If a name matches nothing, a shape does not fit, an activation knows the target of its own row or of
            later ones, a target is the same in all episodes, there are no targets or no names, or a control has the
            name of another subject.

    Reference:
        Akyürek et al. 2022, arXiv:2211.15661, section 5; Hewitt & Liang 2019, arXiv:1909.03368, for control tasks.
        Differs: by default a probe for each position, and penalties chosen on other episodes.
    """
    if not targets:
        raise ValueError("targets must name at least one quantity; see metaicl.analysis.probe_targets")
    if isinstance(names, str) or not names:
        raise ValueError(
            f"names must be a list of modules or patterns, such as ['transformer.blocks.*']; got {names!r}"
        )
    if taken := {"trained", "shuffled"} & set(controls):
        raise ValueError(f"controls must have names of their own: {sorted(taken)} are those of the learner's columns")
    subjects = {"trained": learner, **controls}
    check_learners(list(subjects.values()), tasks)
    episode = draw_episodes(tasks, n_shot=n_shot, n_query=1, start=0, stop=n_episodes, split=split, seed=seed)
    stream = concatenate(episode.support, episode.query)
    wanted = {name: target(stream, episode.latents)[:, 1:] for name, target in targets.items()}
    fit = partial(probe, kind=kind, pooled=pooled, seed=seed)
    found: dict[str, dict[str, dict[str, tuple[Interval, ...]]]] = {name: {} for name in targets}
    for subject, one in subjects.items():
        activations = prefix_activations(
            one, episode, names, positions=positions, sees_target=sees_target, call=call, seed=seed
        )
        for name, values in wanted.items():
            found[name][subject] = {module: fit(rows[:, 1:], values).r2 for module, rows in activations.items()}
            if subject == "trained":
                found[name]["shuffled"] = {
                    module: fit(rows[:, 1:], shuffled(values)).r2 for module, rows in activations.items()
                }
    return ProbeReport(found, kind, n_episodes, n_shot, pooled)


def untrained(learner: Learner, *, seed: int = 0) -> Learner:
    """A copy of a learner with first weights of its modules' own making: the control that has learned nothing.

    Modules that are made of others come after them. Parameters outside modules with a `reset_parameters` (start tokens)
    are drawn with the spread of those they replace; single numbers among them stay.
    """
    fresh = copy.deepcopy(learner)
    with isolated_randomness(seed, device_of(learner)):
        reset: set[int] = set()
        modules = list(fresh.modules())
        simple = [module for module in modules if not list(module.children())]
        for module in (*simple, *(module for module in reversed(modules) if list(module.children()))):
            again = getattr(module, "reset_parameters", None)
            if callable(again):
                again()
                reset.update(id(parameter) for parameter in module.parameters(recurse=False))
        for parameter in fresh.parameters():
            if id(parameter) not in reset and parameter.is_floating_point() and parameter.numel() > 1:
                spread = float(parameter.detach().std())
                nn.init.normal_(parameter, std=spread)
    return fresh
