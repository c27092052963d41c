"""What a MAML update costs, side by side with learn2learn, higher, TorchOpt and JAX.

Claim    One compiled graph for all tasks makes a second-order MAML update at least 50 times as fast as learn2learn's
         loop on sine waves, 8 times at width 256, where fast weights are never formed, and 1.2 times on Conv4.
Run      python recipes/benchmark_gradient.py --out runs/benchmark_gradient  (all peers: pip install 'metaicl[bench]')
Smoke    python recipes/benchmark_gradient.py --smoke --out runs/benchmark_gradient
Method   one process; the same weights and episodes; before anything is timed gradients are compared in float64, as in
         float32 some unit of a net with ReLU switches by rounding; calls of all variants interleaved; medians. An
         update is the meta-gradient and Adam. Peak: a matrix product of 2,048.
"""

import sys
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from metaicl import MAML
from metaicl.episode import Episode
from metaicl.meta_step import MetaStep
from metaicl.objectives import query_loss, squared_error
from metaicl.plots import COLORS, figure_with_panels
from metaicl.process import tune_process
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run

sys.path.insert(0, str(Path(__file__).parent))
from peers.jax_adam import double_jax
from peers.maml_steps import Steps, higher_steps, jax_steps, learn2learn_steps, torchopt_steps
from peers.work import Work, medians


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"repeats": 2, "works": ("sine waves, 25 tasks, 1 step",), "scaling": False}

    repeats: int = option(15, "timed calls of each variant, fewer where they take long")
    works: tuple[str, ...] = option((), "names of what to time; none times all")
    scaling: bool = option(True, "time growing meta-batches and inner loops too, and plot them")
    device: str = option("cpu", "where to compute; JAX takes its own default")


WORKS = {
    "sine waves, 25 tasks, 1 step": Work(40, 25, 1, {"learn2learn": 50, "higher": 70, "JAX": 1.0}),
    "sine waves, 25 tasks, 5 steps": Work(40, 25, 5, {"learn2learn": 50, "higher": 65, "JAX": 1.1}),
    "sine waves, 1000 tasks, 1 step": Work(40, 1000, 1, {"learn2learn": 55, "higher": 70, "JAX": 1.0}),
    "sine waves, 1000 tasks, 5 steps": Work(40, 1000, 5, {"learn2learn": 55, "higher": 70, "JAX": 2.0}),
    "width 256, 100 tasks, 1 step": Work(256, 100, 1, {"learn2learn": 8, "higher": 12, "JAX": 5}),
    "Conv4-32, 4 tasks, 1 step": Work(None, 4, 1, {"learn2learn": 1.2, "higher": 1.3, "JAX": 9}),
    "Conv4-32, 4 tasks, 5 steps": Work(None, 4, 5, {"learn2learn": 1.2, "higher": 1.3, "JAX": 9}),
}


def our_steps(work: Work, net: nn.Module, lr: float, *, compile: bool) -> Steps:
    """MAML in a MetaStep, as `meta_train` runs it."""
    weight = next(net.parameters())
    learner = MAML(work.spec, net=net, inner_lr=lr, inner_steps=work.inner_steps).to(weight.device, weight.dtype)
    step = MetaStep(learner, squared_error if work.spec.kind == "regression" else query_loss, compile=compile)
    adam = torch.optim.Adam(step.parameters.values(), lr=1e-3, fused=True)

    def gradient(episode: Episode) -> dict[str, Tensor]:
        return {name.removeprefix("net."): value for name, value in step(episode)[1].items() if "scale" not in name}

    def update(episode: Episode) -> None:
        for name, value in step(episode)[1].items():
            step.parameters[name].grad = value
        adam.step()

    return gradient, update


def variants(
    work: Work, config: Config, lr: float = 0.01, dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], Steps]]:
    """Ours and every peer that is installed."""

    def net() -> nn.Module:
        return work.net().to(config.device, dtype)

    loss = F.mse_loss if work.spec.kind == "regression" else F.cross_entropy
    found: dict[str, Callable[[], Steps]] = {
        "ours": lambda: our_steps(work, net(), lr, compile=not config.smoke and dtype == torch.float32),
        "ours, eager": lambda: our_steps(work, net(), lr, compile=False),
        "learn2learn": lambda: learn2learn_steps(net(), loss, lr, work.inner_steps),
        "higher": lambda: higher_steps(net(), loss, lr, work.inner_steps),
    }
    if find_spec("torchopt"):
        found["TorchOpt"] = lambda: torchopt_steps(net(), loss, lr, work.inner_steps)
    if find_spec("jax") and find_spec("optax"):
        found["JAX"] = lambda: jax_steps(net(), work.spec.kind, lr, work.inner_steps)
    return found


