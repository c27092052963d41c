"""Learners that read x_1, y_1, x_2, y_2, ...: one pass, pieces and single queries give the same answers."""

from functools import partial

import pytest
import torch

from metaicl.episode import Episode, Examples
from metaicl.learners.incontext.linear_transformer import LinearTransformer
from metaicl.learners.incontext.looped_linear import LoopedLinearAttention
from metaicl.learners.incontext.sequence import InterleavedTransformer, LoopedTransformer, SequenceLearner
from metaicl.meta_step import MetaStep
from metaicl.nets.memory.layers import DeltaRule
from metaicl.nets.sequence.model import SequenceModel
from metaicl.objectives import prefix_loss, prefix_squared_error, query_loss, squared_error
from metaicl.prefixes import predict_prefixes
from metaicl.task import EpisodeStream
from metaicl.tasks.functions import LinearRegression
from metaicl.tasks.gaussians import GaussianClasses

TASKS = {"regression": LinearRegression(dim=3, noise=0.1), "classification": GaussianClasses(n_way=3, dim=4)}
LEARNERS = {
    "transformer": partial(InterleavedTransformer, dim=16, depth=2, max_length=64),
    "without positions": partial(InterleavedTransformer, dim=16, depth=2, max_length=None),
    "looped": partial(LoopedTransformer, dim=16, loops=3, window=2, max_length=64),
    "one memory layer": partial(SequenceLearner, model=DeltaRule, dim=16),
    "stack of memories": partial(SequenceLearner, model=partial(SequenceModel, mixer=DeltaRule, depth=2), dim=16),
}


def episode_of(kind: str) -> Episode:
    episode = EpisodeStream(TASKS[kind], seed=0, split="test", n_shot=3, n_query=2, chunk_size=4)[0]
    return episode.to(dtype=torch.float64)


def masked(rows: Examples) -> Examples:
    real = torch.ones_like(rows.real)
    real[0, 0] = real[1, 2] = real[3, -1] = False
    return Examples(rows.x, rows.y, real)


def numbers(distribution, kind):
    return distribution.logits if kind == "classification" else torch.cat([distribution.mean, distribution.stddev], -1)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.fixture(params=LEARNERS, name="learner_of")
def build(request):
    def make(kind):
        torch.manual_seed(0)
        return LEARNERS[request.param](TASKS[kind].spec).double().eval()

    return make


@pytest.mark.parametrize("kind", TASKS)
def test_one_pass_over_prefixes_equals_adapting_to_each(learner_of, kind):
    learner, rows = learner_of(kind), masked(episode_of(kind).support)
    together = numbers(learner.predict_prefixes(rows), kind)

    class Slow(torch.nn.Module):  # the learner without its own method
        adapt, predict = learner.adapt, learner.predict

        def __call__(self, support, x):
            return self.predict(self.adapt(support), x)

    loop = numbers(predict_prefixes(Slow(), rows), kind)
    close(together[rows.real], loop[rows.real])


@pytest.mark.parametrize("kind", TASKS)
def test_reading_on_equals_reading_all(learner_of, kind):
    learner, episode = learner_of(kind), episode_of(kind)
    rows = masked(episode.support)
    grown = learner.update(learner.adapt(rows.rows(slice(2))), rows.rows(slice(2, None)))
    found = numbers(learner.predict(grown, episode.query.x), kind)
    close(found, numbers(learner(rows, episode.query.x), kind))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_tasks_with_masked_rows_can_be_mapped_over(learner_of):
    learner, rows = learner_of("regression"), masked(episode_of("regression").support)

    def one(x, y, real):
        part = Examples(x[None], y[None], real[None])
        state = learner.update(learner.adapt(part), part)
        return numbers(learner.predict(state, part.x), "regression")[0]

    found = torch.func.vmap(one)(rows.x, rows.y, rows.real)
    close(found, numbers(learner.predict(learner.update(learner.adapt(rows), rows), rows.x), "regression"))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_tokens_beyond_the_last_position_are_refused_when_mapped_over():
    learner = InterleavedTransformer(TASKS["regression"].spec, dim=8, depth=1, heads=2, max_length=4).double()
    rows = masked(episode_of("regression").support)
    with pytest.raises(IndexError):
        torch.func.vmap(lambda x, y, real: learner.adapt(Examples(x[None], y[None], real[None])).count)(
            rows.x, rows.y, rows.real
        )


def test_it_is_the_order_that_counts(learner_of):
    assert learner_of("regression").traits.order_sensitive


