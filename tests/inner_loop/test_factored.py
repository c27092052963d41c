"""Fast weights that are never formed equal formed ones, in value and in every derivative."""

import pytest
import torch
import torch.nn.functional as F
from gradient_helpers import CLASSES, SINES, draw, meta_gradient, seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from metaicl.episode import Examples
from metaicl.inner_loop import SGD, Adam, Rate
from metaicl.inner_loop.factored import Factors, LinearLayers
from metaicl.inner_loop.unrolling import unroll_path
from metaicl.learners import MAML, MAMLPlusPlus
from metaicl.learners.gradient.shared import linear_layers
from metaicl.meta_step import MetaStep
from metaicl.native.library import without_kernels
from metaicl.nets.backbones import MLP
from metaicl.spec import TaskSpec


class Attention(nn.Module):
    """Rows of 4 numbers as tokens: linear layers inside and outside of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 12)
        self.block = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(x[..., None])).mean(-2))


class Recurrence(nn.Module):
    """One linear layer used once per number."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(13, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x.new_zeros(len(x), 12)
        for value in x.unbind(-1):
            hidden = torch.tanh(self.cell(torch.cat([hidden, value[:, None]], -1)))
        return self.head(hidden)


class Tied(nn.Module):
    """A weight that is also read in another way, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.tied(self.free(x))), self.tied.weight[:3])


NETS = {"mlp": lambda: MLP([4, 16, 16, 3], activation=nn.Tanh), "attention": Attention, "recurrence": Recurrence}
OPTIONS = {
    "1 step": {},
    "3 steps": {"inner_steps": 3},
    "first order": {"inner_steps": 3, "first_order": True},
    "truncated": {"inner_steps": 3, "truncate": 1},
    "checkpointed": {"inner_steps": 3, "checkpoint": 2},
    "learned rates": {"inner_steps": 3, "optimizer": SGD(Rate(0.3, "tensor", per_step=True))},
    "some layers": {"inner_steps": 2, "adapt": ["*.weight"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_equals_formed_weights(net, options) -> None:
    episode = draw(CLASSES)
    formed, factored = (seeded(lambda f=f: MAML(CLASSES.spec, net=net(), factored=f, **options)) for f in (False, True))
    state = factored.adapt(episode.support)
    assert any(isinstance(value, Factors) for value in state.values())
    expected, found = formed(episode.support, episode.query.x).logits, factored.predict(state, episode.query.x).logits
    assert float((expected - found).detach().abs().max()) <= 1e-12
    expected, found = meta_gradient(formed, episode), meta_gradient(factored, episode)
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= 1e-12 * scale, name


def test_masked_rows_do_not_count() -> None:
    episode = draw(SINES)
    factored = seeded(lambda: MAML(SINES.spec, inner_steps=2, factored=True))
    padded = episode.support.pad(episode.support.n_rows + 3)
    expected, found = (factored(support, episode.query.x).mean for support in (episode.support, padded))
    assert float((expected - found).detach().abs().max()) <= 1e-12


def test_the_factors_multiply_out_to_the_formed_weights() -> None:
    support = draw(SINES).support
    formed, factored = (seeded(lambda f=f: MAML(SINES.spec, inner_steps=2, factored=f)) for f in (False, True))
    starts = dict(factored.net.named_parameters())
    for name, value in factored.adapt(support).items():
        whole = starts[name] + value.product() if isinstance(value, Factors) else value
        assert float((whole - formed.adapt(support)[name]).detach().abs().max()) <= 1e-13, name


def test_layers_are_factored_where_that_is_cheaper() -> None:
    wide = MAML(SINES.spec, net=MLP([1, 256, 256, 1]))
    narrow = MAML(SINES.spec)
    assert wide.layers is not None
    assert narrow.layers is not None
    assert list(wide.layers.choose(rows=10, steps=1)) == list(wide.layers.choose(rows=10, steps=5)) == ["2.weight"]
    assert not wide.layers.choose(rows=100, steps=5)
    assert not narrow.layers.choose(rows=10, steps=5)


class _Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return out


@pytest.mark.parametrize("factored", [None, False])
def test_no_tensor_has_the_size_of_a_weight_per_task(factored: bool | None) -> None:
    n_tasks, width = 6, 128
    episode = draw(SINES, n_tasks=n_tasks)
    learner = seeded(lambda: MAML(SINES.spec, net=MLP([1, width, width, 1]), factored=factored))
    with _Largest() as largest:
        meta_gradient(learner, episode)
    assert (largest.numel < n_tasks * width * width) is (factored is None)


def test_a_weight_that_is_used_otherwise_is_formed() -> None:
    net = Tied()
    layers = LinearLayers(net, (4,), integers=False, adapted=["free.weight", "tied.weight"])
    assert layers.names == ["free.weight"]


def test_looking_changes_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    LinearLayers(net, (4,), integers=False, adapted=["0.weight"])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_net_that_refuses_zeros_is_served_with_formed_weights() -> None:
    class Picky(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not x.any():
                raise ValueError("no zeros here")
            return super().forward(x)

    assert MAML(SINES.spec, net=Picky(1, 1)).layers is None
    with pytest.raises(ValueError, match="no zeros here"):
        MAML(SINES.spec, net=Picky(1, 1), factored=True)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="factored=True needs gradient descent without momentum"):
        MAML(SINES.spec, optimizer=Adam(0.01), factored=True)
    with pytest.raises(ValueError, match="factored=True found no linear layer of Conv2d"):
        linear_layers(nn.Conv2d(4, 3, 1), TaskSpec("classification", (4, 1, 1), "image", n_way=3), [], SGD(0.1), True)
    assert MAML(SINES.spec, optimizer=SGD(0.01, momentum=0.9)).layers is None
    weight, data = {"weight": torch.zeros(1, 1)}, (torch.zeros(2, 3, 1),)
    with pytest.raises(ValueError, match="layers need an optimizer that takes factors, got Adam"):
        unroll_path(lambda w, x: x.sum(), weight, data, steps=1, optimizer=Adam(0.01), layers={"weight": [(3, 1)]})


def test_several_steps_of_maml_plus_plus_are_factored_too() -> None:
    episode = draw(SINES, n_shot=2)
    learner = seeded(lambda: MAMLPlusPlus(SINES.spec, net=MLP([1, 64, 64, 1]), inner_steps=2))
    with without_kernels():
        state = learner.adapt(episode.support)
        assert isinstance(state["2.weight"], Factors)
        expected = meta_gradient(learner, episode)
    learner.layers = None
    for name, value in meta_gradient(learner, episode).items():
        assert float((value - expected[name]).abs().max()) <= 1e-12 * max(1.0, float(value.abs().max())), name


def test_compiled_equals_eager() -> None:
    episode = draw(SINES, n_shot=2).to(dtype=torch.float32)
    learner = seeded(lambda: MAML(SINES.spec, net=MLP([1, 16, 16, 1]), factored=True)).float()
    torch.compiler.reset()
    compiled = MetaStep(learner, compile=True)
    found, expected = compiled(episode)[1], MetaStep(learner)(episode)[1]
    assert compiled.is_compiled
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= 1e-5 * max(1.0, float(value.abs().max())), name


def test_fused_kernels_of_eval_mode_do_not_pass_factors_by() -> None:
    episode = draw(CLASSES)
    learner = seeded(lambda: MAML(CLASSES.spec, net=Attention(), factored=True))
    expected = learner(episode.support, episode.query.x).logits
    with torch.no_grad():
        assert torch.equal(learner(episode.support, episode.query.x).logits, expected)


def test_a_net_that_changes_its_mind_is_refused() -> None:
    class Fickle(nn.Linear):
        decided = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T if self.decided else super().forward(x)

    learner = MAML(SINES.spec, net=Fickle(1, 1), factored=True)
    learner.net.decided = True
    with pytest.raises(RuntimeError, match=r"gives its weight weight to .* make the learner with factored=False"):
        learner.adapt(draw(SINES).to(dtype=torch.float32).support)


def test_supports_of_another_length_choose_again() -> None:
    learner = MAML(SINES.spec, net=MLP([1, 32, 32, 1]))
    few, many = (Examples(torch.randn(2, n, 1), torch.randn(2, n, 1)) for n in (4, 40))
    with without_kernels():
        assert isinstance(learner.adapt(few)["2.weight"], Factors)
        assert isinstance(learner.adapt(many)["2.weight"], torch.Tensor)


class Wide(nn.Module):
    """Three linear layers, wide enough to be factored, gone through in some way of a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 3)

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class InPieces(Wide):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.plain(piece) for piece in x.split(4)])


