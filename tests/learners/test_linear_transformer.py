"""Linear Transformers: the construction of gradient descent, GD++ and streams, exact in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from metaicl.episode import Examples
from metaicl.learners.incontext.linear_transformer import CausalLinearTransformer, LinearTransformer
from metaicl.nets.linear_attention import LinearAttention
from metaicl.spec import TaskSpec

SPEC = TaskSpec("regression", (4,), y_dim=2)
LR, GAMMA = 0.3, 0.2


def rows(n_rows: int, *, seed: int = 0, masked: bool = False) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, n_rows, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(3, n_rows, 2, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, n_rows, generator=generator) < 0.6 if masked else None
    return Examples(x, y, mask)


def queries() -> Tensor:
    return rows(5, seed=1).x


def descend(support: Examples, start: Tensor, steps: int) -> Tensor:
    """Weights (B, 4, 2) after explicit gradient steps on the mean over real rows."""
    weights, n_rows = start.expand(3, 4, 2), support.real.double().sum(1).clamp(min=1)[:, None, None]
    for _ in range(steps):
        residuals = (support.x @ weights - support.y) * support.real[..., None]
        weights = weights - LR / n_rows * support.x.mT @ residuals
    return weights


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("steps", range(1, 6))
def test_constructed_weights_are_gradient_descent(steps: int, masked: bool) -> None:
    support, start = rows(7, masked=masked), torch.randn(4, 2, dtype=torch.float64)
    expected = queries() @ descend(support, start, steps)
    for options in ({"depth": steps}, {"loops": steps}):
        learner = LinearTransformer(SPEC, **options).double()
        learner.set_gradient_descent(lr=LR, start=start)
        assert (learner(support, queries()).mean - expected).abs().max() <= 1e-12


def test_constructed_weights_are_gradient_descent_in_single_precision() -> None:
    support = rows(7).to(dtype=torch.float32)
    learner = LinearTransformer(SPEC, loops=5)
    learner.set_gradient_descent(lr=LR)
    expected = queries() @ descend(rows(7), torch.zeros(4, 2, dtype=torch.float64), 5)
    assert (learner(support, queries().float()).mean - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_curvature_is_gd_plus_plus() -> None:
    support, x = rows(7), rows(7).x
    learner = LinearTransformer(SPEC, loops=3, scratch=2).double()
    learner.set_gradient_descent(lr=LR, curvature=GAMMA)
    q, residual, answer = queries(), support.y, 0.0
    for _ in range(3):  # on residuals: each step answers a part, and bends the inputs for the next one
        weights, bend = LR / 7 * residual.mT @ x, GAMMA / 7 * x.mT @ x
        answer, residual = answer + q @ weights.mT, residual - x @ weights.mT
        x, q = x - x @ bend, q - q @ bend
    assert (learner(support, queries()).mean - answer).abs().max() <= 1e-12


@pytest.mark.parametrize("masked", [False, True])
def test_each_prefix_of_a_stream_is_one_gradient_step(masked: bool) -> None:
    stream, start = rows(6, masked=masked), torch.randn(4, 2, dtype=torch.float64)
    learner = CausalLinearTransformer(SPEC).double()
    learner.set_gradient_descent(lr=LR, start=start)
    found = learner.predict_prefixes(stream).mean
    for t in range(6):
        weights = descend(stream.rows(slice(t)), start, 1)
        expected = (stream.x[:, t : t + 1] @ weights)[:, 0]
        assert (found[:, t] - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_deeper_causal_layers_step_on_residuals_that_know_earlier_rows_only(steps: int) -> None:
    support, start = rows(6), torch.randn(4, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    learner = CausalLinearTransformer(SPEC, depth=steps).double()
    learner.set_gradient_descent(lr=LR, start=start)
    residuals, weights = support.x @ start - support.y, start.expand(3, 4, 2)
    for _ in range(steps):
        moves = [LR / t * support.x[:, :t].mT @ residuals[:, :t] for t in range(1, 7)]
        weights = weights - moves[-1]
        residuals = torch.stack([residuals[:, t] - (support.x[:, t, None] @ moves[t])[:, 0] for t in range(6)], 1)
    found = learner(support, queries()).mean
    assert (found - queries() @ weights).abs().max() <= 1e-12
    assert bool((found - queries() @ descend(support, start, steps)).abs().max() <= 1e-12) == (steps == 1)


@pytest.mark.parametrize("options", [{"depth": 3, "heads": 2, "scratch": 3}, {"depth": 2, "loops": 2, "clip": 1.5}])
def test_streams_in_pieces_equal_streams_in_one(options: dict) -> None:
    learner = CausalLinearTransformer(SPEC, init_variance=0.3, **options).double()
    stream = rows(9, masked=True)
    whole, pieces = learner.adapt(stream), learner.adapt(stream.rows(slice(4)))
    pieces = learner.update(learner.update(pieces, stream.rows(slice(4, 5))), stream.rows(slice(5, 9)))
    for a, b in zip(whole.sums, pieces.sums, strict=True):
        assert (a - b).abs().max() <= 1e-12
    found = learner.predict_prefixes(stream).mean
    for t in range(1, 9):
        alone = learner(stream.rows(slice(t)), stream.x[:, t : t + 1]).mean[:, 0]
        assert (found[:, t] - alone).abs().max() <= 1e-12


@pytest.mark.parametrize("make", [LinearTransformer, CausalLinearTransformer])
def test_no_rows_and_no_queries(make: type) -> None:
    learner = make(SPEC, depth=2, heads=2).double()
    nothing, stream = rows(0), rows(5, masked=True)
    assert learner(stream, nothing.x).mean.shape == (3, 0, 2)
    assert torch.equal(learner(nothing, queries()).mean, torch.zeros(3, 5, 2))
    if make is CausalLinearTransformer:
        state = learner.adapt(stream)
        for a, b in zip(learner.update(state, nothing), state, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert learner.predict_prefixes(nothing).mean.shape == (3, 0, 2)


def test_half_precision_counts_all_rows_of_a_stream() -> None:
    learner = CausalLinearTransformer(TaskSpec("regression", (2,), y_dim=1), depth=1).bfloat16()
    row = Examples(torch.ones(1, 1, 2).bfloat16(), torch.ones(1, 1, 1).bfloat16())
    with torch.no_grad():
        state = learner.adapt(row)
        for _ in range(299):
            state = learner.update(state, row)
    assert state.count.tolist() == [300]


def test_one_layer_does_not_care_for_causality() -> None:
    one, other = LinearTransformer(SPEC, heads=2).double(), CausalLinearTransformer(SPEC, heads=2).double()
    other.load_state_dict(one.state_dict())
    assert torch.allclose(one(rows(5), queries()).mean, other(rows(5), queries()).mean, atol=1e-12)


def test_products_say_what_a_layer_computes() -> None:
    layer, other = LinearAttention(6, heads=2, init_variance=1.0), LinearAttention(6, heads=2)
    other.set_products(*layer.products())
    h, moment = torch.randn(2, 3, 6), torch.randn(2, 6, 6)
    moment = moment @ moment.mT
    assert torch.allclose(layer.read(h, moment), other.read(h, moment), atol=1e-5)
    key_query, project_value = layer.products()
    explicit = sum(h @ (project_value[i] @ moment @ key_query[i]).mT for i in range(2))
    assert torch.allclose(layer.read(h, moment), explicit, atol=1e-5)


def test_loops_may_be_changed_and_damped_later() -> None:
    learner = LinearTransformer(SPEC).double()
    learner.set_gradient_descent(lr=LR / 0.75)
    learner.stack.loops, learner.stack.damping = 4, 0.75
    expected = queries() @ descend(rows(7), torch.zeros(4, 2, dtype=torch.float64), 4)
    assert (learner(rows(7), queries()).mean - expected).abs().max() <= 1e-12


def test_an_encoder_makes_it_a_step_on_features() -> None:
    encoder = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    learner = LinearTransformer(SPEC, encoder=encoder).double()
    learner.set_gradient_descent(lr=LR)
    features = encoder(rows(7).x)
    expected = encoder(queries()) @ (LR / 7 * rows(7).y.mT @ features).mT
    assert (learner(rows(7), queries()).mean - expected).abs().max() <= 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearTransformer(SPEC, loops=0), "loops"),
        (lambda: LinearTransformer(SPEC, clip=0.0), "clip"),
        (
            lambda: LinearTransformer(SPEC).set_gradient_descent(lr=1, start=torch.zeros(2, 4)),
            r"\(4, 2\); got \(2, 4\)",
        ),
        (
            lambda: LinearTransformer(SPEC).set_gradient_descent(lr=1, curvature=0.1, start=torch.ones(4, 2)),
            r"start must be None or zero with curvature != 0, .*got curvature 0.1 and a start up to 1",
        ),
        (lambda: LinearTransformer(SPEC, heads=2).set_gradient_descent(lr=1), r"key_query must be \(H, D, D\)"),
        (lambda: CausalLinearTransformer(SPEC, key_size=3).set_gradient_descent(lr=1), "key_size 3"),
    ],
)
def test_wrong_use(make: partial, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_sums_instead_of_means() -> None:
    means, sums = LinearTransformer(SPEC).double(), LinearTransformer(SPEC, per_row=False).double()
    means.set_gradient_descent(lr=LR)
    sums.set_gradient_descent(lr=LR / 7)
    assert torch.allclose(means(rows(7), queries()).mean, sums(rows(7), queries()).mean, atol=1e-12)
