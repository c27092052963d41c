"""Risk of a learner after every number of examples, and training in stages that grow, as Garg et al. 2022 do it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from metaicl.learner import Learner
from metaicl.objectives import prefix_squared_error, stream_of
from metaicl.prefixes import predict_prefixes
from metaicl.statistics import Interval
from metaicl.task import EVAL_SEED, EpisodeStream
from metaicl.tasks import LinearRegression
from metaicl.tasks.inputs import skewed, subspace
from metaicl.train_config import TrainConfig, make_optimizer
from metaicl.training import outer_loop, training_mode

Stage = tuple[int, LinearRegression, int]
"""Updates done at its end, tasks, points of a prompt."""


def stages(config: TrainConfig, *, dim: int, points: int, noise: float, every: int) -> Iterator[Stage]:
    """One stage; or, with `every` > 0, a curriculum: it adds a dimension and two points every so many updates.

    It starts at 5 dimensions (a quarter of them where that is more) and 11 points. Later coordinates are zero.

    Reference:
        Garg et al. 2022, arXiv:2208.01066, appendix A.2.
    """
    stop = 0
    for stage in range(config.steps if every else 0):
        active, length = min(max(5, dim // 4) + stage, dim), min(11 + 2 * stage, points)
        if (active, length) == (dim, points) or stop + every >= config.steps:
            break
        stop += every
        eigenvalues = torch.tensor([1.0] * active + [0.0] * (dim - active))
        yield stop, LinearRegression(dim=dim, noise=noise, eigenvalues=eigenvalues), length
    yield config.steps, LinearRegression(dim=dim, noise=noise), points


def train(
    learner: Learner,
    config: TrainConfig,
    plan: Sequence[Stage],
    *,
    label: str,
    before: Callable[[int], None] = lambda done: None,
) -> Learner:
    """Train on the squared error of every prefix, one optimizer and one schedule through all stages.

    `before` is called with the number of updates done, before the next one: it may change the learner.
    """
    optimizer, scheduler = make_optimizer(learner, config)
    start = 0
    before(start)
    with tqdm(total=config.steps, desc=label, unit="update", mininterval=5) as bar:
        for stop, tasks, points in plan:
            options = {**config.loop_options(), "n_shot": 1, "n_query": points - 1, "device": config.device}
            loop = outer_loop(
                learner, tasks, optimizer, steps=stop, start=start, scheduler=scheduler,
                objective=prefix_squared_error, **options,
            )  # fmt: skip
            for step in loop:
                before(step.index + 1)
                bar.update()
                if step.index % 100 == 0:
                    bar.set_postfix_str(f"loss {step.loss:.3f}")
            start = stop
    return learner.cpu()


def risks(learner: Learner, tasks: LinearRegression, *, points: int, n_episodes: int) -> np.ndarray:
    """Squared error against the noiseless target over D, after k = 0 .. points - 1 examples: (episodes, points)."""
    stream = EpisodeStream(tasks, seed=EVAL_SEED, split="test", n_shot=1, n_query=points - 1, chunk_size=250)
    found = []
    with torch.no_grad(), training_mode(learner, False):
        for episode in stream.batches(0, n_episodes, batch_size=250):
            rows = stream_of(episode)
            clean = rows.x @ episode.latents["weights"][..., None]
            found.append((predict_prefixes(learner, rows).mean - clean).square().sum(-1) / rows.x.shape[-1])
    return torch.cat(found).double().numpy()


def query_risk(learner: Learner, tasks: LinearRegression, *, n_shot: int, n_episodes: int) -> float:
    """Mean squared error over D of one query after `n_shot` examples, for prompts whose query is special."""
    stream = EpisodeStream(tasks, seed=EVAL_SEED, split="test", n_shot=n_shot, n_query=1, chunk_size=250)
    found = []
    with torch.no_grad(), training_mode(learner, False):
        for episode in stream.batches(0, n_episodes, batch_size=250):
            clean = episode.query.x @ episode.latents["weights"][..., None]
            error = learner(episode.support, episode.query.x).mean - clean
            found.append(error.square().sum(-1).mean(1) / episode.query.x.shape[-1])
    return float(torch.cat(found).mean())


def shifts(dim: int) -> dict[str, dict[str, Any]]:
    """Settings of prompts unlike those of training; without a word on it they have no noise.

    Reference:
        Garg et al. 2022, arXiv:2208.01066, section 4, and their code for the scales and the renormalized noise.
    """
    kept = (dim / (dim + 1)) ** 0.5  # of targets with unit noise: as much variance as without it
    variants: dict[str, dict[str, Any]] = {
        "as trained": {}, "skewed covariance": {"eigenvalues": skewed(dim)},
        "half of the dimensions": {"eigenvalues": subspace(dim, max(dim // 2, 1))}, "noise": {"noise": 1.0},
        "noise, renormalized": {"noise": kept, "weight_scale": kept},
        "examples in one orthant": {"prompt": "same orthant"}, "orthogonal query": {"prompt": "orthogonal query"},
        "seen query": {"prompt": "seen query"},
    }  # fmt: skip
    for name, factor in (("/ 3", 1 / 3), ("/ 2", 1 / 2), ("x 2", 2.0), ("x 3", 3.0)):
        variants |= {f"inputs {name}": {"x_scale": factor}, f"targets {name}": {"weight_scale": factor}}
    return variants


def show(found: Mapping[str, Sequence[Interval]]) -> None:
    """The table of risks."""
    print("risk/d after k =" + "".join(f"{k:>8}" for k in range(len(found["Bayes"]))))
    for name, curve in found.items():
        print(f"{name:16}" + "".join(f"{one.mean:8.4f}" for one in curve))
