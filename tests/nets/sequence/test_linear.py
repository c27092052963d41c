"""The linear layer on oneDNN: the numbers and gradients of F.linear, and F.linear itself wherever it cannot serve."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from metaicl.nets.sequence import linear
from metaicl.nets.sequence.linear import Linear


@pytest.fixture(autouse=True)
def _switched_on(monkeypatch):
    monkeypatch.setattr(Linear, "onednn", True)


@pytest.fixture(name="used")
def count_calls(monkeypatch):
    calls = []
    product = linear._product
    monkeypatch.setattr(linear, "_product", lambda *args: calls.append(1) or product(*args))
    return calls


def pair(bias=True):
    torch.manual_seed(0)
    return Linear(6, 5, bias=bias), torch.randn(3, 4, 6, requires_grad=True)


@pytest.mark.skipif(not linear.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_value_and_gradients_equal_those_of_f_linear(used, bias, rank):
    layer, x = pair(bias)
    x = x.detach().reshape((12, 6) if rank == 2 else (3, 4, 6) if rank == 3 else (3, 2, 2, 6)).requires_grad_()
    wanted = (x, *layer.parameters())
    ours, plain = layer(x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(ours, plain)
    slope = torch.randn_like(plain)
    for found, expected in zip(
        torch.autograd.grad(ours, wanted, slope), torch.autograd.grad(plain, wanted, slope), strict=True
    ):
        torch.testing.assert_close(found, expected)
    assert len(used) == 2


@pytest.mark.skipif(not linear.is_available(), reason="this torch has no oneDNN")
def test_second_derivatives_equal_those_of_f_linear(used):
    layer, x = pair()

    def second(out):
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, layer.weight))

    plain = second(F.linear(x, layer.weight, layer.bias))
    for found, expected in zip(second(layer(x)), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert used


@pytest.mark.skipif(not linear.is_available(), reason="this torch has no oneDNN")
def test_only_wanted_gradients_are_computed(used):
    layer, x = pair()
    layer.requires_grad_(False)
    layer(x).sum().backward()
    assert len(used) == 2
    assert layer.weight.grad is None


def test_the_switch_and_the_processor_decide(used, monkeypatch):
    layer, x = pair()
    monkeypatch.setattr(Linear, "onednn", False)
    layer(x)
    monkeypatch.setattr(Linear, "onednn", None)
    layer(x)  # too small to pay
    monkeypatch.setattr(linear, "_MIN_MULTIPLICATIONS", 1)
    monkeypatch.setattr(linear, "_is_faster", lambda: False)
    layer(x)
    assert not used
    monkeypatch.setattr(linear, "_is_faster", lambda: True)
    layer(x)
    assert len(used) == int(linear.is_available())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # forward mode loads old parts of torch
def test_what_onednn_cannot_serve_goes_to_f_linear(used, monkeypatch):
    layer, x = pair()
    plain = F.linear(x, layer.weight, layer.bias).detach()
    torch.testing.assert_close(torch.vmap(layer)(x).detach(), plain)
    jacobian = torch.func.jacrev(lambda w: F.linear(x[0], w, layer.bias).sum())(layer.weight)
    torch.testing.assert_close(
        torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x[0],)).sum())(dict(layer.named_parameters()))[
            "weight"
        ],
        jacobian,
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        tangent = forward_ad.unpack_dual(layer(dual)).tangent
    torch.testing.assert_close(tangent, layer.weight.sum(1).expand_as(plain))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with monkeypatch.context() as switched_off:
        switched_off.setattr(linear, "_enabled", lambda: False)
        torch.testing.assert_close(layer(x), plain)
    assert layer(x[:, :0]).shape == (3, 0, 5)
    wide = x.double()
    assert layer.double()(wide).dtype == torch.float64
    assert not used


def test_in_a_compiled_graph_it_is_f_linear(used):
    layer, x = pair()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias))
    assert not used
