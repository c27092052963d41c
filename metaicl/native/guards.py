"""Whether anybody could notice that a kernel, and not torch, does some work."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from metaicl.transforms import in_a_transform

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def nobody_watches() -> bool:
    """Whether no mode or transform sees what torch does."""
    return not (
        in_a_transform()
        or torch._C._len_torch_function_stack()  # type: ignore[attr-defined]
        or torch._C._len_torch_dispatch_stack()  # type: ignore[attr-defined]
        or forward_ad._current_level >= 0
    )


def all_modules_are_hooked() -> bool:
    """Whether there are hooks of all modules at once."""
    return module_hooks._has_any_global_hook()  # type: ignore[attr-defined]


def is_as_made(module: nn.Module) -> bool:
    """Whether a module has no hooks, and no forward pass put into the place of its type's."""
    own = module.__dict__
    return "forward" not in own and not any(own[hooks] for hooks in _HOOKS)


def is_plain(value: Tensor) -> bool:
    """Whether a tensor is an ordinary one in memory, as a kernel reads it."""
    plain = type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu" and value.layout is torch.strided
    # A kernel reads memory as it stands; compiled graphs make no such views, and cannot ask.
    return plain and (torch.compiler.is_compiling() or not value.is_neg())
