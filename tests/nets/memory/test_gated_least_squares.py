"""Least squares that forgets: long streams and steep gates, against a direct solution of the weighted ridge problem."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from metaicl.nets.memory.layers import Mesa
from metaicl.nets.memory.least_squares import (
    Fit,
    least_squares,
    least_squares_chunked,
    least_squares_recursive,
    ridge_start,
)

TOKENS, KEY, VALUE = 300, 4, 2
ROUTES = [least_squares, least_squares_chunked, least_squares_recursive]
GATES = [0.3, 0.5, 0.7, 0.9, 0.95]


def tokens(gate: float, n_tokens: int = TOKENS) -> tuple[Tensor, ...]:
    """Unit queries and keys, values, and gates that scatter around one, in float64 but with the digits of float32."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, n_tokens, size, generator=generator) for size in (KEY, KEY, VALUE))
    queries, keys = (rows / rows.norm(dim=-1, keepdim=True) for rows in (queries, keys))
    decay = torch.tensor(gate).log() * (0.8 + 0.4 * torch.rand(2, n_tokens, generator=generator))
    return tuple(leaf.double() for leaf in (queries, keys, values, decay))


def direct(queries: Tensor, keys: Tensor, values: Tensor, decay: Tensor) -> Tensor:
    """Each prefix as a ridge problem with weighted rows, solved on its own."""
    since = decay.cumsum(-1)
    causal = torch.ones(since.shape[-1], since.shape[-1], dtype=torch.bool).tril()
    weight = torch.where(causal, since[..., :, None] - since[..., None, :], -torch.inf).exp()  # (B, t, i)
    eye = torch.eye(KEY, dtype=keys.dtype)
    gram = torch.einsum("bti,bik,bil->btkl", weight, keys, keys) + since.exp()[..., None, None] * eye
    cross = torch.einsum("bti,bik,biv->btkv", weight, keys, values)
    return (queries[..., None, :] @ torch.linalg.solve(gram, cross))[..., 0, :]


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gate", GATES)
def test_long_streams_at_any_gate_are_weighted_ridge_regression(gate: float, dtype: torch.dtype) -> None:
    given = tokens(gate)
    expected = direct(*given)
    queries, keys, values, decay = (leaf.to(dtype) for leaf in given)
    start = ridge_start(torch.ones(2, dtype=dtype), KEY, VALUE)
    for route in ROUTES:
        reads, fit = route(queries, keys, values, start, decay)
        assert off(reads, expected) < (1e-4 if dtype == torch.float32 else 1e-9)
        assert torch.equal(fit.inverse, fit.inverse.mT)


@pytest.mark.parametrize("gate", GATES)
def test_gradients_are_those_of_the_direct_solution(gate: float) -> None:
    leaves = [leaf.requires_grad_() for leaf in tokens(gate)]
    expected = torch.autograd.grad(direct(*leaves).square().sum(), leaves)
    for route in ROUTES:
        reads, _ = route(*leaves[:3], ridge_start(torch.ones(2, dtype=torch.float64), KEY, VALUE), leaves[3])
        for a, b in zip(torch.autograd.grad(reads.square().sum(), leaves), expected, strict=True):
            assert off(a, b) < 1e-7


@pytest.mark.parametrize("gate", [1e-3, 0.3, 0.9])
def test_chunks_stay_finite_where_keys_leave_directions_alone(gate: float) -> None:
    """The regularizer fades below what the dtype can hold, and nothing else stands in for it."""
    queries, keys, values, decay = (leaf.float() for leaf in tokens(gate))
    keys = keys[:, :1].expand_as(keys).clone().requires_grad_()
    reads, fit = least_squares_chunked(queries, keys, values, ridge_start(torch.ones(2), KEY, VALUE), decay)
    (grad,) = torch.autograd.grad(reads.square().sum(), keys)
    assert bool(grad.isfinite().all())
    assert bool(fit.inverse.isfinite().all())
    left = (decay.sum(-1, keepdim=True) - decay.cumsum(-1)).exp()
    mean = (left[..., None] * values).sum(1) / left.sum(1, keepdim=True)  # what is left: one number per value
    found = (fit.weights @ keys[:, 0, :, None])[..., 0]
    torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-4)


def test_pieces_and_gates_that_suddenly_forget() -> None:
    queries, keys, values, decay = tokens(0.98)
    decay[:, 100] = -15.0
    start = ridge_start(torch.ones(2, dtype=torch.float64), KEY, VALUE)
    reads, fit = least_squares_chunked(queries, keys, values, start, decay)
    assert off(reads, direct(queries, keys, values, decay)) < 1e-6
    state, parts = start, []
    for part in (slice(0, 90), slice(90, 130), slice(130, None)):
        read, state = least_squares_chunked(queries[:, part], keys[:, part], values[:, part], state, decay[:, part])
        parts.append(read)
    assert off(torch.cat(parts, 1), reads) < 1e-6
    assert off(state.inverse, fit.inverse) < 1e-6


