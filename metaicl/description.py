"""What a learner, a trainer or an objective is, in JSON: equal for two built alike, in any process, and for no others.

Names of classes and functions stand for their code. Nothing depends on addresses or on the order of sets.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from enum import Enum
from functools import cached_property, partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

N_LISTED = 10
"""Differences that a message lists."""

_LONG = 1000  # characters, from which a digest stands for a text or a collection
_TOLD_BY_REPR = (complex, range, torch.dtype, torch.device, torch.layout, torch.memory_format)
_OWN_OF_MODULES = frozenset(vars(nn.Module()))  # how torch keeps house, and whether it is in train mode
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def describe(value: Any, *, weights: bool = True) -> Any:
    """Numbers, texts, lists and dicts that tell `value` from any that would behave otherwise.

    All modules and other objects that it holds are described with it, by class and attributes.

    Args:
        value: A module, a function, or anything else; it should be fresh, because what running fills in is told too.
        weights: Tell the values of parameters and buffers as well, by a digest.
    """
    return _Description(weights).of(value, "")


def differences(saved: Any, here: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """The innermost entries that differ between two descriptions, as (name, saved, here); None where one has none."""
    if not (isinstance(saved, Mapping) and isinstance(here, Mapping)):
        return [] if saved == here else [(name, saved, here)]
    names = [key for key in {**saved, **here} if saved.get(key) != here.get(key)]
    return [
        one for key in names for one in differences(saved.get(key), here.get(key), f"{name}.{key}" if name else key)
    ]


def shortened(value: Any, length: int = 200) -> str:
    """The representation of a described value, cut where it is long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


