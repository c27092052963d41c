"""Every row of the migration tables in docs/gradient.md: both sides run in float64 and give the same numbers."""

import re
import warnings
from pathlib import Path
from typing import Any

import higher
import pytest
import torch
import torch.nn.functional as F
from higher.optim import DifferentiableOptimizer
from torch import Tensor, nn
from torch.func import functional_call

from metaicl.episode import Episode, Examples
from metaicl.inner_loop import SGD, Adam, InnerOptimizer, Rate, RMSprop, call_tasks, unroll, unroll_path, unroll_tasks
from metaicl.inner_loop.curvature import Curvature, Kronecker
from metaicl.inner_loop.parameters import dotless
from metaicl.interop.l2l_package import import_learn2learn
from metaicl.learners.gradient.maml import MAML
from metaicl.learners.gradient.meta_sgd import MetaSGD
from metaicl.objectives import squared_error
from metaicl.spec import TaskSpec
from metaicl.task import derive_generator

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gradient.md"
B, LR, STEPS = 3, 0.125, 3  # a rate that is exact in float32, to which higher rounds its trainable ones
SPEC = TaskSpec("regression", (2,), y_dim=1)
ROWS = {"learn2learn": {}, "higher": {}}
WITHOUT_CODE = {
    "learn2learn": {"`GBML(model, transform, adapt_transform=True)`", "`optim.LearnableOptimizer(model, transform)`"},
    "higher": {
        "`torch.optim.Adadelta`, `Adagrad`, `Adamax`, `ASGD`, `Rprop`, `amsgrad=True`",
        "`apply_trainable_opt_params(opt, override)`",
    },
}


def row(library, theirs):
    """Register both sides of one row: a function that gives two lists of tensors."""

    def register(function):
        assert theirs not in ROWS[library]
        ROWS[library][theirs] = function
        return function

    return register


def draw(name, *shape):
    return torch.randn(*shape, generator=derive_generator("migration", name), dtype=torch.float64)


X, Y, X_NEW, Y_NEW = draw("x", B, 5, 2), draw("y", B, 5, 1), draw("x new", B, 4, 2), draw("y new", B, 4, 1)


