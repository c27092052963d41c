"""Finding the tensors of anyone's net: the names are torch's."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from metaicl.inner_loop.parameters import adapted_tensors, frozen_tensors


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    net[2].weight = net[0].weight
    return net


def shared_layer() -> nn.Module:
    layer = nn.Linear(2, 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm1d(2), nn.ModuleDict({"again": layer, "other": nn.BatchNorm1d(2)}))


def with_gaps() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, affine=False, track_running_stats=False))
    net.register_module("nothing", None)
    net.register_buffer("later", torch.ones(1), persistent=False)
    net.own = nn.Parameter(torch.ones(1))
    return net


class Renamed(nn.Linear):
    def named_parameters(self, *args: object, **kwargs: object) -> Iterator[tuple[str, nn.Parameter]]:
        return ((f"renamed_{name}", value) for name, value in super().named_parameters())


NETS = [tied, shared_layer, with_gaps, lambda: nn.LSTM(2, 3, num_layers=2), lambda: Renamed(2, 2)]


@pytest.mark.parametrize("make", NETS)
def test_tensors_have_the_names_and_the_order_of_torch(make: Callable[[], nn.Module]) -> None:
    net = make()
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    some = list(parameters)[::2]
    adapted, frozen = adapted_tensors(net, some), frozen_tensors(net, some)
    assert list(adapted) == some
    assert list(frozen) == [name for name in parameters if name not in some] + list(buffers)
    assert all(value is parameters[name] for name, value in {**adapted, **frozen}.items() if name in parameters)
    copies: list[tuple[Tensor, Tensor]] = [(frozen[name], value) for name, value in buffers.items()]
    assert all(copy is not value and torch.equal(copy, value) for copy, value in copies)
