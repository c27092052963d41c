"""The kernels of perceptrons compute what the engine computes, in every derivative, and step aside where they must."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from gradient_helpers import CLASSES, SINES, draw, meta_gradient, seeded
from kernel_helpers import Watcher, record_calls
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import metaicl.native.operators as operators
from metaicl.episode import Episode, Examples
from metaicl.functional import masked_mean
from metaicl.inner_loop import SGD, Rate
from metaicl.inner_loop.perceptron_nets import as_perceptron
from metaicl.inner_loop.tracing import trace_steps
from metaicl.learner import Learner
from metaicl.learners import MAML, MAMLPlusPlus, MetaSGD
from metaicl.meta_step import MetaStep
from metaicl.native.library import load, without_kernels
from metaicl.nets.backbones import MLP, EncoderWithHead
from metaicl.objectives import Objective, query_loss
from metaicl.spec import TaskSpec

PLANE = TaskSpec("regression", (3,), y_dim=2)
IMAGES = TaskSpec("classification", (1, 3, 3), "image", n_way=3)

pytestmark = pytest.mark.skipif(load("perceptron") is None, reason="no C compiler")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were called."""
    return record_calls(monkeypatch, operators)


def episode_for(spec: TaskSpec, *, masked: bool = False) -> Episode:
    source = torch.Generator().manual_seed(0)

    def part(rows: int) -> Examples:
        x = torch.randn(4, rows, *spec.x_shape, generator=source, dtype=torch.float64)
        if spec.kind == "classification":
            y = torch.randint(spec.n_way, (4, rows), generator=source)
        else:
            y = torch.randn(4, rows, spec.y_dim, generator=source, dtype=torch.float64)
        mask = torch.rand(4, rows, generator=source) > 0.3 if masked else None
        return Examples(x, y, mask)

    return Episode(part(7), part(5))