class ByNumberOfRows(Wide):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(x) + (self.plain(-x) if len(x) in (8, 9) else 0)


class OtherInEvaluation(Wide):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.a(x))
        h = self.b(h) if self.training else h @ self.b.weight.t() + self.b.bias
        return self.c(torch.tanh(h))


class Transformed(Wide):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        energy = torch.func.vmap(torch.func.grad(lambda row: self.plain(row)[0]))(x)
        out, slope = torch.func.jvp(self.plain, (x,), (torch.ones_like(x),))
        return energy[:, :3] + out + slope


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 64, dtype=torch.complex128), nn.Linear(64, 3, dtype=torch.complex128)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.b(self.a(torch.complex(x, x.flip(-1)))).abs()


@pytest.mark.parametrize("make", [MAML, MAMLPlusPlus])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, when jvp is first called
@pytest.mark.parametrize("net", [InPieces, ByNumberOfRows, OtherInEvaluation, Transformed])
def test_any_net_is_served_without_a_setting(net, make) -> None:
    episode = draw(CLASSES)
    auto, formed = (seeded(lambda f=f: make(CLASSES.spec, net=net(), inner_steps=2, factored=f)) for f in (None, False))
    found, expected = meta_gradient(auto, episode), meta_gradient(formed, episode)
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-12


def test_complex_layers_are_formed() -> None:
    learner = MAML(CLASSES.spec, net=Complex())
    assert learner.layers is None or not learner.layers.names


def test_an_update_rule_of_ones_own_gets_no_factors() -> None:
    class Signs(SGD):
        def update(self, name, value, gradient, slots, step):
            return value - 0.01 * gradient.sign(), slots

    class Signed(SGD):
        def forward(self, params, gradients, state, step):
            return super().forward(params, {name: value.sign() for name, value in gradients.items()}, state, step)

    class Decaying(SGD):
        def rate(self, which, name, step):
            return super().rate(which, name, step) / (1 + step)

    class Same(SGD):
        pass

    net = MLP([4, 64, 64, 3])
    for optimizer in (Signs(0.1), Signed(0.1), Decaying(0.1)):
        learner = MAML(CLASSES.spec, net=net, optimizer=optimizer)
        assert learner.layers is None
        learner.double().adapt(draw(CLASSES).support)
    assert MAML(CLASSES.spec, net=net, optimizer=Same(0.1)).layers is not None
