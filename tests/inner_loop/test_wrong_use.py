"""Wrong use of gradient learners is named at construction or at the first step, or does no harm."""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaicl.episode import Examples
from metaicl.inner_loop import SGD, Adam, Rate, check_inner_loop_module, select_parameters
from metaicl.learners.gradient.amortized_bayes import AmortizedBayes, Posterior
from metaicl.learners.gradient.cavia import CAVIA
from metaicl.learners.gradient.es_maml import ESMAML
from metaicl.learners.gradient.imaml import IMAML
from metaicl.learners.gradient.kfo import KFO
from metaicl.learners.gradient.maml import MAML, HoldsMAML
from metaicl.learners.gradient.maml_plus_plus import MAMLPlusPlus
from metaicl.learners.gradient.meta_curvature import MetaCurvature
from metaicl.learners.gradient.meta_sgd import MetaSGD
from metaicl.learners.gradient.proto_maml import ProtoMAML
from metaicl.learners.gradient.reptile import Reptile
from metaicl.meta_step import MetaStep
from metaicl.native import without_kernels
from metaicl.task import EpisodeStream
from metaicl.tasks.functions import Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.training import outer_loop

TASKS = GaussianClasses(n_way=3, dim=4)
LEARNERS = {
    learner.__name__: learner
    for learner in (
        MAML, MAMLPlusPlus, MetaSGD, MetaCurvature, KFO, IMAML, CAVIA, Reptile, ProtoMAML, ESMAML, AmortizedBayes
    )
}  # fmt: skip
WITHOUT_DERIVATIVES = ("Reptile", "ESMAML")
SECOND_ORDER = [name for name in LEARNERS if name not in WITHOUT_DERIVATIVES]
FIRST_ORDER = {"MAMLPlusPlus": {"first_order_until": 1.0}}  # how to say it; first_order=True elsewhere

every_learner = pytest.mark.parametrize("name", LEARNERS)


class Net(nn.Module):
    """A linear net that takes a context or none, so that every learner can have it."""

    def __init__(self, *, middle=None, spare=False):
        super().__init__()
        self.body, self.middle, self.head = nn.Linear(4, 4), middle or nn.Tanh(), nn.Linear(4, 3)
        if spare:
            self.spare = nn.Linear(4, 3)

    def forward(self, x, context=None):
        return self.head(self.middle(self.body(x if context is None else x + context[:4])))


class Counting(nn.Module):
    """Writes into a buffer of its own, in no way that torch has a name for."""

    mean: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return x - self.mean


class Distances(nn.Module):
    """Torch has no second derivative of these distances."""

    def __init__(self):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.cdist(x, self.centers, p=1.0)


def make(name, net=None, **settings) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nets = {} if net is None else {"encoder" if name == "ProtoMAML" else "net": net()}
        if name == "ProtoMAML":
            settings = {"first_order": False, **settings}
        return LEARNERS[name](TASKS.spec, **nets, **settings).double()


def net_of(learner: Any) -> tuple[Any, str]:
    """The net that adapts, and the prefix of its parameters' names."""
    if isinstance(learner, ProtoMAML):
        return learner.encoder, "encoder."
    inside = isinstance(learner, HoldsMAML)
    return (learner.maml.net, "maml.net.") if inside else (learner.net, "net.")


def adapted(learner: Any, support: Examples) -> dict[str, Tensor]:
    """What adapts, by name, with leading axis B; weights that the learner keeps as factors are formed."""
    state = learner.adapt(support)
    if isinstance(learner, CAVIA):
        return {"context": state}
    found = state.weights if isinstance(state, Posterior) else state
    start = dict(net_of(learner)[0].named_parameters())
    return {n: value if isinstance(value, Tensor) else start[n] + value.product() for n, value in found.items()}


def episode():
    stream = EpisodeStream(TASKS, seed=0, split="train", n_shot=2, n_query=2, chunk_size=3)
    return stream[0].to(dtype=torch.float64)


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, "0.1", True], ids=repr)
@every_learner
def test_step_size(name, value):
    with pytest.raises(ValueError, match=r"(inner_lr|lr|Rate\.value) must be a finite number.* got"):
        make(name, inner_lr=value)


@pytest.mark.parametrize(
    ("value", "kind"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), ("2", TypeError)]
)
@every_learner
def test_inner_steps(name, value, kind):
    if value == 0 and name in ("ProtoMAML", "AmortizedBayes"):  # there a start without a step is an answer
        assert torch.isfinite(MetaStep(make(name, inner_steps=0))(episode())[0]).all()
        return
    with pytest.raises(kind, match=r"inner_steps must be an int >= [01]; got"):
        make(name, inner_steps=value)


