"""What episodes, prototypes and nearest neighbors cost, side by side with learn2learn, easyfsl's way and faiss.

Claim    Episodes of images are drawn at least 50 times as fast as by learn2learn's task set or by a DataLoader over
         episodic batches; a training step of ProtoNet takes 1 / 1.8 of the time of a loop over tasks (1 / 2.8 in
         bfloat16 on processors that have it), with the same loss; exact search of 256 queries is 2.5 to 6 times as
         fast as faiss flat.
Run      python recipes/benchmark_metric_retrieval.py --data FOLDER --out runs/benchmark_metric_retrieval
Smoke    python recipes/benchmark_metric_retrieval.py --data FOLDER --smoke --out runs/benchmark_metric_retrieval
         Beside it: accuracy after a short training in bfloat16, and the recall of approximate indexes.
Method   one process; calls of all variants interleaved; medians. Losses and answers are compared before anything is
         timed. easyfsl's way is written here after its documentation. The peers' nets are timed with the same group
         normalization, so that losses are comparable, and with the batch normalization that they come with.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from metaicl import Omniglot, ProtoNet, TaskSpec
from metaicl.episode import Episode
from metaicl.meta_step import MetaStep
from metaicl.nets.backbones import Conv4, group_norm
from metaicl.objectives import query_loss
from metaicl.process import tune_process
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run
from metaicl.task import derive_generator

sys.path.insert(0, str(Path(__file__).parent))
from peers.episode_samplers import Pool, learn2learn_sampler, loader_sampler
from peers.half_precision import lost_in_bf16
from peers.prototype_steps import easyfsl_steps, learn2learn_steps, usual_conv4
from peers.search import approximate_recall, search_times
from peers.work import medians

SEARCH_BOUNDS = {10_000: 2.5, 100_000: 6.0, 1_000_000: 5.0}


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"repeats": 1, "bank_sizes": (2000,), "channels": 4, "rotations": False, "steps": 2}

    data: str = option("", "folder with omniglot.npz")
    download: bool = option(False, "fetch the public originals instead")
    repeats: int = option(15, "timed turns of each variant, fewer where they take long")
    bank_sizes: tuple[int, ...] = option(tuple(SEARCH_BOUNDS), "rows of the memory banks that are searched")
    n_episodes: int = option(32, "episodes that one call of our sampler draws")
    channels: int = option(64, "filters of Conv4")
    steps: int = option(200, "updates in float32 and in bfloat16, whose accuracies are compared")
    rotations: bool = option(True, "turned characters are classes of their own")


def sampling_times(tasks: Omniglot, config: Config) -> dict[str, float]:
    """Median seconds of one 5-way 1-shot 15-query episode."""
    random.seed(config.seed)
    pool, generator = Pool(tasks), derive_generator(config.seed)
    shots: dict[str, int] = {"n_shot": 1, "n_query": 15}
    draw = partial(tasks.sample, config.n_episodes, split="train", generator=generator, **shots)
    single = partial(tasks.sample, 1, split="train", generator=generator, **shots)
    calls: dict[str, Callable[[], Any]] = {
        "ours": draw,
        "ours, one at a time": single,
        "learn2learn": learn2learn_sampler(tasks, pool, n_rows=16),
        "DataLoader": loader_sampler(tasks, pool, **shots),
    }
    seconds = medians(calls, config.repeats, turn=0.0 if config.smoke else 0.2)
    return {**seconds, "ours": seconds["ours"] / config.n_episodes}


def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16; without that, autocast is only a detour."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def our_update(learner: ProtoNet, autocast: str | None) -> Callable[[Episode], None]:
    """A step of all tasks at once, as `meta_train` does it."""
    step = MetaStep(learner, query_loss, autocast=autocast)
    adam = torch.optim.Adam(step.parameters.values(), lr=1e-3, fused=True)

    def update(episode: Episode) -> None:
        for name, value in step(episode)[1].items():
            step.parameters[name].grad = value
        adam.step()

    return update


def our_learner(spec: TaskSpec, weights: nn.Sequential, channels: int) -> ProtoNet:
    """ProtoNet on Conv4 with these weights, and no temperature as in the paper."""
    encoder = Conv4(channels=channels)
    encoder.blocks.load_state_dict(weights.state_dict())
    return ProtoNet(spec, encoder=encoder, temperature=1.0, learn_temperature=False)


def step_times(tasks: Omniglot, config: Config) -> dict[str, float]:
    """Median seconds of a step on four 5-way 5-shot 15-query tasks, once all have given the same answers."""
    torch.manual_seed(config.seed)
    episode = tasks.sample(4, split="train", n_shot=5, n_query=15, generator=derive_generator(config.seed))
    nets = {"": usual_conv4(group_norm, channels=config.channels)}
    nets[", batch norm"] = usual_conv4(nn.BatchNorm2d, channels=config.channels)
    learner = our_learner(tasks.spec, nets[""], config.channels)
    peers = {"learn2learn": learn2learn_steps, "easyfsl's way": easyfsl_steps}
    found = {name + norm: make(net) for norm, net in nets.items() for name, make in peers.items()}
    with torch.no_grad():
        answer = learner(episode.support, episode.query.x)
        assert isinstance(answer, torch.distributions.Categorical)
        for name in peers:
            scores = torch.stack([found[name][0](t.support.x[0], t.support.y[0], t.query.x[0]) for t in episode])
            if name != "learn2learn":
                scores = -scores.square()  # the other one does not square its distances
            gap = float((scores.log_softmax(-1) - answer.logits.log_softmax(-1)).abs().max())
            if not gap <= 1e-4 * max(1.0, float(scores.abs().max())):
                raise RuntimeError(f"log-probabilities by {name} differ from ours by {gap:.1e}")
    calls = {name: partial(update, episode) for name, (_, update) in found.items()}
    calls["ours"] = partial(our_update(learner, None), episode)
    calls["ours, bf16"] = partial(our_update(our_learner(tasks.spec, nets[""], config.channels), "bf16"), episode)
    return medians(calls, config.repeats, turn=0.0)


def main(config: Config) -> RecipeResult:
    """Time sampling, steps and search; write the table."""
    tune_process()
    tasks = Omniglot(n_way=5, rotations=config.rotations, folder=config.data or None, download=config.download)
    lines, criteria = [], []

    def note(title: str, seconds: dict[str, float], bounds: dict[str, float], ours: str = "ours") -> None:
        lines.append(f"{title}: ms " + "  ".join(f"{name} {1e3 * value:.3g}" for name, value in seconds.items()))
        print(lines[-1], flush=True)
        for name, bound in bounds.items():
            criteria.append(Criterion(f"{name} / {ours}, {title}", seconds[name] / seconds[ours], ">=", bound))

    note("an episode", sampling_times(tasks, config), {"learn2learn": 50, "DataLoader": 50})
    steps = step_times(tasks, config)
    note("a step of ProtoNet", steps, dict.fromkeys((name for name in steps if "ours" not in name), 1.8))
    if has_bfloat16():
        note("a step in bf16", steps, {"learn2learn": 2.8, "easyfsl's way": 2.8}, ours="ours, bf16")
    else:
        lines.append("no bfloat16 instructions here: its time is shown, not judged")
    for size in config.bank_sizes:
        seconds = search_times(size, repeats=config.repeats)
        note(f"256 queries of {size}", seconds, {"faiss flat": SEARCH_BOUNDS.get(size, 1.0)})
    recall = approximate_recall(min(100_000, max(config.bank_sizes)))
    criteria += [Criterion(name, value, ">=", 0.9) for name, value in recall.items() if "recall" in name]
    lines.append(
        "approximate indexes, recall and seconds: " + "  ".join(f"{name} {value:.4g}" for name, value in recall.items())
    )
    lost = lost_in_bf16(tasks, steps=config.steps, channels=config.channels, seed=config.seed)
    lines.append(f"accuracy after {config.steps} updates, float32 - bf16: {lost.mean:.4f} {lost.ends}")
    worst = lost.mean if lost.high is None else lost.high
    criteria.append(Criterion("accuracy lost by bf16, upper end", worst, "<=", 0.02, ci=lost.ends))
    print("\n".join(lines[-2:]), flush=True)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "table.txt").write_text("\n".join(lines) + "\n")
    claim = "Episodes are drawn 50 times, steps done 1.8 times and neighbors found 2.5 to 6 times as fast as by peers."
    return RecipeResult("benchmark_metric_retrieval", claim, config, criteria)


if __name__ == "__main__":
    run(main, Config)
