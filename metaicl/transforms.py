"""Whether a transform of torch.func is at work; torch has no public way to ask, and this one has no stubs."""

import torch


def in_a_transform() -> bool:
    """Whether any runs: `vmap`, `grad`, `jvp`, `functionalize`."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]


def in_vmap() -> bool:
    """Whether `vmap` runs, outermost or within another one."""
    stack = torch._C._functorch.get_interpreter_stack() or []  # type: ignore[attr-defined]
    return any(one.key() == torch._C._functorch.TransformType.Vmap for one in stack)  # type: ignore[attr-defined]
