import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from training_helpers import (
    MAKERS,
    Lines,
    Ridge,
    assert_same_weights,
    make_dropout,
    make_maml,
    make_ridge,
    weights_of,
)

from metaicl.episode import Episode, Examples
from metaicl.evaluation import evaluate
from metaicl.functional import gaussian
from metaicl.learner import Learner
from metaicl.learners import ProtoNet
from metaicl.meta_step import MetaStep
from metaicl.meta_training import meta_train
from metaicl.objectives import Objective, prefix_loss, prefix_squared_error, query_loss, squared_error
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream, TaskDistribution
from metaicl.tasks import GaussianClasses
from metaicl.testing import check_learner
from metaicl.train_config import TrainConfig
from metaicl.training import outer_loop, training_mode

SHAPE = {"meta_batch_size": 4, "n_shot": 3, "n_query": 2}


def adam(learner: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(learner.parameters(), lr=0.01)


def train(learner: Learner, tasks: TaskDistribution | None = None, **choices: object) -> list[float]:
    options = {**SHAPE, "steps": 5, **choices}
    return [step.loss for step in outer_loop(learner, tasks or Lines(), adam(learner), **options)]


def test_equals_a_loop_by_hand() -> None:
    learner, other = make_ridge(), make_ridge()
    optimizer = adam(other)
    stream = EpisodeStream(Lines(), seed=3, split="train", n_shot=3, n_query=2, chunk_size=4)
    for step in outer_loop(learner, Lines(), adam(learner), steps=6, seed=3, **SHAPE):
        loss = query_loss(other, stream[step.index]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in other.parameters()))
        optimizer.step()
        assert step.loss == pytest.approx(loss.item(), abs=1e-6)
        assert step.grad_norm == pytest.approx(norm, rel=1e-5)
        assert (step.n_shot, step.learning_rate) == (3, 0.01)
        assert step.seconds > 0
    assert step.index == 5
    assert_same_weights(weights_of(learner), weights_of(other))


@pytest.mark.parametrize("name", ["maml", "ridge", "dropout"])
def test_every_learner_learns(name: str) -> None:
    learner = MAKERS[name]()
    losses = train(learner, steps=150, n_shot=8)
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


def test_a_loop_that_starts_later_goes_on_where_the_first_ended() -> None:
    whole, parts = make_dropout(), make_dropout()
    losses = [step.loss for step in outer_loop(whole, Lines(), adam(whole), steps=6, **SHAPE)]
    optimizer = adam(parts)
    first = [step.loss for step in outer_loop(parts, Lines(), optimizer, steps=2, **SHAPE)]
    second = [step.loss for step in outer_loop(parts, Lines(), optimizer, steps=6, start=2, **SHAPE)]
    assert first + second == losses
    assert_same_weights(weights_of(parts), weights_of(whole))


def test_micro_batches_give_the_same_training() -> None:
    learner, other = make_maml().double(), make_maml().double()
    assert train(learner, micro_batch_size=3) == pytest.approx(train(other), abs=1e-12)
    for a, b in zip(learner.parameters(), other.parameters(), strict=True):
        assert (a - b).abs().max().item() <= 1e-12


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_neither_seeded_nor_consumed(workers: int) -> None:
    torch.manual_seed(11)
    expected = torch.random.get_rng_state()
    losses = train(make_dropout(), workers=workers)
    torch.manual_seed(11)  # making the learner seeds
    learner = make_dropout()
    torch.manual_seed(11)
    assert train(learner, workers=workers) == losses == train(make_dropout())
    torch.manual_seed(11)
    list(outer_loop(learner, Lines(), adam(learner), steps=2, workers=workers, **SHAPE))
    assert torch.equal(torch.random.get_rng_state(), expected)


def test_dropout_differs_from_step_to_step_and_seed_to_seed() -> None:
    def drawn(**choices: int) -> list[float]:
        losses = []

        def noise(learner: Learner, episode: Episode) -> Tensor:
            losses.append(float(torch.rand(())))
            return query_loss(learner, episode)

        train(make_ridge(), objective=noise, **choices)
        return losses

    assert len(set(drawn())) == 5
    assert drawn() == drawn()
    assert not set(drawn()) & set(drawn(seed=1))


