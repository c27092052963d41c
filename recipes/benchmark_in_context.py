"""What in-context learning costs: a training step beside Hugging Face and JAX, long contexts, prefixes and the cache.

Claim    A training step of the interleaved Transformer is faster than that of GPT-2 by Hugging Face fed the same
         embeddings and than jitted JAX; all prefixes in one pass and a cached context cost a fraction of recomputing.
Run      python recipes/benchmark_in_context.py --out runs/benchmark_in_context    (peers: pip install metaicl[bench])
Smoke    python recipes/benchmark_in_context.py --smoke --out runs/benchmark_in_context
Method   one process; the same weights and prompts; gradients are compared before anything is timed; calls of all
         variants interleaved; medians. A step is the gradient of the squared error of every prefix, and Adam. Peak: a
         matrix product of 2,048. The bounds were set on a processor with AVX-512, where MKL, which serves Hugging
         Face, takes its AVX2 path and oneDNN does not (see metaicl.nets.sequence.linear): without AVX-512 all share
         the same matrix products, and only what lies between them can be faster.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from tqdm.auto import tqdm

from metaicl.episode import Episode
from metaicl.learners import InterleavedTransformer
from metaicl.nets.memory.descent_layers import Omega
from metaicl.nets.memory.layers import DeltaRule, LinearAttention, Mesa
from metaicl.nets.sequence.attention import CausalAttention
from metaicl.nets.sequence.mixer import AnyMixer
from metaicl.objectives import stream_of
from metaicl.plots import COLORS, figure_with_panels
from metaicl.process import tune_process
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run
from metaicl.task import EpisodeStream
from metaicl.tasks import LinearRegression

sys.path.insert(0, str(Path(__file__).parent))
from peers.sequence_steps import Steps, count_operations, hugging_face_steps, jax_steps, our_steps
from peers.work import medians


class Size(NamedTuple):
    """A Transformer, its prompts, and how many times as fast as each peer we want to be."""

    width: int
    depth: int
    heads: int
    dim: int
    points: int
    bounds: Mapping[str, float]


SIZES = {
    "tiny": Size(64, 3, 2, 5, 11, {"Hugging Face": 1.4, "JAX": 1.0}),
    "small": Size(128, 6, 4, 20, 41, {"Hugging Face": 1.5, "JAX": 1.4}),
    "standard": Size(256, 12, 8, 20, 41, {"Hugging Face": 1.4, "JAX": 1.4}),
}
MIXERS: dict[str, Callable[[int], AnyMixer]] = {
    "attention": partial(CausalAttention, heads=4),
    "linear attention": partial(LinearAttention, heads=4),
    "delta rule": partial(DeltaRule, heads=4),
    "mesa, chunked": partial(Mesa, heads=4),
    "mesa, recursive": partial(Mesa, heads=4, recursive=True),
    "Omega": partial(Omega, heads=4),
}


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {
        "repeats": 1, "sizes": ("tiny",), "peers": ("JAX",), "lengths": (8,), "n_tasks": 2, "predicts": 5, "width": 16,
    }  # fmt: skip

    repeats: int = option(15, "timed calls of each variant, fewer where they take long")
    sizes: tuple[str, ...] = option(("tiny", "small", "standard"), "of the training step")
    peers: tuple[str, ...] = option(("Hugging Face", "JAX"), "beside whom, where installed")
    n_tasks: int = option(64, "prompts in a step")
    lengths: tuple[int, ...] = option((32, 64, 128, 256, 512), "context lengths, tokens")
    width: int = option(64, "of the mixers whose cost is measured against length")
    predicts: int = option(20, "calls of predict with one adapted context")
    compile: bool = option(False, "time our step as one compiled graph too")


def build(size: Size) -> tuple[InterleavedTransformer, LinearRegression]:
    """The learner, always with the same weights, and its tasks."""
    torch.manual_seed(0)
    tasks = LinearRegression(dim=size.dim, noise=0.0)
    shape: dict[str, Any] = {"dim": size.width, "depth": size.depth, "heads": size.heads, "max_length": 2 * size.points}
    return InterleavedTransformer(tasks.spec, **shape), tasks


def draw(tasks: LinearRegression, n_tasks: int, n_shot: int, n_query: int) -> Episode:
    """Prompts."""
    return EpisodeStream(tasks, seed=0, split="train", n_shot=n_shot, n_query=n_query, chunk_size=n_tasks)[0]


def time_steps(size: Size, config: Config) -> tuple[dict[str, float], float]:
    """Median seconds of a training step by each variant, and the floating-point operations of one."""
    learner, tasks = build(size)
    episode = draw(tasks, config.n_tasks, 1, size.points - 1)
    steps: dict[str, Steps] = {"ours": our_steps(learner)}
    if config.compile:
        steps["ours, compiled"] = our_steps(learner, compile=True)
    if "Hugging Face" in config.peers and find_spec("transformers"):
        steps["Hugging Face"] = hugging_face_steps(learner)
    if "JAX" in config.peers and find_spec("jax") and find_spec("optax"):
        steps["JAX"] = jax_steps(learner)
    expected = steps["ours"][0](episode)
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, (gradient, _) in steps.items():
        gap = max(float((value - expected[key]).abs().max()) / scale for key, value in gradient(episode).items())
        if not gap <= 1e-4:
            raise RuntimeError(f"the gradient by {name} differs from ours by {gap:.1e} of the largest")
    calls = {name: partial(update, episode) for name, (_, update) in steps.items()}
    return medians(calls, config.repeats, turn=0.05), count_operations(learner, episode)


def time_lengths(config: Config) -> dict[str, list[float]]:
    """Median seconds of a pass with its gradient through one layer, for every context length."""
    found: dict[str, list[float]] = {name: [] for name in MIXERS}
    for length in tqdm(config.lengths, desc="contexts", unit="length"):
        torch.manual_seed(0)
        layers = {name: make(config.width) for name, make in MIXERS.items()}
        tokens = torch.randn(8, length, config.width)

        def learn(layer: AnyMixer, tokens: torch.Tensor = tokens) -> None:
            layer(tokens, layer.start(len(tokens), tokens))[0].square().mean().backward()

        calls = {name: partial(learn, layer) for name, layer in layers.items()}
        for name, seconds in medians(calls, max(config.repeats // 3, 1), turn=0.02).items():
            found[name].append(seconds)
    return found


def time_reuse(size: Size, config: Config) -> dict[str, float]:
    """How many times as long recomputing takes: a loop over prefixes, and adapting again for every query."""
    learner, tasks = build(size)
    episode = draw(tasks, config.n_tasks, size.points - 1, 1)
    rows, support, x = stream_of(episode), episode.support, episode.query.x

    def prefixes() -> Any:
        return [learner(rows.rows(slice(t)), rows.x[:, t : t + 1]) for t in range(rows.n_rows)]

    def cached() -> Any:
        state = learner.adapt(support)
        return [learner.predict(state, x) for _ in range(config.predicts)]

    calls: dict[str, Callable[[], Any]] = {
        "one pass": lambda: learner.predict_prefixes(rows),
        "loop": prefixes,
        "cached": cached,
        "again": lambda: [learner(support, x) for _ in range(config.predicts)],
    }
    with torch.no_grad():
        seconds = medians(calls, max(config.repeats // 3, 1), turn=0.05)
    return {
        "a loop over prefixes / all prefixes in one pass": seconds["loop"] / seconds["one pass"],
        f"adapting for each of {config.predicts} queries / once": seconds["again"] / seconds["cached"],
    }


def main(config: Config) -> RecipeResult:
    """Compare gradients, time, and write the table."""
    tune_process()
    a = torch.rand(2048, 2048)
    peak = 2 * 2048**3 / medians({"peak": lambda: a @ a}, 5, turn=0.05)["peak"]
    rows, criteria = [f"peak {peak / 1e9:.0f} GF/s, {torch.backends.cpu.get_cpu_capability()}"], []
    for name in tqdm(config.sizes, unit="size"):
        seconds, operations = time_steps(SIZES[name], config)
        times = "  ".join(f"{variant} {1e3 * value:.3g}" for variant, value in seconds.items())
        rows.append(f"{name}: ms {times}; ours at {operations / seconds['ours'] / peak:.0%} of peak")
        for peer, bound in SIZES[name].bounds.items():
            if peer in seconds:
                criteria.append(Criterion(f"{peer} / ours, {name}", seconds[peer] / seconds["ours"], ">=", bound))
    for what, ratio in time_reuse(SIZES["tiny" if config.smoke else "small"], config).items():
        criteria.append(Criterion(what, ratio, ">=", 3.0))
    curves = time_lengths(config)
    rows += [f"{name}: ms " + "  ".join(f"{1e3 * value:.3g}" for value in curve) for name, curve in curves.items()]
    print("\n".join(rows))
    (config.out / "table.txt").write_text("\n".join(rows) + "\n")
    with figure_with_panels(width=6.5) as (figure, axes):
        for (name, curve), color in zip(curves.items(), COLORS, strict=False):
            axes.loglog(config.lengths, [1e3 * value for value in curve], "o-", ms=4, color=color, label=name)
        axes.set(title="one layer, 8 prompts, with gradient", xlabel="tokens in context", ylabel="ms")
        axes.set_xticks(config.lengths, [str(length) for length in config.lengths])
        axes.set_xticks([], minor=True)
        figure.legend(loc="outside right upper")
        figure.savefig(config.out / "contexts.png", dpi=150, facecolor="white")
    claim = "A step of the interleaved Transformer is faster than Hugging Face's and JAX's; contexts are read once."
    return RecipeResult("benchmark_in_context", claim, config, criteria)


if __name__ == "__main__":
    run(main, Config)
