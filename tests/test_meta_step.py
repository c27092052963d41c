import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from training_helpers import (
    MAKERS,
    Lines,
    Ridge,
    TinyReptile,
    make_averaging,
    make_maml,
    make_normalized,
    make_reptile,
    make_ridge,
)

from metaicl.episode import Episode, Examples
from metaicl.functional import gaussian
from metaicl.learner import Learner
from metaicl.meta_step import MetaStep, accumulate
from metaicl.objectives import query_loss
from metaicl.task import derive_generator

TASKS = Lines()


def episode_of(n_tasks: int = 5, n_shot: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> Episode:
    generator = derive_generator(seed, "test")
    return TASKS.sample(n_tasks, split="train", n_shot=n_shot, n_query=3, generator=generator).to(dtype=dtype)


def gaps(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> float:
    assert found[1].keys() == expected[1].keys()
    pairs = [(found[0], expected[0]), *((found[1][name], expected[1][name]) for name in expected[1])]
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("name", ["ridge", "maml"])
def test_gradient_equals_central_differences(name: str) -> None:
    learner, episode = MAKERS[name]().double(), episode_of(dtype=torch.float64)
    losses, gradients = MetaStep(learner)(episode)
    assert losses.shape == (5,)
    for key, parameter in learner.named_parameters():
        values = []
        for move in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.flatten()[0].add_(move)
                values.append(float(query_loss(learner, episode).mean()))
                parameter.flatten()[0].sub_(move)
        assert float(gradients[key].flatten()[0]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["ridge", "maml", "reptile"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_micro_batches_equal_the_whole(name: str, size: int) -> None:
    learner, episode = MAKERS[name]().double(), episode_of(dtype=torch.float64)
    losses, gradients = accumulate(MetaStep(learner), episode, size)
    whole_losses, whole = accumulate(MetaStep(learner), episode)
    assert float((losses.mean() - whole_losses.mean()).abs()) <= 1e-12
    assert max(float((gradients[key] - whole[key]).abs().max()) for key in whole) <= 1e-12


def test_learner_is_left_alone() -> None:
    learner = make_ridge()
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    MetaStep(learner)(episode_of())
    assert all(parameter.grad is None for parameter in learner.parameters())
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())


def test_gradients_come_under_no_grad_too() -> None:
    step = MetaStep(make_maml())
    expected = step(episode_of())
    with torch.no_grad():
        assert gaps(step(episode_of()), expected) == 0


def test_frozen_parameters_get_no_gradient_and_unused_ones_zeros() -> None:
    learner = make_ridge()
    learner.encoder[0].weight.requires_grad_(False)
    _, gradients = MetaStep(
        learner, lambda learner, episode: learner(episode.support, episode.query.x).mean.mean((1, 2))
    )(episode_of())
    assert sorted(gradients) == ["encoder.0.bias", "raw_scale"]
    assert float(gradients["raw_scale"]) == 0
    assert float(gradients["encoder.0.bias"].abs().sum()) > 0


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="Ridge has no parameter with requires_grad=True"):
        MetaStep(make_ridge().requires_grad_(False))
    with pytest.raises(ValueError, match="autocast must be one of"):
        MetaStep(make_ridge(), autocast="fp16")


def test_an_objective_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"loss of each task, shape \(B,\) = \(5,\); got \(\) for Ridge"):
        MetaStep(make_ridge(), lambda learner, episode: query_loss(learner, episode).mean())(episode_of())
    with pytest.raises(ValueError, match=r"= \(5,\); got float for Ridge"):
        MetaStep(make_ridge(), lambda learner, episode: 1.0)(episode_of())
    with pytest.raises(ValueError, match="depends on no trainable parameter of Ridge"):
        MetaStep(make_ridge(), lambda learner, episode: query_loss(learner, episode).detach())(episode_of())


def test_own_meta_gradients_are_used_and_checked() -> None:
    learner, episode = make_reptile(), episode_of()
    losses, gradients = MetaStep(learner)(episode)
    expected_loss, expected = learner.meta_gradients(episode)
    assert gaps((losses, gradients), (expected_loss, expected)) == 0
    assert not gradients["net.0.weight"].requires_grad

    class Multiplying(TinyReptile):
        def meta_gradients(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
            loss, gradients = super().meta_gradients(episode)
            return loss, {name: (torch.eye(len(value)) @ value).view_as(value) for name, value in gradients.items()}

    rounded = MetaStep(Multiplying(Lines.spec), autocast="bf16")(episode)[1]
    assert {value.dtype for value in rounded.values()} == {torch.float32}

    class Forgetful(TinyReptile):
        def meta_gradients(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
            loss, gradients = super().meta_gradients(episode)
            return loss, {name: value for name, value in gradients.items() if name != "net.0.bias"}

    with pytest.raises(ValueError, match=r"net.0.bias should have shape \(5,\), got absent"):
        MetaStep(Forgetful(Lines.spec))(episode)


def test_autocast_is_near_float32_but_not_it() -> None:
    learner, episode = make_ridge(), episode_of()

    def plain(learner: Learner, episode: Episode) -> Tensor:
        return (learner.encoder(episode.query.x) ** 2).mean((1, 2))

    exact, rounded = MetaStep(learner, plain)(episode), MetaStep(learner, plain, autocast="bf16")(episode)
    assert rounded[0].dtype == torch.float32
    assert 0 < gaps(rounded, exact) < 2e-2


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graphs, run by torch's own kernels: generating and building new ones takes seconds."""
    build = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, *, options, **rest: build(step, backend="aot_eager", **rest))


def assert_compiled_equals_eager(learner: Learner) -> None:
    """Two episodes, two shapes, and three sets of weights."""
    step, eager = MetaStep(learner, compile=True), MetaStep(learner)
    before = step(episode_of())
    assert gaps(before, eager(episode_of())) <= 1e-5
    assert gaps(step(episode_of(seed=1)), eager(episode_of(seed=1))) <= 1e-5
    assert gaps(step(episode_of(n_tasks=3, n_shot=2)), eager(episode_of(n_tasks=3, n_shot=2))) <= 1e-5
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.3)
    assert gaps(step(episode_of()), eager(episode_of())) <= 1e-5
    assert gaps(step(episode_of()), before) > 1e-2
    for parameter in learner.parameters():  # weights in new memory, as after `learner.to` or an assigned `.data`
        parameter.data = parameter.data.clone() * 0.5
    assert gaps(step(episode_of()), eager(episode_of())) <= 1e-5
    assert step.is_compiled


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("name", ["ridge", "maml", "banked"])
def test_compiled_equals_eager_and_sees_later_weights(name: str) -> None:
    learner = MAKERS[name]()
    if name == "banked":
        learner.prepare(TASKS, seed=0)
    assert_compiled_equals_eager(learner)


_TWICE = 2.0


class _Shift(Learner[Tensor]):
    """As little as a graph can hold."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(Lines.spec)
        self.factor = factor
        self.shift = nn.Parameter(torch.zeros(()))

    def adapt(self, support: Examples) -> Tensor:
        factor = self.factor if self.training else 5.0
        return support.y.mean(1, keepdim=True) * factor + self.shift * _TWICE

    def predict(self, state: Tensor, x: Tensor) -> Distribution:
        return gaussian(state + 0 * x[..., :1], torch.ones(()))


def test_one_real_graph() -> None:
    learner = _Shift()
    step, eager = MetaStep(learner, compile=True), MetaStep(learner)
    assert gaps(step(episode_of()), eager(episode_of())) <= 1e-5
    with torch.no_grad():
        learner.shift.add_(1.0)
    assert gaps(step(episode_of(seed=1)), eager(episode_of(seed=1))) <= 1e-5
    assert step.is_compiled


@pytest.mark.parametrize("changed", ["attribute", "global", "training"])
def test_what_a_user_changes_between_calls_is_seen(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = _Shift()
    step, episode = MetaStep(learner, compile=True), episode_of()
    before = step(episode)
    if changed == "attribute":
        learner.factor = 3.0
    elif changed == "global":
        monkeypatch.setitem(globals(), "_TWICE", 7.0)
    else:
        learner.eval()
    after = step(episode)
    assert gaps(after, MetaStep(learner)(episode)) <= 1e-5
    assert gaps(after, before) > 1e-2
    assert step.is_compiled


@pytest.mark.parametrize("name", ["ridge", "maml"])
def test_real_graphs_equal_eager_and_see_later_weights(name: str) -> None:
    assert_compiled_equals_eager(MAKERS[name]())


def assert_same_dropout() -> None:
    learner = MAKERS["dropout"]()
    results = []
    for compile in (True, False):
        step = MetaStep(learner, compile=compile)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            results.append(step(episode_of()))
        assert step.is_compiled is compile
    assert gaps(*results) <= 1e-5


@pytest.mark.usefixtures("quick_compiler")
def test_dropout_is_the_same_compiled() -> None:
    assert_same_dropout()


def test_dropout_is_the_same_in_a_real_graph() -> None:
    assert_same_dropout()


@pytest.mark.usefixtures("quick_compiler")
def test_learners_do_not_share_graphs_or_their_limit() -> None:
    for factor in range(9):  # torch stops at 8 graphs for one code object
        learner = _Shift(float(factor))
        step = MetaStep(learner, compile=True)
        assert gaps(step(episode_of()), MetaStep(learner)(episode_of())) <= 1e-5
        assert step.is_compiled


@pytest.mark.usefixtures("quick_compiler")
def test_more_shapes_than_torch_allows() -> None:
    learner = _Shift()
    step = MetaStep(learner, compile=True)
    for n_shot in range(1, 10):
        assert gaps(step(episode_of(n_shot=n_shot)), MetaStep(learner)(episode_of(n_shot=n_shot))) <= 1e-5
    assert step.is_compiled


@pytest.mark.usefixtures("quick_compiler")
def test_hooks_that_come_and_go_later_are_seen() -> None:
    learner, episode = MAKERS["maml"](), episode_of()
    step, eager = MetaStep(learner, compile=True), MetaStep(learner)
    first, second = [module for module in learner.modules() if isinstance(module, nn.Linear)][:2]

    def check() -> None:
        assert gaps(step(episode), eager(episode)) <= 1e-5
        assert step.is_compiled

    check()
    before = eager(episode)
    one = first.register_forward_hook(lambda module, inputs, out: 2 * out)
    check()
    assert gaps(eager(episode), before) > 1e-2
    two = second.register_forward_pre_hook(lambda module, inputs: (3 * inputs[0],))
    check()
    one.remove()
    check()
    two.remove()
    check()
    assert torch._dynamo.config.skip_nnmodule_hook_guards  # which is torch's own


class _Breaking(Ridge):
    """A forward that no graph can hold: it asks Python for a value."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x) * (1.0 if float(x.detach().sum()) > -1e9 else 2.0)


def test_what_cannot_be_compiled_is_served_eagerly_with_one_warning() -> None:
    learner = _Breaking(Lines.spec)
    step = MetaStep(learner, compile=True)
    with pytest.warns(RuntimeWarning, match="_Breaking runs without torch.compile: torch.compile failed") as caught:
        found = step(episode_of())
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert gaps(found, MetaStep(learner)(episode_of())) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(episode_of(seed=1))
    assert not step.is_compiled


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("reason", ["it changes too often", "torch.compile failed: Unsupported"])
def test_a_learner_that_can_no_longer_be_compiled_goes_on_eagerly(reason: str) -> None:
    learner = _Shift()
    step, episode = MetaStep(learner, compile=True), episode_of()
    step(episode)
    limit = 8 if "failed" in reason else 1
    if "failed" in reason:
        learner.register_forward_pre_hook(lambda module, inputs: print(end=""))

    def later() -> None:
        for factor in (2.0, 3.0):
            learner.factor = factor
            with torch._dynamo.config.patch(recompile_limit=limit):
                assert gaps(step(episode), MetaStep(learner)(episode)) <= 1e-5

    with pytest.warns(RuntimeWarning, match=f"_Shift runs without torch.compile: {reason}") as caught:
        later()
    assert len(caught) == 1
    assert not step.is_compiled


@pytest.mark.usefixtures("quick_compiler")
def test_buffers_that_are_bound_anew_are_seen_and_put_back() -> None:
    learner, eager = make_averaging(), make_averaging()
    step = MetaStep(learner, compile=True)
    with pytest.warns(RuntimeWarning, match=r"changes its buffers \['mean'\]"):
        found = step(episode_of())
    assert gaps(found, MetaStep(eager)(episode_of())) == 0
    assert torch.equal(learner.mean, eager.mean)


@pytest.mark.usefixtures("quick_compiler")
def test_changing_buffers_are_not_compiled() -> None:
    learner, eager = make_normalized(), make_normalized()
    step = MetaStep(learner, compile=True)
    with pytest.warns(RuntimeWarning, match=r"changes its buffers \['encoder.1.running_mean', "):
        found = step(episode_of())
    assert gaps(found, MetaStep(eager)(episode_of())) == 0
    for buffer, expected in zip(learner.buffers(), eager.buffers(), strict=True):
        assert torch.equal(buffer, expected)


@pytest.mark.parametrize("wrong", ["losses", "weights"])
def test_a_wrong_graph_is_caught(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make_ridge()

    def compiler(step: object, device: torch.device) -> object:
        fixed = {f"learner.{name}": value.detach().clone() for name, value in learner.named_parameters()}

        def graph(trainable: dict[str, Tensor], rest: dict[str, Tensor], episode: Episode) -> object:
            losses, gradients = step(fixed if wrong == "weights" else trainable, rest, episode)
            return (losses + 0.01 if wrong == "losses" else losses), gradients

        return graph

    monkeypatch.setattr("metaicl.meta_step.compile_step", compiler)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    step = MetaStep(learner, compile=True)
    place = "moved" if wrong == "weights" else "current"
    with pytest.warns(RuntimeWarning, match=f"at the {place} weights the compiled step differs from the eager one"):
        found = step(episode_of())
    assert gaps(found, MetaStep(learner)(episode_of())) == 0
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())


def test_own_meta_gradients_are_not_compiled() -> None:
    with pytest.warns(
        RuntimeWarning, match="TinyReptile runs without torch.compile: it computes its own meta-gradients"
    ):
        step = MetaStep(make_reptile(), compile=True)
    assert step(episode_of())[0].shape == ()


def test_a_failing_learner_fails_as_without_compile() -> None:
    learner = make_ridge()
    learner.encoder = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        MetaStep(learner, compile=True)(episode_of())
