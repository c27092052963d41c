"""Attention and GELU by kernels give what torch gives, in every derivative."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import Watcher, record_calls
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import metaicl.native.transformer as kernel
from metaicl.learners import InterleavedTransformer
from metaicl.native import without_kernels
from metaicl.native.library import load
from metaicl.native.transformer import causal_attention, gelu_tanh
from metaicl.nets.gelu import TanhGELU
from metaicl.nets.sequence.attention import CausalAttention
from metaicl.objectives import prefix_squared_error
from metaicl.second_order import twice_differentiable
from metaicl.tasks import LinearRegression

pytestmark = pytest.mark.skipif(load("transformer") is None, reason="no C compiler")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were called."""
    return record_calls(monkeypatch, kernel)


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def by_torch(tokens: Tensor, heads: int) -> Tensor:
    query, keys, values = tokens.unflatten(-1, (3, heads, -1)).transpose(1, 3).unbind(2)
    mixed = F.scaled_dot_product_attention(query, keys, values, is_causal=True)
    return mixed.transpose(1, 2).flatten(2)


def by_kernel(tokens: Tensor, heads: int) -> Tensor:
    found = causal_attention(tokens, heads)
    assert found is not None
    return found


def gelu(x: Tensor) -> Tensor:
    found = gelu_tanh(x)
    assert found is not None
    return found


SHAPES = [(2, 1, 3, 1), (3, 5, 12, 3), (2, 32, 16, 2), (2, 33, 20, 2), (1, 70, 96, 2), (2, 82, 32, 4)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 2e-14), (torch.float32, 5e-6)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_and_its_slopes(shape: tuple[int, ...], dtype: torch.dtype, bound: float, calls: list[str]) -> None:
    n_tasks, n_tokens, dim, heads = shape
    tokens = numbers(n_tasks, n_tokens, 3 * dim, dtype=dtype).requires_grad_()
    exact = tokens.detach().double().requires_grad_()
    slopes = numbers(n_tasks, n_tokens, dim, seed=1)
    found, expected = by_kernel(tokens, heads), by_torch(exact, heads)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)
    (ours,) = torch.autograd.grad(found, tokens, slopes.to(dtype))
    (theirs,) = torch.autograd.grad(expected, exact, slopes)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound)
    assert calls == ["attend", "attend_backward"]


def test_every_derivative() -> None:
    tokens = numbers(2, 5, 12).requires_grad_()
    assert torch.autograd.gradcheck(partial(by_kernel, heads=2), tokens)
    assert torch.autograd.gradgradcheck(partial(by_kernel, heads=2), tokens)
    x = (2 * numbers(3, 7)).requires_grad_()
    assert torch.autograd.gradcheck(gelu, x)
    assert torch.autograd.gradgradcheck(gelu, x)


def test_slopes_in_any_layout() -> None:
    tokens = numbers(3, 6, 12).requires_grad_()
    slopes = numbers(6, 4, 3).permute(2, 0, 1)
    found, expected = (torch.autograd.grad(one(tokens, 2), tokens, slopes)[0] for one in (by_kernel, by_torch))
    torch.testing.assert_close(found, expected)


def test_huge_scores_leave_one_weight() -> None:
    tokens = (300 * numbers(2, 40, 24)).requires_grad_()
    found, expected = by_kernel(tokens, 2), by_torch(tokens, 2)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-8)
    ours, theirs = (torch.autograd.grad(out.square().sum(), tokens)[0] for out in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8 * float(theirs.abs().max()))
    narrow = tokens.detach().float().requires_grad_()  # whose scores have five digits before the point
    out = by_kernel(narrow, 2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=0.1)
    (slopes,) = torch.autograd.grad(out.square().sum(), narrow)
    assert slopes.isfinite().all()
    torch.testing.assert_close(slopes[..., 16:].double(), theirs[..., 16:], rtol=1e-3, atol=1)  # of the values


def test_what_is_not_finite_stays_in_its_task() -> None:
    tokens = numbers(3, 40, 24, dtype=torch.float32)
    clean = by_kernel(tokens, 2)
    tokens[1, 36, 3], tokens[2, 0, 20] = float("nan"), float("inf")
    found = by_kernel(tokens, 2)
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[1, :36], clean[1, :36])
    assert found[1, 36, :4].isnan().all()
    assert not found[2, :, 4:].isfinite().all()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    before, tokens = torch.get_num_threads(), numbers(5, 19, 24, dtype=torch.float32).requires_grad_()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = gelu(by_kernel(tokens, 2))
            found.append((out, *torch.autograd.grad(out.square().sum(), tokens)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 2e-15), (torch.float32, 1e-6)])
