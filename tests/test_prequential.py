"""Prequential evaluation against a plain loop: adapt to all rows so far, predict the next one."""

import json
import math

import numpy as np
import pytest
import torch
from torch.distributions import Laplace

from metaicl.collation import concatenate
from metaicl.comparison import compare
from metaicl.episode import Episode, Examples
from metaicl.evaluation import evaluate, evaluate_shots
from metaicl.functional import categorical, gaussian
from metaicl.learner import Learner, PredictsPrefixes, Traits, Updates
from metaicl.learners import CausalInContextTransformer, ProtoNet
from metaicl.learners.reference.recursive import RecursiveLeastSquares
from metaicl.metrics import query_metrics
from metaicl.nets.context import ContextTransformer
from metaicl.prefixes import first_shots, predict_prefixes
from metaicl.report import Report
from metaicl.results import Result
from metaicl.spec import TaskSpec
from metaicl.task import EVAL_SEED, EpisodeStream, TaskDistribution
from metaicl.tasks.dynamics import DynamicalSystem
from metaicl.tasks.gaussians import GaussianClasses

SIZES = {"n_shot": 3, "n_query": 5, "n_episodes": 30}


class Drift(TaskDistribution):
    """A random walk, so that early rows say little about late ones; the numbers of real rows vary with the task."""

    spec = TaskSpec("regression", (1,), y_dim=1, ordered=True)

    def sample(self, n_tasks, *, split, n_shot, n_query, generator):
        x, step = torch.randn(2, n_tasks, n_shot + n_query, 1, generator=generator, dtype=torch.float64)
        mask = torch.rand(n_tasks, n_shot + n_query, generator=generator) < 0.7
        mask[:, [0, n_shot]] = True
        rows = Examples(x, step.cumsum(1), mask)
        return Episode(rows.rows(slice(n_shot)), rows.rows(slice(n_shot, None)))


class Steps(TaskDistribution):
    """Classes that change along the stream; masked as `Drift`."""

    spec = TaskSpec("classification", (1,), n_way=2, ordered=True)

    def sample(self, n_tasks, *, split, n_shot, n_query, generator):
        walk = Drift().sample(n_tasks, split=split, n_shot=2 * n_shot, n_query=2 * n_query, generator=generator)
        parts = (Examples(part.x, (part.y[..., 0] > 0).long(), part.mask) for part in (walk.support, walk.query))
        return Episode(*parts)


class Still(Drift):
    """The same rows as a set."""

    spec = TaskSpec("regression", (1,), y_dim=1)


class Plain(Learner):
    """The mean of all rows seen; it neither answers prefixes nor learns on."""

    traits = Traits(trainable=False)

    def __init__(self, spec):
        super().__init__(spec)
        self.adapted = 0

    def adapt(self, support):
        self.adapted += 1
        y = support.y if self.spec.kind == "regression" else torch.eye(2, dtype=torch.float64)[support.y]
        weight = support.real[..., None].to(y.dtype)
        return (y * weight).sum(1), weight.sum(1)

    def predict(self, state, x):
        total, count = state
        if self.spec.kind == "regression":
            mean = (total / count.clamp(min=1))[:, None].expand(-1, x.shape[1], -1)
            return gaussian(mean, 1 + 1 / count[:, None].clamp(min=1))
        return categorical((1 + total).log()[:, None].expand(-1, x.shape[1], -1))


class Growing(Plain):
    def update(self, state, examples):
        self.adapted -= 1
        return tuple(old + new for old, new in zip(state, self.adapt(examples), strict=True))


class Fast(Plain):
    """Answers all prefixes at once; nothing sensible before the first row, as some learners."""

    def predict_prefixes(self, examples):
        y = examples.y if self.spec.kind == "regression" else torch.eye(2, dtype=torch.float64)[examples.y]
        weight = examples.real[..., None].to(y.dtype)
        before = [torch.cat([torch.zeros_like(v[:, :1]), v.cumsum(1)[:, :-1]], 1) for v in (y * weight, weight)]
        total, count = before
        first = torch.where(torch.arange(examples.n_rows) == 0, math.nan, 1.0)[:, None]
        if self.spec.kind == "regression":
            return gaussian(first * total / count.clamp(min=1), first * (1 + 1 / count.clamp(min=1)))
        return categorical(first * (1 + total).log())


class Heavy(Plain):
    """Answers of a kind that cannot be joined into one distribution."""

    def predict(self, state, x):
        normal = super().predict(state, x)
        return torch.distributions.Independent(Laplace(normal.mean, normal.stddev, validate_args=False), 1)


