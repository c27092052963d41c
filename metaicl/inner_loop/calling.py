"""Calling anyone's net with other weights, and leaving no trace in it."""

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from metaicl.inner_loop.parameters import named_tensors

_TRIALS = 4  # of a net that seems to leave parameters unused
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_CONTAINERS = (list, dict, set, deque)
_HOLDERS = (*_CONTAINERS, tuple)
_PLAIN = (str, bytes, int, float, complex, type(None))


def call_net(net: nn.Module, tensors: Mapping[str, Tensor], arguments: tuple[Any, ...]) -> Any:
    """The output of `net` with all its parameters and buffers replaced, by name.

    `torch.func.functional_call`, with its traps removed: torch 2.13 leaves the stand-ins in a submodule that is
    registered under two names, and whatever a forward pass writes into attributes (torch's recurrent layers keep lists
    of weights there, hooks of weight normalization a weight, anyone an activation) would outlive the call too. So would
    tensors that it puts into lists, dicts, sets and deques among its attributes, and into those within them. Numbers
    and strings are left to the net, so that it can count. One thread at a time: the stand-ins are in the net itself
    while it is called.

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
        parameters, buffers = named_tensors(net)
        return {name: value.clone() for name, value in (*parameters.items(), *buffers.items())}


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
    for own in ("named_parameters", "named_buffers"):  # a tensor that is both has the name of the parameter
        for prefix, module in net.named_modules():
            for name, value in getattr(module, own)(prefix, recurse=False, remove_duplicate=False):
                found[name] = tensors[names.setdefault(id(value), name)]
    return found


@contextmanager
def _same_attributes(net: nn.Module) -> Iterator[None]:
    """Put back attributes of all modules that were bound anew, and keep cudnn from rearranging stand-ins."""
    kept = [(module.__dict__, dict(module.__dict__)) for module in net.modules()]
    # Inner containers first: what holds them holds nothing new once they are as they were.
    containers = [(value, _copied(value)) for _, before in kept for value in reversed(_containers(before))]
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
    """Lists, dicts, sets and deques in the attributes of a module that are not those of every module, however deep."""
    own = [v for key, v in attributes.items() if key not in _OF_EVERY_MODULE and isinstance(v, _HOLDERS)]
    return [part for part in _inside(own) if isinstance(part, _CONTAINERS)][1:] if own else []


def _inside(value: Any) -> Iterator[Any]:
    """A container, the containers in it and their tensors, outer ones first."""
    waiting, seen = [value], set[int]()
    while waiting:
        part = waiting.pop()
        if isinstance(part, _HOLDERS):
            if id(part) not in seen:
                seen.add(id(part))
                waiting.extend(part.values() if isinstance(part, dict) else part)
                yield part
        elif isinstance(part, Tensor):
            yield part
        elif not isinstance(part, _PLAIN):
            yield from tree_leaves(part)  # data classes that torch knows


def _tensors(value: Any) -> dict[int, Tensor]:
    return {id(part): part for part in _inside(value) if isinstance(part, Tensor)}


def _holds_new_tensors(value: Any, before: Any) -> bool:
    found = _tensors(value)
    return bool(found) and not found.keys() <= _tensors(before).keys()


def _copied(value: Any) -> Any:
    """What a container holds, in a plain one; its own kind may have more arguments."""
    return dict(value) if isinstance(value, dict) else list(value)


def _refill(value: Any, before: Any) -> None:
    value.clear()
    (value.update if isinstance(value, (dict, set)) else value.extend)(before)


def _do_nothing() -> None:
    """Stands in for `flatten_parameters`, which looks at addresses in memory."""