def test_modes_are_train_in_a_step_and_restored_after() -> None:
    learner = make_ridge()
    learner.encoder.eval()
    seen = []

    def objective(learner: Learner, episode: Episode) -> Tensor:
        seen.append([module.training for module in learner.modules()])
        return query_loss(learner, episode)

    before = [module.training for module in learner.modules()]
    for _ in outer_loop(learner, Lines(), adam(learner), steps=2, objective=objective, **SHAPE):
        assert [module.training for module in learner.modules()] == before
    assert all(map(all, seen))
    assert True in before
    assert False in before
    with pytest.raises(KeyError), training_mode(learner, False):
        raise KeyError
    assert [module.training for module in learner.modules()] == before


def test_n_shot_from_a_range() -> None:
    learner = make_ridge()
    choices = {**SHAPE, "n_shot": (1, 6)}
    drawn = [step.n_shot for step in outer_loop(learner, Lines(), adam(learner), steps=40, **choices)]
    assert set(drawn) == {1, 2, 3, 4, 5, 6}


def test_clipping_and_schedule() -> None:
    learner = make_ridge()
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    before, rates = weights_of(learner), []
    for step in outer_loop(learner, Lines(), optimizer, steps=3, scheduler=scheduler, clip_norm=1e-3, **SHAPE):
        after = weights_of(learner)
        moved = math.sqrt(sum(float((after[name] - before[name]).square().sum()) for name in after))
        assert moved == pytest.approx(1e-3 * step.learning_rate, rel=1e-2)
        assert step.grad_norm > 1e-3
        before = after
        rates.append(step.learning_rate)
    assert rates == [1.0, 0.5, 0.25]


class Transposed(Learner[Tensor]):
    """Weights that are used transposed, whose gradients come so too."""

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.first, self.second = (nn.Parameter(torch.randn(1, 3, 4)) for _ in range(2))

    def adapt(self, support: Examples) -> Tensor:
        return support.y.mean(1)

    def predict(self, state: Tensor, x: Tensor) -> Distribution:
        product = self.first.mT @ self.second  # (1, 4, 4)
        waves = torch.sin(x.sum(-1, keepdim=True) * torch.arange(1, 5))
        mean = ((waves @ product[0]) * waves).sum(-1, keepdim=True) + state[:, None]
        return gaussian(mean, torch.ones(1))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_fused_optimizers_get_gradients_in_the_layout_of_the_weights(kind: type) -> None:
    trained = []
    for fused in (False, True):
        torch.manual_seed(0)
        learner = Transposed(Lines().spec)
        gradients = MetaStep(learner)(EpisodeStream(Lines(), seed=0, split="train", n_shot=2, n_query=2)[0])[1]
        assert not gradients["first"].is_contiguous()
        optimizer = kind(learner.parameters(), lr=1e-2, fused=fused)
        list(outer_loop(learner, Lines(), optimizer, steps=5, meta_batch_size=4))
        trained.append(learner.state_dict())
    for name, value in trained[0].items():
        assert torch.allclose(value, trained[1][name], atol=1e-6), name


def test_some_parameters_may_stay_out_of_the_optimizer() -> None:
    learner = make_ridge()
    before = weights_of(learner)
    list(outer_loop(learner, Lines(), torch.optim.Adam([learner.raw_scale], lr=0.1), steps=2, **SHAPE))
    after = weights_of(learner)
    assert not torch.equal(after.pop("raw_scale"), before.pop("raw_scale"))
    assert_same_weights(after, before)
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_float64_learner_gets_float64_episodes() -> None:
    assert train(make_ridge().double()) == pytest.approx(train(make_ridge()), rel=1e-4)


def test_bf16_changes_the_numbers_a_little() -> None:
    exact, rounded = train(make_maml(), steps=1), train(make_maml(), steps=1, autocast="bf16")
    assert 0 < abs(rounded[0] - exact[0]) < 0.05 * abs(exact[0])


