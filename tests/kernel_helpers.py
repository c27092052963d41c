"""What tests of kernels share: who was called, and somebody who watches torch."""

from types import ModuleType

import pytest
from torch.overrides import TorchFunctionMode


def record_calls(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[str]:
    """Names of the kernels that a module calls from now on."""
    found: list[str] = []
    original = module.call

    def call(library: str, name: str, *arguments: object) -> None:
        found.append(name)
        original(library, name, *arguments)

    monkeypatch.setattr(module, "call", call)
    return found


class Watcher(TorchFunctionMode):
    """A mode that changes nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """What torch would do."""
        return func(*args, **(kwargs or {}))
