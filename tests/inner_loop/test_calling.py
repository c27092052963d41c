"""Anyone's net in an inner loop: right gradients, nothing left behind, and a way out where torch has none."""

import copy
import pickle
from collections import OrderedDict, defaultdict, deque
from functools import partial

import pytest
import torch
from gradient_helpers import CLASSES, draw, seeded, worst_slope_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from metaicl.episode import Episode, Examples
from metaicl.inner_loop.calling import call_net
from metaicl.inner_loop.solvers import ConjugateGradient
from metaicl.learners import CAVIA, IMAML, KFO, MAML, MAMLPlusPlus, MetaCurvature, MetaSGD, ProtoMAML
from metaicl.meta_step import MetaStep
from metaicl.spec import TaskSpec


class Shared(nn.Module):
    """One layer under two names, its weight in a third layer, a buffer twice, and an activation kept."""

    def __init__(self):
        super().__init__()
        self.first, self.tied, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.again, self.tied.weight = self.first, self.first.weight
        self.register_buffer("scale", torch.linspace(0.5, 2, 4))
        self.same_scale, self.calls, self.last = self.scale, 0, None

    def forward(self, x):
        self.calls += 1
        self.last = self.again(torch.tanh(self.first(x * self.same_scale))) * self.scale
        return self.head(torch.tanh(self.tied(self.last)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.cells(x[None].expand(3, -1, -1))[0][-1])


def weight_norm(make):
    return nn.Sequential(make(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 5), torch.randn(5, 3)])
        self.rest = nn.ParameterDict({"shift": torch.randn(3)})
        self.register_buffer("order", torch.arange(4).flip(0), persistent=False)

    def forward(self, x):
        hidden = x[:, self.order] @ self.weights[0]
        hidden += 1  # in place, where autograd allows it
        return hidden.tanh() @ self.weights[1] + self.rest["shift"]


NETS = {
    "shared": Shared,
    "recurrent": Recurrent,
    "lists": Lists,
    "weight_norm": lambda: weight_norm(nn.utils.parametrizations.weight_norm),
    "old_weight_norm": lambda: weight_norm(nn.utils.weight_norm),
    "orthogonal": lambda: weight_norm(nn.utils.parametrizations.orthogonal),
    "hooked": lambda: weight_norm(_hooked),
}


def _hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: output.sin())
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated", "ignore:There is a performance drop.*tril_")
@pytest.mark.parametrize("name", NETS)
def test_the_meta_gradient_is_right_and_the_net_is_left_alone(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NETS[name]()
    learner = seeded(lambda: MAML(CLASSES.spec, net=net, inner_lr=0.1, inner_steps=2))
    before = copy.deepcopy(learner.state_dict())
    attributes = [dict(vars(module)) for module in net.modules()]
    MetaStep(learner)(draw(CLASSES))
    for module, kept in zip(net.modules(), attributes, strict=True):
        changed = {key for key, value in vars(module).items() if value is not kept.get(key)}
        assert changed <= {"calls"}
    assert all(torch.equal(value, before[key]) for key, value in learner.state_dict().items())
    assert worst_slope_error(learner, draw(CLASSES)) <= 1e-5


def test_the_tied_weight_stays_tied_and_the_learner_can_be_sent():
    learner = seeded(lambda: MAML(CLASSES.spec, net=Shared(), inner_lr=0.1))
    expected = MetaStep(learner)(draw(CLASSES))[1]
    assert learner.net.first is learner.net.again
    assert learner.net.first.weight is learner.net.tied.weight
    assert learner.net.last is None
    for twin in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        found = MetaStep(twin)(draw(CLASSES))[1]
        assert max(float((found[key] - value).abs().max()) for key, value in expected.items()) < 1e-14


def test_a_net_that_fails_is_left_alone_too():
    net = Shared()
    weights = {name: torch.zeros_like(value) for name, value in [*net.named_parameters(), *net.named_buffers()]}
    assert float(call_net(net, weights, (torch.ones(2, 4),)).abs().max()) == 0
    own, calls = net.first.weight, net.calls
    with pytest.raises(RuntimeError, match="size of tensor"):
        call_net(net, weights, (torch.ones(2, 5),))
    assert net.first.weight is net.tied.weight is own
    assert net.calls == calls + 1
    assert net.last is None


class Step(nn.Module):
    """A linear net with any function behind its first layer."""

    def __init__(self, function):
        super().__init__()
        self.function, self.body, self.head = function, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.function(self.body(x)))


REFUSED = {
    "checkpoint": (lambda h: checkpoint(torch.tanh, h, use_reentrant=False), r"own checkpoint=True"),
    "old_function": (lambda h: Old.apply(h), r"autograd\.Function of the old style.*setup_context"),
    "branch": (lambda h: h if h.sum() > 0 else -h, r"branches on the numbers.*torch\.where.*HigherMAML"),
    "mask": (lambda h: h + h[h > 0].sum(), r"shape depends on numbers.*torch\.where and sparse=False"),
    "unmapped": (lambda h: nn.functional.rrelu(h, training=True), r"cannot be mapped over tasks: replace it"),
}