def without_asking(queries: Tensor, keys: Tensor, values: Tensor, fit: Fit, decay: Tensor) -> tuple[Tensor, Fit]:
    """`least_squares_chunked` under vmap, where gates cannot be looked at."""

    def one(queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor, inverse: Tensor, decay: Tensor):
        return least_squares_chunked(queries, keys, values, Fit(weights, inverse), decay)

    return torch.func.vmap(one)(queries, keys, values, fit.weights, fit.inverse, decay)


@pytest.mark.parametrize("gate", [0.3, 0.99])
def test_graphs_that_cannot_look_at_the_gates_compute_the_same(gate: float) -> None:
    queries, keys, values, decay = tokens(gate, 80)
    start = ridge_start(torch.ones(2, dtype=torch.float64), KEY, VALUE)
    expected = least_squares(queries, keys, values, start, decay)
    compiled = torch.compile(least_squares_chunked, fullgraph=True, dynamic=False, backend="eager")
    for route in (without_asking, compiled):
        reads, fit = route(queries, keys, values, start, decay)
        assert off(reads, expected[0]) < 1e-9
        assert off(fit.inverse, expected[1].inverse) < 1e-9
        _, same = route(queries, torch.zeros_like(keys), torch.zeros_like(values), fit, torch.zeros_like(decay))
        assert torch.equal(same.weights, fit.weights)
        assert torch.equal(same.inverse, fit.inverse)


@pytest.mark.parametrize("route", [least_squares_chunked, least_squares_recursive])
def test_first_and_second_derivatives_at_steep_gates(route) -> None:
    queries, keys, values, decay = (leaf[:1, :3].clone().requires_grad_() for leaf in tokens(1e-4))
    root = torch.randn(1, KEY, KEY, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def function(queries: Tensor, keys: Tensor, values: Tensor, root: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        inverse = root @ root.mT + torch.eye(KEY, dtype=root.dtype)
        reads, fit = route(queries, keys, values, Fit(torch.zeros(1, VALUE, KEY).double(), inverse), 0.3 * decay)
        return reads, fit.weights

    inputs = (queries, keys, values, root.requires_grad_(), decay)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("recursive", [False, True])
def test_the_layer_keeps_its_digits_on_a_long_stream(recursive: bool) -> None:
    torch.manual_seed(0)
    layer, h = Mesa(16, heads=2, gate=True, recursive=recursive), torch.randn(1, 1024, 16)
    with torch.no_grad():
        single = layer(h, layer.start(1, h))[0]
        double = layer.double()(h.double(), layer.start(1, h.double()))[0]
    assert off(single[:, -100:], double[:, -100:]) < 1e-5


def test_an_untrained_layer_that_forgets_fast_has_gradients() -> None:
    torch.manual_seed(0)
    layer = partial(Mesa, heads=2, gate=True)(32)
    with torch.no_grad():
        assert layer.to_gates is not None
        layer.to_gates.bias.fill_(-1.0)
    h = torch.randn(4, 80, 4) @ torch.randn(4, 32)  # keys of size 16 from inputs of size 4
    reads, _ = layer(h, layer.start(4, h))
    found = torch.autograd.grad(reads.square().mean(), list(layer.parameters()))
    assert all(bool(one.isfinite().all()) for one in found)


def test_the_reverse_recursion_does_not_get_back_what_a_gate_has_made_to_fade() -> None:
    """The docstring says from where on a backward without kept fits is lost; those with some are not."""
    for gate, good in ((0.95, True), (0.5, False)):
        errors = []
        for keep_every in (None, 0):
            found = []
            for dtype in (torch.float32, torch.float64):
                leaves = [leaf.to(dtype).requires_grad_() for leaf in tokens(gate, 64)]
                start = ridge_start(torch.ones(2, dtype=dtype), KEY, VALUE)
                route = least_squares_recursive if dtype == torch.float32 else least_squares
                options = {"keep_every": keep_every} if dtype == torch.float32 else {}
                reads, _ = route(*leaves[:3], start, leaves[3], **options)
                found.append(torch.autograd.grad(reads.square().sum(), leaves[1])[0].double())
            errors.append(float((found[0] - found[1]).norm() / found[1].norm()))
        assert errors[1] < 1e-4
        assert errors[0] < 1e-3 if good else errors[0] > 0.1