@pytest.mark.parametrize("name", ["normalized", "averaging"])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_a_loss_that_is_not_finite_stops_before_the_update(micro_batch_size: int | None, name: str) -> None:
    learner = MAKERS[name]()
    kept = {}

    def objective(learner: Learner, episode: Episode) -> Tensor:
        loss = query_loss(learner, episode)
        return torch.where(episode.latents["weights"][:, 0] == target, math.nan, loss)

    stream = EpisodeStream(Lines(), seed=0, split="train", n_shot=3, n_query=2, chunk_size=4)
    target = stream[2].latents["weights"][3, 0]
    choices = {**SHAPE, "objective": objective, "micro_batch_size": micro_batch_size}

    def run() -> None:
        for step in outer_loop(learner, Lines(), adam(learner), steps=5, **choices):
            kept[step.index] = weights_of(learner)

    with pytest.raises(FloatingPointError, match="the loss of task 3 is nan at step 2") as caught:
        run()
    assert sorted(kept) == [0, 1]
    assert_same_weights(weights_of(learner), kept[1])  # running statistics of the normalization included
    address = str(caught.value).partition("Replay it with ")[2]
    replayed = eval(address, {"EpisodeStream": EpisodeStream, "tasks": Lines()})
    assert replayed.latents["weights"][3, 0] == target


def test_a_gradient_that_is_not_finite_is_named() -> None:
    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient * math.inf

    def objective(learner: Ridge, episode: Episode) -> Tensor:
        return query_loss(learner, episode) + Infinite.apply(learner.encoder[0].bias).sum()

    learner = make_ridge()
    before = weights_of(learner)
    with pytest.raises(FloatingPointError, match=r"parameter encoder\.0\.bias has 4 NaN or infinite values at step 0"):
        train(learner, objective=objective)
    assert_same_weights(weights_of(learner), before)


def test_a_gradient_whose_norm_overflows_is_named() -> None:
    def objective(learner: Ridge, episode: Episode) -> Tensor:
        return query_loss(learner, episode) + 1e30 * learner.raw_scale

    with pytest.raises(FloatingPointError, match=r"norm of the meta-gradient overflows, .* parameter raw_scale"):
        train(make_ridge(), objective=objective)


def test_a_bad_episode_is_named_by_row() -> None:
    def poison(episode: Episode) -> None:
        episode.support.x[1, 2] = math.nan

    with pytest.raises(ValueError, match=r"episode.support.x must be finite; 1 rows .* task 1, row 2"):
        train(make_ridge(), Lines(poison))


def test_every_episode_is_looked_at() -> None:
    def poison(episode: Episode) -> None:
        count.append(0)
        if len(count) == 3:
            episode.query.y[1, 0] = math.inf

    count: list[int] = []
    with pytest.raises(
        ValueError, match=r"chunk 2 of Lines \(seed 0, split 'train'\): episode.query.y .* task 1, row 0"
    ):
        train(make_ridge(), Lines(poison), steps=5)


class OneMore(Lines):
    """Gives a task more than it was asked for."""

    def sample(self, n_tasks: int, **choices: Any) -> Episode:
        return super().sample(n_tasks + 1, **choices)


class Nothing(Lines):
    """Gives nothing."""

    def sample(self, n_tasks: int, **choices: Any) -> Any:
        return None


def test_a_sampler_that_gives_something_else_is_named() -> None:
    with pytest.raises(ValueError, match=r"chunk 0 of OneMore .* must be an Episode of n_tasks = 4 tasks; got 5"):
        train(make_ridge(), OneMore())
    with pytest.raises(ValueError, match=r"chunk 0 of Nothing .* must be an Episode of n_tasks = 4 tasks; got None"):
        train(make_ridge(), Nothing())


class Taught(Lines):
    """Rows that a net labels, which leaves its graph on them."""

    def sample(self, n_tasks: int, **choices: Any) -> Episode:
        drawn, teacher = super().sample(n_tasks, **choices), torch.ones(1, requires_grad=True)
        parts = (Examples(part.x, part.y * teacher) for part in (drawn.support, drawn.query))
        return Episode(*parts, {"teacher": teacher.expand(n_tasks)})


def test_episodes_of_a_stream_have_no_graph() -> None:
    one = EpisodeStream(Taught(), seed=0, split="train", n_shot=3, n_query=2)[0]
    assert not any(leaf.requires_grad for leaf in (one.support.y, one.query.y, one.latents["teacher"]))
    assert check_learner(make_ridge(), Taught(), checks=["answer_shape"]) is None  # copies episodes


