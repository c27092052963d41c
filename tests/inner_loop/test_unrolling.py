"""The engine by itself: unrolling, selection of parameters, refusals."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

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


class Attends(nn.Module):
    """A row of three numbers as three tokens."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 1, 8, dropout=0.0, batch_first=True)
        self.first, self.last = nn.Linear(1, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.last(self.layer(self.first(x[..., None])).mean(1))


def weight_normed():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 6))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 1))


@pytest.mark.parametrize("make", [weight_normed, Attends])
def test_one_task_alone_has_the_slope_of_its_query_loss(make):
    """The kernels of both have no second derivative, or a wrong one, without vmap too."""
    torch.manual_seed(0)
    net = make().double()
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)

    def loss(params, x, y):
        return (functional_call(net, params, (x,)) - y).square().mean()

    def query_loss(params):
        return loss(unroll(loss, params, (x[:4], y[:4]), steps=2, lr=0.1), x[4:], y[4:])

    params = {name: value.detach().requires_grad_() for name, value in net.named_parameters()}
    slope = {name: torch.randn_like(value) for name, value in params.items()}
    found = torch.autograd.grad(query_loss(params), list(params.values()))
    above, below = (
        query_loss({name: (value + step * slope[name]).detach() for name, value in params.items()})
        for step in (1e-5, -1e-5)
    )
    expected = float(above - below) / 2e-5
    assert float(sum((a * b).sum() for a, b in zip(found, slope.values(), strict=True))) == pytest.approx(
        expected, rel=1e-5
    )


def test_no_steps_with_data_of_steps_or_starts_of_tasks_alone():
    own = {"v": torch.zeros(3, 2, dtype=torch.float64)}
    fast = unroll_tasks(quadratic, start(), (), own=own, lr=0.1, steps=0)
    assert torch.equal(fast["w"], start()["w"].expand(3, 2))
    fast = unroll_tasks(quadratic, start(), (), step_data=(CENTER.expand(3, 0, 2),), lr=0.1, steps=0)
    assert fast["w"].shape == (3, 2)
    with pytest.raises(ValueError, match="nothing says for how many tasks"):
        unroll_tasks(quadratic, start(), (), lr=0.1, steps=0)


def test_data_of_steps_that_ends_early_is_named():
    message = "step_data must have an entry for each of 3 steps; got 2"
    with pytest.raises(ValueError, match=message):
        unroll(quadratic, start(), (), step_data=(CENTER.expand(2, 2),), lr=0.1, steps=3)
    with pytest.raises(ValueError, match=message):
        unroll_tasks(quadratic, start(), (), step_data=(CENTER.expand(4, 2, 2),), lr=0.1, steps=3, checkpoint=True)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_step_sizes_that_would_broadcast_weights_are_named(checkpoint):
    def loss(params, x, y):
        return (x @ params["w"] - y).square().mean()

    start, data = {"w": torch.zeros(3, 1)}, (torch.ones(4, 5, 3), torch.ones(4, 5, 1))
    message = r"keep the shape \(3, 1\) of w; got \(3, 2\).*Rate in SGD gives one"
    with pytest.raises(ValueError, match=message):
        unroll_tasks(loss, start, data, steps=2, lr=torch.full((2,), 0.1), checkpoint=checkpoint)
    with pytest.raises(ValueError, match=message):
        unroll(loss, start, [part[0] for part in data], steps=2, lr=torch.full((2,), 0.1))


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