class Old(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent * 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_cannot_map_comes_with_a_way_out(name):
    function, message = REFUSED[name]
    learner = seeded(lambda: MAML(CLASSES.spec, net=Step(function)))
    with pytest.raises(RuntimeError, match=rf"(?s){message}"):
        MetaStep(learner)(draw(CLASSES))


def test_spectral_normalization_in_training_comes_with_a_way_out():
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)), nn.Linear(6, 3))
    learner = seeded(lambda: MAML(CLASSES.spec, net=net))
    assert torch.isfinite(MetaStep(learner)(draw(CLASSES))[0]).all()
    with pytest.raises(RuntimeError, match="as spectral normalization does: replace that layer, or adapt task by task"):
        MetaStep(learner.train())(draw(CLASSES))


@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        (lambda: torch.tanh, TypeError, r"needs an nn\.Module; got <built-in method tanh"),
        (lambda: torch.jit.script(nn.Linear(4, 3)), TypeError, "scripted module; pass the module it was made of"),
        (lambda: nn.LazyLinear(3), ValueError, r"without a shape, \['weight', 'bias'\]; call it once"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_what_is_no_net_is_refused_at_once(net, error, message):
    with pytest.raises(error, match=message):
        MAML(CLASSES.spec, net=net())


@pytest.mark.parametrize("size", [2, 7])
def test_outputs_of_another_size_are_named(size):
    learner = seeded(lambda: MAML(CLASSES.spec, net=nn.Linear(4, size)))
    with pytest.raises(
        ValueError, match=rf"must turn 9 rows into a tensor \(9, 3\) of n_way logits each; got \(9, {size}"
    ):
        MetaStep(learner)(draw(CLASSES))


def test_word_vectors_with_sparse_gradients_are_shared_between_tasks():
    gradients = []
    for sparse in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            words = nn.Embedding(9, 4, sparse=sparse)
            net = nn.Sequential(words, nn.Flatten(), nn.Linear(8, 2))
        rows = Examples(torch.arange(8).view(1, 4, 2), torch.tensor([[0, 1, 0, 1]]))
        learner = MAML(TaskSpec("classification", (2,), "tokens", n_way=2, vocabulary=9), net=net)
        gradients.append(MetaStep(learner)(Episode(rows, rows))[1]["net.0.weight"])
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-7
    assert float(gradients[0].abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"), [({"max_norm": 1.0}, "use max_norm=None"), ({"sparse": True}, "use sparse=False")]
)
@pytest.mark.parametrize("words", [nn.Embedding, nn.EmbeddingBag])
def test_word_vectors_that_cannot_adapt_come_with_a_way_out(words, options, message):
    net = nn.Sequential(words(9, 4, **options), nn.Flatten(), nn.LazyLinear(2))
    net(torch.zeros(1, 2, dtype=torch.long))
    rows = Examples(torch.arange(8).view(2, 2, 2), torch.tensor([[0, 1], [1, 0]]))
    learner = MAML(TaskSpec("classification", (2,), "tokens", n_way=2, vocabulary=9), net=net, adapt="*")
    with pytest.raises(RuntimeError, match=rf"(?s){message}"):
        MetaStep(learner)(Episode(rows, rows))


@pytest.mark.parametrize("adapt", ["*", "1.*"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_words_adapt_as_their_words(mode, adapt):
    class Words(nn.Embedding):
        def forward(self, x):
            found = super().forward(x)
            return found.max(1).values if mode == "max" else getattr(found, mode)(1)

    rows = Examples(torch.arange(9).view(3, 3, 1).repeat(1, 1, 2), torch.tensor([0, 1, 2]).repeat(3, 1))
    rows.x[..., 1] = torch.tensor([4, 2, 7])
    spec, gradients = TaskSpec("classification", (2,), "tokens", n_way=3, vocabulary=9), []
    for make in (Words, partial(nn.EmbeddingBag, mode=mode)):
        net = seeded(lambda make=make: nn.Sequential(make(9, 4), nn.Linear(4, 3)).double())
        learner = MAML(spec, net=net, adapt=adapt, inner_steps=2).double()
        gradients.append(MetaStep(learner)(Episode(rows, rows))[1])
    assert max(float((gradients[0][name] - value).abs().max()) for name, value in gradients[1].items()) < 1e-14
    assert float(gradients[0]["net.0.weight"].abs().max()) > 1e-3


@pytest.mark.parametrize(("adapt", "error"), [([], ValueError), (5, TypeError), ([None], TypeError)])
def test_patterns_that_are_none(adapt, error):
    with pytest.raises(error, match=r"adapt (has no pattern|must be patterns of parameter names)"):
        MAML(CLASSES.spec, adapt=adapt)


class Hoarder(nn.Module):
    """Puts what it sees into containers, and counts in one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.seen, self.by_name, self.counts = ["mark"], {"mark": 0}, []

    def forward(self, x):
        self.seen.append(x)
        self.by_name["last"] = [x]
        self.counts.append(len(x))
        return self.layer(x)


def test_tensors_in_containers_are_taken_out_and_numbers_stay():
    episode = draw(CLASSES)
    learner = seeded(lambda: MAML(CLASSES.spec, net=Hoarder()))
    MetaStep(learner)(episode)
    assert (learner.net.seen, learner.net.by_name) == (["mark"], {"mark": 0})
    assert learner.net.counts
    copy.deepcopy(learner)


CONTAINERS = {
    "deque": lambda: deque(maxlen=3),
    "defaultdict": lambda: defaultdict(list),
    "ordered": OrderedDict,
    "nested list": lambda: [[], 0],
    "nested dict": lambda: {"a": ([],)},
}


class Collecting(nn.Module):
    """Puts what it sees into any container."""

    def __init__(self, box):
        super().__init__()
        self.layer, self.box = nn.Linear(4, 3), box

    def forward(self, x):
        if isinstance(self.box, OrderedDict):
            self.box["a"] = x
        elif isinstance(self.box, dict):
            found = self.box["a"]
            (found[0] if isinstance(found, tuple) else found).append(x)
        else:
            (self.box[0] if isinstance(self.box, list) else self.box).append(x)
        return self.layer(x)


@pytest.mark.parametrize("name", CONTAINERS)
def test_tensors_in_containers_of_any_kind_are_taken_out(name):
    learner = seeded(lambda: MAML(CLASSES.spec, net=Collecting(CONTAINERS[name]())))
    MetaStep(learner)(draw(CLASSES))
    assert learner.net.box == CONTAINERS[name]()
    assert type(learner.net.box) is type(CONTAINERS[name]())
    copy.deepcopy(learner)


class AlsoABuffer(nn.Module):
    """Its layer's weight is a buffer of its own too."""

    def __init__(self, twice):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("again", self.layer.weight)
        self.twice = self.layer if twice else None

    def forward(self, x):
        return self.layer(x) + x.square() @ self.again.T


@pytest.mark.parametrize("twice", [False, True])
def test_a_parameter_that_is_a_buffer_too_adapts_in_both_places(twice):
    learner = seeded(lambda: MAML(CLASSES.spec, net=AlsoABuffer(twice), inner_steps=2))
    assert learner.adapted == {"layer.weight", "layer.bias"}
    assert worst_slope_error(learner, draw(CLASSES)) < 1e-6
    support, lr = draw(CLASSES).support[0], 0.4
    fast, plain = learner.adapt(support), copy.deepcopy(learner.net)
    optimizer = torch.optim.SGD(plain.parameters(), lr=lr)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(support.x[0]), support.y[0]).backward()
        optimizer.step()
    assert float((fast["layer.weight"][0] - plain.layer.weight).detach().abs().max()) < 1e-12


class Touching(nn.Module):
    """Writes into a buffer and draws a random number whenever it runs."""

    def __init__(self, inputs=4, outputs=3):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.register_buffer("mean", torch.zeros(inputs))

    def forward(self, x, context=None):
        self.mean += 1 + torch.rand(())
        return self.layer(x) + (0 if context is None else context.sum())


@pytest.mark.parametrize("make", [CAVIA, lambda spec, net: ProtoMAML(spec, encoder=net), MAML])
def test_making_a_learner_leaves_net_and_random_state_alone(make):
    net, state = Touching(), torch.get_rng_state()
    make(CLASSES.spec, net=net)
    assert net.mean.tolist() == [0, 0, 0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_may_be_called_as_the_methods_of_a_dict():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.values = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return torch.tanh(x @ self.keys) @ self.values

    for make in (MetaSGD, MetaCurvature, KFO, MAMLPlusPlus):
        learner = seeded(lambda make=make: make(CLASSES.spec, net=Attend()))
        assert worst_slope_error(learner, draw(CLASSES)) < 1e-5


@pytest.mark.parametrize(
    "make", [MAML, KFO, partial(IMAML, inner_lr=0.2, inner_steps=200, solver=ConjugateGradient(20))]
)
def test_parameters_of_any_number_of_axes_adapt(make):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.weight = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.randn(3, 2, 1, 1, 2))

        def forward(self, x):
            return torch.einsum("nij,oiklj->no", x.view(-1, 2, 2), self.scale * self.weight)

    assert worst_slope_error(seeded(lambda: make(CLASSES.spec, net=Scaled())), draw(CLASSES)) < 1e-5


def test_torchs_transformer_layers_are_served_in_evaluation_too():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 3)
            self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)

        def forward(self, x):
            padding = torch.zeros(x.shape, dtype=torch.bool)
            padding[:, -1] = True
            return self.head(self.layers(self.embed(x[..., None]), src_key_padding_mask=padding)[:, 0])

    episode, before = draw(CLASSES), torch.backends.mha.get_fastpath_enabled()
    learner = seeded(lambda: MAML(CLASSES.spec, net=Masked()))
    expected = learner.train()(episode.support, episode.query.x).logits.detach()
    with torch.no_grad():
        found = learner.eval()(episode.support, episode.query.x).logits
    assert float((found - expected).abs().max()) < 1e-12
    assert torch.backends.mha.get_fastpath_enabled() == before
