"""Inner optimizers: torch's numbers, learned hyper-parameters, clipping, preconditioning, wrong settings."""

import pytest
import torch
from torch import nn

from metaicl.inner_loop.adaptive import Adam, AdamW, RMSprop
from metaicl.inner_loop.curvature import Curvature, GradientMap, Kronecker
from metaicl.inner_loop.optimizers import SGD
from metaicl.inner_loop.parameters import dotless
from metaicl.inner_loop.rates import Rate
from metaicl.inner_loop.unrolling import unroll, unroll_path, unroll_tasks
from metaicl.task import derive_generator

PAIRS = {
    "sgd": (lambda: SGD(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        lambda: SGD(0.1, momentum=0.9, dampening=0.3, weight_decay=0.2),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.2),
    ),
    "nesterov": (
        lambda: SGD(0.1, momentum=0.8, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True),
    ),
    "adam": (
        lambda: Adam(0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2),
    ),
    "adamw": (lambda: AdamW(0.1, weight_decay=0.2), lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2)),
    "rmsprop": (
        lambda: RMSprop(0.1, alpha=0.9, momentum=0.5, weight_decay=0.2),
        lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.9, momentum=0.5, weight_decay=0.2),
    ),
}


def draw(*shape, seed="optimizers"):
    return torch.randn(*shape, generator=derive_generator(seed), dtype=torch.float64)


CENTER = {"a": draw(3, 2, seed="center a"), "b": draw(2, seed="center b")}


def bowl(params, scale):
    """Not separable, so that the Hessian has entries off its diagonal."""
    total = sum(
        ((params[name] - center).square() + 0.1 * (params[name] - center) ** 4).sum() for name, center in CENTER.items()
    )
    return scale * total + (params["a"].sum() * params["b"].sum()).sin()


def start():
    return {"a": draw(3, 2, seed="a").requires_grad_(), "b": draw(2, seed="b").requires_grad_()}


SCALE = torch.tensor(0.7, dtype=torch.float64)
OTHER = {"c": torch.zeros(2)}


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("name", PAIRS)
def test_numbers_are_those_of_torch(name, clip_norm):
    ours, theirs = PAIRS[name]
    optimizer = ours()
    optimizer.clip_norm = clip_norm
    path = unroll_path(
        lambda params, scale: bowl(params, scale), start(), (SCALE.expand(1),), steps=6, optimizer=optimizer
    )
    weights = start()
    other = theirs(list(weights.values()))
    for fast in path:
        other.zero_grad()
        bowl(weights, SCALE).backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(weights.values()), clip_norm)
        other.step()
        for key, value in weights.items():
            assert float((fast[key][0] - value).detach().abs().max()) < 1e-12, key


def objective(optimizer, params, steps=3):
    fast = unroll(bowl, params, (SCALE,), steps=steps, optimizer=optimizer)
    return sum((value * draw(*value.shape, seed=name)).sum() for name, value in fast.items())


LEARNED = {
    "one": lambda: SGD(Rate(0.1, "all"), momentum=Rate(0.5, "all", per_step=True), weight_decay=Rate(0.1, "tensor")),
    "nesterov": lambda: SGD(Rate(0.1, "tensor", per_step=True), momentum=Rate(0.5, "element"), nesterov=True),
    "clipped": lambda: SGD(Rate(0.1, "element"), clip_norm=0.5),
    "adam": lambda: Adam(Rate(0.1, "element", per_step=True), betas=(Rate(0.8, "tensor"), Rate(0.9, "all"))),
    "adamw": lambda: AdamW(Rate(0.1, "tensor"), weight_decay=Rate(0.2, "element")),
    "rmsprop": lambda: RMSprop(Rate(0.1, "all"), alpha=Rate(0.9, "tensor"), momentum=Rate(0.5, "tensor")),
    "curvature": lambda: SGD(Rate(0.1, "all"), precondition=Curvature()),
    "kronecker": lambda: SGD(Rate(0.1, "all"), precondition=Kronecker()),
    "eps": lambda: Adam(0.1, eps=Rate(0.1, "element", per_step=True)),
    "eps of rmsprop": lambda: RMSprop(0.1, eps=Rate(0.1, "tensor")),
}


@pytest.mark.parametrize("name", LEARNED)
def test_meta_gradients_of_weights_and_rates_equal_finite_differences(name):
    params = start()
    optimizer = LEARNED[name]().bind(params, 3)
    leaves = [*params.values(), *optimizer.parameters()]
    assert len(leaves) > 2
    gradients = torch.autograd.grad(objective(optimizer, params), leaves)
    size = max(float(gradient.abs().max()) for gradient in gradients)
    with torch.no_grad():
        for leaf, gradient in zip(leaves, gradients, strict=True):
            for place in range(leaf.numel()):
                values = []
                for shift in (1e-6, -2e-6, 1e-6):
                    leaf.view(-1)[place] += shift
                    values.append(float(objective(optimizer, params)))
                slope = (values[0] - values[1]) / 2e-6
                assert abs(slope - float(gradient.reshape(-1)[place])) <= 1e-5 * abs(slope) + 1e-8 * size


