"""Memories that descend: against autograd token by token, chunks against the loop, and the closed forms at the ends."""

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from metaicl.nets.memory.delta import delta_rule, linear_attention
from metaicl.nets.memory.descent import Descent, Rates, descend, descend_chunked, start_descent
from metaicl.nets.memory.least_squares import least_squares, ridge_start
from metaicl.nets.memory.recall import orthogonalize, recall
from metaicl.nets.memory.state import FastWeights

TASKS, HEADS, TOKENS, SIZE = 2, 2, 11, 4
Written = tuple[Tensor, Tensor, Rates]


def setting(hidden: int | None = None, *, masked: bool = False) -> tuple[tuple[Tensor, ...], Tensor, Written, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(TASKS, HEADS, *shape, generator=generator, dtype=torch.float64)

    def between(low: float, high: float) -> Tensor:
        uniform = torch.rand(TASKS, HEADS, TOKENS, generator=generator, dtype=torch.float64)
        return low + (high - low) * uniform

    shapes = [(SIZE, SIZE)] if hidden is None else [(hidden, SIZE), (SIZE, hidden)]
    weights = tuple(0.5 * normal(*shape) for shape in shapes)
    keys, rates = normal(TOKENS, SIZE), Rates(between(0, 0.2), between(0, 0.9), between(0.8, 1), between(0, 1))
    keys = keys / keys.norm(dim=-1, keepdim=True)
    real = torch.rand(TASKS, 1, TOKENS, generator=generator) > (0.4 if masked else -1.0)
    return weights, normal(TOKENS, SIZE), (keys, normal(TOKENS, SIZE), rates), real


def cut(written: Written, part: slice) -> Written:
    return written[0][..., part, :], written[1][..., part, :], Rates(*(rate[..., part] for rate in written[2]))


def by_autograd(weights: tuple[Tensor, ...], queries: Tensor, written: Written, rule: Descent) -> Tensor:
    """The definition in the head of the module, written for one task and head without any mask."""
    keys, values, rates = written
    weights = tuple(one.clone().requires_grad_() for one in weights)
    base, momentum, reads = weights, tuple(torch.zeros_like(one) for one in weights), []
    for t in range(TOKENS):
        for _ in range(rule.inner_steps):
            place = weights if rule.batch == 1 else base
            past = slice(max(0, t - rule.window + 1), t + 1)
            error = (recall(place, keys[past], norm=rule.norm) - values[past]).square().sum(-1)
            grads = torch.autograd.grad(0.5 * (rates.importance[past] * error).sum(), place)
            size = 1.0 if rule.muon else rates.step[t]
            momentum = tuple(rates.momentum[t] * s - size * g for s, g in zip(momentum, grads, strict=True))
            moves = [rates.step[t] * orthogonalize(s) for s in momentum] if rule.muon else momentum
            weights = tuple(rates.keep[t] * w + m for w, m in zip(weights, moves, strict=True))
            weights = tuple(one.detach().requires_grad_() for one in weights)
        if rule.batch is not None and (t + 1) % rule.batch == 0:
            base = weights
        reads.append(recall(weights, queries[t : t + 1], norm=rule.norm).detach())
    return torch.cat(reads)


RULES = [
    Descent(),
    Descent(norm=True),
    Descent(window=3),
    Descent(window=3, inner_steps=2),
    Descent(window=3, muon=True),
    Descent(batch=4),
    Descent(batch=4, window=3, norm=True),
    Descent(batch=None, window=3),
]


@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_loop_is_the_definition(rule: Descent, hidden: int | None) -> None:
    weights, queries, written, real = setting(hidden)
    reads, _ = descend(queries, written, start_descent(weights, SIZE, rule), rule, real)
    for b in range(TASKS):
        for h in range(HEADS):
            own = (written[0][b, h], written[1][b, h], Rates(*(rate[b, h] for rate in written[2])))
            expected = by_autograd(tuple(one[b, h] for one in weights), queries[b, h], own, rule)
            torch.testing.assert_close(reads[b, h], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("batch", [2, 4, None])
@pytest.mark.parametrize("window", [1, 3])
def test_chunks_equal_the_loop_also_in_pieces(window: int, batch: int | None, hidden: int | None, masked: bool) -> None:
    weights, queries, written, real = setting(hidden, masked=masked)
    rule = Descent(batch=batch, window=window, norm=hidden is not None)
    start = start_descent(weights, SIZE, rule)
    expected = descend(queries, written, start, rule, real)
    whole = descend_chunked(queries, written, start, rule, real)
    reads, state = [], start
    for part in (slice(0, 3), slice(3, 4), slice(4, None)):
        read, state = descend_chunked(queries[..., part, :], cut(written, part), state, rule, real[..., part])
        reads.append(read)
    for got in (whole, (torch.cat(reads, -2), state)):
        for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("run", [descend, descend_chunked])
def test_tokens_that_are_not_real_leave_the_state_exactly_as_it_is(run) -> None:
    rule = Descent(batch=4, window=3)
    weights, queries, written, real = setting()
    _, state = run(queries, written, start_descent(weights, SIZE, rule), rule, real)
    _, after = run(queries, written, state, rule, torch.zeros_like(real))
    assert len(pytree.tree_leaves(state)) == 7
    for a, b in zip(pytree.tree_leaves(state), pytree.tree_leaves(after), strict=True):
        assert torch.equal(a, b)


def constant(written: Written, *, step: float | Tensor, momentum: float = 0.0, keep: float | Tensor = 1.0) -> Written:
    one = torch.ones_like(written[2].step)
    return written[0], written[1], Rates(step * one, momentum * one, keep * one, one)


def test_ttt_linear_with_all_gradients_at_zero_is_linear_attention() -> None:
    weights, queries, written, real = setting()
    empty = (torch.zeros_like(weights[0]),)
    rule = Descent(batch=None)
    for run in (descend, descend_chunked):
        reads, state = run(queries, constant(written, step=1.0), start_descent(empty, SIZE, rule), rule, real)
        expected, memory = linear_attention(queries, written[0], written[1], empty[0])
        torch.testing.assert_close(reads, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(state.weights[0], memory, rtol=1e-10, atol=1e-12)


def test_a_window_of_one_without_momentum_is_the_delta_rule() -> None:
    weights, queries, written, real = setting()
    rule, step = Descent(), written[2].step
    reads, _ = descend(queries, constant(written, step=step), start_descent(weights, SIZE, rule), rule, real)
    expected, _ = delta_rule(queries, written[0], written[1], step, weights[0])
    torch.testing.assert_close(reads, expected, rtol=1e-10, atol=1e-12)


def test_a_window_over_everything_with_many_steps_is_least_squares() -> None:
    weights, queries, written, real = setting()
    regularizer, step = 4.0, 0.2
    rule = Descent(window=TOKENS, inner_steps=300)
    settled = constant(written, step=step, keep=1 - step / regularizer)  # decay is the gradient of |M|^2 / (2 lambda)
    reads, _ = descend(queries, settled, start_descent(weights, SIZE, rule), rule, real)
    start = ridge_start(torch.full((TASKS, HEADS), regularizer, dtype=torch.float64), SIZE, SIZE)
    expected, _ = least_squares(queries, written[0], written[1], start)
    assert (reads - expected).abs().max().item() < 1e-6


@pytest.mark.parametrize("rule", [Descent(window=2), Descent(batch=2, norm=True), Descent(batch=2, window=2)], ids=str)
def test_first_and_second_derivatives(rule: Descent) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2), (2, 2), (3, 2), (3, 2), (3, 2), (3,))  # two layers, queries, keys, values, steps
    inputs = [torch.randn(1, 1, *shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    rest = [torch.full((1, 1, 3), value, dtype=torch.float64) for value in (0.5, 0.9, 0.7)]
    run = descend if rule.batch == 1 else descend_chunked

    def function(first: Tensor, last: Tensor, queries: Tensor, keys: Tensor, values: Tensor, step: Tensor) -> Tensor:
        state, real = start_descent((first, last), 2, rule), torch.ones(1, 1, 3, dtype=torch.bool)
        return run(queries, (keys, values, Rates(step, *rest)), state, rule, real)[0]

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("rule", [Descent(window=2, muon=True), Descent(batch=2, window=2)], ids=str)
def test_first_and_second_derivatives_in_everything(rule: Descent) -> None:
    """Of a linear memory, in all rates too."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2), (3, 2), (3, 2), (3, 2), (3,), (3,), (3,), (3,))  # memory, queries, keys, values, raw rates
    inputs = [torch.randn(1, 1, *shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    run = descend if rule.batch == 1 else descend_chunked

    def function(memory: Tensor, queries: Tensor, keys: Tensor, values: Tensor, *raw: Tensor) -> tuple[Tensor, ...]:
        state, real = start_descent((memory,), 2, rule), torch.ones(1, 1, 3, dtype=torch.bool)
        rates = Rates(*(torch.sigmoid(one) for one in raw))
        reads, after = run(queries, (keys, values, rates), state, rule, real)
        return reads, after.weights[0], after.momentum[0]

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_rules_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="batch must be 1 with inner_steps > 1 or muon"):
        Descent(batch=4, muon=True)
    with pytest.raises(ValueError, match="window must be an int >= 1; got 0"):
        Descent(window=0)
    weights, queries, written, real = setting()
    state: FastWeights = start_descent(weights, SIZE, Descent())
    with pytest.raises(ValueError, match="descend_chunked needs gradients that share a place"):
        descend_chunked(queries, written, state, Descent(), real)