def loop(learner, tasks, *, n_shot, n_query, n_episodes, most=None):
    """One task and one row at a time, real rows only: (metrics by name, each (E,))."""
    stream = EpisodeStream(tasks, seed=EVAL_SEED, split="test", n_shot=most or n_shot, n_query=n_query)
    found = []
    for task in stream.batches(0, n_episodes, batch_size=1):
        seen = task.support if most is None else first_shots(task.support, n_shot, tasks.spec)
        seen = seen.rows(seen.real[0])
        query, values = task.query.rows(task.query.real[0]), []
        for t in range(query.n_rows):
            row = query.rows(slice(t, t + 1))
            answer = learner.predict(learner.adapt(seen), row.x)
            values.append(query_metrics(answer, Examples(row.x, row.y), tasks.spec))
            seen = concatenate(seen, row)
        found.append({name: float(torch.stack([one[name] for one in values]).mean()) for name in values[0]})
    return {name: np.array([one[name] for one in found]) for name in found[0]}


@pytest.mark.parametrize("tasks", [Drift(), Steps()], ids=["regression", "classification"])
@pytest.mark.parametrize("learner", [Plain, Growing, Fast])
@pytest.mark.parametrize("batch_size", [1, 7, 30])
def test_values_are_those_of_a_plain_loop(learner, tasks, batch_size):
    built = learner(tasks.spec)
    assert (isinstance(built, PredictsPrefixes), isinstance(built, Updates)) == (learner is Fast, learner is Growing)
    found = evaluate(built.double(), tasks, **SIZES, batch_size=batch_size)
    expected = loop(Plain(tasks.spec), tasks, **SIZES)
    assert found.prequential
    assert set(found.metrics) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found.metrics[name], values, rtol=1e-9, err_msg=name)
    at_once = evaluate(built, tasks, **SIZES, prequential=False)
    primary = next(iter(expected))
    assert not np.allclose(at_once.metrics[primary], expected[primary], rtol=0.05)  # the loop has something to find


def test_a_learner_that_can_learn_on_does_not_start_over():
    counts = {}
    for kind in (Plain, Growing, Fast):
        learner = kind(Drift.spec)
        evaluate(learner, Drift(), **SIZES, batch_size=30)
        counts[kind] = learner.adapted
    assert counts == {Plain: SIZES["n_query"], Growing: 1, Fast: 1}


def test_calibration_counts_every_real_row_once():
    real = sum(
        int(task.query.real.sum())
        for task in EpisodeStream(Drift(), seed=EVAL_SEED, split="test", n_shot=3, n_query=5).batches(
            0, 30, batch_size=10
        )
    )
    ways = [evaluate(kind(Drift.spec).double(), Drift(), **SIZES).calibration for kind in (Plain, Growing, Fast)]
    assert ways[0].count == (real,) * 10
    assert ways[0].observed == ways[1].observed == ways[2].observed


def attentive(spec):
    """An untrained Transformer whose answers depend on the rows before."""
    learner = CausalInContextTransformer(spec)
    learner.transformer = ContextTransformer(dim=64, depth=4, heads=4, causal=True, kind="classification")
    return learner


@pytest.mark.parametrize("build", [lambda spec: RecursiveLeastSquares(spec, penalty=0.1), attentive])
def test_bundled_learners_on_a_dynamical_system(build):
    tasks = DynamicalSystem(dim=3)
    torch.manual_seed(0)
    learner = build(tasks.spec).eval()
    found = evaluate(learner, tasks, **SIZES)
    with torch.no_grad():
        expected = loop(learner, tasks, **SIZES)
    np.testing.assert_allclose(found.metrics["mse"], expected["mse"], rtol=1e-4)
    at_once = evaluate(learner, tasks, **SIZES, prequential=False)
    assert found.mean("mse") != pytest.approx(at_once.mean("mse"), rel=0.01)


def test_a_learner_with_update_on_classes_that_are_no_stream():
    tasks, sizes = GaussianClasses(dim=2), {"n_shot": 1, "n_query": 2, "n_episodes": 20}
    learner = ProtoNet(tasks.spec)
    found = evaluate(learner, tasks, **sizes, prequential=True)
    with torch.no_grad():
        expected = loop(learner.eval(), tasks, **sizes)
    np.testing.assert_allclose(found.metrics["nll"], expected["nll"], rtol=1e-4)
    np.testing.assert_allclose(found.metrics["accuracy"], expected["accuracy"], rtol=1e-6)


def test_late_rows_gain_from_the_rows_before_them():
    tasks = DynamicalSystem(dim=5)
    learner = RecursiveLeastSquares(tasks.spec, penalty=0.1)
    sizes = {"n_shot": 10, "n_query": 10, "n_episodes": 100}
    ordered, at_once = (evaluate(learner, tasks, **sizes, prequential=choice) for choice in (None, False))
    episode = next(
        EpisodeStream(tasks, seed=EVAL_SEED, split="test", n_shot=10, n_query=10).batches(0, 100, batch_size=100)
    )
    rows = concatenate(episode.support, episode.query)
    error = (predict_prefixes(learner, rows).mean - rows.y).square().mean(-1)[:, 10:]
    assert ordered.mean("mse") == pytest.approx(float(error.mean()), rel=1e-5)
    assert ordered.mean("mse") < 0.8 * at_once.mean("mse")