@pytest.mark.parametrize("optimizer", [SGD, Adam])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, Rate(-0.1), Rate(0.0, "tensor")])
def test_step_size_of_an_optimizer(optimizer, value):
    with pytest.raises(ValueError, match=r"lr must be a finite number > 0; got"):
        optimizer(value)


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "ProtoMAML"])  # which serves no regression
def test_a_step_size_that_diverges_stops_training_before_the_update(name):
    learner = LEARNERS[name](Sinusoid().spec, inner_lr=1e9, inner_steps=8)
    before = [value.clone() for value in learner.parameters()]
    steps = outer_loop(learner, Sinusoid(), torch.optim.SGD(learner.parameters(), lr=0.1), steps=1, meta_batch_size=2)
    trace = r"inner loss before each step was \d.*(nan|inf).*inner loop diverges: lower its step size \(inner_lr\)"
    with pytest.raises(FloatingPointError, match=rf"loss of task 0 is (nan|inf).*{trace}.*Replay it with"):
        next(steps)
    assert all(torch.equal(value, start) for value, start in zip(learner.parameters(), before, strict=True))


@every_learner
def test_a_parameter_that_the_net_never_uses_is_named_or_stays_as_it_is(name):
    named = {}
    if name != "CAVIA":  # whose net does not adapt
        with pytest.raises(
            ValueError, match=r"Net never uses 2 of the 6 parameters .*\['spare\.bias', 'spare\.weight'\]"
        ):
            make(name, net=partial(Net, spare=True))
        named = {"adapt": "*"}
    learner = make(name, net=partial(Net, spare=True), **named)
    net, prefix = net_of(learner)
    fast = adapted(learner, episode().support)
    _, gradients = MetaStep(learner)(episode())
    for key in ("spare.weight", "spare.bias"):
        start = net.get_parameter(key)
        if name != "CAVIA":
            assert torch.equal(fast[key], start.expand_as(fast[key]))
            assert not torch.equal(fast["head.weight"], net.head.weight.expand_as(fast["head.weight"]))
        if name == "Reptile":
            assert float(gradients[prefix + key].abs().max()) <= 1e-16  # start minus a mean of equal numbers
        elif name != "ESMAML":  # which estimates, and sees noise where there is nothing
            assert torch.equal(gradients[prefix + key], torch.zeros_like(start))
    assert float(gradients[prefix + "head.weight"].abs().max()) > 1e-3


class Late(Net):
    """Makes its head when it is called."""

    def __init__(self):
        super().__init__()
        del self.head

    def forward(self, x, context=None):
        if not hasattr(self, "head"):
            self.head = nn.Linear(4, 3)
        return super().forward(x, context)


@pytest.mark.parametrize("adapt", [None, "*"])
@pytest.mark.parametrize("name", ["MAML", "MAMLPlusPlus", "IMAML", "Reptile", "AmortizedBayes"])
def test_parameters_made_by_the_first_call_are_named(name, adapt):
    with pytest.raises(
        ValueError, match=r"Late makes parameters.*'head\.weight', 'head\.bias'.*call it once on a batch of rows before"
    ):
        make(name, net=Late, adapt=adapt)
    called = Late()
    called(torch.zeros(2, 4))
    assert "head.weight" in make(name, net=lambda: called, adapt=adapt).adapted


@pytest.mark.parametrize("dtype", [torch.float32, torch.long])  # whole numbers are no labels in regression
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "ProtoMAML"])
def test_targets_without_their_axis_are_refused(name, kernels, dtype):
    learner, x = LEARNERS[name](Sinusoid().spec), torch.randn(2, 5, 1)
    with (
        nullcontext() if kernels else without_kernels(),
        pytest.raises(ValueError, match=r"targets of 5 rows must be \(5, 1\).*got \(5,\); give them an axis y_dim"),
    ):
        learner.adapt(Examples(x, x[..., 0].to(dtype)))


@every_learner
def test_frozen_parameters_do_not_adapt_and_get_no_gradient(name):
    learner = make(name, net=lambda: Net())
    half_frozen = make(name, net=lambda: _freeze(Net(), "body"))
    net, prefix = net_of(half_frozen)
    assert not any(key.startswith("body") for key in adapted(half_frozen, episode().support))
    _, gradients = MetaStep(half_frozen)(episode())
    assert not any(key.startswith(f"{prefix}body") for key in gradients)
    assert set(gradients) < set(MetaStep(learner)(episode())[1])
    assert not net.body.weight.requires_grad


def _freeze(net: nn.Module, part: str) -> nn.Module:
    net.get_submodule(part).requires_grad_(False)
    return net


def test_a_pattern_for_frozen_parameters_says_so():
    net = _freeze(Net(), "body")
    with pytest.raises(ValueError, match=r"'body\.\*' matches frozen parameters only, such as \['body\.weight', 'b"):
        MAML(TASKS.spec, net=net, adapt="body.*")
    assert select_parameters(net, "*.weight") == {"head.weight"}
    with pytest.raises(ValueError, match=r"'boody\.\*' matches no parameter; there are 2"):
        select_parameters(net, "boody.*")
    with pytest.raises(ValueError, match="Net has no trainable parameters to adapt"):
        MAML(TASKS.spec, net=net.requires_grad_(False))