class Careless(Ridge):
    """Answers with whatever `shape` makes of the mean (B, Q, 1)."""

    def __init__(self, shape: Callable[[Tensor], Any]) -> None:
        super().__init__(Lines().spec)
        self.shape = shape

    def predict(self, state: Tensor, x: Tensor) -> Any:
        return self.shape(super().predict(state, x).mean)

    def predict_prefixes(self, examples: Examples) -> Any:
        return self.shape(examples.y)


@pytest.mark.parametrize("objective", [query_loss, squared_error, prefix_loss, prefix_squared_error])
@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        (lambda mean: mean, TypeError, "torch distribution; got Tensor. Hint: metaicl.functional.gaussian"),
        (lambda mean: Normal(mean, 1.0), ValueError, r"batch shape \(B, Q\) = \(4, \d\); got \(4, \d, 1\)"),
        (lambda mean: gaussian(mean.expand(-1, -1, 2), torch.ones(2)), ValueError, r"event shape \(1,\) .* got \(2,\)"),
    ],
)
def test_every_objective_names_an_answer_of_another_shape(
    objective: Objective, shape: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(Careless(shape), objective=objective)


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps must be an int >= 0"),
        ({"steps": 2, "start": 3}, ValueError, "steps must be an int >= 3"),
        ({"meta_batch_size": 0}, ValueError, "must be an int >= 1"),
        ({"micro_batch_size": 2.0}, TypeError, "micro_batch_size must be an int"),
        ({"n_shot": (5, 2)}, ValueError, "n_shot must be an int >= 5"),
        ({"clip_norm": math.nan}, ValueError, "clip_norm must be a finite number"),
        ({"device": "gpu"}, ValueError, "device must be one of"),
        ({"workers": -1}, ValueError, "workers must be an int >= 0"),
        ({"autocast": "fp8"}, ValueError, "autocast must be one of"),
        ({"seed": None}, TypeError, "seed must be an int"),
    ],
)
def test_bad_arguments_are_refused_at_once(choices: dict[str, object], error: type[Exception], message: str) -> None:
    learner = make_ridge()
    with pytest.raises(error, match=message):
        outer_loop(learner, Lines(), adam(learner), **{"steps": 3, **choices})


def test_wrong_objects_are_refused_at_once() -> None:
    learner = make_ridge()
    with pytest.raises(TypeError, match="learner must be a Learner; got Linear"):
        outer_loop(nn.Linear(1, 1), Lines(), adam(learner), steps=1)
    with pytest.raises(TypeError, match=r"got the class itself: Ridge\(tasks.spec\) makes one"):
        outer_loop(type(learner), Lines(), adam(learner), steps=1)
    with pytest.raises(TypeError, match=r"tasks must be a TaskDistribution; got the class itself: Lines\(\) makes one"):
        outer_loop(learner, Lines, adam(learner), steps=1)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer; got float"):
        outer_loop(learner, Lines(), 0.1, steps=1)
    with pytest.raises(ValueError, match="3 of its 3 are of something else"):
        outer_loop(learner, Lines(), adam(make_ridge()), steps=1)


def test_no_steps() -> None:
    learner = make_ridge()
    assert list(outer_loop(learner, Lines(), adam(learner), steps=4, start=4)) == []


def test_a_learner_of_other_tasks_is_refused_before_anything_runs(tmp_path: Path) -> None:
    learner, tasks = ProtoNet(TaskSpec("classification", (4,), n_way=5)), GaussianClasses(n_way=3, dim=4)
    expected = "ProtoNet was built for n_way 5; the tasks have n_way 3"
    with pytest.raises(ValueError, match=expected):
        outer_loop(learner, tasks, torch.optim.SGD(learner.parameters(), lr=0.1), steps=1)
    with pytest.raises(ValueError, match=expected):
        meta_train(learner, tasks, TrainConfig(steps=1), directory=tmp_path / "run")
    with pytest.raises(ValueError, match=expected):
        evaluate(learner, tasks, n_shot=1, n_query=1)
    assert not (tmp_path / "run").exists()
