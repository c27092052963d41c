"""The learners on the engine in float64: finite differences, higher, learn2learn, loops over tasks."""

from functools import partial

import pytest
import torch
from torch import nn

from metaicl.episode import Episode, Examples
from metaicl.inner_loop.adaptive import Adam, RMSprop
from metaicl.inner_loop.optimizers import SGD
from metaicl.inner_loop.parameters import dotless
from metaicl.inner_loop.rates import Rate
from metaicl.inner_loop.solvers import ConjugateGradient
from metaicl.interop.higher import HigherMAML
from metaicl.interop.learn2learn import L2LGBML, L2LMetaSGD, import_learn2learn
from metaicl.learners.gradient.amortized_bayes import AmortizedBayes
from metaicl.learners.gradient.cavia import CAVIA
from metaicl.learners.gradient.imaml import IMAML
from metaicl.learners.gradient.kfo import KFO
from metaicl.learners.gradient.maml import MAML
from metaicl.learners.gradient.maml_plus_plus import MAMLPlusPlus
from metaicl.learners.gradient.meta_curvature import MetaCurvature
from metaicl.learners.gradient.meta_sgd import MetaSGD
from metaicl.learners.gradient.proto_maml import ProtoMAML
from metaicl.meta_step import MetaStep, accumulate
from metaicl.nets.backbones import Conv4, EncoderWithHead
from metaicl.nets.norm import BatchStatNorm
from metaicl.objectives import query_loss
from metaicl.spec import TaskSpec
from metaicl.task import derive_generator
from metaicl.tasks.functions import Sinusoid
from metaicl.tasks.gaussians import GaussianClasses

WAVES = Sinusoid().spec
POINTS = GaussianClasses(n_way=2, dim=2)
IMAGES = TaskSpec("classification", (1, 8, 8), "image", n_way=2)


def waves():
    generator = derive_generator("waves")
    return Sinusoid().sample(3, split="train", n_shot=4, n_query=5, generator=generator).to(dtype=torch.float64)


def points():
    generator = derive_generator("points")
    return POINTS.sample(3, split="train", n_shot=2, n_query=3, generator=generator).to(dtype=torch.float64)


def pictures():
    generator = derive_generator("pictures")

    def rows(per_class):
        y = torch.arange(2).repeat_interleave(per_class).expand(2, -1).clone()
        return Examples(torch.rand(2, 2 * per_class, 1, 8, 8, generator=generator, dtype=torch.float64), y)

    return Episode(rows(2), rows(2))


def sequence(x):
    """Four shifted copies of each row: (rows, 4, features)."""
    return x[:, None] + torch.arange(4.0, dtype=x.dtype)[:, None]


class Transformer(nn.Module):
    def __init__(self, n_in=1, n_out=1):
        super().__init__()
        self.embed, self.head = nn.Linear(n_in, 8), nn.Linear(8, n_out)
        self.mix = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0, activation="gelu")

    def forward(self, x):
        return self.head(self.mix(self.embed(sequence(x))).mean(1))


class Recurrent(nn.Module):
    def __init__(self, n_in=1, n_out=1):
        super().__init__()
        self.cells, self.head = nn.LSTM(n_in, 5, batch_first=True), nn.Linear(5, n_out)

    def forward(self, x):
        return self.head(self.cells(sequence(x))[0][:, -1])