class Net(nn.Module):
    def __init__(self, *, bias=True):
        super().__init__()
        self.body, self.head = nn.Linear(2, 4, bias=bias), nn.Linear(4, 1, bias=bias)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def make(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(**settings).double()


def start(net):
    return dict(net.named_parameters())


def loss_of(net):
    def loss(params, x, y):
        return F.mse_loss(functional_call(net, dict(params), (x,), strict=True), y)

    return loss


def ours(net, *, learned=(), steps=STEPS, **settings):
    """Our side: gradients of the mean loss on the queries by the net's parameters and by `learned`."""
    fast = unroll_tasks(loss_of(net), start(net), (X, Y), steps=steps, **settings)
    return gradients(F.mse_loss(call_tasks(net, fast, {}, X_NEW), Y_NEW), [*net.parameters(), *learned])


def rates_of(optimizer: Any, net: nn.Module) -> list[Tensor]:
    """The rates per element in the order of the net's parameters."""
    return [optimizer.learned["lr"].values[dotless(name)] for name in start(net)]


def gradients(loss, meta):
    return list(torch.autograd.grad(loss, meta, allow_unused=True, materialize_grads=True))


def their_loop(adapted):
    """The mean loss on the queries; `adapted(i)` gives the adapted model of task i."""
    return torch.stack([F.mse_loss(adapted(i)(X_NEW[i]), Y_NEW[i]) for i in range(B)]).mean()


def l2l_side(algorithm, meta, **settings):
    def adapted(i):
        clone = algorithm.clone()
        for _ in range(STEPS):
            clone.adapt(F.mse_loss(clone(X[i]), Y[i]), **settings)
        return clone

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        return gradients(their_loop(adapted), meta)


def higher_side(net, optimizer, meta=(), *, step=None, steps=STEPS, **settings):
    settings = {"copy_initial_weights": False, **settings}

    def adapted(i):
        with higher.innerloop_ctx(net, optimizer, **settings) as (patched, inner):
            for k in range(steps):
                inner.step(F.mse_loss(patched(X[i]), Y[i]), **(step(k) if step else {}))
            return patched

    return gradients(their_loop(adapted), [*net.parameters(), *meta])


def scalar(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


# ---------------------------------------------------------------------------------------------------- learn2learn


@row("learn2learn", "`MAML(model, lr)`, `clone()`, `adapt(loss)`")
def maml():
    net = make()
    return l2l_side(algorithms().MAML(net, lr=LR), list(net.parameters())), ours(net, lr=LR)


@row("learn2learn", "`MAML(model, lr)` in a training script")
def maml_learner():
    net = make()
    learner = MAML(SPEC, net=net, inner_lr=LR, inner_steps=STEPS)
    losses = squared_error(learner, Episode(Examples(X, Y), Examples(X_NEW, Y_NEW)))
    theirs = l2l_side(algorithms().MAML(net, lr=LR), list(net.parameters()))
    return theirs, gradients(losses.mean(), list(net.parameters()))


@row("learn2learn", "`MAML(model, lr, first_order=True)`")
def first_order():
    net = make()
    theirs = l2l_side(algorithms().MAML(net, lr=LR, first_order=True), list(net.parameters()))
    return theirs, ours(net, lr=LR, first_order=True)


@row("learn2learn", "`adapt(loss, first_order=True)` in the first steps only")
def truncated():
    net = make()

    def adapted(i):
        clone = algorithms().MAML(net, lr=LR).clone()
        for k in range(STEPS):
            clone.adapt(F.mse_loss(clone(X[i]), Y[i]), first_order=k < STEPS - 1)
        return clone

    return gradients(their_loop(adapted), list(net.parameters())), ours(net, lr=LR, truncate=1)


@row("learn2learn", "`adapt(loss)` with a loss of your own")
def own_loss():
    net, strength = make(), scalar(0.3)
    algorithm = algorithms().MAML(net, lr=LR)

    def adapted(i):
        clone = algorithm.clone()
        for _ in range(STEPS):
            size = sum(value.square().sum() for value in clone.parameters())
            clone.adapt(F.huber_loss(clone(X[i]), Y[i]) + strength * size)
        return clone

    def loss(params, x, y):
        weights = {name: value for name, value in params.items() if name != "strength"}
        size = sum(value.square().sum() for value in weights.values())
        return F.huber_loss(functional_call(net, weights, (x,)), y) + params["strength"] * size

    meta = [*net.parameters(), strength]
    fast = unroll_tasks(loss, start(net), (X, Y), lr=LR, steps=STEPS, shared={"strength": strength})
    mine = F.mse_loss(call_tasks(net, fast, {}, X_NEW), Y_NEW)
    return gradients(their_loop(adapted), meta), gradients(mine, meta)


@row("learn2learn", "`MAML(model, lr, allow_unused=True)`")
def unused():
    net = make()
    net.spare = nn.Linear(2, 2).double()
    theirs = l2l_side(algorithms().MAML(net, lr=LR, allow_unused=True), list(net.parameters()))
    return theirs, ours(net, lr=LR)


@row("learn2learn", "`MAML(model, lr, allow_nograd=True)`")
def frozen():
    net = make()
    net.body.requires_grad_(False)
    learner = MAML(SPEC, net=net, inner_lr=LR, inner_steps=STEPS)
    losses = squared_error(learner, Episode(Examples(X, Y), Examples(X_NEW, Y_NEW)))
    meta = list(net.head.parameters())
    return l2l_side(algorithms().MAML(net, lr=LR, allow_nograd=True), meta), gradients(losses.mean(), meta)


@row("learn2learn", "`MAML(head, lr)` on `body(x)`: ANIL")
def anil():
    net = make()
    algorithm = algorithms().MAML(net.head, lr=LR)

    def adapted(i):
        clone = algorithm.clone()
        for _ in range(STEPS):
            clone.adapt(F.mse_loss(clone(torch.tanh(net.body(X[i]))), Y[i]))
        return lambda x: clone(torch.tanh(net.body(x)))

    learner = MAML(SPEC, net=net, inner_lr=LR, inner_steps=STEPS, adapt="head.*")
    losses = squared_error(learner, Episode(Examples(X, Y), Examples(X_NEW, Y_NEW)))
    meta = list(net.parameters())
    return gradients(their_loop(adapted), meta), gradients(losses.mean(), meta)


@row("learn2learn", "`MetaSGD(model, lr)`")
def meta_sgd():
    net = make()
    theirs = algorithms().MetaSGD(net, lr=LR)
    learner = MetaSGD(SPEC, net=net, inner_lr=LR, inner_steps=STEPS).double()
    losses = squared_error(learner, Episode(Examples(X, Y), Examples(X_NEW, Y_NEW)))
    mine = [*net.parameters(), *rates_of(learner.maml.optimizer, net)]
    return l2l_side(theirs, [*net.parameters(), *theirs.lrs]), gradients(losses.mean(), mine)


@row("learn2learn", "`MetaSGD(model, lrs=...)` with one number per tensor")
def rate_per_tensor():
    net = make()
    theirs = algorithms().MetaSGD(net, lrs=nn.ParameterList([scalar(value) for value in (0.05, 0.1, 0.15, 0.2)]))
    optimizer = SGD(Rate(LR, "tensor", relative=False)).bind(start(net), STEPS)
    (rates,) = optimizer.parameters()
    with torch.no_grad():
        rates.copy_(torch.stack(list(theirs.lrs)))
    expected = l2l_side(theirs, [*net.parameters(), *theirs.lrs])
    return [*expected[:4], torch.stack(expected[4:])], ours(net, optimizer=optimizer, learned=[rates])


@row("learn2learn", "`GBML(model, ModuleTransform(nn.Scale), lr)`")
def scale():
    net = make()
    package = import_learn2learn()
    theirs = package.algorithms.GBML(net, package.optim.ModuleTransform(package.nn.Scale), lr=LR).double()
    scales = list(theirs.compute_update.parameters())
    with torch.no_grad():
        for each in scales:
            each.fill_(1.0)  # theirs starts at the number of elements
    optimizer = SGD(Rate(LR, "element", relative=False)).bind(start(net), STEPS)
    expected = l2l_side(theirs, [*net.parameters(), *scales])
    found = ours(net, optimizer=optimizer, learned=rates_of(optimizer, net))
    return expected, [*found[:4], *(LR * value.flatten() for value in found[4:])]


@row("learn2learn", "`GBML(model, MetaCurvatureTransform, lr)`")
def meta_curvature():
    """Of weights; theirs multiplies by the second matrix itself, ours by its transpose, as the paper does."""
    net = make(bias=False)
    package = import_learn2learn()
    theirs = package.algorithms.GBML(net, package.optim.MetaCurvatureTransform, lr=LR).double()
    optimizer = SGD(LR, precondition=Curvature()).bind(start(net), STEPS)
    their_factors, our_factors = list(theirs.compute_update.parameters()), list(optimizer.parameters())
    with torch.no_grad():
        for place, (other, mine) in enumerate(zip(their_factors, our_factors, strict=True)):
            mine += 0.3 * draw(f"curvature {place}", *mine.shape)  # away from the identity, its own transpose
            other.copy_(mine if place % 2 == 0 else mine.T)
    found = ours(net, optimizer=optimizer, learned=our_factors)
    found[2:] = [value if place % 2 == 0 else value.T for place, value in enumerate(found[2:])]
    return l2l_side(theirs, [*net.parameters(), *their_factors]), found


def kronecker_side(net):
    """Their algorithm with moved factors: the modules that hold them, the factors, and both gradients."""
    package = import_learn2learn()
    transform = package.optim.KroneckerTransform(package.nn.KroneckerLinear)
    theirs = package.algorithms.GBML(net, transform, lr=LR).double()
    modules = theirs.compute_update.transforms_modules
    factors = list(modules.parameters())
    with torch.no_grad():
        for place, value in enumerate(factors):
            value += 0.3 * draw(f"factor {place}", *value.shape)
    return modules, factors, l2l_side(theirs, [*net.parameters(), *factors])


@row("learn2learn", "`GBML(model, KroneckerTransform(KroneckerLinear), lr)`")
def kronecker():
    net = make()
    _, factors, expected = kronecker_side(net)
    optimizer = SGD(LR, precondition=Kronecker()).bind(start(net), STEPS)
    with torch.no_grad():
        for mine, other in zip(optimizer.parameters(), factors, strict=True):
            mine.copy_(other)
    return expected, ours(net, optimizer=optimizer, learned=list(optimizer.parameters()))


@row("learn2learn", "`GBML(model, transform, lr)` with modules of your own")
def modules_of_ones_own():
    """Their Kronecker modules as our preconditioner, under our vmap."""
    net = make()
    modules, factors, expected = kronecker_side(net)
    by_name = dict(zip(start(net), modules, strict=True))
    optimizer = SGD(LR, precondition=lambda slopes: {name: by_name[name](slope) for name, slope in slopes.items()})
    return expected, ours(net, optimizer=optimizer, learned=factors)


@row("learn2learn", "`clone_module`, `autograd.grad`, `update_module`")
def by_hand():
    net = make()
    package = import_learn2learn()

    def adapted(i):
        clone = package.clone_module(net)
        for _ in range(STEPS):
            slopes = torch.autograd.grad(F.mse_loss(clone(X[i]), Y[i]), clone.parameters(), create_graph=True)
            package.update_module(clone, updates=[-LR * slope for slope in slopes])
        return clone

    def mine(i):
        fast = unroll(loss_of(net), start(net), (X[i], Y[i]), lr=LR, steps=STEPS)
        return lambda x: functional_call(net, fast, (x,))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        return [gradients(their_loop(side), list(net.parameters())) for side in (adapted, mine)]


@row("learn2learn", "`detach_module(clone)` after adaptation")
def detached():
    net = make()
    package = import_learn2learn()
    expected = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        for i in range(B):
            clone = package.algorithms.MAML(net, lr=LR).clone()
            for _ in range(STEPS):
                clone.adapt(F.mse_loss(clone(X[i]), Y[i]))
            package.detach_module(clone.module)
            expected.append([value.detach() for value in clone.parameters()])
    with torch.no_grad():
        fast = unroll_tasks(loss_of(net), start(net), (X, Y), lr=LR, steps=STEPS)
    assert not any(value.requires_grad for value in fast.values())
    return [torch.stack(parts) for parts in zip(*expected, strict=True)], list(fast.values())


def algorithms():
    return import_learn2learn().algorithms


# --------------------------------------------------------------------------------------------------------- higher


@row("higher", "`innerloop_ctx(model, opt, copy_initial_weights=False)`, `diffopt.step(loss)`")
def innerloop():
    net = make()
    return higher_side(net, torch.optim.SGD(net.parameters(), lr=LR)), ours(net, lr=LR)


@row("higher", "`copy_initial_weights=True`, their default")
def copied():
    """Nothing reaches the initial weights; a learned rate still gets its gradient."""
    net, theirs, mine = make(), scalar(LR), scalar(LR)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    expected = higher_side(net, optimizer, [theirs], copy_initial_weights=True, override={"lr": [theirs]})
    begin = {name: value.detach() for name, value in start(net).items()}
    fast = unroll_tasks(loss_of(net), begin, (X, Y), lr=mine, steps=STEPS)
    return expected, gradients(F.mse_loss(call_tasks(net, fast, {}, X_NEW), Y_NEW), [*net.parameters(), mine])


@row("higher", "`track_higher_grads=False`")
def untracked():
    net, expected = make(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for i in range(B):
        with higher.innerloop_ctx(net, optimizer, track_higher_grads=False) as (patched, inner):
            for _ in range(STEPS):
                inner.step(F.mse_loss(patched(X[i]), Y[i]))
            expected.append([value.detach() for value in patched.parameters()])
    with torch.no_grad():
        fast = unroll_tasks(loss_of(net), start(net), (X, Y), lr=LR, steps=STEPS)
    return [torch.stack(parts) for parts in zip(*expected, strict=True)], list(fast.values())


@row("higher", "`grad_callback=` that detaches")
def callback_detach():
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    step = {"grad_callback": lambda slopes: [slope.detach() for slope in slopes]}
    return higher_side(net, optimizer, step=lambda k: step), ours(net, lr=LR, first_order=True)


@row("higher", "`grad_callback=` that clips")
def callback_clip():
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)

    def clip(slopes):
        norm = torch.stack([slope.square().sum() for slope in slopes]).sum().sqrt()
        return [slope * (0.5 / (norm + 1e-6)).clamp(max=1.0) for slope in slopes]

    expected = higher_side(net, optimizer, step=lambda k: {"grad_callback": clip})
    return expected, ours(net, optimizer=SGD(LR, clip_norm=0.5))


@row("higher", "`grad_callback=` of another kind")
def callback_any():
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    expected = higher_side(net, optimizer, step=lambda k: {"grad_callback": lambda all: [s.tanh() for s in all]})
    squash = SGD(LR, precondition=lambda slopes: {name: slope.tanh() for name, slope in slopes.items()})
    return expected, ours(net, optimizer=squash)


@row("higher", "`torch.optim.SGD(..., momentum, nesterov, weight_decay)`")
def momentum():
    net = make()
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    expected = higher_side(net, torch.optim.SGD(net.parameters(), lr=LR, **options))
    return expected, ours(net, optimizer=SGD(LR, **options))


@row("higher", "`torch.optim.Adam` (`DifferentiableAdam`)")
def adam():
    """higher adds eps before it corrects the bias of the square, torch and we after it."""
    net, eps = make(), 1e-3
    one_step = torch.optim.Adam(net.parameters(), lr=0.05, eps=eps)
    uncorrected = torch.optim.Adam(net.parameters(), lr=0.05, betas=(0.9, 0.0), eps=eps)
    return (
        [*higher_side(net, one_step, steps=1), *higher_side(net, uncorrected)],
        [
            *ours(net, optimizer=Adam(0.05, eps=eps / (1 - 0.999) ** 0.5), steps=1),
            *ours(net, optimizer=Adam(0.05, betas=(0.9, 0.0), eps=eps)),
        ],
    )


@row("higher", "`torch.optim.RMSprop` (`DifferentiableRMSprop`)")
def rmsprop():
    net = make()
    optimizer = torch.optim.RMSprop(net.parameters(), lr=0.05, momentum=0.5, eps=1e-3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Differentiable RMSprop")
        expected = higher_side(net, optimizer)
    return expected, ours(net, optimizer=RMSprop(0.05, momentum=0.5, eps=1e-3))


@row("higher", '`override={"lr": [tensor]}`')
def learned_rate():
    net, theirs, mine = make(), scalar(LR), scalar(LR)
    expected = higher_side(net, torch.optim.SGD(net.parameters(), lr=1.0), [theirs], override={"lr": [theirs]})
    return expected, ours(net, lr=mine, learned=[mine])


@row("higher", '`override={"lr": [...]}`, one per parameter group')
def learned_rate_per_layer():
    net = make()
    values = [scalar(value) for value in (0.0625, 0.125, 0.25, 0.5)]
    groups = [{"params": [parameter]} for parameter in net.parameters()]
    expected = higher_side(net, torch.optim.SGD(groups, lr=1.0), values, override={"lr": values})
    optimizer = SGD(Rate(LR, "tensor", relative=False)).bind(start(net), STEPS)
    (rates,) = optimizer.parameters()
    with torch.no_grad():
        rates.copy_(torch.stack(values))
    return [*expected[:4], torch.stack(expected[4:])], ours(net, optimizer=optimizer, learned=[rates])


@row("higher", '`step(loss, override={"lr": [rates[k]]})`')
def learned_rate_per_step():
    net = make()
    values = [scalar(value) for value in (0.25, 0.125, 0.0625)]
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    expected = higher_side(net, optimizer, values, step=lambda k: {"override": {"lr": [values[k]]}})
    mine = SGD(Rate(LR, "all", per_step=True, relative=False)).bind(start(net), STEPS)
    (rates,) = mine.parameters()
    with torch.no_grad():
        rates.copy_(torch.stack(values))
    return [*expected[:4], torch.stack(expected[4:])], ours(net, optimizer=mine, learned=[rates])


@row("higher", '`override={"momentum": [tensor]}`')
def learned_momentum():
    net, theirs = make(), scalar(0.75)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.5)
    *expected, slope = higher_side(net, optimizer, [theirs], override={"momentum": [theirs]})
    mine = SGD(LR, momentum=Rate(0.75, "all")).bind(start(net), STEPS)
    found = ours(net, optimizer=mine, learned=list(mine.parameters()))
    return [*expected, 0.75 * 0.25 * slope], found  # ours is the sigmoid of its parameter


@row("higher", "`get_trainable_opt_params(opt)`")
def trainable_settings():
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    trainable = {
        name: [value.detach().double().requires_grad_() for value in values]
        for name, values in higher.optim.get_trainable_opt_params(optimizer).items()
    }
    expected = higher_side(net, optimizer, trainable["lr"], override=trainable)
    mine = SGD(Rate(LR, "all", relative=False)).bind(start(net), STEPS)
    return expected, ours(net, optimizer=mine, learned=list(mine.parameters()))


@row("higher", "`get_diff_optim(opt, params)`, `create_diff_optim(...)`, `step(loss, params=params)`")
def loose_parameters():
    net, results = make(), []
    names, made = list(start(net)), [
        lambda: higher.get_diff_optim(torch.optim.SGD(net.parameters(), lr=LR), net.parameters()),
        lambda: higher.create_diff_optim(torch.optim.SGD, {"lr": LR}, list(net.parameters())),
    ]  # fmt: skip
    for make_optimizer in made:

        def adapted(i, make_optimizer=make_optimizer):
            inner, fast = make_optimizer(), list(net.parameters())
            for _ in range(STEPS):
                loss = loss_of(net)(dict(zip(names, fast, strict=True)), X[i], Y[i])
                fast = inner.step(loss, params=fast)
            return lambda x: functional_call(net, dict(zip(names, fast, strict=True)), (x,))

        results += gradients(their_loop(adapted), list(net.parameters()))

    def mine(i):
        fast = unroll(loss_of(net), start(net), (X[i], Y[i]), lr=LR, steps=STEPS)
        return lambda x: functional_call(net, fast, (x,))

    return results, 2 * gradients(their_loop(mine), list(net.parameters()))


@row("higher", "`monkeypatch(model)`, `fmodel(x, params=fast)`")
def stateless():
    net = make()
    fast = {name: draw(f"fast {name}", B, *value.shape).requires_grad_() for name, value in start(net).items()}
    patched = higher.monkeypatch(net)
    out = torch.stack([patched(X_NEW[i], params=[value[i] for value in fast.values()]) for i in range(B)])
    mine = call_tasks(net, fast, {}, X_NEW)
    return [[side.detach(), *gradients(F.mse_loss(side, Y_NEW), list(fast.values()))] for side in (out, mine)]


def _at(patched: Any, k: int) -> Any:
    return patched.parameters(time=k)


@row("higher", "`fmodel.parameters(time=k)`")
def history():
    net, expected = make(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for i in range(B):
        with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (patched, inner):
            for _ in range(STEPS):
                inner.step(F.mse_loss(patched(X[i]), Y[i]))
            expected.append([value.detach() for k in (1, 2, 3) for value in _at(patched, k)])
    path = unroll_path(loss_of(net), start(net), (X, Y), lr=LR, steps=STEPS)
    found = [value.detach() for fast in path for value in fast.values()]
    return [torch.stack(parts) for parts in zip(*expected, strict=True)], found


class CubeOptimizer(torch.optim.Optimizer):
    """A rule that torch does not have: steps along the cubes of the gradients."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})


class DifferentiableCube(DifferentiableOptimizer):
    def _update(self, grouped_grads, **kwargs):
        for group, slopes in zip(self.param_groups, grouped_grads, strict=True):
            for place, (value, slope) in enumerate(zip(group["params"], slopes, strict=True)):
                group["params"][place] = value - group["lr"] * slope**3


class Cube(InnerOptimizer):
    def __init__(self, lr):
        super().__init__(clip_norm=None, precondition=None, lr=Rate(lr))

    def update(self, name, value, gradient, slots, step):
        return value - self.rate("lr", name, step) * gradient**3, slots


@row("higher", "`register_optim(MyOptimizer, MyDifferentiable)`")
def own_rule():
    net = make()
    register: Any = higher.register_optim  # its annotation asks for an instance
    register(CubeOptimizer, DifferentiableCube)
    return higher_side(net, CubeOptimizer(net.parameters(), LR)), ours(net, optimizer=Cube(LR))


@row("higher", "an optimizer over some of the parameters")
def some_parameters():
    net = make()
    expected = higher_side(net, torch.optim.SGD(net.head.parameters(), lr=LR))
    head = {name: value for name, value in start(net).items() if name.startswith("head.")}
    body = {name: value for name, value in start(net).items() if name.startswith("body.")}
    fast = unroll_tasks(loss_of(net), head, (X, Y), lr=LR, steps=STEPS, shared=body)
    loss = F.mse_loss(call_tasks(net, fast, body, X_NEW), Y_NEW)
    return expected, gradients(loss, list(net.parameters()))


# ---------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(("library", "theirs"), [(library, key) for library in ROWS for key in ROWS[library]])
def test_both_sides_of_a_row_are_equal(library, theirs):
    expected, found = ROWS[library][theirs]()
    assert len(expected) == len(found)
    size = max(float(value.abs().max()) for value in expected)
    assert size > 1e-2
    for their_value, our_value in zip(expected, found, strict=True):
        assert their_value.shape == our_value.shape
        assert our_value.dtype == torch.float64
        assert float((their_value - our_value).abs().max()) <= 1e-12 * size


@pytest.mark.parametrize("library", ROWS)
def test_the_tables_of_the_page_are_these_rows(library):
    text = PAGE.read_text(encoding="utf-8")
    table = re.search(rf"^\| {library} \| .*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table is not None
    listed = [line.split(" | ")[0].removeprefix("| ") for line in table[1].splitlines()]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(ROWS[library]) | WITHOUT_CODE[library]
