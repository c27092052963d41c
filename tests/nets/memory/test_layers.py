"""The memories as layers: the four agreements of a mixer, masks included, for every kind."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from metaicl.nets.memory.delta import linear_attention
from metaicl.nets.memory.descent_layers import Omega, TestTimeTraining, Titans
from metaicl.nets.memory.layers import DeltaRule, FastWeightMixer, LinearAttention, Mesa, set_gates
from metaicl.nets.memory.state import FastWeights

TASKS, TOKENS, DIM = 2, 7, 8

LAYERS = {
    "LinearAttention": LinearAttention,
    "LinearAttention, gate": partial(LinearAttention, gate=True),
    "DeltaRule": DeltaRule,
    "DeltaRule, gate, degree 2": partial(DeltaRule, gate=True, degree=2),
    "Mesa": Mesa,
    "Mesa, gate": partial(Mesa, gate=True),
    "Mesa, recursive": partial(Mesa, recursive=True),
    "TTT": partial(TestTimeTraining, batch=3),
    "TTT, MLP": partial(TestTimeTraining, batch=3, hidden=5),
    "TTT, full batch": partial(TestTimeTraining, batch=None),
    "Titans": Titans,
    "Titans, MLP": partial(Titans, hidden=5, batch=4),
    "Omega": Omega,
    "Omega, mini-batch": partial(Omega, batch=3),
    "Omega, Muon": partial(Omega, muon=True),
    "Omega, inner steps, degree 2": partial(Omega, inner_steps=2, degree=2, unit_keys=False, max_step=0.1),
}


def close(a: Any, b: Any) -> None:
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> FastWeightMixer:
    torch.manual_seed(0)
    made = LAYERS[request.param](DIM, heads=2).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    h, context = torch.randn(2, TASKS, TOKENS, DIM, generator=generator, dtype=torch.float64)
    return h, context, torch.rand(TASKS, TOKENS, generator=generator) > 0.4


def begun(layer: FastWeightMixer, like: Tensor) -> FastWeights:
    """A state that has read two tokens, so that nothing is tested at the start only."""
    before = torch.randn(TASKS, 2, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return layer(before, layer.start(TASKS, like))[1]


def test_reading_in_pieces_is_reading_at_once(layer: FastWeightMixer, rows: tuple[Tensor, Tensor, Tensor]) -> None:
    h, _, real = rows
    start = begun(layer, h)
    for mask in (None, real):
        whole, end = layer(h, start, mask)
        parts, state = [], start
        for piece in (slice(0, 3), slice(3, 4), slice(4, 4), slice(4, None)):
            out, state = layer(h[:, piece], state, None if mask is None else mask[:, piece])
            parts.append(out)
        close((torch.cat(parts, 1), state), (whole, end))


def test_masked_tokens_are_absent(layer: FastWeightMixer, rows: tuple[Tensor, Tensor, Tensor]) -> None:
    h, _, real = rows
    start = begun(layer, h)
    junk = torch.where(real[..., None], h, 1e6)
    out, end = layer(junk, start, real)
    for task in range(TASKS):
        alone, state = layer(h[task : task + 1, real[task]], pytree.tree_map(lambda x, i=task: x[i : i + 1], start))
        close(alone, out[task : task + 1, real[task]])
        close(state, pytree.tree_map(lambda x, i=task: x[i : i + 1], end))
    _, same = layer(junk, start, torch.zeros_like(real))
    for a, b in zip(pytree.tree_leaves(start), pytree.tree_leaves(same), strict=True):
        assert torch.equal(a, b)


def test_a_peek_is_the_next_token_alone(layer: FastWeightMixer, rows: tuple[Tensor, Tensor, Tensor]) -> None:
    h, _, _ = rows
    state = begun(layer, h)
    own, other = layer.peek(h, state, own=True), layer.peek(h, state)
    for t in range(TOKENS):
        token = h[:, t : t + 1]
        close(layer(token, state)[0], own[:, t : t + 1])
        close(layer.peek(token, state), other[:, t : t + 1])
    assert (own - other).abs().max().item() > 1e-3
    assert layer.peek(h[:, :0], state, own=True).shape == layer.peek(h[:, :0], state).shape == (TASKS, 0, DIM)


def test_prefixes_are_a_loop_of_peeks(layer: FastWeightMixer, rows: tuple[Tensor, Tensor, Tensor]) -> None:
    h, context, real = rows
    start = begun(layer, h)
    for mask in (None, real):
        together = layer.peek_prefixes(h, context, start, mask)
        for t in range(TOKENS):
            state = layer(context[:, :t], start, None if mask is None else mask[:, :t])[1]
            close(layer.peek(h[:, t : t + 1], state), together[:, t : t + 1])


def test_what_is_declared_order_free_is(layer: FastWeightMixer, rows: tuple[Tensor, Tensor, Tensor]) -> None:
    h, context, _ = rows
    order = torch.arange(TOKENS).flip(0)
    start = layer.start(TASKS, h)
    states = (layer(context, start)[1], layer(context[:, order], start)[1])
    first, second = (layer.peek(h, state) for state in states)
    assert ((first - second).abs().max().item() < 1e-9) == layer.order_free


def test_every_parameter_gets_a_finite_gradient(layer: FastWeightMixer, rows: tuple[Tensor, Tensor, Tensor]) -> None:
    h, _, real = rows
    out, _ = layer(h, begun(layer, h), real)
    found = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    assert all(bool(one.isfinite().all()) and float(one.abs().max()) > 0 for one in found)


def test_the_memory_does_not_grow() -> None:
    for make in LAYERS.values():
        layer = make(DIM, heads=2)
        state = layer.start(1, torch.zeros(1, 0, DIM))
        _, later = layer(torch.randn(1, 40, DIM), state)
        assert [leaf.shape for leaf in pytree.tree_leaves(later)] == [leaf.shape for leaf in pytree.tree_leaves(state)]


def test_a_layer_is_its_operator_between_two_projections() -> None:
    torch.manual_seed(0)
    layer, h = LinearAttention(DIM, key_dim=3, value_dim=2, unit_keys=False).double(), torch.randn(1, 5, DIM).double()
    out, state = layer(h, layer.start(1, h))
    queries, keys, values = (one(h) for one in (layer.to_query, layer.to_key, layer.to_value))
    reads, memory = linear_attention(queries, keys, values, torch.zeros(1, 2, 3, dtype=torch.float64))
    close(out, layer.project(reads))
    close(state.weights[0][:, 0], memory)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="heads must divide dim = 8 where key_dim or value_dim is None; got 3"):
        DeltaRule(8, heads=3)
    with pytest.raises(ValueError, match="needs keys and values of one size; got 4 and 8"):
        TestTimeTraining(8, hidden=4, key_dim=4)


def test_mini_batches_of_alike_tokens_do_not_diverge() -> None:
    torch.manual_seed(0)
    h = torch.ones(1, 512, 8)
    for options, bounded in (({}, True), ({"max_step": 1.0}, False)):
        layer = TestTimeTraining(8, **options)
        out, _ = layer(h, layer.start(1, h), None)
        assert (bool(out.isfinite().all()) and float(out.detach().abs().max()) < 10) == bounded


def largest(layer: FastWeightMixer, h: Tensor) -> float:
    """The largest absolute output; infinite if any is not a number."""
    with torch.no_grad():
        out, _ = layer(h, layer.start(len(h), h))
    return float(out.abs().nan_to_num(torch.inf).max())


DESCENTS = [(Titans, batch, {}) for batch in (1, 4, 16)]
DESCENTS += [(Omega, batch, {"window": window}) for batch in (1, 4, 16) for window in (1, 4, 16)]


@pytest.mark.parametrize(("make", "batch", "options"), DESCENTS)
@pytest.mark.parametrize("alike", [False, True])
def test_descent_stays_bounded_before_training(make: Any, batch: int, options: dict, alike: bool) -> None:
    torch.manual_seed(0)
    h = torch.randn(2, 1 if alike else 300, DIM).expand(2, 300, DIM)
    assert largest(make(DIM, batch=batch, **options), h) < 5


@pytest.mark.parametrize(("make", "batch", "options"), DESCENTS)
def test_no_rate_up_to_the_largest_diverges_but_larger_ones_do(make: Any, batch: int, options: dict) -> None:
    """With all gates where training could bring them: the whole step, momentum of a half, nothing or much forgotten."""
    torch.manual_seed(0)
    h, stable = torch.randn(1, 1, DIM, dtype=torch.float64).expand(1, 600, DIM), 1 / (batch * options.get("window", 1))
    for keep in (1 - 1e-9, 0.5, 0.01):
        for max_step, bounded in ((None, True), ((4.5 if batch == 1 else 2.5) * stable, False)):
            layer = make(DIM, batch=batch, max_step=max_step, **options).double()
            assert max_step is not None or layer.max_step == stable
            gates = {"step": 1 - 1e-9, "momentum": 0.5, "keep": keep, "importance": 1 - 1e-9}
            assert layer.to_gates is not None
            set_gates(layer.to_gates, [gates[name] for name in layer.gate_names])
            if bounded or keep > 0.9:
                assert (largest(layer, h) < 20) == bounded


@pytest.mark.parametrize("name", ["LinearAttention", "DeltaRule", "DeltaRule, gate, degree 2", *list(LAYERS)[4:7]])
def test_half_precision_is_single_precision_rounded(name: str) -> None:
    torch.manual_seed(0)
    layer, h = LAYERS[name](DIM, heads=2), torch.randn(TASKS, 40, DIM)
    expected, _ = layer(h, layer.start(TASKS, h))
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = layer(h, layer.start(TASKS, h))
    layer, h = layer.bfloat16(), h.bfloat16()
    half, state = layer(h[:, :30], layer.start(TASKS, h))
    half = torch.cat([half, layer(h[:, 30:], state)[0]], 1)
    for found in (mixed, half):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_regularizer_that_is_not_positive_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="regularizer must be a finite number > 0"):
        Mesa(DIM, regularizer=value)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (4.0, TypeError)])
def test_hidden_units_are_counted_when_a_memory_is_made(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="hidden must be an int >= 1; got"):
        Titans(DIM, hidden=value)
