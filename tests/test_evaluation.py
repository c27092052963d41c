import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.distributions import AffineTransform, TransformedDistribution

from metaicl.episode import Episode, Examples
from metaicl.evaluation import evaluate, evaluate_shots
from metaicl.functional import categorical, gaussian, masked_mean
from metaicl.learner import Learner, Traits
from metaicl.number_text import interval_text, number
from metaicl.spec import TaskSpec
from metaicl.statistics import interval
from metaicl.task import EVAL_SEED, EpisodeStream, TaskDistribution, derive_seed


class Levels(TaskDistribution):
    """y = a level of the task + noise; the number of real query rows varies from task to task."""

    spec = TaskSpec("regression", (1,), y_dim=1)
    ragged = False

    def sample(self, n_tasks, *, split, n_shot, n_query, generator):
        level = torch.randn(n_tasks, 1, 1, generator=generator)
        parts = []
        for n in (n_shot, n_query):
            x = torch.rand(n_tasks, n, 1, generator=generator)
            parts.append(Examples(x, level + 0.1 * torch.randn(n_tasks, n, 1, generator=generator)))
        if self.ragged:  # chunks of different widths
            extra = int(torch.randint(1, 5, (), generator=generator))
            parts[1] = parts[1].pad(n_query + extra)
        return Episode(parts[0], parts[1], {"level": level})


class Ragged(Levels):
    ragged = True


class Signs(TaskDistribution):
    spec = TaskSpec("classification", (1,), n_way=2)

    def sample(self, n_tasks, *, split, n_shot, n_query, generator):
        parts = []
        for n in (n_shot, n_query):
            y = torch.arange(2).repeat(n).expand(n_tasks, -1)
            x = 2.0 * y[..., None] - 1 + torch.randn(n_tasks, 2 * n, 1, generator=generator)
            parts.append(Examples(x, y))
        return Episode(*parts)


class Mean(Learner):
    def __init__(self, spec, scale=1.0):
        super().__init__(spec)
        self.weight = torch.nn.Parameter(torch.tensor(scale))
        self.dropout = torch.nn.Dropout(0.5)

    def adapt(self, support):
        assert not torch.is_grad_enabled()
        return self.dropout(masked_mean(support.y, support.mask, 1))

    def predict(self, state, x):
        mean = state[:, None].expand(-1, x.shape[1], -1)
        return gaussian(mean, self.weight.expand_as(mean))


class Broken(Mean):
    """NaN for the tasks whose first support row exceeds 0.99."""

    def predict(self, state, x):
        distribution = super().predict(state, x)
        return gaussian(distribution.mean.where(x[:, :1] <= 0.99, math.nan), distribution.stddev)


class WrongShape(Mean):
    def predict(self, state, x):
        return gaussian(state, torch.ones(()))


class Threshold(Learner):
    traits = Traits(transductive=True, kinds=("classification",))

    def adapt(self, support):
        return support.x.mean((1, 2))

    def predict(self, state, x):
        return categorical(torch.cat([-(x - state[:, None, None]), x - state[:, None, None]], -1))


class Noisy(Mean):
    def adapt(self, support):
        return torch.randn(support.n_tasks, 1)


LEVELS = Levels()
SIZES = {"n_shot": 2, "n_query": 3, "n_episodes": 60}


def test_regression_values_are_right_and_float64():
    found = evaluate(Mean(LEVELS.spec), LEVELS, **SIZES)
    assert found.metrics["mse"].dtype == np.float64
    assert found.metrics["mse"].shape == (60,)
    assert found.mean("mse") == pytest.approx(0.01 * (1 + 1 / 2), rel=0.25)  # noise of a query and of a mean of two
    assert found.mean("nll") == pytest.approx(0.5 * math.log(2 * math.pi) + 0.5 * found.mean("mse"), abs=1e-6)
    assert found.calibration.kind == "coverage"
    assert (found.parameters, found.state_bytes, found.device, found.transductive) == (1, 4, "cpu", False)
    assert found.peak_memory_bytes is None or 0 <= found.peak_memory_bytes < 64 * 2**20
    assert found.adapt_seconds > 0


def test_classification_is_scored_and_traits_are_kept():
    found = evaluate(Threshold(Signs.spec), Signs(), n_shot=5, n_query=20, n_episodes=100)
    assert found.mean("accuracy") == pytest.approx(0.841, abs=0.03)  # Phi(1), less what five shots cost
    assert set(found.metrics) == {"accuracy", "nll", "brier"}
    assert sum(found.calibration.count) == 100 * 40
    assert found.transductive


def test_text_gives_each_metric_with_its_interval():
    found = evaluate(Threshold(Signs.spec), Signs(), n_shot=5, n_query=20, n_episodes=100)
    shown = interval_text(interval(found.metrics["accuracy"][None]))
    assert re.fullmatch(r"0\.\d{4} \[0\.\d{4}, 0\.\d{4}\]", shown)
    assert str(found).startswith(f"Threshold: accuracy {shown}, nll")
    assert str(found).endswith("(100 test episodes, 5 support and 20 query rows per class)")
    one = evaluate(Mean(LEVELS.spec), LEVELS, n_shot=2, n_query=3, n_episodes=1)
    shown = ", ".join(f"{name} {number(one.mean(name))} [n/a]" for name in ("mse", "nll"))  # one draw has no interval
    assert str(one) == f"Mean: {shown} (1 test episodes, 2 support and 3 query rows)"


