"""Recomputation, truncation and gates: the same numbers, or those that were asked for."""

from functools import partial

import pytest
import torch
from gradient_helpers import SINES, seeded
from gradient_helpers import draw as draw_episode
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from metaicl.inner_loop.adaptive import Adam
from metaicl.inner_loop.checkpointing import recompute
from metaicl.inner_loop.optimizers import SGD
from metaicl.inner_loop.rates import Rate
from metaicl.inner_loop.unrolling import unroll_path, unroll_tasks
from metaicl.learners import IMAML, MAML
from metaicl.meta_step import MetaStep
from metaicl.nets.backbones import MLP
from metaicl.objectives import squared_error
from metaicl.task import derive_generator


def make_net(*extra):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1, 8), nn.LayerNorm(8), nn.Tanh(), *extra, nn.Linear(8, 1)).double()


def draw(name, *shape):
    return torch.randn(*shape, generator=derive_generator(name), dtype=torch.float64)


DATA = (draw("x", 3, 5, 1), draw("y", 3, 5, 1))


def mse(net):
    return lambda weights, x, y: (functional_call(net, weights, (x,)) - y).square().mean()


def split(net):
    named = dict(net.named_parameters())
    return {n: v for n, v in named.items() if n != "0.bias"}, {"0.bias": named["0.bias"]}


def gradients(net, optimizer, **settings):
    start, shared = split(net)
    fast = unroll_tasks(mse(net), start, DATA, optimizer=optimizer, shared=shared, **settings)
    loss = sum((value * draw(name, *value.shape)).sum() for name, value in fast.items())
    leaves = [*net.parameters(), *optimizer.parameters()]
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def gap(found, expected):
    assert max(float(part.abs().max()) for part in expected) > 1e-2
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("checkpoint", [True, 2, 5, 9])
@pytest.mark.parametrize(
    "make", [lambda: SGD(0.1), lambda: SGD(Rate(0.1, "element", per_step=True), momentum=0.9),
             lambda: Adam(Rate(0.05, "tensor"), betas=(Rate(0.9, "all"), 0.99))],
)  # fmt: skip
def test_recomputed_steps_are_exact(make, checkpoint):
    net = make_net()
    optimizer = make().bind(split(net)[0], 5)
    expected = gradients(net, optimizer, steps=5)
    assert gap(gradients(net, optimizer, steps=5, checkpoint=checkpoint), expected) < 1e-12


def test_every_step_of_a_path_can_be_recomputed():
    net = make_net()
    start, shared = split(net)
    found, expected = (
        unroll_path(mse(net), start, DATA, steps=4, lr=0.1, shared=shared, checkpoint=checkpoint)
        for checkpoint in (2, False)
    )
    assert len(found) == len(expected) == 4
    losses = [
        sum((i + 1) * fast["3.weight"].square().sum() for i, fast in enumerate(path)) for path in (found, expected)
    ]
    a, b = (torch.autograd.grad(loss, list(net.parameters())) for loss in losses)
    assert gap(a, b) < 1e-12


def test_dropout_is_drawn_the_same_again():
    net = make_net(nn.Dropout(0.5))
    optimizer = SGD(0.1).bind(split(net)[0], 3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = gradients(net, optimizer, steps=3)
        torch.manual_seed(3)
        found = gradients(net, optimizer, steps=3, checkpoint=True)
        other = gradients(net, optimizer, steps=3, checkpoint=True)
    assert gap(found, expected) < 1e-12
    assert gap(other, expected) > 1e-3


def test_a_meta_parameter_that_would_be_lost_is_refused():
    net = make_net()
    start, shared = split(net)

    def loss(weights, x, y):
        return mse(net)({**shared, **weights}, x, y)

    with pytest.raises(ValueError, match="pass every meta-parameter that it reads in params or shared"):
        unroll_tasks(loss, start, DATA, steps=2, lr=0.1, checkpoint=True)
    assert unroll_tasks(loss, start, DATA, steps=2, lr=0.1)["3.bias"].requires_grad


@pytest.mark.parametrize(("checkpoint", "error"), [(0, ValueError), (-1, ValueError)])
def test_wrong_segments_are_refused(checkpoint, error):
    net = make_net()
    with pytest.raises(error, match="checkpoint must be an int >= 1"):
        unroll_tasks(mse(net), dict(net.named_parameters()), DATA, steps=2, lr=0.1, checkpoint=checkpoint)


def test_recompute_keeps_only_its_arguments():
    kept = []
    x = draw("kept", 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = recompute(lambda v: torch.stack([v.sin().exp().tanh() for _ in range(10)]).sum(0), x)
        assert sum(kept) == 4
        kept.clear()
        _ = torch.stack([x.sin().exp().tanh() for _ in range(10)]).sum(0)
        assert sum(kept) > 80
    (found,) = torch.autograd.grad(out.sum(), x)
    (expected,) = torch.autograd.grad((10 * x.sin().exp().tanh()).sum(), x)
    assert float((found - expected).abs().max()) < 1e-13


def quadratic(params, center):
    return 0.5 * (params["w"] - center).square().sum()


@pytest.mark.parametrize("truncate", [0, 1, 3, 4, 9])
def test_truncation_differentiates_the_last_steps(truncate):
    """A second-order step on this loss multiplies the derivative by 1 - lr, a first-order one by 1."""
    start = {"w": draw("start", 2).requires_grad_()}
    fast = unroll_tasks(quadratic, start, (draw("centers", 3, 2),), steps=4, lr=0.1, truncate=truncate)["w"]
    (found,) = torch.autograd.grad(fast.sum(), start["w"])
    assert float((found - 3 * 0.9 ** min(truncate, 4)).abs().max()) < 1e-13


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_a_gate_is_first_or_second_order(gate):
    net = make_net()
    optimizer = SGD(0.1, momentum=0.5).bind(split(net)[0], 3)
    gated = gradients(net, optimizer, steps=3, first_order=torch.tensor(gate, dtype=torch.float64))
    assert gap(gated, gradients(net, optimizer, steps=3, first_order=bool(gate))) < 1e-13
    assert gap(gated, gradients(net, optimizer, steps=3, first_order=not gate)) > 1e-3


@pytest.mark.parametrize("make", [partial(MAML, checkpoint=True), partial(IMAML, inner_lr=0.05)])
def test_the_backward_pass_has_the_precision_of_the_forward_pass(make):
    episode = draw_episode(SINES, n_shot=4).to(dtype=torch.float32)
    learner = seeded(lambda: make(SINES.spec, net=MLP([1, 64, 64, 1]), inner_steps=3)).float()
    with Precisions() as seen:
        found = MetaStep(learner, squared_error, autocast="bf16")(episode)
    assert seen.dtypes == {torch.bfloat16}
    if isinstance(learner, MAML):
        learner.checkpoint = False
        expected = MetaStep(learner, squared_error, autocast="bf16")(episode)
        assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())


class Precisions(TorchDispatchMode):
    """Collects the precisions of matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.dtypes.add([leaf.dtype for leaf in args if isinstance(leaf, torch.Tensor)][-1])
        return func(*args, **(kwargs or {}))