class Contextual(nn.Module):
    """Any net, with a context of two numbers that scales and shifts its inputs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, context):
        return self.net(x * (1 + context[0]) + context[1])


def mlp(n_in=1, n_out=1):
    return nn.Sequential(nn.Linear(n_in, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, n_out))


def conv():
    # One group: pooling leaves one place, and of a group of two channels there nothing is left but signs.
    net = EncoderWithHead(Conv4(1, channels=4, norm=lambda channels: nn.GroupNorm(1, channels)), IMAGES)
    net.head.reset_parameters()  # a head of zeros hides the encoder
    return net


CASES = {
    "mlp": (WAVES, mlp, waves),
    "conv4": (IMAGES, conv, pictures),
    "transformer": (WAVES, Transformer, waves),
    "lstm": (WAVES, Recurrent, waves),
}
ENCODERS = {
    "mlp": (POINTS.spec, lambda: mlp(2, 4), points),
    "conv4": (IMAGES, lambda: conv().encoder, pictures),
    "transformer": (POINTS.spec, lambda: Transformer(2, 4), points),
    "lstm": (POINTS.spec, lambda: Recurrent(2, 4), points),
}
FAMILY = {
    "MAML": partial(MAML, inner_lr=0.1),
    "MAML by Adam": partial(MAML, optimizer=Adam(Rate(0.02, "tensor"), eps=1e-3)),
    "MAML by Nesterov": partial(MAML, optimizer=SGD(0.05, momentum=Rate(0.5, "all"), nesterov=True, clip_norm=1.0)),
    "MetaSGD": partial(MetaSGD, inner_lr=0.1),
    "MetaCurvature": partial(MetaCurvature, inner_lr=0.1),
    "KFO": partial(KFO, inner_lr=0.1),
    "MAMLPlusPlus": partial(MAMLPlusPlus, inner_lr=0.1),
}


def cavia(spec, *, net, **settings):
    return CAVIA(spec, net=Contextual(net), context_size=2, **settings)


def proto_maml(spec, *, net, **settings):
    return ProtoMAML(spec, encoder=net, first_order=False, **settings)


EXACT = {
    **FAMILY,
    "MAML of biases": partial(MAML, inner_lr=0.1, adapt="*bias"),
    "CAVIA": partial(cavia, inner_lr=0.1),
    "ProtoMAML": partial(proto_maml, inner_lr=0.1),
    "AmortizedBayes": partial(AmortizedBayes, inner_lr=0.05, prior_scale=0.1, n_predictions=3),
}
QUICK = {("MAML", "transformer", 1), ("MAML", "lstm", 1), ("MAML", "lstm", 3), ("MAML", "lstm", 5)}


def is_quick(name, case, steps):
    if case == "mlp":
        return steps < 5 or name in ("MAML", "CAVIA", "ProtoMAML")
    return (case == "conv4" and steps == 1 and name in FAMILY) or (name, case, steps) in QUICK


ALL = [
    pytest.param(
        case, make, steps, id=f"{name}-{case}-{steps}", marks=[] if is_quick(name, case, steps) else pytest.mark.slow
    )
    for name, make in EXACT.items()
    for case in CASES
    for steps in (1, 3, 5)
]


def build(case, make, **settings):
    spec, net, episode = (ENCODERS if getattr(make, "func", make) is proto_maml else CASES)[case]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learner = make(spec, net=net(), **settings).double()
        with torch.no_grad():
            for value in learner.parameters():  # away from identities and equal rates
                value += 0.01 * torch.randn_like(value)
    return learner, episode()


def meta_gradient(learner, episode):
    parameters = dict(learner.named_parameters())
    found = torch.autograd.grad(
        query_loss(learner, episode).sum(), list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, found, strict=True))


def check_differences(learner, episode):
    gradients = meta_gradient(learner, episode)
    size = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        place = int(gradient.abs().argmax())
        expected = float(gradient.reshape(-1)[place])
        for stride in (1e-6, 1e-7):  # the shorter one where a kink of ReLU or pooling lies within the first
            slope = difference(learner, episode, name, place, stride)
            agrees = abs(slope - expected) <= 1e-5 * abs(slope) + 1e-8 * size
            if agrees:
                break
        assert agrees, (name, slope, expected)


def difference(learner, episode, name, place, stride):
    flat, values = learner.get_parameter(name).view(-1), []
    with torch.no_grad():
        start = float(flat[place])
        for shift in (stride, -stride):
            flat[place] = start + shift
            values.append(float(query_loss(learner, episode).sum()))
        flat[place] = start
    return (values[0] - values[1]) / (2 * stride)


@pytest.mark.parametrize(("case", "make", "steps"), ALL)
def test_equals_finite_differences(case, make, steps):
    learner, episode = build(case, make, inner_steps=steps)
    check_differences(learner.eval(), episode)  # in eval mode nothing is drawn anew


@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_normalization_of_each_step_equals_finite_differences(steps):
    """After convolutions without a bias, which batch statistics would take off again."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), BatchStatNorm(4), nn.Tanh(), nn.Conv2d(4, 4, 3, bias=False),
            BatchStatNorm(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2),
        )  # fmt: skip
        learner = MAMLPlusPlus(IMAGES, net=net, inner_lr=0.1, inner_steps=steps).double()
    assert len(learner.norms) == 4
    check_differences(learner.eval(), pictures())