@pytest.mark.parametrize("tasks", [Levels(), Ragged()])
@pytest.mark.parametrize("batch_size", [1, 7, 25, 1000])
def test_the_batch_size_changes_neither_values_nor_fingerprint(tasks, batch_size):
    whole = evaluate(Mean(tasks.spec), tasks, **SIZES, batch_size=60)
    cut = evaluate(Mean(tasks.spec), tasks, **SIZES, batch_size=batch_size)
    assert cut.fingerprint == whole.fingerprint
    np.testing.assert_allclose(cut.metrics["mse"], whole.metrics["mse"], rtol=1e-5)


def test_the_fingerprint_names_the_episodes():
    learner = Mean(LEVELS.spec)
    prints = [
        evaluate(learner, LEVELS, **SIZES).fingerprint,
        evaluate(learner, LEVELS, **SIZES, seed=1).fingerprint,
        evaluate(learner, LEVELS, **SIZES, split="validation").fingerprint,
        evaluate(learner, LEVELS, **{**SIZES, "n_episodes": 59}).fingerprint,
        evaluate(learner, LEVELS, **{**SIZES, "n_shot": 3}).fingerprint,
    ]
    assert len(set(prints)) == 5
    assert evaluate(Mean(LEVELS.spec, scale=2.0), LEVELS, **SIZES).fingerprint == prints[0]


@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_restored_module_by_module(fails):
    learner = (Broken if fails else Mean)(LEVELS.spec).train()
    learner.dropout.eval()
    if fails:
        with pytest.raises(FloatingPointError):
            evaluate(learner, LEVELS, **{**SIZES, "n_episodes": 600})
    else:
        evaluate(learner, LEVELS, **SIZES)
    assert (learner.training, learner.dropout.training) == (True, False)


def test_nan_names_learner_and_episode():
    with pytest.raises(FloatingPointError, match=r"^mine failed in episodes .*nan at episode \d+, query row \d"):
        evaluate(Broken(LEVELS.spec), LEVELS, **{**SIZES, "n_episodes": 600}, name="mine")


def test_a_mean_of_finite_errors_is_finite():
    class Far(Mean):
        def predict(self, state, x):
            mean = torch.full((*x.shape[:2], 1), 1.5e19)
            return gaussian(mean, mean)

    found = evaluate(Far(LEVELS.spec), LEVELS, **SIZES)
    assert found.metrics["mse"] == pytest.approx(2.25e38, rel=1e-6)


def test_evaluations_are_equal_where_every_value_is():
    first, second = (evaluate(Mean(LEVELS.spec), LEVELS, **SIZES) for _ in range(2))
    second = replace(second, adapt_seconds=first.adapt_seconds, predict_seconds=first.predict_seconds)
    second = replace(second, peak_memory_bytes=first.peak_memory_bytes)
    assert first == second
    assert first != replace(second, seed=1)
    assert first != replace(second, metrics={**second.metrics, "mse": second.metrics["mse"] + 1})
    assert first != "first"


def test_an_answer_without_a_mean_is_explained():
    class Stretched(Mean):
        def predict(self, state, x):
            return TransformedDistribution(super().predict(state, x), AffineTransform(0.0, 2.0))

    with pytest.raises(TypeError, match="needs a mean, for the squared error; TransformedDistribution has none"):
        evaluate(Stretched(LEVELS.spec), LEVELS, **SIZES)


def test_a_wrong_batch_shape_is_explained():
    with pytest.raises(ValueError, match=r"\(B, Q\) = \(50, 3\); got \(50,\).*gaussian"):
        evaluate(WrongShape(LEVELS.spec), LEVELS, **SIZES)


def test_a_learner_that_draws_at_random_gives_the_same_answer_twice_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    first, second = (evaluate(Noisy(LEVELS.spec), LEVELS, **SIZES) for _ in range(2))
    assert first.metrics["mse"].tolist() == second.metrics["mse"].tolist()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_float64_learner_gets_float64_episodes():
    found = evaluate(Mean(LEVELS.spec).double(), LEVELS, **SIZES)
    assert found.metrics["mse"] == pytest.approx(evaluate(Mean(LEVELS.spec), LEVELS, **SIZES).metrics["mse"], rel=1e-4)
    assert found.state_bytes == 8


def test_bytes_of_states_that_are_dataclasses_or_modules_count_too():
    @dataclass
    class Told:
        state: object
        kept: dict

    class Wraps(Mean):
        def adapt(self, support):
            state = super().adapt(support)
            return Told(state, {"more": [state, torch.nn.ParameterList([state, state]), "text"]})

        def predict(self, state, x):
            return super().predict(state.state, x)

    assert evaluate(Wraps(LEVELS.spec), LEVELS, **SIZES).state_bytes == 4 * 4