def compare_gradients(work: Work, config: Config, names: Collection[str]) -> None:
    """Stop if a variant computes something else than ours."""
    episode = work.episode().to(config.device, torch.float64)
    made = variants(work, config, dtype=torch.float64)
    with double_jax() if "JAX" in names else nullcontext():
        gradients = {name: made[name]()[0](episode) for name in names}
    expected = next(iter(gradients.values()))
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, found in gradients.items():
        for key, value in expected.items():
            gap = float((value.cpu() - found[key].cpu()).abs().max()) / scale
            if not gap <= 1e-9:
                raise RuntimeError(f"the gradient of {key} by {name} differs from ours by {gap:.1e} of the largest")


def measure(work: Work, config: Config, names: Collection[str] | None = None) -> dict[str, float]:
    """Median seconds of an update by each variant, and of the very first call of ours as "compiling"."""
    found = {name: make for name, make in variants(work, config).items() if names is None or name in names}
    compare_gradients(work, config, list(found))
    episode = work.episode().to(config.device)
    steps = {name: make() for name, make in found.items()}
    began = time.perf_counter()
    next(iter(steps.values()))[0](episode)
    compiling = time.perf_counter() - began
    calls = {name: partial(update, episode) for name, (_, update) in steps.items()}
    return {**medians(calls, config.repeats, turn=0.05, device=config.device), "compiling": compiling}


def main(config: Config) -> RecipeResult:
    """Compare gradients, time, and write the table."""
    tune_process()
    peak, rows, criteria = _peak(config.device), [], []
    for name in tqdm(config.works or list(WORKS), unit="work"):
        work = WORKS[name]
        seconds = measure(work, config)
        share = _flops(work) / seconds["ours"] / peak
        gain = seconds["ours, eager"] - seconds["ours"]
        pays = f"{seconds['compiling'] / gain:.0f} updates to pay for it" if gain > 0 else "which does not pay"
        times = "  ".join(
            f"{variant} {1e3 * value:.3g}" for variant, value in seconds.items() if variant != "compiling"
        )
        note = f"{share:.1%} of peak, {seconds['compiling']:.0f} s to compile, {pays}"
        rows.append(f"{name}: ms {times}; {note}")
        tqdm.write(rows[-1])
        for peer, bound in work.bounds.items():
            if peer in seconds:
                criteria.append(Criterion(f"{peer} / ours, {name}", seconds[peer] / seconds["ours"], ">=", bound))
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "table.txt").write_text("\n".join([f"peak {peak / 1e9:.0f} GF/s", *rows]) + "\n")
    if config.scaling:
        _plot_scaling(config)
    claim = "A second-order MAML update is 50 times as fast as learn2learn's on sine waves and faster everywhere."
    return RecipeResult("benchmark_gradient", claim, config, criteria)


def _flops(work: Work) -> float:
    """Of a meta-gradient that forms its weights: 3 forward passes for the query and 9 for each inner step."""
    with FlopCounterMode(display=False) as counter:
        work.net()(work.episode().support.x[0])
    n_support, n_query = work.episode().support.n_rows, work.episode().query.n_rows
    return counter.get_total_flops() * work.n_tasks * (3 * n_query / n_support + 9 * work.inner_steps)


def _peak(device: str) -> float:
    """Floating-point operations per second of a large matrix product."""
    a = torch.rand(2048, 2048, device=device)
    return 2 * 2048**3 / medians({"peak": lambda: a @ a}, 5, turn=0.05, device=device)["peak"]


def _plot_scaling(config: Config) -> None:
    """Milliseconds over the meta-batch at one step, and over inner steps at 25 tasks: eager, as graphs cost seconds."""
    sizes = {"tasks per update": (1, 10, 100, 1000), "inner steps": (1, 5, 20, 50)}
    titles = ("one inner step", "25 tasks")
    with figure_with_panels(2, width=9, height=3.8) as (figure, *panels):
        for axes, title, (label, values) in zip(panels, titles, sizes.items(), strict=True):
            works = [Work(40, n, 1) if label.startswith("tasks") else Work(40, 25, n) for n in values]
            found = [measure(work, config, {"ours, eager", "learn2learn"}) for work in tqdm(works, desc=label)]
            for variant, color in zip(("ours, eager", "learn2learn"), COLORS, strict=False):
                axes.loglog(values, [1e3 * each[variant] for each in found], "o-", ms=4, color=color, label=variant)
            axes.set(title=title, xlabel=label, ylabel="ms per update")
            axes.set_xticks(values, [str(value) for value in values])
            axes.set_xticks([], minor=True)
        panels[0].legend()
        figure.savefig(config.out / "scaling.png", dpi=150, facecolor="white")


if __name__ == "__main__":
    run(main, Config)