def test_sets_are_asked_at_once_unless_it_is_said():
    assert evaluate(Plain(Drift.spec), Drift(), **SIZES).prequential
    found = [evaluate(Plain(Still.spec), Still(), **SIZES, prequential=choice) for choice in (None, False, True)]
    assert [one.prequential for one in found] == [False, False, True]
    assert found[0].metrics["mse"].tolist() == found[1].metrics["mse"].tolist() != found[2].metrics["mse"].tolist()
    assert len({one.fingerprint for one in found}) == 1  # of the episodes, which are the same
    assert str(found[0]).endswith("3 support and 5 query rows)")
    assert str(found[2]).endswith("3 support and 5 query rows, prequential)")


def test_shots_are_nested_before_the_same_query():
    curves = evaluate_shots(Plain(Drift.spec).double(), Drift(), shots=(1, 3), n_query=5, n_episodes=20)
    for shots, one in curves.items():
        expected = loop(Plain(Drift.spec), Drift(), n_shot=shots, n_query=5, n_episodes=20, most=3)
        np.testing.assert_allclose(one.metrics["mse"], expected["mse"], rtol=1e-9)


def test_answers_that_cannot_be_joined_are_judged_too():
    found = evaluate(Heavy(Drift.spec).double(), Drift(), **SIZES)
    np.testing.assert_allclose(found.metrics["nll"], loop(Heavy(Drift.spec), Drift(), **SIZES)["nll"], rtol=1e-9)


@pytest.mark.parametrize("kind", [Plain, Growing, Fast])
def test_nan_names_the_query_row(kind):
    class Broken(kind):
        """Not a number once six rows have been seen: the fourth real query row after three support rows."""

        def _spoil(self, answer, count):
            return gaussian(torch.where(count >= 6, math.nan, answer.mean), answer.stddev)

        def predict(self, state, x):
            return self._spoil(super().predict(state, x), state[1][:, None])

        if kind is Fast:

            def predict_prefixes(self, examples):
                seen = torch.arange(examples.n_rows, dtype=torch.float64)[None, :, None]
                return self._spoil(super().predict_prefixes(examples), seen)

    class Full(Drift):
        def sample(self, n_tasks, **options):
            drawn = super().sample(n_tasks, **options)
            return Episode(*(Examples(part.x, part.y) for part in (drawn.support, drawn.query)))

    with pytest.raises(FloatingPointError, match=r"^mine failed in episodes 0 to 29: .* at episode 0, query row 3 "):
        evaluate(Broken(Drift.spec), Full(), **SIZES, name="mine")


def test_another_word_for_it_is_an_error():
    with pytest.raises(TypeError, match=r"prequential must be True, False or None .* got 'yes'"):
        evaluate(Plain(Drift.spec), Drift(), **SIZES, prequential="yes")
    with pytest.raises(TypeError, match="prequential must be"):
        compare({"a": Plain}, Drift(), **SIZES, prequential=1, progress=False)


def test_a_comparison_says_so_and_keeps_the_ways_apart(tmp_path):
    options = {**SIZES, "directory": tmp_path / "run", "progress": False}
    learners = {"a": Plain, "b": Growing}
    found = compare(learners, Drift(), **options)
    ones = [one for result in found.results for one in result.evaluations.values()]
    assert all(one.prequential for one in ones)
    assert "3 shot and 5 query rows of vector 1, prequential; 30 episodes" in str(found)
    np.testing.assert_allclose(found.values("Drift", "a"), loop(Plain(Drift.spec), Drift(), **SIZES)["mse"][None], 1e-6)
    again = compare(learners, Drift(), **options)
    assert again.values("Drift", "b").tolist() == found.values("Drift", "b").tolist()
    with pytest.raises(ValueError, match="prequential was True, is None"):
        compare(learners, Drift(), **options, prequential=False)
    plain = compare(learners, Drift(), **SIZES, prequential=False, progress=False)
    assert "prequential" not in str(plain)
    assert plain.values("Drift", "a").mean() > found.values("Drift", "a").mean()
    with pytest.raises(ValueError, match=r"all prequential or none to be compared; got a answered row by row, b all"):
        Report(found.protocol, found.tasks, (found.results[0], plain.results[1]))


def test_a_result_stored_before_the_choice_existed_is_one_of_all_queries_at_once(tmp_path):
    options = {**SIZES, "directory": tmp_path, "progress": False}
    found = compare({"a": Plain}, Still(), **options)
    path = next(tmp_path.rglob("fixed.json"))
    stored = json.loads(path.read_text())
    assert "prequential" not in stored["settings"]
    del stored["result"]["evaluations"]["3"]["prequential"], stored["sha256"]  # nor were there checksums
    path.write_text(json.dumps(stored))
    old = compare({"a": Plain}, Still(), **options).results[0]
    assert old.evaluations[3].prequential is False
    assert old.evaluations[3].metrics["mse"].tolist() == found.results[0].evaluations[3].metrics["mse"].tolist()
    again = Result.from_dict(compare({"a": Plain}, Drift(), **SIZES, progress=False).results[0].to_dict())
    assert again.evaluations[3].prequential
    with pytest.raises(ValueError, match="prequential was None, is True"):
        compare({"a": Plain}, Still(), **options, prequential=True)