@pytest.mark.parametrize("case", ["mlp", "conv4"])
def test_multi_step_loss_equals_finite_differences(case):
    learner, episode = build(case, FAMILY["MAMLPlusPlus"], inner_steps=3, first_order_until=0.0)
    learner.train().at(0.05)
    assert 0 < float(learner.step_weights[0]) < 1 / 3
    check_differences(learner, episode)


@pytest.mark.parametrize(
    "case", ["mlp", *(pytest.param(case, marks=pytest.mark.slow) for case in ("conv4", "transformer", "lstm"))]
)
def test_implicit_gradient_equals_finite_differences_at_the_solution(case):
    """Differences see the minimizer only where the inner loop has found it; Conv4 bends more and needs more pull."""
    lr, proximal = (0.0015, 500.0) if case == "conv4" else (0.02, 20.0)
    learner, episode = build(
        case, partial(IMAML, inner_lr=lr), inner_steps=120, proximal=proximal, solver=ConjugateGradient(25)
    )
    check_differences(learner, episode)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
         lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
        # higher adds eps before the correction of the bias: the two rules agree where eps does not matter
        (Adam(0.02, eps=1e-18), lambda p: torch.optim.Adam(p, lr=0.02, eps=1e-18)),
        (RMSprop(0.02, momentum=0.5, eps=1e-3), lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.5, eps=1e-3)),
    ],
    ids=["sgd", "adam", "rmsprop"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Differentiable RMSprop")
def test_each_optimizer_equals_higher(ours, theirs, steps):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = mlp().double()
    learner = MAML(WAVES, net=net, optimizer=ours, inner_steps=steps).double()
    higher = HigherMAML(WAVES, net=net, optimizer=theirs, inner_steps=steps).double()
    check_same(meta_gradient(learner, waves()), meta_gradient(higher, waves()), names={"net": "_net"})


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("case", ["mlp", "conv4"])
def test_meta_sgd_equals_learn2learn(case, steps):
    ours, episode = build(case, MetaSGD, inner_lr=0.1, inner_steps=steps)
    theirs = L2LMetaSGD(ours.spec, net=ours.maml.net, inner_lr=0.1, inner_steps=steps).double()
    rates, names = ours.maml.optimizer.learned["lr"].values, [name for name, _ in ours.maml.net.named_parameters()]
    with torch.no_grad():
        for lr, name in zip(theirs.algorithm.lrs, names, strict=True):
            lr.copy_(rates[dotless(name)])
    if ours.spec.kind == "regression":
        theirs.raw_scale.data.copy_(ours.maml.raw_scale.data)
    found, expected = meta_gradient(ours, episode), meta_gradient(theirs, episode)
    for name in dict(ours.maml.net.named_parameters()):
        assert_close(found[f"maml.net.{name}"], expected[f"algorithm.module.{name}"])
    for i, name in enumerate(names):
        key = dotless(name)
        assert_close(found[f"maml.optimizer.learned.lr.values.{key}"], expected[f"algorithm.lrs.{i}"])


@pytest.mark.parametrize("steps", [1, 3])
def test_meta_curvature_equals_learn2learn(steps):
    ours, episode = build("mlp", MetaCurvature, inner_lr=0.1, inner_steps=steps)
    theirs = L2LGBML(
        ours.spec, net=ours.maml.net, inner_lr=0.1, inner_steps=steps,
        transform=import_learn2learn().optim.MetaCurvatureTransform,
    ).double()  # fmt: skip
    factors = ours.maml.optimizer.precondition.factors.values()
    transforms = theirs.algorithm.compute_update.transforms_modules
    with torch.no_grad():
        theirs.raw_scale.copy_(ours.maml.raw_scale)
        for mine, other in zip(factors, transforms, strict=True):
            if len(mine) == 1:
                other.mc.copy_(mine[0])
            else:  # they multiply by the second matrix itself, the paper by its transpose
                other.mc_in.copy_(mine[0])
                other.mc_out.copy_(mine[1].T)
    found, expected = meta_gradient(ours, episode), meta_gradient(theirs, episode)
    for name in dict(ours.maml.net.named_parameters()):
        assert_close(found[f"maml.net.{name}"], expected[f"algorithm.module.{name}"])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("case", ["mlp", "conv4"])
def test_kfo_equals_learn2learn(case, steps):
    ours, episode = build(case, KFO, inner_lr=0.1, inner_steps=steps)
    theirs = L2LGBML(ours.spec, net=ours.maml.net, inner_lr=0.1, inner_steps=steps).double()
    factors = ours.maml.optimizer.precondition.factors
    with torch.no_grad():
        for mine, other in zip(factors.values(), theirs.algorithm.compute_update.transforms_modules, strict=True):
            other.transform.left.copy_(mine[0])
            other.transform.right.copy_(mine[1])
        if ours.spec.kind == "regression":
            theirs.raw_scale.copy_(ours.maml.raw_scale)
    found, expected = meta_gradient(ours, episode), meta_gradient(theirs, episode)
    for place, name in enumerate(dict(ours.maml.net.named_parameters())):
        assert_close(found[f"maml.net.{name}"], expected[f"algorithm.module.{name}"])
        for i, side in enumerate(("left", "right")):
            assert_close(
                found[f"maml.optimizer.precondition.factors.{dotless(name)}.{i}"],
                expected[f"algorithm.compute_update.transforms_modules.{place}.transform.{side}"],
            )


LEARNED = {
    "CAVIA": (cavia, Adam(Rate(0.1, "tensor", per_step=True), eps=Rate(1e-2, "all"))),
    "ProtoMAML": (proto_maml, SGD(Rate(0.1, "tensor"), momentum=Rate(0.5, "all"), clip_norm=1.0)),
    "AmortizedBayes": (
        partial(AmortizedBayes, prior_scale=0.1, n_predictions=3), SGD(Rate(0.05, "element"), momentum=0.5)
    ),
    "MAMLPlusPlus": (MAMLPlusPlus, Adam(Rate(0.02, "tensor", per_step=True), eps=1e-2)),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNED)
def test_any_optimizer_is_learned_and_recomputed_exactly(name):
    make, optimizer = LEARNED[name]
    learner, episode = build("mlp", make, inner_steps=3, optimizer=optimizer)
    check_differences(learner.eval(), episode)
    expected = meta_gradient(learner, episode)
    assert all(float(value.abs().max()) > 0 for key, value in expected.items() if "learned" in key)
    learner.checkpoint = 2
    for key, value in meta_gradient(learner, episode).items():
        assert_close(value, expected[key])


EVERY = {**EXACT, "IMAML": partial(IMAML, inner_lr=0.1)}


@pytest.mark.parametrize("case", ["mlp", "conv4"])
@pytest.mark.parametrize("name", EVERY)
def test_a_meta_batch_is_a_loop_is_micro_batches(name, case):
    learner, episode = build(case, EVERY[name], inner_steps=2)
    learner.eval()  # in eval mode nothing is drawn anew
    together = meta_gradient(learner, episode)
    alone = [meta_gradient(learner, task) for task in episode]
    step = MetaStep(learner)
    whole, pieces = accumulate(step, episode)[1], accumulate(step, episode, 1)[1]
    for key, value in together.items():
        assert_close(value, sum(gradients[key] for gradients in alone))
        assert_close(whole[key], pieces[key])


def check_same(found, expected, names):
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-2
    renamed = {
        f"{names.get(name.split('.')[0], name.split('.')[0])}{name[len(name.split('.')[0]) :]}": value
        for name, value in found.items()
    }
    assert set(renamed) == set(expected)
    for name, value in expected.items():
        assert_close(renamed[name], value)


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-12 * max(1.0, float(expected.abs().max()))