def test_loss_of_prefixes_is_the_mean_over_rows_and_stages():
    episode = episode_of("regression")
    learner = LEARNERS["looped"](TASKS["regression"].spec).double()
    rows = Examples(
        torch.cat([episode.support.x, episode.query.x], 1), torch.cat([episode.support.y, episode.query.y], 1)
    )
    errors = []
    for loops in (2, 3):
        other = LEARNERS["looped"](TASKS["regression"].spec).double()
        other.load_state_dict(learner.state_dict())
        other.loops = loops
        errors.append((other.eval().predict_prefixes(rows).mean - rows.y).square().sum(-1).mean(1))
    close(prefix_squared_error(learner.eval(), episode), errors[1])
    close(prefix_squared_error(learner.train(), episode), (errors[0] + errors[1]) / 2)
    plain = LEARNERS["transformer"](TASKS["regression"].spec).double().train()
    answer = plain.predict_prefixes(rows)
    close(prefix_squared_error(plain, episode), (answer.mean - rows.y).square().sum(-1).mean(1))
    close(prefix_loss(plain, episode), -answer.log_prob(rows.y).mean(1))


def test_a_model_that_is_no_mixer_is_named():
    with pytest.raises(TypeError, match=r"model must make a Mixer .* got Linear"):
        SequenceLearner(TASKS["regression"].spec, model=lambda dim: torch.nn.Linear(dim, dim))


def test_losses_of_prefixes_need_prefixes():
    learner = LoopedLinearAttention(TASKS["regression"].spec).double()
    for loss in (prefix_loss, prefix_squared_error):
        with pytest.raises(TypeError, match="LoopedLinearAttention has none"):
            loss(learner, episode_of("regression"))


def test_squared_errors_of_classes_are_named():
    learner, episode = InterleavedTransformer(TASKS["classification"].spec).double(), episode_of("classification")
    for loss in (squared_error, prefix_squared_error):
        with pytest.raises(ValueError, match=f"{loss.__name__} is for regression; InterleavedTransformer"):
            loss(learner, episode)


def test_more_loops_than_trained_with_can_be_run():
    learner = LEARNERS["looped"](TASKS["regression"].spec).double()
    learner.loops = 7
    episode = episode_of("regression")
    assert learner(episode.support, episode.query.x).mean.isfinite().all()
    with pytest.raises(ValueError, match="loops must be an int >= 1; got 0"):
        learner.loops = 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer", "looped"])
@pytest.mark.parametrize("objective", [query_loss, prefix_squared_error])
def test_a_compiled_step_equals_the_eager_one(name, objective, recwarn):
    learner = LEARNERS[name](TASKS["regression"].spec)
    episode = episode_of("regression").to(dtype=torch.float32)
    compiled = MetaStep(learner.train(), objective, compile=True)
    losses, _ = compiled(episode)
    assert compiled.is_compiled, [str(warning.message) for warning in recwarn]
    torch.testing.assert_close(losses, MetaStep(learner, objective)(episode)[0], rtol=1e-4, atol=1e-5)


def test_looped_linear_attention_is_gradient_descent_and_a_linear_transformer():
    episode = episode_of("regression")
    rows, spec = masked(episode.support), TASKS["regression"].spec
    looped = LoopedLinearAttention(spec, loops=4, start=0.25).double()
    state = looped.adapt(rows)
    for task in range(rows.n_tasks):
        x, y = rows.x[task, rows.real[task]], rows.y[task, rows.real[task]]
        weights = torch.zeros(3, 1, dtype=x.dtype)
        for _ in range(4):
            weights = weights - 0.25 * x.T @ (x @ weights - y) / len(x)
        close(state.weights[task], weights)
    built = LinearTransformer(spec, loops=4).double()
    built.set_gradient_descent(lr=0.25)
    close(looped(rows, episode.query.x).mean, built(rows, episode.query.x).mean)
    close(looped.update(looped.adapt(rows.rows(slice(2))), rows.rows(slice(2, None))).weights, state.weights)


def test_looped_linear_attention_equals_its_tokens():
    torch.manual_seed(0)
    rows = episode_of("regression").support
    looped = LoopedLinearAttention(TASKS["regression"].spec, loops=3).double()
    with torch.no_grad():
        looped.preconditioner.copy_(0.2 * torch.randn(3, 3))
        looped.shift.copy_(torch.randn(3, 1))
    query = torch.randn(4, 1, 3, dtype=torch.float64)
    tokens, ask = rows.y, torch.zeros(4, 1, 1, dtype=torch.float64)
    for _ in range(3):
        values = rows.x @ looped.shift + tokens
        mixed = looped.preconditioner @ (rows.x.mT @ values) / rows.n_rows  # every token: x^T A (1/N) sum x_i value_i
        tokens, ask = tokens - rows.x @ mixed, ask - query @ mixed
    close(looped(rows, query).mean, -ask)


def test_looped_linear_attention_serves_regression_on_vectors():
    with pytest.raises(ValueError, match="LoopedLinearAttention serves regression, not classification; use Linear"):
        LoopedLinearAttention(TASKS["classification"].spec)
