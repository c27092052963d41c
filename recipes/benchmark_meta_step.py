"""What a training step costs: compiled against eager, against learn2learn, and how much of it is sampling.

Claim    Compiled and eager meta-gradients agree to 1e-5; episode sampling is under 5 % of a step for every bundled
         pair of learner and tasks; our compiled MAML step on sine waves is at least 36 times as fast as learn2learn's.
Run      python recipes/benchmark_meta_step.py --out runs/benchmark_meta_step
Smoke    python recipes/benchmark_meta_step.py --smoke --out runs/benchmark_meta_step
Method   one process, one thread, the same weights and episodes, calls of all variants interleaved, medians.
         Gradients are compared before anything is timed. A step is the meta-gradient plus Adam.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm

from metaicl import (
    MAML,
    EpisodeStream,
    GaussianClasses,
    Glyphs,
    InContextTransformer,
    Learner,
    ProtoNet,
    RetrievalAugmented,
    RidgeHead,
    Sinusoid,
    TaskDistribution,
)
from metaicl.interop.learn2learn import L2LMAML
from metaicl.learners import CausalInContextTransformer, ConditionalNeuralProcess
from metaicl.meta_step import MetaStep
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run

sys.path.insert(0, str(Path(__file__).parent))  # for the neighboring files
from my_learner import KernelRegressor
from peers.work import medians


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"repeats": 2, "learners": ("KernelRegressor",)}

    repeats: int = option(30, "timed calls of each variant")
    learners: tuple[str, ...] = option((), "names to time; none times all")
    images: bool = option(False, "time convolutional nets too, whose graphs take minutes to compile")


LEARNERS: Mapping[str, Any] = {
    "MAML": MAML,
    "MAML, 5 steps": partial(MAML, inner_steps=5),
    "ProtoNet": ProtoNet,
    "RidgeHead": RidgeHead,
    "Transformer": InContextTransformer,
    "causal Transformer": CausalInContextTransformer,
    "neural process": ConditionalNeuralProcess,
    "retrieval + RidgeHead": partial(RetrievalAugmented, learner=RidgeHead),
    "KernelRegressor": KernelRegressor,
}


def pairs(config: Config) -> dict[str, tuple[Learner[Any], EpisodeStream]]:
    """Every learner with every distribution that it serves, with training's usual sizes."""
    tasks: dict[str, tuple[TaskDistribution, int, int, int]] = {
        "sine waves": (Sinusoid(), 10, 10, 25),
        "Gaussian classes": (GaussianClasses(), 5, 15, 25),
    }
    if config.images:
        tasks["letters"] = (Glyphs(n_way=5), 1, 5, 4)
    found = {}
    for name, factory in LEARNERS.items():
        if config.learners and name not in config.learners:
            continue
        for task, (distribution, n_shot, n_query, size) in tasks.items():
            if (task == "letters" and name.startswith(("MAML, 5", "causal"))) or (
                name == "KernelRegressor" and task != "sine waves"
            ):
                continue  # a convolutional graph of five steps takes minutes to compile
            try:
                learner = factory(distribution.spec)
            except ValueError:
                continue  # the learner says at construction that it does not serve the kind
            if isinstance(learner, RetrievalAugmented):
                learner.prepare(distribution, seed=0)
            stream = EpisodeStream(distribution, seed=0, split="train", n_shot=n_shot, n_query=n_query, chunk_size=size)
            found[f"{name} on {task}"] = (learner, stream)
    return found


def main(config: Config) -> RecipeResult:
    """Compare gradients, then time."""
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    criteria = []
    for name, (learner, stream) in tqdm(pairs(config).items(), unit="pair"):
        eager, compiled = MetaStep(learner), MetaStep(learner, compile=True)
        episode = stream[0]
        error = difference(eager(episode)[1], compiled(episode)[1])
        seconds = medians(
            {
                "sampling": partial(stream.__getitem__, 1),
                "eager": partial(update, eager, episode),
                "compiled": partial(update, compiled, episode),
            },
            config.repeats,
            turn=0,
        )
        criteria += [
            Criterion(f"{name}: compiled - eager gradient, relative", error, "<=", 1e-5),
            Criterion(f"{name}: eager / compiled time", seconds["eager"] / seconds["compiled"], ">=", 1.0),
            Criterion(f"{name}: sampling share of an eager step", seconds["sampling"] / seconds["eager"], "<=", 0.05),
        ]
        if not compiled.is_compiled:
            criteria.append(Criterion(f"{name}: compiles", 0.0, ">=", 1.0))
    for steps, bound in ((1, 36.0), (5, 36.0)):
        criteria.append(against_learn2learn(steps, bound, config))
    claim = "Compiled steps are exact, sampling is cheap, and MAML is 36 times as fast as learn2learn on sine waves."
    return RecipeResult("benchmark_meta_step", claim, config, criteria)


def against_learn2learn(inner_steps: int, bound: float, config: Config) -> Criterion:
    """Our compiled step against learn2learn's loop over tasks: same weights, same episode, equal gradients."""
    tasks = Sinusoid()
    stream = EpisodeStream(tasks, seed=0, split="train", n_shot=10, n_query=10, chunk_size=25)
    ours = MAML(tasks.spec, inner_steps=inner_steps)
    theirs = L2LMAML(tasks.spec, inner_steps=inner_steps, net=ours.net, inner_lr=ours.optimizer.rates["lr"].value)
    steps = {"ours": MetaStep(ours, compile=not config.smoke), "theirs": MetaStep(theirs)}
    episode = stream[0]
    gradients = [list(step(episode)[1].values()) for step in steps.values()]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    repeats = max(2, config.repeats // 3)
    seconds = medians({name: partial(update, step, episode) for name, step in steps.items()}, repeats, turn=0)
    ratio = seconds["theirs"] / seconds["ours"]
    return Criterion(f"learn2learn / ours, MAML step, K={inner_steps}, meta-batch 25", ratio, ">=", bound)


def update(step: MetaStep, episode: Any) -> None:
    """A whole training step: meta-gradient and Adam."""
    optimizer = getattr(step, "_benchmark_optimizer", None)
    if optimizer is None:
        optimizer = torch.optim.Adam(step.parameters.values(), lr=0.0)
        step._benchmark_optimizer = optimizer  # type: ignore[attr-defined]  # lives as long as the step
    for name, gradient in step(episode)[1].items():
        step.parameters[name].grad = gradient
    optimizer.step()


def difference(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    """Largest difference of two gradients, relative to the largest entry."""
    scale = max(value.abs().max() for value in first.values())
    return float(max((first[name] - second[name]).abs().max() for name in first) / scale)


if __name__ == "__main__":
    run(main, Config)