@pytest.mark.parametrize("optimizer", [Adam(0.1), AdamW(0.1), RMSprop(0.1), SGD(0.1, clip_norm=1.0)])
def test_a_gradient_of_zero_gives_no_nan(optimizer):
    params = {"a": torch.zeros(2, dtype=torch.float64, requires_grad=True)}
    fast = unroll(lambda p: p["a"].square().sum(), params, (), steps=2, optimizer=optimizer)["a"]
    assert fast.tolist() == [0, 0]
    assert bool(torch.autograd.grad(fast.sum(), params["a"])[0].isfinite().all())


@pytest.mark.parametrize(
    ("rate", "shapes"),
    [
        (Rate(0.1, "all"), [()]),
        (Rate(0.1, "all", per_step=True), [(4,)]),
        (Rate(0.1, "tensor"), [(2,)]),
        (Rate(0.1, "tensor", per_step=True), [(4, 2)]),
        (Rate(0.1, "element"), [(3, 2), (2,)]),
        (Rate(0.1, "element", per_step=True), [(4, 3, 2), (4, 2)]),
        (Rate(0.1), []),
    ],
)
def test_shapes_of_learned_rates(rate, shapes):
    assert [tuple(value.shape) for value in SGD(rate).bind(start(), 4).parameters()] == shapes


def test_learned_fractions_start_where_they_should_and_stay_inside():
    optimizer = SGD(0.1, momentum=Rate(0.9, "all")).bind(start(), 1)
    assert abs(float(optimizer.rate("momentum", "a", 0).detach()) - 0.9) < 1e-15
    with torch.no_grad():
        next(optimizer.parameters()).fill_(20.0)
    assert 0.9 < float(optimizer.rate("momentum", "a", 0).detach()) < 1


@pytest.mark.parametrize("learn", ["all", "tensor", "element"])
def test_an_outer_step_moves_a_relative_rate_in_proportion(learn):
    def moved(**settings):
        optimizer = SGD(Rate(0.01, learn, **settings)).bind(start(), 1)
        outer = torch.optim.Adam(optimizer.parameters(), lr=0.002)
        before = optimizer.rate("lr", "a", 0).mean()
        (-before).backward()
        outer.step()
        return float(before.detach()), float(optimizer.rate("lr", "a", 0).mean().detach())

    assert moved() == pytest.approx((0.01, 0.01 * 1.002), rel=1e-6)
    assert moved(relative=False) == pytest.approx((0.01, 0.012), rel=1e-6)


def test_bind_copies_and_steps_beyond_the_last_use_the_last():
    one = SGD(Rate(0.1, "all", per_step=True), precondition=Curvature())
    first, second = one.bind(start(), 2), one.bind(start(), 2)
    assert list(one.parameters()) == []
    assert not {id(value) for value in first.parameters()} & {id(value) for value in second.parameters()}
    with torch.no_grad():
        first.learned["lr"].value[1] = 3.0
    assert [round(float(first.rate("lr", "a", step).detach()), 6) for step in range(4)] == [0.1, 0.3, 0.3, 0.3]


def test_clipping_bounds_the_gradient_of_each_task():
    params = {"w": torch.zeros(2, dtype=torch.float64)}
    targets = torch.tensor([[30.0, 40.0], [0.03, 0.04]], dtype=torch.float64)
    fast = unroll_tasks(
        lambda p, t: 0.5 * (p["w"] - t).square().sum(), params, (targets,), steps=1, optimizer=SGD(1.0, clip_norm=1.0)
    )["w"]
    assert float((fast[0].norm() - 1).abs()) < 1e-7
    assert float((fast[1] - targets[1]).abs().max()) < 1e-15


def test_a_function_preconditions():
    fast = unroll(
        bowl, start(), (SCALE,), steps=1, optimizer=SGD(0.1, precondition=lambda g: {n: 2 * v for n, v in g.items()})
    )
    twice = unroll(bowl, start(), (SCALE,), steps=1, lr=0.2)
    assert max(float((fast[name] - twice[name]).detach().abs().max()) for name in fast) < 1e-15


class Scaling(GradientMap):
    """A gradient map with a setting."""

    def __init__(self, times=1.0):
        super().__init__()
        self.times = times

    def start(self, value):
        return [torch.ones_like(value)]

    def transform(self, gradient, factors):
        return self.times * factors[0] * gradient