def test_per_shot_curves_are_paired_and_nested():
    curves = evaluate_shots(Mean(LEVELS.spec), LEVELS, shots=(5, 1, 2, 2), n_query=3, n_episodes=60)
    assert list(curves) == [1, 2, 5]
    assert len({one.fingerprint for one in curves.values()}) == 1
    assert (
        curves[5].metrics["mse"].tolist()
        == evaluate(Mean(LEVELS.spec), LEVELS, n_shot=5, n_query=3, n_episodes=60).metrics["mse"].tolist()
    )
    assert curves[1].mean("mse") > curves[2].mean("mse") > curves[5].mean("mse")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_episodes": 0}, ValueError, "n_episodes must be an int >= 1; got 0"),
        ({"n_shot": 0}, ValueError, "^n_shot must be an int >= 1; got 0"),
        ({"n_query": 2.5}, TypeError, "n_query must be an int"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"split": "tset"}, ValueError, "did you mean 'test'"),
        ({"seed": -1}, ValueError, "seed"),
        ({"device": "gpu"}, ValueError, "device must be one of"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        evaluate(Mean(LEVELS.spec), LEVELS, **{**SIZES, **change})


class TurnsBad(Signs):
    """Chunk 7 of the test stream is spoiled."""

    def __init__(self, spoil):
        self.spoil, self.bad = spoil, derive_seed(EVAL_SEED, "test", 7)

    def sample(self, n_tasks, **choices):
        episode = super().sample(n_tasks, **choices)
        return self.spoil(episode) if choices["generator"].initial_seed() == self.bad else episode


def with_query(x=None, y=None, mask=None):
    """A function that replaces fields of the query."""

    def spoil(episode):
        query = Examples(*(old if new is None else new(old.clone()) for old, new in zip(
            (episode.query.x, episode.query.y), (x, y), strict=True)), mask)  # fmt: skip
        return Episode(episode.support, query)

    return spoil


def at(value):
    def put(leaf):
        leaf[3, 1] = value
        return leaf

    return put


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (with_query(y=at(2)), ValueError, r"query\.y must hold .* got \[2\], the first at task 3, row 1"),
        (with_query(y=at(-100)), ValueError, r"got \[-100\], the first at task 3, row 1; mark rows to ignore in mask"),
        (with_query(x=at(math.nan)), ValueError, r"query\.x must be finite; 1 rows hold NaN or Inf, .* task 3, row 1"),
        (with_query(x=at(math.inf)), ValueError, r"query\.x must be finite; .* task 3, row 1"),
        (with_query(y=torch.Tensor.double), TypeError, r"query\.y must be long class indices"),
        (
            lambda e: Episode(*(Examples(part.x.repeat(1, 1, 2), part.y) for part in (e.support, e.query))),
            ValueError,
            r"support\.x must have rows of shape \(1,\); got \(2,\)",
        ),
        (lambda e: e.query, ValueError, r"must be an Episode of n_tasks = 25 tasks; got Examples"),
        (lambda e: e.no_such_field, AttributeError, "no_such_field"),
    ],
)
def test_a_distribution_that_turns_bad_is_named_with_chunk_and_task(spoil, error, message):
    learner, sizes = Threshold(Signs.spec), {"n_shot": 2, "n_query": 3}
    with pytest.raises(error, match=message) as raised:
        evaluate(learner, TurnsBad(spoil), n_episodes=176, **sizes)
    told = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert "chunk 7 of TurnsBad (seed 20240229, split 'test')" in told
    evaluate(learner, TurnsBad(spoil), n_episodes=175, **sizes)


def test_huge_values_and_masked_ones_are_no_fault():
    mask = torch.ones(25, 6, dtype=torch.bool)
    mask[3, 1] = False
    for spoil in (with_query(y=at(7), mask=mask), with_query(x=at(math.nan), mask=mask)):
        assert evaluate(Threshold(Signs.spec), TurnsBad(spoil), n_shot=2, n_query=3, n_episodes=176).n_episodes == 176
    stream = EpisodeStream(
        TurnsBad(with_query(x=lambda x: x + 3e38)), seed=EVAL_SEED, split="test", n_shot=2, n_query=3
    )
    assert stream[7].query.x.sum() == math.inf  # by overflow: every value is finite


def test_no_shots_is_an_error():
    with pytest.raises(ValueError, match="at least one number"):
        evaluate_shots(Mean(LEVELS.spec), LEVELS, shots=(), n_query=1)


@pytest.mark.parametrize(
    ("learner", "tasks", "error", "message"),
    [
        (torch.nn.Linear(1, 1), LEVELS, TypeError, "must be a Learner; got Linear"),
        (Mean, LEVELS, TypeError, r"must be a Learner; got the class itself: Mean\(tasks.spec\) makes one"),
        (Mean(LEVELS.spec), [1], TypeError, "must be a TaskDistribution; got list"),
        (Mean(LEVELS.spec), Signs(), ValueError, "built for kind regression, .*; the tasks have kind classification"),
    ],
)
def test_bad_learners_and_tasks_are_named(learner, tasks, error, message):
    with pytest.raises(error, match=message):
        evaluate(learner, tasks, **SIZES)
