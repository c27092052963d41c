"""Calling anyone's net with other weights, and leaving no trace in it."""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

_TRIALS = 4  # of a net that seems to leave parameters unused
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def call_net(net: nn.Module, tensors: Mapping[str, Tensor], arguments: tuple[Any, ...]) -> Any:
    """The output of `net` with all its parameters and buffers replaced, by name.

    `torch.func.functional_call`, with its traps removed: torch 2.13 leaves the stand-ins in a submodule that is
    registered under two names, and whatever a forward pass writes into attributes (torch's recurrent layers keep lists
    of weights there, hooks of weight normalization a weight, anyone an activation) would outlive the call too.
    So would tensors that it puts into lists, dicts and sets among its attributes. Numbers and strings are left to the
    net, so that it can count. One thread at a time: the stand-ins are in the net itself while it is called.

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


def cloned_tensors(net: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers by name, for a call that may write into them."""
    with torch.no_grad():
        named = (*net.named_parameters(), *net.named_buffers())
        return {name: value.clone() for name, value in named}


def try_net(net: nn.Module, *arguments: Any) -> Any:
    """What a net says to some arguments, without a gradient; net and global random state are left as they were."""
    with torch.random.fork_rng(), torch.no_grad():
        return call_net(net, cloned_tensors(net), arguments)


def unused_parameters(net: nn.Module, x_shape: tuple[int, ...], names: Collection[str], *, integers: bool) -> list[str]:
    """Those of the parameters `names` that the output of `net` does not depend on, found by a few rows of zeros.

    A net that drops parts of itself by chance is asked some times. Nothing is said of one that refuses zeros.

    Args:
        net: Any module; left alone, and the global random state too.
        x_shape: Shape of one row.
        names: Of floating parameters.
        integers: Whether rows hold token ids.
    """
    like = next((value for value in net.parameters() if value.is_floating_point()), torch.empty(()))
    x = torch.zeros(2, *x_shape, dtype=torch.long if integers else like.dtype, device=like.device)
    unused = set(names)
    with torch.random.fork_rng(), torch.enable_grad():
        for _ in range(_TRIALS):
            tensors = cloned_tensors(net)
            starts = [tensors[name].requires_grad_() for name in names]
            try:
                output = call_net(net, tensors, (x,))
                found = torch.autograd.grad(output.sum(), starts, allow_unused=True)
            except Exception:  # anyone's net: it may refuse zeros, or give no tensor, and says so at the first step
                return []
            unused &= {name for name, value in zip(names, found, strict=True) if value is None}
            if not unused:
                break
    return sorted(unused)


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
    containers = [(value, copy.copy(value)) for _, before in kept for value in _containers(before)]
    for layer in net.modules():
        if isinstance(layer, nn.RNNBase):
            layer.__dict__["flatten_parameters"] = _do_nothing
    try:
        yield
    finally:
        for now, before in kept:
            if list(map(id, now.values())) != list(map(id, before.values())):
                _put_back(now, before)
        for value, before in containers:
            if _holds_new_tensors(value, before):
                _refill(value, before)


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    changed = [key for key, value in now.items() if key not in before or value is not before[key]]
    for key in changed:
        if isinstance(now[key], (bool, int, float, str)):
            continue
        del now[key]
        if key in before:
            now[key] = before[key]
    now |= {key: value for key, value in before.items() if key not in now}


def _containers(attributes: Mapping[str, Any]) -> list[Any]:
    """Lists, dicts and sets among the attributes of a module that are not those of every module."""
    return [
        value for key, value in attributes.items() if type(value) in (list, dict, set) and key not in _OF_EVERY_MODULE
    ]


def _holds_new_tensors(value: Any, before: Any) -> bool:
    known = set(map(id, tree_leaves(_listed(before))))
    return any(isinstance(leaf, Tensor) and id(leaf) not in known for leaf in tree_leaves(_listed(value)))


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, set) else value  # a pytree has no sets


def _refill(value: Any, before: Any) -> None:
    value.clear()
    (value.extend if isinstance(value, list) else value.update)(before)


def _do_nothing() -> None:
    """Stands in for `flatten_parameters`, which looks at addresses in memory."""