class _Description:
    """One walk through an object.

    Args:
        weights: Tell the values of parameters and buffers.
        met: Modules and parameters told already, with their places: what is shared is told once, and as shared.
        trail: Identities of the objects that the walk is in, which ends cycles.
    """

    def __init__(
        self, weights: bool, met: Mapping[int, tuple[str, Any]] | None = None, trail: tuple[int, ...] = ()
    ) -> None:
        self.weights, self.met, self.trail = weights, dict(met or {}), trail

    def of(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int):
            return value
        if kind is float:
            return value if math.isfinite(value) else repr(value)
        if kind is str:
            return value if len(value) <= _LONG else f"str of {len(value)}, {_digest(value.encode())}"
        if isinstance(value, Enum):
            return f"{_name(kind)}.{value.name}"
        if isinstance(value, type):
            return _name(value)
        if isinstance(value, ModuleType):
            return value.__name__
        if isinstance(value, _TOLD_BY_REPR):
            return repr(value)
        if isinstance(value, PurePath):
            return str(value)
        if isinstance(value, (bytes, bytearray)):
            return f"bytes of {len(value)}, {_digest(bytes(value))}"
        if isinstance(value, Tensor):
            return _of_tensor(value)
        if isinstance(value, (np.bool_, np.integer, np.floating)):
            return self.of(value.item(), path)
        if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
            array = np.ascontiguousarray(value)
            return f"{array.dtype.str} {np.shape(value)}, {_digest(array.tobytes())}"
        if isinstance(value, torch.Generator):
            return [_name(kind), value.initial_seed()]
        if isinstance(value, nn.Module):
            return self._module(value, path)
        if id(value) in self.trail:
            return f"what holds it, {len(self.trail) - self.trail.index(id(value))} up"
        self.trail += (id(value),)
        try:
            return self._object(value, path)
        finally:
            self.trail = self.trail[:-1]

    def _object(self, value: Any, path: str) -> Any:
        if isinstance(value, np.ndarray):
            return self.of(value.tolist(), path)
        if isinstance(value, (list, tuple)):
            return _short([self.of(item, f"{path}.{index}") for index, item in enumerate(value)])
        if isinstance(value, (set, frozenset)):
            return _short(sorted((self._apart(item, path) for item in value), key=_text))
        if isinstance(value, (dict, MappingProxyType)):
            return _short(self._entries(value, path))
        if isinstance(value, partial):
            parts = {"args": value.args, **value.keywords}
            return {"partial": self.of(value.func, path), **self._entries(parts, path)}
        if isinstance(value, MethodType):
            return {"method": value.__func__.__qualname__, "of": self.of(value.__self__, path)}
        if isinstance(value, FunctionType):
            return self._function(value, path)
        if isinstance(value, BuiltinFunctionType):
            return f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, CodeType):
            return [_digest(value.co_code), list(value.co_names), self.of(value.co_consts, path)]
        if hasattr(value, "__wrapped__") and hasattr(value, "__qualname__"):  # a function with a cache
            return self.of(value.__wrapped__, path)
        return self._by_parts(value, path)

    def _module(self, module: nn.Module, path: str) -> Any:
        if id(module) in self.met:
            return f"the same as {self.met[id(module)][0] or 'the whole'}"
        self.met[id(module)] = path, module
        kept = {name: item for name, item in vars(module).items() if name not in _OWN_OF_MODULES}
        kept |= {name: list(vars(module)[name].values()) for name in _HOOKS if vars(module).get(name)}
        if self.weights and type(module).get_extra_state is not nn.Module.get_extra_state:
            kept["extra state"] = module.get_extra_state()
        parameters = {}
        for name, value in sorted(module._parameters.items()):
            parameters[name] = None if value is None else self._parameter(value, f"{path}.{name}".lstrip("."))
        buffers = {name: value for name, value in module._buffers.items() if self.weights}
        found = {
            "attributes": self._entries(_without_caches(module, kept), path),
            "parameters": {name: text for name, text in parameters.items() if text},
            "buffers": self._entries(buffers, path),
            "modules": self._entries(module._modules, path),
        }
        return {"class": _name(type(module)), **{name: one for name, one in found.items() if one}}

    def _parameter(self, value: nn.Parameter, path: str) -> str:
        if id(value) in self.met:
            return f"the same as {self.met[id(value)][0]}"
        self.met[id(value)] = path, value
        dtype = [str(value.dtype)] * (not self.weights and value.dtype != torch.float32)
        return ", ".join([_of_tensor(value)] * self.weights + dtype + ["frozen"] * (not value.requires_grad))

    def _function(self, function: FunctionType, path: str) -> Any:
        """Of functions made by others, what they were made with; of those without a name, the code too."""
        if "<" not in function.__qualname__:
            return _name(function)
        parts: dict[str, Any] = {"defaults": function.__defaults__, "keywords": function.__kwdefaults__}
        if function.__qualname__.endswith("<lambda>"):
            parts["code"] = function.__code__
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                parts[f"closure {name}"] = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        parts = {name: item for name, item in parts.items() if item is not None}
        return {"function": _name(function), **self._entries(parts, path)}

    def _by_parts(self, value: Any, path: str) -> Any:
        """Any other object by what copying takes: what it is made with and its attributes."""
        found: dict[str, Any] = {"class": _name(type(value))}
        if dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
            return found | self._entries(_without_caches(value, fields | getattr(value, "__dict__", {})), path)
        try:
            reduced = value.__reduce_ex__(2)
        except Exception:  # locks, files, foreign handles: whatever they raise, the class is all that can be told
            return found
        if isinstance(reduced, str):
            return {**found, "name": reduced}
        args, state, items, pairs = (*reduced[1:], None, None, None)[:4]
        attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
        parts: dict[str, Any] = {"args": [item for item in args or () if item is not type(value)]}
        parts |= {"items": list(items or ()), "pairs": dict(pairs or ()), "slots": slots or ()}
        told = {f"its {name}": item for name, item in parts.items() if item}
        if isinstance(attributes, dict):
            told |= _without_caches(value, attributes)
        elif attributes is not None:
            told["its state"] = state
        return found | self._entries(told, path)

    def _entries(self, entries: Mapping[Any, Any], path: str) -> dict[str, Any]:
        named = {key if isinstance(key, str) else _text(self._apart(key, path)): item for key, item in entries.items()}
        return {name: self.of(named[name], f"{path}.{name}".lstrip(".")) for name in sorted(named)}

    def _apart(self, value: Any, path: str) -> Any:
        """What does not depend on siblings, which come in any order."""
        return _Description(self.weights, self.met, self.trail).of(value, path)


def _of_tensor(tensor: Tensor) -> str:
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        return f"{type(tensor).__name__}, no values"
    dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    array = dense.cpu().resolve_conj().resolve_neg().contiguous()
    plain = array.reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b""
    return f"{array.dtype} {tuple(array.shape)}, {_digest(plain)}"


def _without_caches(owner: Any, attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: item
        for name, item in attributes.items()
        if not isinstance(getattr(type(owner), str(name), None), cached_property)
    }


def _name(value: Any) -> str:
    module = "__main__" if value.__module__ == "__mp_main__" else value.__module__  # a script, seen by its workers
    return f"{module}.{value.__qualname__}"


def _short(collection: Any) -> Any:
    text = _text(collection)
    return collection if len(text) <= _LONG else f"{len(collection)} entries, {_digest(text.encode())}"


def _text(described: Any) -> str:
    return json.dumps(described, sort_keys=True)


def _digest(content: bytes) -> str:
    return f"sha256 {hashlib.sha256(content).hexdigest()[:32]}"
