"""Trained models end where theory says they end: the recipes of linear Transformers and the ladder, in small."""

import pytest
import torch

from metaicl.learners.incontext.linear_transformer import LinearTransformer
from metaicl.learners.reference.linear import GradientDescent, GradientDescentPlusPlus
from metaicl.learners.reference.tuning import tune
from metaicl.meta_training import meta_train
from metaicl.nets.memory.delta import delta_rule_chunked, linear_attention_chunked
from metaicl.nets.memory.least_squares import least_squares_chunked, ridge_start
from metaicl.objectives import squared_error
from metaicl.task import EpisodeStream
from metaicl.tasks.inputs import draw_inputs
from metaicl.tasks.linear import LinearRegression
from metaicl.tasks.linear_risk import LinearFamily, best_one_step, delta_error, hebb_error, recursive_error
from metaicl.train_config import TrainConfig

DIM, N = 4, 8
TASKS = LinearRegression(dim=DIM, noise=0.0, inputs="uniform", x_scale=1.0)


def train(loops: int, steps: int) -> LinearTransformer:
    torch.manual_seed(0)
    learner = LinearTransformer(TASKS.spec, loops=loops)
    config = TrainConfig(
        steps=steps, meta_batch_size=256, n_shot=N, n_query=4, outer_lr=1e-2, betas=(0.9, 0.98), schedule="cosine",
        clip_norm=10.0, validate_every=None,
    )  # fmt: skip
    meta_train(learner, TASKS, config, objective=squared_error, progress=False)
    return learner


def risk(learner: torch.nn.Module) -> float:
    episode = EpisodeStream(TASKS, seed=1, split="test", n_shot=N, n_query=8, chunk_size=4000)[0]
    with torch.no_grad():
        return float(squared_error(learner, episode).mean())


def test_one_trained_layer_is_the_best_step_of_gradient_descent() -> None:
    learner = train(loops=1, steps=400)
    rate, expected = best_one_step(LinearFamily(DIM, variance=1 / 3, kurtosis=1.8), N)
    step = GradientDescent(TASKS.spec, lr=rate)
    assert risk(learner) <= 1.01 * risk(step)
    assert abs(risk(step) / expected - 1) <= 0.03  # 4,000 tasks


@pytest.mark.slow
def test_two_trained_loops_are_gd_plus_plus() -> None:
    best = tune(
        lambda v: GradientDescentPlusPlus(TASKS.spec, steps=2, lr=v[0], gamma=v[1]), TASKS, start=(2.0, 0.5), n_shot=N
    )
    assert risk(train(loops=2, steps=3000)) <= 1.02 * risk(best.learner)


@pytest.mark.parametrize(("dim", "n_rows"), [(8, 8), (8, 16), (16, 32)])
def test_memories_stand_on_the_rungs_of_the_ladder(dim: int, n_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = draw_inputs("sphere", (3000, n_rows, dim), generator).double()
    weights = torch.randn(3000, 1, dim, generator=generator).double()
    empty, values = torch.zeros_like(weights), keys @ weights.mT
    written = dim / (dim + n_rows - 1) * linear_attention_chunked(keys, keys, values, empty)[1]
    corrected = delta_rule_chunked(keys, keys, values, torch.ones_like(keys[..., 0]), empty)[1]
    start = ridge_start(keys.new_full((3000,), 1e9), dim, 1)
    fitted = least_squares_chunked(keys, keys, values, start)[1].weights
    for memory, expected in zip(
        (written, corrected, fitted),
        (one(dim, n_rows) for one in (hebb_error, delta_error, recursive_error)),
        strict=True,
    ):
        found = float((memory - weights).square().sum() / weights.square().sum())
        assert abs(found - expected) <= 0.03 * (expected or 1.0), (found, expected)  # 3,000 tasks