def test_word_vectors_alone_have_to_be_named():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2).requires_grad_(False))
    with pytest.raises(ValueError, match=r"Sequential has only word vectors to adapt.*\['0\.weight'\]"):
        select_parameters(net, None)
    assert select_parameters(net, "0.weight") == {"0.weight"}


@every_learner
def test_running_statistics_are_refused_by_the_names_of_their_layers(name):
    with pytest.raises(ValueError, match=r"running statistics; Net tracks them in \['middle'\].*GroupNorm or LayerN"):
        make(name, net=lambda: Net(middle=nn.BatchNorm1d(4)))


@every_learner
def test_other_running_statistics_are_an_error_and_never_written(name):
    learner = make(name, net=lambda: Net(middle=Counting()))
    mean = net_of(learner)[0].middle.mean
    before = mean.clone()  # construction may have tried the net
    with pytest.raises(RuntimeError, match=r"in-?place|broadcast shape"):
        MetaStep(learner)(episode())
    assert torch.equal(mean, before)


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_an_operator_without_a_second_derivative_is_named(name):
    learner = make(name, net=lambda: Net(middle=Distances()))
    with pytest.raises(RuntimeError, match=r"(?s)_cdist_backward.*second derivative.*first_order=True"):
        MetaStep(learner)(episode())


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "IMAML"])
def test_first_order_needs_no_second_derivative(name):
    settings = {} if name in WITHOUT_DERIVATIVES else FIRST_ORDER.get(name, {"first_order": True})
    learner = make(name, net=lambda: Net(middle=Distances()), **settings)
    if name == "MAMLPlusPlus":
        learner.at(0.0)
    _, gradients = MetaStep(learner)(episode())
    assert all(torch.isfinite(value).all() for value in gradients.values())
    assert max(float(value.abs().max()) for value in gradients.values()) > 1e-3


class Once(torch.autograd.Function):
    """The sine, whose derivative must not be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent):
        return cotangent * ctx.saved_tensors[0].cos()


class Sine(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.xfail(strict=True, reason="torch.func ignores once_differentiable: no error, and a wrong meta-gradient")
def test_a_function_that_is_differentiable_once_is_refused_or_right():
    exact, once = (MetaStep(make("MAML", net=lambda f=f: Net(middle=Sine(f)))) for f in (torch.sin, Once.apply))
    expected = exact(episode())[1]
    try:
        found = once(episode())[1]
    except RuntimeError:
        return
    assert max(float((found[key] - value).abs().max()) for key, value in expected.items()) < 1e-12


@every_learner
def test_float16_is_refused_with_a_way_out(name):
    with pytest.raises(ValueError, match=r"float16.*\['body\.weight', .*in float32 \(\.float\(\)\).*autocast=\"bf16\""):
        make(name, net=lambda: Net().half())


@every_learner
def test_float16_after_construction_is_refused_at_the_first_step(name):
    learner = make(name).half()
    with pytest.raises(ValueError, match=r"cannot run in float16.*in float32 \(\.float\(\)\).*autocast=\"bf16\""):
        MetaStep(learner)(episode().to(dtype=torch.float16))
    assert torch.isfinite(MetaStep(learner.float())(episode().to(dtype=torch.float32))[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_other_precisions_are_welcome(dtype):
    check_inner_loop_module(Net().to(dtype))


DROPS = [name for name in LEARNERS if name != "IMAML"]


@pytest.mark.parametrize("name", DROPS)
def test_dropout_differs_between_tasks_and_follows_torchs_generator(name):
    learner = make(name, net=lambda: Net(middle=nn.Dropout(0.5))).train()
    support = episode().support[torch.tensor([0, 0, 0])]  # three times the same task

    def seeded(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return adapted(learner, support)["context" if name == "CAVIA" else "head.weight"].detach()

    first, again, other = seeded(1), seeded(1), seeded(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert min(float((first[i] - first[j]).abs().max()) for i, j in ((0, 1), (1, 2))) > 1e-6
    learner.eval()
    assert torch.equal(seeded(1)[0], seeded(2)[1])


@pytest.mark.parametrize("name", DROPS)
def test_training_with_dropout_follows_the_training_seed_alone(name):
    def trained(seed, outside):
        learner = make(name, net=lambda: Net(middle=nn.Dropout(0.5)))
        torch.manual_seed(outside)
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        steps = outer_loop(learner, TASKS, optimizer, steps=2, meta_batch_size=2, n_shot=1, n_query=2, seed=seed)
        assert all(math.isfinite(step.loss) for step in steps)
        return torch.cat([value.detach().flatten() for value in learner.parameters()])

    with torch.random.fork_rng():
        first = trained(3, outside=0)
        assert torch.equal(first, trained(3, outside=1))
        assert not torch.equal(first, trained(4, outside=0))


def test_dropout_leaves_nothing_to_minimize_for_an_implicit_gradient():
    with pytest.raises(ValueError, match=r"dropout in \['middle'\]. Set its p to 0, or use MAML"):
        make("IMAML", net=lambda: Net(middle=nn.Dropout(0.5)))
