"""The mesa memory: three routes to one ridge regression, and what the reverse recursion can bear."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from metaicl.nets.memory.delta import linear_attention
from metaicl.nets.memory.layers import Mesa
from metaicl.nets.memory.least_squares import (
    Fit,
    least_squares,
    least_squares_chunked,
    least_squares_recursive,
    ridge_start,
)

TOKENS, KEY, VALUE = 11, 4, 3
ROUTES = [least_squares, least_squares_chunked, least_squares_recursive]


def tokens(n_tokens: int = TOKENS, key: int = KEY, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n_tokens, key), (n_tokens, key), (n_tokens, VALUE))
    queries, keys, values = (torch.randn(2, *s, generator=generator, dtype=torch.float64) for s in shapes)
    decay = -0.3 * torch.rand(2, n_tokens, generator=generator, dtype=torch.float64)
    return queries, keys, values, decay


@pytest.mark.parametrize("route", ROUTES)
def test_every_prefix_is_ridge_regression(route) -> None:
    queries, keys, values, _ = tokens()
    regularizer = torch.tensor([0.5, 20.0], dtype=torch.float64)
    reads, fit = route(queries, keys, values, ridge_start(regularizer, KEY, VALUE))
    eye = torch.eye(KEY, dtype=torch.float64) / regularizer[:, None, None]
    for t in range(1, TOKENS + 1):
        k, v = keys[:, :t], values[:, :t]
        solution = torch.linalg.solve(k.mT @ k + eye, k.mT @ v).mT
        expected = (solution @ queries[:, t - 1, :, None])[..., 0]
        torch.testing.assert_close(reads[:, t - 1], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fit.weights, solution, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fit.inverse, torch.linalg.inv(keys.mT @ keys + eye), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("route", ROUTES)
def test_with_a_gate_it_is_weighted_ridge_regression(route) -> None:
    queries, keys, values, decay = tokens()
    _, fit = route(queries, keys, values, ridge_start(torch.full((2,), 3.0).double(), KEY, VALUE), decay)
    left = (decay.sum(1, keepdim=True) - decay.cumsum(1)).exp()[..., None]
    eye = torch.eye(KEY, dtype=torch.float64) / 3 * decay.sum(1).exp()[:, None, None]
    solution = torch.linalg.solve((left * keys).mT @ keys + eye, (left * keys).mT @ values).mT
    torch.testing.assert_close(fit.weights, solution, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 3, 11, 64])
def test_chunks_equal_the_recursion(chunk: int) -> None:
    queries, keys, values, decay = tokens()
    start = ridge_start(torch.full((2,), 5.0).double(), KEY, VALUE)
    for gate in (None, decay):
        reads, fit = least_squares(queries, keys, values, start, gate)
        got, chunked = least_squares_chunked(queries, keys, values, start, gate, chunk=chunk)
        for a, b in zip((reads, *fit), (got, *chunked), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("regularizer", "bound"), [(1e3, 2e-7), (1e5, 2e-7), (1e7, 2e-7), (1e9, 5e-5)])
def test_chunks_in_single_precision_keep_their_digits_at_a_large_regularizer(regularizer: float, bound: float) -> None:
    """Against ridge regression by singular values, where tokens repeat all directions, and where there are few."""
    compiled = torch.compile(least_squares_chunked, fullgraph=True, dynamic=False, backend="eager")

    def mapped(queries: Tensor, keys: Tensor, values: Tensor, fit: Fit) -> tuple[Tensor, Fit]:
        return torch.func.vmap(lambda *one: least_squares_chunked(*one[:3], Fit(*one[3:])))(queries, keys, values, *fit)

    for n_tokens in (3, 150):
        queries, keys, values, _ = (leaf.float() for leaf in tokens(n_tokens))
        left, size, right = torch.linalg.svd(keys.double(), full_matrices=False)
        shrunk = (size / (size**2 + 1 / regularizer)).diag_embed()
        expected = values.double().mT @ left @ shrunk @ right
        start = ridge_start(torch.full((2,), regularizer), KEY, VALUE)
        for route in (least_squares_chunked, compiled, mapped):
            fit = route(queries, keys, values, start)[1]
            assert (fit.weights - expected).norm() / expected.norm() < bound


def test_chunks_are_no_worse_than_the_recursion_in_double_precision() -> None:
    queries, keys, values, _ = tokens(150)
    exact = torch.linalg.lstsq(keys, values).solution.mT
    start = ridge_start(torch.full((2,), 1e12, dtype=torch.float64), KEY, VALUE)
    off = [(route(queries, keys, values, start)[1].weights - exact).norm() / exact.norm() for route in ROUTES[:2]]
    assert off[1] <= off[0] < 1e-4


def test_the_own_backward_is_replaced_within_transforms() -> None:
    queries, keys, values, decay = tokens()
    start = ridge_start(torch.ones(2, dtype=torch.float64), KEY, VALUE)

    def loss(keys: Tensor) -> Tensor:
        return least_squares_recursive(queries, keys, values, start, decay)[0].square().sum()

    (expected,) = torch.autograd.grad(loss(leaf := keys.clone().requires_grad_()), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(keys), expected, rtol=1e-9, atol=1e-11)
    reads = torch.func.vmap(lambda *one: least_squares_recursive(*one[:3], Fit(*one[3:]))[0])
    expected = least_squares(queries, keys, values, start)[0]
    torch.testing.assert_close(reads(queries, keys, values, *start), expected, rtol=1e-9, atol=1e-11)


def test_a_small_regularizer_gives_linear_attention() -> None:
    queries, keys, values, _ = tokens()
    tiny = 1e-9
    reads, _ = least_squares_chunked(queries, keys, values, ridge_start(torch.full((2,), tiny).double(), KEY, VALUE))
    expected, _ = linear_attention(queries, keys, values, torch.zeros(2, VALUE, KEY, dtype=torch.float64))
    torch.testing.assert_close(reads / tiny, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_zero_keys_leave_the_fit_exactly_as_it_is(route) -> None:
    queries, keys, values, _ = tokens()
    _, fit = least_squares(queries, keys, values, ridge_start(torch.full((2,), 5.0).double(), KEY, VALUE))
    _, after = route(queries, torch.zeros_like(keys), torch.zeros_like(values), fit)
    assert torch.equal(after.weights, fit.weights)
    assert torch.equal(after.inverse, fit.inverse)


def flat(route, decay: Tensor | None = None):
    """A function of independent tensors; the inverse is made symmetric and positive definite."""

    def function(queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor, root: Tensor, decay: Tensor):
        eye = torch.eye(root.shape[-1], dtype=root.dtype)
        reads, fit = route(queries, keys, values, Fit(weights, root @ root.mT + eye), decay)
        return reads, fit.weights, fit.inverse

    return function


@pytest.mark.parametrize("keep_every", [None, 0, 2])
def test_first_and_second_derivatives_of_the_own_backward(keep_every: int | None) -> None:
    queries, keys, values, decay = (leaf[:1].clone().requires_grad_() for leaf in tokens(n_tokens=3, key=2))
    extra = tuple(torch.randn(1, n, 2, dtype=torch.float64).requires_grad_() for n in (VALUE, 2))

    def route(*args):
        return least_squares_recursive(*args, keep_every=keep_every)

    inputs = (queries, keys, values, *extra, decay)
    assert gradcheck(flat(route), inputs)
    assert gradgradcheck(flat(route), inputs)


def test_first_and_second_derivatives_of_the_chunked_form() -> None:
    queries, keys, values, decay = (leaf[:1].clone().requires_grad_() for leaf in tokens(n_tokens=3, key=2))
    extra = tuple(torch.randn(1, n, 2, dtype=torch.float64).requires_grad_() for n in (VALUE, 2))
    inputs = (queries, keys, values, *extra, decay)
    assert gradcheck(flat(least_squares_chunked), inputs)
    assert gradgradcheck(flat(least_squares_chunked), inputs)


def gradients(route, regularizer: float, dtype: torch.dtype) -> Tensor:
    queries, keys, values, _ = tokens(64, 8)
    keys = keys / keys.norm(dim=-1, keepdim=True)
    leaves = [leaf.to(dtype).requires_grad_() for leaf in (queries, keys, values)]
    reads, _ = route(*leaves, ridge_start(torch.full((2,), regularizer, dtype=dtype), 8, VALUE))
    found = torch.autograd.grad(reads.square().sum(), leaves)
    return torch.cat([leaf.flatten().double() for leaf in found])


def test_kept_fits_make_the_backward_stable_where_the_reverse_recursion_is_not() -> None:
    def reverse(*args):
        return least_squares_recursive(*args, keep_every=None)

    for regularizer, dtype, bound in ((1.0, torch.float32, 1e-5), (1e4, torch.float64, 1e-7)):
        exact = gradients(least_squares, regularizer, torch.float64)
        for route in (reverse, least_squares_recursive, least_squares_chunked):
            off = (gradients(route, regularizer, dtype) - exact).norm() / exact.norm()
            assert off.item() < bound
    exact = gradients(least_squares, 1e9, torch.float64)
    for dtype in (torch.float32, torch.float64):
        off = [
            (gradients(route, 1e9, dtype) - exact).norm() / exact.norm() for route in (reverse, least_squares_recursive)
        ]
        assert off[0].item() > 0.1
        assert off[1].item() < 1e-6


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("recursive", [False, True])
@pytest.mark.parametrize("regularizer", [1e3, 1e5, 1e7])
def test_a_stream_in_pieces_keeps_its_digits_at_a_large_regularizer(
    regularizer: float, recursive: bool, gate: bool
) -> None:
    """In single precision, one token after the other and several together, against all at once in double."""
    torch.manual_seed(0)
    layer, h = Mesa(8, regularizer=regularizer, recursive=recursive, gate=gate), torch.randn(2, 24, 8)
    with torch.no_grad():
        found = []
        for size in (1, 5, 24):
            state, reads = layer.start(2, h), []
            for piece in h.split(size, 1):
                read, state = layer(piece, state)
                reads.append(read)
            found.append(torch.cat(reads, 1))
        exact = layer.double()(h.double(), layer.start(2, h.double()))[0]
    for one in found:
        assert (one - exact).norm() / exact.norm() < 1e-4


def test_the_own_backward_keeps_few_inverses() -> None:
    """Bytes saved for the backward: root(T) fits, or none, instead of one per token and temporary."""

    def kept(route) -> int:
        queries, keys, values, _ = (leaf.requires_grad_() for leaf in tokens(100, 8))
        saved: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            route(queries, keys, values, ridge_start(torch.ones(2, dtype=torch.float64), 8, VALUE))
        return sum(saved)

    inputs = 2 * 100 * (8 + 8 + VALUE + 1)
    fit = 2 * 8 * (8 + VALUE)
    assert kept(least_squares_recursive) <= inputs + (2 + 10) * fit
    assert kept(lambda *args: least_squares_recursive(*args, keep_every=None)) <= inputs + 2 * fit
    assert kept(least_squares) > inputs + 100 * fit