def test_gelu_and_its_slopes(dtype: torch.dtype, bound: float, calls: list[str]) -> None:
    x = torch.linspace(-30, 30, 20011, dtype=dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    found, expected = gelu(x), F.gelu(exact, approximate="tanh")
    torch.testing.assert_close(found.double(), expected, rtol=2 * bound, atol=bound)
    (ours,), (theirs,) = torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=8 * bound)
    assert calls == ["gelu", "gelu_backward"]


def test_gelu_far_from_zero() -> None:
    far = torch.tensor([-1e15, -1e4, -100.0, 100.0, 1e4, 1e15, float("inf"), float("nan")])
    found = gelu(far)
    assert found[:3].abs().max() <= 1e-20
    assert torch.equal(found[3:7], far[3:7])
    assert found[7].isnan()


def transformer() -> InterleavedTransformer:
    torch.manual_seed(0)
    return InterleavedTransformer(LinearRegression(dim=3).spec, dim=16, depth=2, heads=2, max_length=32).double()


def test_a_transformer_in_training_is_the_same_without_them(calls: list[str]) -> None:
    learner = transformer()
    episode = LinearRegression(dim=3).sample(
        4, split="train", n_shot=1, n_query=7, generator=torch.Generator().manual_seed(0)
    )
    episode = episode.to(dtype=torch.float64)

    def slopes() -> list[Tensor]:
        return list(torch.autograd.grad(prefix_squared_error(learner, episode).sum(), list(learner.parameters())))

    found = slopes()
    assert sorted(set(calls)) == ["attend", "attend_backward", "gelu", "gelu_backward"]
    with without_kernels():
        expected = slopes()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_the_state_of_attention_has_derivatives_too(calls: list[str]) -> None:
    layer, h, more = CausalAttention(8, heads=2).double(), numbers(2, 5, 8), numbers(2, 3, 8, seed=1)

    def slopes() -> list[Tensor]:
        first, state = layer(h, layer.start(2, h))
        second = layer.peek(more, state, own=True)
        return list(torch.autograd.grad(first.square().sum() + second.square().sum(), list(layer.parameters())))

    found = slopes()
    assert calls == ["attend", "attend_backward"]
    with without_kernels():
        expected = slopes()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_nothing_is_kept_where_no_gradient_is_wanted(calls: list[str]) -> None:
    with torch.no_grad():
        assert not by_kernel(numbers(2, 4, 12).requires_grad_(), 2).requires_grad
    assert calls == ["attend"]


@pytest.mark.parametrize(
    "context",
    [Watcher, partial(FlopCounterMode, display=False), partial(torch.autocast, "cpu", torch.bfloat16)],
    ids=["function mode", "dispatch mode", "autocast"],
)
def test_whoever_watches_torch_sees_it(context: Callable[[], AbstractContextManager], calls: list[str]) -> None:
    with context():
        assert causal_attention(numbers(2, 4, 12), 2) is None
        TanhGELU()(numbers(3))
    assert not calls


def test_what_is_left_to_torch(calls: list[str]) -> None:
    x, layer = numbers(3, 2, 5, 8), CausalAttention(8, heads=2).double()
    with twice_differentiable():  # torch's own kernel has no rule for vmap
        found = torch.func.vmap(lambda h: layer(h, layer.start(2, h))[0])(x)
    assert not calls
    torch.testing.assert_close(layer(x[1], layer.start(2, x[1]))[0], found[1])
    calls.clear()
    assert causal_attention(numbers(1, 1025, 3), 1) is None
    assert causal_attention(numbers(2, 4, 12).bfloat16(), 2) is None
    assert causal_attention(numbers(12, 4, 2).permute(2, 1, 0), 2) is None
    assert gelu_tanh(torch.zeros(0)) is None
    assert not calls


def test_second_derivatives_of_a_layer(calls: list[str]) -> None:
    layer, h = CausalAttention(4, heads=2).double(), numbers(1, 3, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda h: layer(h, layer.start(1, h))[0], h)
    assert "attend" in calls


class Stop(torch.autograd.Function):
    """Lets no gradient through, and says so with None."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, slope: Tensor) -> None:
        return None


@pytest.mark.parametrize("function", [gelu, partial(by_kernel, heads=1)])
def test_a_graph_of_the_gradient_where_none_came_back(function: Callable[[Tensor], Tensor]) -> None:
    x = numbers(2, 4, 3).requires_grad_()
    (found,) = torch.autograd.grad(Stop.apply(function(x)).sum() + x.sum(), x, create_graph=True)
    assert torch.equal(found, torch.ones_like(x))
