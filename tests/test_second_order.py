"""Written-out operations equal the native ones, in value and in derivatives, wherever the native ones are right."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from metaicl.nets.norm import BatchStatNorm
from metaicl.second_order import twice_differentiable
from metaicl.task import derive_generator


def randn(*shape):
    return torch.randn(*shape, generator=derive_generator("second order", *shape), dtype=torch.float64)


CASES = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), (3, 4), 4),
    "layer_norm_plain": (lambda x, w, b: F.layer_norm(x, [3, 4]), (2, 3, 4), 4),
    "layer_norm_weight_only": (lambda x, w, b: F.layer_norm(x, (4,), weight=w, eps=1e-3), (3, 4), 4),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), (5, 4), 4),
    "batch_norm_images": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True, eps=1e-3), (5, 4, 3, 2), 4),
    "batch_norm_plain": (lambda x, w, b: F.batch_norm(x, None, None, training=True), (5, 4), 4),
    "instance_norm": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (5, 4, 3, 2), 4),
    "instance_norm_plain": (lambda x, w, b: F.instance_norm(x), (5, 4, 3), 4),
}


@pytest.mark.parametrize("name", CASES)
def test_written_out_equals_native_to_the_second_derivative(name):
    function, shape, channels = CASES[name]
    inputs = tuple(value.requires_grad_() for value in (randn(*shape), randn(channels) + 1.5, randn(channels)))
    results = []
    for context in (twice_differentiable, torch.enable_grad):
        with context():
            out = function(*inputs)
        first = torch.autograd.grad(
            out.sin().sum(), inputs, create_graph=True, materialize_grads=True, allow_unused=True
        )
        total = sum((part.square().sum() for part in first if part.requires_grad), torch.zeros(()))
        second = torch.autograd.grad(total, inputs, materialize_grads=True, allow_unused=True)
        results.append([out, *first, *second])
    size = max(float(part.detach().abs().max()) for part in results[1])
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).detach().abs().max()) < 1e-12 * max(size, 1)


IN_TORCH = {
    "layer_norm": lambda x, w, b: torch.layer_norm(x, (4,), w, b, 1e-5, False),
    "batch_norm": lambda x, w, b: torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, False),
    "instance_norm": lambda x, w, b: torch.instance_norm(x, w, b, None, None, True, 0.1, 1e-5, False),
}


@pytest.mark.parametrize("name", IN_TORCH)
def test_names_of_torch_itself_have_right_second_derivatives_over_tasks(name):
    inputs = randn(2, *CASES[name][1]), randn(2, 4) + 1.5, randn(2, 4)

    def slopes(*values):
        return torch.func.grad(lambda *values: IN_TORCH[name](*values).sin().sum(), argnums=(0, 1, 2))(*values)

    def second(*values, tasks):
        return torch.func.grad(lambda *v: sum(s.square().sum() for s in tasks(*v)), argnums=(0, 1, 2))(*values)

    loop = [second(*task, tasks=slopes) for task in zip(*inputs, strict=True)]
    with twice_differentiable():
        found = second(*inputs, tasks=torch.func.vmap(slopes))
    for value, expected in zip(found, map(torch.stack, zip(*loop, strict=True)), strict=True):
        assert float((value - expected).abs().max()) < 1e-12 * float(expected.abs().max())


def test_kernels_of_normalization_name_the_function_to_call():
    x, w = randn(3, 4), randn(4)
    with twice_differentiable():
        with pytest.raises(RuntimeError, match=r"call F\.layer_norm instead"):
            torch.native_layer_norm(x, (4,), w, w, 1e-5)
        with pytest.raises(RuntimeError, match=r"call F\.batch_norm instead"):
            torch.native_batch_norm(x, w, w, None, None, True, 0.1, 1e-5)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (nn.LayerNorm(1), (5, 4), r"input must end in normalized_shape=\(1,\); got \(4,\)"),
        (nn.LayerNorm((3, 4)), (4,), r"input must end in normalized_shape=\(3, 4\); got \(4,\)"),
        (nn.BatchNorm1d(1, track_running_stats=False), (5, 4), r"weight must have one number per channel, 4 of"),
        (nn.BatchNorm1d(4, track_running_stats=False), (1, 4), r"more than one value per channel.*got \(1, 4\)"),
        (nn.InstanceNorm2d(4), (5, 4, 1, 1), r"more than one value per channel over places; got \(5, 4, 1, 1\)"),
        (BatchStatNorm(1), (5, 4), r"weight must have one number per channel, 4 of an input \(5, 4\); got \(1,\)"),
        (BatchStatNorm(4), (1, 4), r"more than one value per channel.*got \(1, 4\)"),
    ],
)
def test_written_out_normalization_refuses_what_torch_refuses(layer, shape, message):
    with twice_differentiable(), pytest.raises(ValueError, match=message):
        layer.double()(randn(*shape))


def test_batch_norm_without_any_statistics_is_refused_as_by_torch():
    with twice_differentiable(), pytest.raises(RuntimeError, match="running_mean"):
        F.batch_norm(randn(3, 4), None, None, training=False)


BAGS = [{"mode": mode, "padding_idx": padding} for mode in ("sum", "mean", "max") for padding in (None, 1)]


@pytest.mark.parametrize("options", BAGS)
def test_bags_of_words_equal_native_ones_to_the_first_derivative(options):
    table, words = randn(6, 3).requires_grad_(), torch.tensor([[1, 2, 2, 0], [1, 1, 1, 1], [5, 4, 1, 3]])
    scale = randn(3, 4) if options["mode"] == "sum" else None
    for x, rest in (
        (words, {"per_sample_weights": scale}),
        (words.flatten(), {"offsets": torch.tensor([0, 3, 3, 8])}),
        (words.flatten(), {"offsets": torch.tensor([0, 7, 12]), "include_last_offset": True}),
    ):
        native = F.embedding_bag(x, table, **options, **rest)
        with twice_differentiable():
            found = F.embedding_bag(x, table, **options, **rest)
        slopes = [torch.autograd.grad(out.sin().sum(), table)[0] for out in (found, native)]
        assert float((found - native).detach().abs().max()) < 1e-14
        assert float((slopes[0] - slopes[1]).abs().max()) < 1e-14


LAYERS = {
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2, proj_size=2, bidirectional=True),
    "lstm_plain": lambda: nn.LSTM(3, 4, bias=False, batch_first=True),
    "gru": lambda: nn.GRU(3, 4, num_layers=2, bidirectional=True),
    "gru_plain": lambda: nn.GRU(3, 4, bias=False, batch_first=True),
    "rnn": lambda: nn.RNN(3, 4, num_layers=2),
    "rnn_relu": lambda: nn.RNN(3, 4, nonlinearity="relu", bidirectional=True, bias=False),
    "lstm_cell": lambda: nn.LSTMCell(3, 4),
    "gru_cell": lambda: nn.GRUCell(3, 4, bias=False),
    "rnn_cell": lambda: nn.RNNCell(3, 4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_layers_equal_native_ones_to_the_second_derivative(name):
    layer = LAYERS[name]().double()
    x = randn(*((5, 3) if name.endswith("cell") else (4, 5, 3))).requires_grad_()
    inputs, results = (x, *layer.parameters()), []
    for context in (twice_differentiable, torch.enable_grad):
        with context():
            out = tree_leaves(layer(x))
        first = torch.autograd.grad(sum(part.square().sum() for part in out), inputs, create_graph=True)
        second = torch.autograd.grad(sum(part.square().sum() for part in first), inputs)
        results.append([*out, *first, *second])
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).detach().abs().max()) < 1e-12 * max(float(expected.detach().abs().max()), 1)


def test_packed_sequences_and_dropout_of_recurrent_layers():
    packed = nn.utils.rnn.pack_padded_sequence(randn(4, 2, 3), torch.tensor([4, 2]))
    layer, deep = nn.LSTM(3, 4).double(), nn.GRU(3, 4, num_layers=2, dropout=0.5).double()
    native = layer(packed)[0].data
    with twice_differentiable(), torch.random.fork_rng():
        assert torch.equal(layer(packed)[0].data, native)
        torch.manual_seed(0)
        first = deep(randn(4, 2, 3))[0]
        assert not torch.equal(first, deep(randn(4, 2, 3))[0])
        torch.manual_seed(0)
        assert torch.equal(first, deep(randn(4, 2, 3))[0])
    assert float((deep.eval()(randn(4, 2, 3))[0] - first).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_weight_norm_has_the_second_derivative_that_the_native_one_lacks(dim):
    direction, length = randn(3, 4).requires_grad_(), torch.norm_except_dim(randn(4, 3).T, 2, dim).requires_grad_()
    native = torch._weight_norm(direction, length, dim)
    with twice_differentiable():
        assert float((torch._weight_norm(direction, length, dim) - native).detach().abs().max()) < 1e-15
        assert torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, dim), (direction, length))


def test_running_statistics_stay_native():
    for layer in (nn.BatchNorm1d(4).double(), nn.InstanceNorm1d(4, track_running_stats=True).double()):
        x = randn(5, 4, 3)
        with twice_differentiable():
            trained, mean = layer(x), layer.running_mean.clone()
            evaluated = layer.eval()(x)
        layer.reset_running_stats()
        assert torch.equal(layer.train()(x), trained)
        assert torch.equal(layer.running_mean, mean)
        assert torch.equal(layer.eval()(x), evaluated)


def test_batch_stat_norm_equals_native_batch_norm():
    layer, native = BatchStatNorm(4).double(), nn.BatchNorm2d(4, track_running_stats=False).double()
    x = randn(5, 4, 3, 2)
    assert float((layer(x) - native(x)).detach().abs().max()) < 1e-12
    assert torch.equal(layer(x), layer.eval()(x))


def test_attention_gets_a_second_derivative():
    x = randn(2, 3, 4).requires_grad_()
    with twice_differentiable():
        (first,) = torch.autograd.grad(F.scaled_dot_product_attention(x, x, x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert float(second.abs().max()) > 1e-3
    with twice_differentiable():
        assert torch.autograd.gradgradcheck(lambda v: F.scaled_dot_product_attention(v, v, v), (x,))


def test_context_leaves_no_trace():
    calls = []
    with twice_differentiable(), twice_differentiable():  # learners inside learners
        calls.append(F.layer_norm(randn(3, 4), (4,)))
    out = F.layer_norm(randn(3, 4).requires_grad_(), (4,))
    assert "LayerNorm" in type(out.grad_fn).__name__
    assert float((calls[0] - out).detach().abs().max()) < 1e-14


def test_compiled_gradients_are_right_too():
    net = nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y, xq, yq = randn(3, 5, 1), randn(3, 5, 1).sin(), randn(3, 6, 1), randn(3, 6, 1).cos()
    weights = {name: value.detach() for name, value in net.named_parameters()}

    def task_loss(params, inputs, targets):
        return (torch.func.functional_call(net, params, (inputs,)) - targets).square().mean()

    def after_one_step(params, *task):
        gradients = torch.func.grad(task_loss)(params, *task[:2])
        return task_loss({name: params[name] - 0.5 * gradients[name] for name in params}, *task[2:])

    def meta_gradient(params):
        def total(params):
            with twice_differentiable():
                return torch.func.vmap(lambda *task: after_one_step(params, *task))(x, y, xq, yq).sum()

        return torch.func.grad(total)(params)

    start = {name: value.clone().requires_grad_() for name, value in weights.items()}
    loop = sum(after_one_step(start, *task) for task in zip(x, y, xq, yq, strict=True))
    expected = dict(zip(start, torch.autograd.grad(loop, list(start.values())), strict=True))
    for compute in (meta_gradient, torch.compile(meta_gradient, fullgraph=True, backend="aot_eager")):
        found = compute(weights)
        assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-12
