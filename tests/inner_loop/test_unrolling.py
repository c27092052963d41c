"""The engine by itself: unrolling, selection of parameters, refusals."""

import pytest
import torch
from torch import nn

from metaicl.inner_loop import (
    call_tasks,
    check_inner_loop_module,
    check_no_running_statistics,
    select_parameters,
    unroll,
    unroll_tasks,
)
from metaicl.nets.norm import BatchStatNorm
from metaicl.task import derive_generator


def quadratic(params, center):
    return 0.5 * (params["w"] - center).square().sum()


def start():
    return {"w": torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)}


CENTER = torch.tensor([3.0, -1.0], dtype=torch.float64)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_unroll_of_a_quadratic_by_hand(steps):
    """w_k = c + (1 - lr)^k (w_0 - c), so d w_k / d w_0 = (1 - lr)^k."""
    params = start()
    fast = unroll(quadratic, params, (CENTER,), lr=0.1, steps=steps)["w"]
    assert float((fast - (CENTER + 0.9**steps * (params["w"] - CENTER))).detach().abs().max()) < 1e-14
    (gradient,) = torch.autograd.grad(fast.sum(), params["w"])
    assert float((gradient - 0.9**steps).abs().max()) < 1e-14
    assert params["w"].tolist() == [1.0, 2.0]


def test_first_order_leaves_the_identity():
    params = start()
    fast = unroll(quadratic, params, (CENTER,), lr=0.1, steps=4, first_order=True)["w"]
    assert torch.equal(fast.detach(), unroll(quadratic, params, (CENTER,), lr=0.1, steps=4)["w"].detach())
    (gradient,) = torch.autograd.grad(fast.sum(), params["w"])
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_first_order_also_forgets_weights_that_are_not_adapted():
    frozen = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def loss(params, center):
        return (frozen * params["w"] - center).square().sum()

    fast = unroll(loss, start(), (CENTER,), lr=0.1, steps=2, first_order=True)["w"]
    assert torch.autograd.grad(fast.sum(), frozen, allow_unused=True) == (None,)
    fast = unroll(loss, start(), (CENTER,), lr=0.1, steps=2)["w"]
    assert float(torch.autograd.grad(fast.sum(), frozen)[0].abs()) > 0.1


def test_learned_step_size_gets_a_gradient():
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    fast = unroll(quadratic, start(), (CENTER,), lr=lr, steps=3)["w"]
    (gradient,) = torch.autograd.grad(fast.sum(), lr)
    expected = -3 * 0.9**2 * (start()["w"] - CENTER).sum()  # d (1 - lr)^3 / d lr
    assert float((gradient - expected).detach().abs()) < 1e-13


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
def test_tasks_together_equal_tasks_alone(steps, first_order):
    centers = torch.randn(5, 2, generator=derive_generator("centers"), dtype=torch.float64)
    settings = {"lr": 0.2, "steps": steps, "first_order": first_order}
    params = start()
    together = unroll_tasks(quadratic, params, (centers,), **settings)["w"]
    alone = torch.stack([unroll(quadratic, params, (center,), **settings)["w"] for center in centers])
    assert together.shape == (5, 2)
    assert float((together - alone).detach().abs().max()) < 1e-14
    probe = torch.arange(10.0, dtype=torch.float64).view(5, 2)
    found, expected = (torch.autograd.grad((fast * probe).sum(), params["w"])[0] for fast in (together, alone))
    assert float((found - expected).abs().max()) < 1e-13


def test_none_among_the_data_is_passed_on():
    def loss(params, center, mask):
        assert mask is None
        return quadratic(params, center)

    fast = unroll_tasks(loss, start(), (CENTER.expand(3, 2), None), lr=0.1, steps=1)
    assert fast["w"].shape == (3, 2)


def test_call_tasks_uses_each_tasks_weights():
    net = nn.Linear(2, 1).double()
    weight = torch.randn(3, 1, 2, generator=derive_generator("weight"), dtype=torch.float64)
    x = torch.randn(3, 4, 2, generator=derive_generator("inputs"), dtype=torch.float64)
    out = call_tasks(net, {"weight": weight}, {"bias": net.bias}, x)
    expected = x @ weight.mT + net.bias
    assert float((out - expected).detach().abs().max()) < 1e-14
    with pytest.raises(RuntimeError, match="wieght"):
        call_tasks(net, {"wieght": weight}, dict(net.named_parameters()), x)


def test_select_parameters():
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    assert select_parameters(net, None) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert select_parameters(net, "2.*") == {"2.weight", "2.bias"}
    assert select_parameters(net, ["*.bias", "0.*"]) == {"0.weight", "0.bias", "2.bias"}
    with pytest.raises(ValueError, match=r"'2\.wieght' matches no parameter; there are 4, such as \['2\.weight'"):
        select_parameters(net, "2.wieght")
    with pytest.raises(ValueError, match="ReLU has no trainable parameters to adapt"):
        select_parameters(nn.ReLU(), None)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)]
)
def test_running_statistics_are_refused(layer):
    for check in (check_inner_loop_module, check_no_running_statistics):
        with pytest.raises(ValueError, match=r"Sequential tracks them in \['0'\].*BatchStatNorm"):
            check(nn.Sequential(layer))


@pytest.mark.parametrize(
    "layer", [nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False), BatchStatNorm(4)]
)
def test_other_normalizations_are_welcome(layer):
    check_inner_loop_module(nn.Sequential(layer))
    assert select_parameters(layer, None) == {"weight", "bias"}
