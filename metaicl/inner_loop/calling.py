"""Calling anyone's net with other weights, and leaving no trace in it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def call_net(net: nn.Module, tensors: Mapping[str, Tensor], arguments: tuple[Any, ...]) -> Any:
    """The output of `net` with all its parameters and buffers replaced, by name.

    `torch.func.functional_call`, with its traps removed: torch 2.13 leaves the stand-ins in a submodule that is
    registered under two names, and whatever a forward pass writes into attributes (torch's recurrent layers keep lists
    of weights there, hooks of weight normalization a weight, anyone an activation) would outlive the call too.
    Numbers and strings in attributes are left to the net, so that it can count.

    Args:
        net: Any module; left alone.
        tensors: A value for each name of `named_parameters()` and `named_buffers()`.
        arguments: What the net is called with.
    """
    if torch.compiler.is_compiling():  # which has its own rules for attributes, and no recurrent layers
        return functional_call(net, dict(tensors), arguments, strict=True)
    with _same_attributes(net):
        if _has_shared_modules(net):
            return functional_call(net, _by_place(net, tensors), arguments, tie_weights=False)
        return functional_call(net, dict(tensors), arguments, strict=True)


def _has_shared_modules(net: nn.Module) -> bool:
    return sum(1 for _ in net.named_modules(remove_duplicate=False)) > sum(1 for _ in net.modules())


def _by_place(net: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A value for each place that holds a tensor, where each module counts once and a tensor may have many places."""
    found: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    for prefix, module in net.named_modules():
        for own in (module.named_parameters, module.named_buffers):
            for name, value in own(prefix, recurse=False, remove_duplicate=False):
                found[name] = tensors[names.setdefault(id(value), name)]
    return found


@contextmanager
def _same_attributes(net: nn.Module) -> Iterator[None]:
    """Put back attributes of all modules that were bound anew, and keep cudnn from rearranging stand-ins."""
    kept = [(module.__dict__, dict(module.__dict__)) for module in net.modules()]
    for layer in net.modules():
        if isinstance(layer, nn.RNNBase):
            layer.__dict__["flatten_parameters"] = _do_nothing
    try:
        yield
    finally:
        for now, before in kept:
            if list(map(id, now.values())) != list(map(id, before.values())):
                _put_back(now, before)


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    changed = [key for key, value in now.items() if key not in before or value is not before[key]]
    for key in changed:
        if isinstance(now[key], (bool, int, float, str)):
            continue
        del now[key]
        if key in before:
            now[key] = before[key]
    now |= {key: value for key, value in before.items() if key not in now}


def _do_nothing() -> None:
    """Stands in for `flatten_parameters`, which looks at addresses in memory."""