def worst_gap(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest gradient."""
    scale = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[name] - value).abs().max()) for name, value in expected.items()) / scale


def net(
    spec: TaskSpec, activation: Callable[[], nn.Module] = nn.ReLU, *, hidden: tuple[int, ...] = (9, 5)
) -> nn.Module:
    layers = MLP([math.prod(spec.x_shape), *hidden, spec.output_size], activation=activation)
    return layers if len(spec.x_shape) == 1 else nn.Sequential(nn.Flatten(), layers)


AT_ONCE = ["adapt_and_answer", "adapt_and_answer_backward"]
IN_PARTS = ["descend", "answer", "answer_backward", "descend_backward"]


def loss_in_parts(learner: Learner, episode: Episode) -> Tensor:
    """`query_loss` with the fast weights given out between."""
    answer = learner.predict(learner.adapt(episode.support), episode.query.x)
    return masked_mean(-answer.log_prob(episode.query.y), episode.query.mask, 1)


SETTINGS: dict[str, Callable[[TaskSpec], Learner]] = {
    "one step": lambda spec: MAML(spec, net=net(spec)),
    "five steps": lambda spec: MAML(spec, net=net(spec, nn.Tanh), inner_steps=5),
    "sigmoid": lambda spec: MAML(spec, net=net(spec, nn.Sigmoid), inner_steps=3),
    "deep linear": lambda spec: MAML(spec, net=net(spec, nn.Identity), inner_steps=2),
    "one layer": lambda spec: MAML(spec, net=net(spec, hidden=()), inner_steps=3),
    "first order": lambda spec: MAML(spec, net=net(spec, nn.Tanh), inner_steps=3, first_order=True),
    "truncated": lambda spec: MAML(spec, net=net(spec, nn.Tanh), inner_steps=4, truncate=2),
    "checkpointed": lambda spec: MAML(spec, net=net(spec, nn.Tanh), inner_steps=3, checkpoint=True),
    "some layers": lambda spec: MAML(spec, net=net(spec, nn.Tanh), inner_steps=3, adapt="*4.*"),
    "Meta-SGD": lambda spec: MetaSGD(spec, net=net(spec, nn.Tanh), inner_steps=3),
    "a rate": lambda spec: MAML(spec, net=net(spec), inner_steps=3, optimizer=SGD(Rate(0.1, "all"))),
    "rates per step": lambda spec: MAML(
        spec, net=net(spec, nn.Tanh), inner_steps=3, optimizer=SGD(Rate(0.1, "element", per_step=True, relative=False))
    ),
    "MAML++": lambda spec: MAMLPlusPlus(spec, net=net(spec, nn.Tanh), inner_steps=3),
}


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
@pytest.mark.parametrize("spec", [PLANE, CLASSES.spec, IMAGES], ids=["regression", "classes", "images"])
@pytest.mark.parametrize("name", SETTINGS)
def test_kernels_equal_the_engine(name: str, spec: TaskSpec, masked: bool, calls: list[str]) -> None:
    learner, episode = seeded(lambda: SETTINGS[name](spec)), episode_for(spec, masked=masked)
    with without_kernels():
        expected = meta_gradient(learner, episode)
        loss = query_loss(learner, episode)
    assert not calls
    for objective, ways in ((query_loss, AT_ONCE), (loss_in_parts, IN_PARTS)):
        assert worst_gap(meta_gradient(learner, episode, objective), expected) <= 1e-12
        assert calls == (IN_PARTS if name == "MAML++" else ways)
        torch.testing.assert_close(objective(learner, episode), loss, rtol=0, atol=1e-13)
        calls.clear()


def test_losses_of_every_step_and_the_gate_of_second_derivatives() -> None:
    episode = episode_for(PLANE)
    learner = seeded(lambda: MAMLPlusPlus(PLANE, net=net(PLANE, nn.Tanh), inner_steps=3)).train()
    for fraction in (0.0, 0.2, 0.5, 1.0):
        learner.at(fraction)
        with without_kernels():
            expected = meta_gradient(learner, episode)
        assert worst_gap(meta_gradient(learner, episode), expected) <= 1e-12, fraction


@pytest.mark.parametrize("objective", [query_loss, loss_in_parts])
def test_derivatives_of_the_meta_gradient(objective: Objective) -> None:
    learner, episode = seeded(lambda: MetaSGD(PLANE, net=net(PLANE, nn.Tanh), inner_steps=2)), episode_for(PLANE)

    def third_order() -> dict[str, Tensor]:
        named = dict(learner.named_parameters())
        slopes = torch.autograd.grad(objective(learner, episode).mean(), list(named.values()), create_graph=True)
        size = sum(slope.square().sum() for slope in slopes)
        return dict(zip(named, torch.autograd.grad(size, list(named.values())), strict=True))

    with without_kernels():
        expected = third_order()
    assert worst_gap(third_order(), expected) <= 1e-11


def test_widths_of_every_remainder_and_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        for width in (1, 2, 3, 4, 7, 8, 11, 12, 13, 16, 20, 33, 40):
            learner = seeded(lambda width=width: MAML(SINES.spec, net=MLP([1, width, width, 1]), inner_steps=2))
            episode = draw(SINES, n_tasks=5)
            with without_kernels():
                expected = meta_gradient(learner, episode)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                for objective in (query_loss, loss_in_parts):
                    found = meta_gradient(learner, episode, objective)
                    assert worst_gap(found, expected) <= 1e-12, (width, threads)
                    again = meta_gradient(learner, episode, objective)
                    assert all(torch.equal(value, again[name]) for name, value in found.items()), "not deterministic"
    finally:
        torch.set_num_threads(before)


def test_torch_spreads_the_rows_of_few_large_tasks_over_threads(calls: list[str]) -> None:
    learner = seeded(lambda: MAML(SINES.spec)).float()
    few, many = (Examples(torch.randn(1, rows, 1), torch.randn(1, rows, 1)) for rows in (10, 2000))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        learner.adapt(many)
        assert not calls
        learner.adapt(few)
        assert calls == ["descend"]
        torch.set_num_threads(1)
        learner.adapt(many)
        assert calls == ["descend", "descend"]
    finally:
        torch.set_num_threads(before)


def test_float32_and_nothing_to_differentiate(calls: list[str]) -> None:
    learner = seeded(lambda: MAML(SINES.spec, inner_steps=4)).float()
    episode = draw(SINES).to(dtype=torch.float32)
    with torch.no_grad():
        found = learner(episode.support, episode.query.x).mean
        assert calls == ["adapt_and_answer"]
        with without_kernels():
            expected = learner(episode.support, episode.query.x).mean
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_stays_so() -> None:
    learner = seeded(lambda: MAML(SINES.spec, inner_steps=2))
    episode = draw(SINES)
    episode.support.y[1, 0] = float("nan")
    answer = learner(episode.support, episode.query.x).mean
    assert answer[1].isnan().all()
    assert answer[0].isfinite().all()  # tasks do not see each other


def test_a_compiled_step_calls_the_kernels(calls: list[str]) -> None:
    episode = draw(SINES).to(dtype=torch.float32)
    learner = seeded(lambda: MAML(SINES.spec, net=MLP([1, 5, 5, 1]), inner_steps=3)).float()
    torch.compiler.reset()
    compiled = MetaStep(learner, compile=True)
    compiled(episode)
    assert compiled.is_compiled
    calls.clear()
    found = compiled(episode)[1]
    assert calls == AT_ONCE
    with without_kernels():
        expected = MetaStep(learner)(episode)[1]
    assert worst_gap(found, expected) <= 1e-5


def test_a_graph_of_factors_is_kept_where_weights_are_many(calls: list[str]) -> None:
    episode = draw(SINES).to(dtype=torch.float32)
    torch.compiler.reset()
    for width, expected in ((40, AT_ONCE), (64, [])):
        learner = seeded(lambda width=width: MAML(SINES.spec, net=MLP([1, width, width, 1]))).float()
        compiled = MetaStep(learner, compile=True)
        compiled(episode)
        assert compiled.is_compiled
        calls.clear()
        compiled(episode)
        assert calls == expected, width


class Halved(MAML):
    """A subclass with an answer of its own."""

    def predict(self, state, x):
        return super().predict(state, 0.5 * x)


def test_an_adapt_or_predict_of_ones_own_is_not_passed_by(calls: list[str]) -> None:
    episode = draw(SINES)
    learner = seeded(lambda: Halved(SINES.spec, net=MLP([1, 4, 1])))
    plain = seeded(lambda: MAML(SINES.spec, net=MLP([1, 4, 1])))
    found = learner(episode.support, episode.query.x).mean
    torch.testing.assert_close(found, plain(episode.support, 0.5 * episode.query.x).mean, rtol=0, atol=1e-13)
    assert calls == ["descend", "answer", "adapt_and_answer"]
    start = plain.adapt(episode.support[:1])
    plain.adapt = lambda support: start  # type: ignore[method-assign]
    calls.clear()
    plain(episode.support[:1], episode.query.x[:1])
    assert calls == ["answer"]


@pytest.mark.parametrize("part", ["net", "rates"])
def test_rates_of_another_precision_than_the_net(part: str, calls: list[str]) -> None:
    episode = draw(SINES)
    learner = seeded(lambda: MAML(SINES.spec, net=MLP([1, 4, 1]), optimizer=SGD(Rate(0.1, "all"))))
    if part == "net":
        learner.net.float()
        episode = episode.to(dtype=torch.float32)
    else:
        learner.optimizer.float()
    with without_kernels():
        expected = learner(episode.support, episode.query.x).mean
    torch.testing.assert_close(learner(episode.support, episode.query.x).mean, expected)
    assert calls == ["answer"]


def test_a_compiled_step_in_bfloat16_multiplies_in_bfloat16(calls: list[str]) -> None:
    episode = draw(SINES).to(dtype=torch.float32)
    learner = seeded(lambda: MAML(SINES.spec, net=MLP([1, 5, 5, 1]), inner_steps=2)).float()
    torch.compiler.reset()
    compiled = MetaStep(learner, compile=True, autocast="bf16")
    compiled(episode)
    assert compiled.is_compiled
    assert not calls


@pytest.mark.parametrize(
    "context",
    [Watcher, partial(FlopCounterMode, display=False), trace_steps, partial(torch.autocast, "cpu", torch.bfloat16)],
    ids=["function mode", "dispatch mode", "trace", "autocast"],
)
def test_whoever_watches_torch_sees_it(context: Callable[[], AbstractContextManager], calls: list[str]) -> None:
    learner, episode = seeded(lambda: MAML(SINES.spec)).float(), draw(SINES).to(dtype=torch.float32)
    with context():
        learner(episode.support, episode.query.x)
    assert not calls


def test_transforms_and_inputs_with_gradients_are_left_to_the_engine(calls: list[str]) -> None:
    learner, episode = seeded(lambda: MAML(SINES.spec)), draw(SINES)
    x = episode.query.x.clone().requires_grad_()
    learner(episode.support, x).mean.sum().backward()
    assert x.grad is not None
    assert calls == ["descend", "descend_backward"]  # the query alone wants a gradient
    calls.clear()
    slopes = torch.func.grad(lambda x: learner(episode.support, x).mean.sum())(episode.query.x)
    torch.testing.assert_close(slopes, x.grad)
    assert not calls


class Twice(MLP):
    """A subclass with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    layers = MLP([1, 4, 1])
    layers[0].register_forward_hook(lambda *_: None)
    return layers


def overridden() -> nn.Module:
    layers = MLP([1, 4, 1])
    layers[0].forward = lambda x: F.linear(x, layers[0].weight) + 1
    return layers


def hooked_identity() -> nn.Module:
    layers = nn.Sequential(nn.Linear(1, 4), nn.Identity(), nn.Tanh(), nn.Linear(4, 1))
    layers[1].register_forward_hook(lambda module, inputs, output: 3 * output)
    return layers


def overridden_identity() -> nn.Module:
    layers = nn.Sequential(nn.Linear(1, 4), nn.Identity(), nn.Tanh(), nn.Linear(4, 1))
    layers[1].forward = lambda x: 3 * x
    return layers


class Called(MLP):
    """A subclass with a call of its own."""

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Reversed(MLP):
    """A subclass that goes through its layers in another order."""

    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


def tied() -> nn.Module:
    layers = MLP([1, 4, 4, 4, 1])
    layers[4].weight = layers[2].weight
    return layers


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "own forward": lambda: Twice([1, 4, 1]),
    "own call": lambda: Called([1, 4, 1]),
    "own order": lambda: Reversed([1, 4, 1]),
    "hook of an identity": hooked_identity,
    "replaced forward of an identity": overridden_identity,
    "hook": hooked,
    "replaced forward": overridden,
    "tied weights": tied,
    "weight normalization": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(1, 1)),
    "mixed activations": lambda: nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)),
    "a missing activation": lambda: nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 1)),
    "an activation at the end": lambda: MLP([1, 4, 1], activate_last=True),
    "another activation": lambda: MLP([1, 4, 1], activation=nn.GELU),
    "normalization": lambda: nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.Linear(4, 1)),
    "no bias": lambda: nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU(), nn.Linear(4, 1)),
    "wide": lambda: MLP([1, 256, 256, 1]),
    "nothing": nn.Sequential,
    "no Sequential": lambda: nn.ModuleList([nn.Linear(1, 1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_nets_are_not_taken_for_perceptrons(name: str) -> None:
    assert as_perceptron(OTHERS[name]()) is None


def test_perceptrons_are_recognized() -> None:
    found = as_perceptron(EncoderWithHead(MLP([1, 6, 6], activate_last=True), SINES.spec))
    assert found is not None
    assert found.names == [
        *("encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias", "head.weight", "head.bias")
    ]
    assert found.layers.sizes == (1, 6, 6, 1)
    alone = as_perceptron(nn.Linear(2, 3))
    assert alone is not None
    assert alone.names == ["weight", "bias"]
    with_identity = as_perceptron(
        nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    )
    assert with_identity is not None
    assert with_identity.flattens
    nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert as_perceptron(nn.Linear(2, 3)) is None
    finally:
        nn.modules.module._global_forward_hooks.clear()


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
def test_errors_are_those_of_the_engine(kernels: bool) -> None:
    learner, episode = seeded(lambda: MAML(CLASSES.spec)), draw(CLASSES)
    with nullcontext() if kernels else without_kernels():
        with pytest.raises(ValueError, match=r"support.y must hold labels in \[0, n_way=3\); got \[5, 6, 7\]"):
            learner.adapt(Examples(episode.support.x, episode.support.y + 5))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            learner.adapt(Examples(episode.support.x[..., :-1], episode.support.y))
        with pytest.raises(ValueError, match="the net must turn 9 rows into a tensor"):
            seeded(lambda: MAML(CLASSES.spec, net=MLP([4, 5]))).adapt(episode.support)
