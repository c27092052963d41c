"""Normalization, pooling and ReLU in one pass give what torch gives, in every derivative."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import Watcher, record_calls
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import metaicl.native.maps as kernel
from metaicl.native import without_kernels
from metaicl.native.library import load
from metaicl.native.maps import norm_pool_relu
from metaicl.nets.backbones import Conv4
from metaicl.nets.norm_pool import run_layers

pytestmark = pytest.mark.skipif(load("maps") is None, reason="no C compiler")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were called."""
    return record_calls(monkeypatch, kernel)


def maps(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Maps whose channels lie side by side."""
    rows, channels, height, width = shape
    made = torch.randn(rows, height, width, channels, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return made.permute(0, 3, 1, 2)


def affine(channels: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(2, channels, dtype=dtype, generator=source)
    return weight.requires_grad_(), bias.requires_grad_()


def by_torch(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return F.relu(F.max_pool2d(F.group_norm(x, groups, weight, bias), 2, ceil_mode=True))


def in_one_pass(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    found = norm_pool_relu(x, weight, bias, groups=groups, eps=1e-5)
    assert found is not None
    return found


SHAPES = [(3, 64, 28, 28, 8), (2, 8, 7, 7, 2), (1, 3, 5, 4, 1), (4, 12, 1, 9, 3), (2, 6, 1, 1, 2), (5, 5, 2, 3, 5)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_slopes(shape: tuple[int, ...], dtype: torch.dtype, bound: float, calls: list[str]) -> None:
    x = (3 + 2 * maps(*shape[:4], dtype=dtype)).requires_grad_()
    inputs = (x, *affine(shape[1], dtype))
    expected, found = by_torch(*inputs, shape[4]), in_one_pass(*inputs, shape[4])
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound * 10)
    slopes = torch.randn(found.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))  # in the usual layout
    for one, other in zip(
        torch.autograd.grad(found, inputs, slopes), torch.autograd.grad(expected, inputs, slopes), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * bound * float(other.abs().max().clamp(min=1e-3)))
    assert calls == ["norm_pool_relu", "norm_pool_relu_backward"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_read_and_written_and_float32_inside(shape: tuple[int, ...]) -> None:
    x = (3 + 2 * maps(*shape[:4])).bfloat16().requires_grad_()
    weight, bias = affine(shape[1], torch.float32)
    wide = x.detach().float().requires_grad_()
    expected, found = by_torch(wide, weight, bias, shape[4]), in_one_pass(x, weight, bias, shape[4])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16()) or (found - expected).abs().max() <= 2**-8 * expected.abs().max()
    slopes = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    ours = torch.autograd.grad(found, (x, weight, bias), slopes)
    theirs = torch.autograd.grad(expected, (wide, weight, bias), slopes.float())
    for one, other, bound in zip(ours, theirs, (2**-8, 1e-5, 1e-5), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0, atol=bound * float(other.abs().max().clamp(min=1e-3)))


def test_a_large_common_offset() -> None:
    x = 1000 + maps(2, 8, 14, 14, dtype=torch.float32)
    weight, bias = affine(8, torch.float32)
    expected = by_torch(x.double(), weight.double(), bias.double(), 2)
    torch.testing.assert_close(in_one_pass(x, weight, bias, 2).double(), expected, rtol=0, atol=1e-3)


def test_derivatives_of_the_gradient() -> None:
    inputs = (maps(2, 4, 3, 4).requires_grad_(), *affine(4))
    function = partial(in_one_pass, groups=2)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_frozen_parts_and_nothing_to_differentiate(calls: list[str]) -> None:
    x, (weight, bias) = maps(2, 8, 6, 6), affine(8)
    expected = torch.autograd.grad(by_torch(x.contiguous(), weight, bias, 2).sum(), bias)
    torch.testing.assert_close(torch.autograd.grad(in_one_pass(x, weight.detach(), bias, 2).sum(), bias), expected)
    with torch.no_grad():
        assert not in_one_pass(x, weight, bias, 2).requires_grad
    assert calls == ["norm_pool_relu", "norm_pool_relu_backward", "norm_pool_relu"]


def test_ties_and_numbers_that_are_not_finite() -> None:
    x, (weight, bias) = maps(3, 4, 4, 4).clone(memory_format=torch.preserve_format), affine(4)
    x[0] = x[0].round()  # many equal values: the first of them gets the slope, in torch too
    x[1, 0, 2, 2], x[2, 1, 1, 0] = float("nan"), float("inf")
    x.requires_grad_()
    expected, found = by_torch(x, weight, bias, 2), in_one_pass(x, weight, bias, 2)
    torch.testing.assert_close(found, expected, equal_nan=True)
    slopes = [torch.autograd.grad(out[0].sum(), x, retain_graph=True)[0][0] for out in (found, expected)]
    torch.testing.assert_close(*slopes)
    assert found[1, :2].isnan().all()
    assert found[1, 2:].isfinite().all()


def test_any_number_of_threads_gives_the_same_rows() -> None:
    before, x, (weight, bias) = torch.get_num_threads(), maps(7, 8, 5, 5), affine(8)
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = in_one_pass(x, weight, bias, 2)
            found.append((out, *torch.autograd.grad(out.square().sum(), (weight, bias))))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0][0], other[0])
        torch.testing.assert_close(found[0][1:], other[1:], rtol=1e-13, atol=1e-13)


def test_conv4_in_training_is_the_same_without_it(calls: list[str]) -> None:
    torch.manual_seed(0)
    encoder, x = Conv4(channels=8).double(), torch.rand(6, 1, 28, 28, dtype=torch.float64)

    def slopes() -> list[Tensor]:
        return list(torch.autograd.grad(encoder(x).square().sum(), list(encoder.parameters())))

    found = slopes()
    assert calls == 4 * ["norm_pool_relu"] + 4 * ["norm_pool_relu_backward"]
    with without_kernels():
        expected = slopes()
    scale = max(float(slope.abs().max()) for slope in expected)
    assert max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True)) <= 1e-12 * scale


def test_conv4_under_autocast_is_near_that_of_torch(calls: list[str]) -> None:
    torch.manual_seed(0)
    encoder, x = Conv4(channels=16), torch.rand(6, 1, 28, 28)

    def embedded_and_slopes() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder(x)
        slopes = torch.autograd.grad(out.square().sum(), list(encoder.parameters()))
        return out.detach(), torch.cat([slope.flatten() for slope in slopes])

    found, slopes = embedded_and_slopes()
    assert calls == 4 * ["norm_pool_relu"] + 4 * ["norm_pool_relu_backward"]
    with without_kernels():
        expected, expected_slopes = embedded_and_slopes()
    assert found.dtype == expected.dtype == torch.bfloat16
    assert float((found - expected).abs().max()) <= 0.03 * float(expected.abs().max())
    assert float(F.cosine_similarity(slopes, expected_slopes, dim=0)) >= 0.99


@pytest.mark.parametrize(
    "context",
    [Watcher, partial(FlopCounterMode, display=False), partial(torch.autocast, "cpu", torch.float16)],
    ids=["function mode", "dispatch mode", "autocast to float16"],
)
def test_whoever_watches_torch_sees_it(context: Callable[[], AbstractContextManager], calls: list[str]) -> None:
    with context():
        Conv4(channels=4)(torch.rand(2, 1, 8, 8))
    assert not calls


def test_transforms_are_left_to_torch(calls: list[str]) -> None:
    encoder, x = Conv4(channels=4), torch.rand(2, 3, 1, 8, 8)
    found = torch.func.vmap(encoder)(x)
    assert not calls
    torch.testing.assert_close(encoder(x[1]), found[1], rtol=1e-4, atol=1e-5)
    assert calls


def hooked(layers: list[nn.Module]) -> None:
    layers[1].register_forward_hook(lambda module, inputs, output: 2 * output)


def overridden(layers: list[nn.Module]) -> None:
    layers[2].forward = F.relu


OTHERS: dict[str, Callable[[], list[nn.Module]]] = {
    "no affine part": lambda: [nn.GroupNorm(2, 4, affine=False), nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()],
    "floors": lambda: [nn.GroupNorm(2, 4), nn.MaxPool2d(2), nn.ReLU()],
    "overlaps": lambda: [nn.GroupNorm(2, 4), nn.MaxPool2d(2, stride=1, ceil_mode=True), nn.ReLU()],
    "pads": lambda: [nn.GroupNorm(2, 4), nn.MaxPool2d(2, padding=1, ceil_mode=True), nn.ReLU()],
    "another activation": lambda: [nn.GroupNorm(2, 4), nn.MaxPool2d(2, ceil_mode=True), nn.ReLU6()],
    "another order": lambda: [nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)],
    "another norm": lambda: [nn.BatchNorm2d(4), nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()],
    "nothing after it": lambda: [nn.GroupNorm(2, 4), nn.MaxPool2d(2, ceil_mode=True)],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_left_to_torch(name: str, calls: list[str]) -> None:
    layers, x = nn.Sequential(*OTHERS[name]()).double(), maps(2, 4, 5, 5)
    assert torch.equal(run_layers(layers, x), layers(x))
    assert not calls


@pytest.mark.parametrize("change", [hooked, overridden])
def test_hooks_and_replaced_forward_passes_are_seen(change: Callable[..., None], calls: list[str]) -> None:
    layers = nn.Sequential(nn.GroupNorm(2, 4), nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()).double()
    x = maps(2, 4, 5, 5)
    run_layers(layers, x)
    assert calls == ["norm_pool_relu"]
    change(list(layers))
    assert torch.equal(run_layers(layers, x), layers(x))
    assert calls == ["norm_pool_relu"]
    nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        run_layers(nn.Sequential(nn.GroupNorm(2, 4), nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()).double(), x)
    finally:
        nn.modules.module._global_forward_hooks.clear()
    assert calls == ["norm_pool_relu"]


def test_other_maps_are_left_to_torch(calls: list[str]) -> None:
    weight, bias = affine(4)
    others = [
        torch.randn(2, 4, 5, 5, dtype=torch.float64),  # pixels of a channel side by side
        maps(2, 4, 5, 5).float(),  # not of the precision of the weights
        maps(2, 4, 5, 5).bfloat16(),
        maps(2, 4, 5, 5).half(),
        maps(0, 4, 5, 5),
    ]
    assert all(norm_pool_relu(x, weight, bias, groups=2, eps=1e-5) is None for x in others)
    assert norm_pool_relu(maps(2, 4, 1, 1), weight, bias, groups=4, eps=1e-5) is None
    assert not calls