def test_a_gradient_map_of_ones_own_keeps_its_settings():
    optimizer = SGD(0.1, precondition=Scaling(times=3.0)).bind(start(), 1)
    fast = unroll(bowl, start(), (SCALE,), steps=1, optimizer=optimizer)
    expected = unroll(bowl, start(), (SCALE,), steps=1, lr=0.3)
    assert max(float((fast[name] - expected[name]).detach().abs().max()) for name in fast) < 1e-14


def test_curvature_transforms_every_axis():
    kernel = draw(4, 3, 2, 2)
    module = Curvature().bind({"conv.weight": kernel}).double()
    factors = list(module.factors[dotless("conv.weight")])
    assert torch.equal(module({"conv.weight": kernel})["conv.weight"], kernel)
    with torch.no_grad():
        for i, factor in enumerate(factors):
            factor.copy_(draw(*factor.shape, seed=str(i)))
    expected = torch.einsum("po,qi,gf,oif->pqg", *factors, kernel.flatten(2)).view_as(kernel)
    assert float((module({"conv.weight": kernel})["conv.weight"] - expected).detach().abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SGD(0), ValueError, "lr must be a finite number > 0; got 0"),
        (lambda: SGD(Rate(-1.0, "all")), ValueError, r"lr must be a finite number > 0; got -1\.0"),
        (lambda: SGD(0.1, momentum=1.0), ValueError, r"momentum must be in \[0, 1\); got 1\.0"),
        (lambda: SGD(0.1, momentum=Rate(0.0, "all")), ValueError, "and not 0, since it is learned"),
        (lambda: SGD(0.1, nesterov=True), ValueError, "nesterov needs momentum > 0"),
        (lambda: Adam(0.1, betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be in"),
        (lambda: Adam(0.1, eps=0), ValueError, "eps must be a finite number > 0"),
        (lambda: RMSprop(0.1, weight_decay=-1), ValueError, "weight_decay must be in"),
        (lambda: SGD(0.1, clip_norm=0), ValueError, "clip_norm must be a finite number > 0"),
        (lambda: SGD(0.1, precondition=3), TypeError, "precondition must map gradients"),
        (lambda: Rate(0.1, "layer"), ValueError, r"Rate\.learn must be one of"),
        (lambda: Rate(0.1, per_step=True), ValueError, "per_step needs a learned rate"),
        (lambda: Rate(float("nan")), ValueError, r"Rate\.value must be a finite number"),
        (lambda: unroll(bowl, start(), (SCALE,), steps=1), ValueError, "either lr, for gradient descent, or"),
        (lambda: unroll(bowl, start(), (SCALE,), steps=1, lr=1.0, optimizer=SGD(1.0)), ValueError, "either lr"),
        (lambda: Adam(0.1, betas=0.9), ValueError, r"betas must be a pair \(beta1, beta2\); got 0\.9"),
        (lambda: AdamW(0.1, betas=(0.9,)), ValueError, r"betas must be a pair \(beta1, beta2\); got \(0\.9,\)"),
        (lambda: unroll(bowl, start(), (SCALE,), steps=-1, lr=1.0), ValueError, "steps must be an int >= 0"),
        (
            lambda: unroll(bowl, start(), (SCALE,), steps=1, optimizer=SGD(Rate(0.1, "all"))),
            RuntimeError,
            r"SGD\.lr is learned; call bind",
        ),
        (
            lambda: unroll(bowl, start(), (SCALE,), steps=1, optimizer=SGD(Rate(0.1, "tensor")).bind(OTHER, 1)),
            RuntimeError,
            r"learned rates are bound to \['c'\], not to 'a'",
        ),
        (
            lambda: unroll(bowl, start(), (SCALE,), steps=1, optimizer=SGD(Rate(0.1, "element")).bind(OTHER, 1)),
            RuntimeError,
            r"learned rates are bound to \['c'\], not to 'a'",
        ),
        (
            lambda: unroll(bowl, start(), (SCALE,), steps=1, optimizer=SGD(0.1, precondition=Curvature())),
            RuntimeError,
            r"learned matrices are not bound to any tensor yet; call bind",
        ),
        (
            lambda: unroll(
                bowl, start(), (SCALE,), steps=1, optimizer=SGD(0.1, precondition=Kronecker()).bind(OTHER, 1)
            ),
            RuntimeError,
            r"learned matrices are bound to \['c'\], not to 'a'",
        ),
    ],
)
def test_wrong_settings_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_learned_rates_are_parameters_of_the_module_that_holds_them():
    holder = nn.Module()
    holder.optimizer = SGD(Rate(0.1, "tensor")).bind(start(), 1)
    assert [name for name, _ in holder.named_parameters()] == ["optimizer.learned.lr.value"]
