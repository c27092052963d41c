"""Which parameters an inner loop adapts, and which nets it refuses."""

import fnmatch
from collections.abc import Collection, Iterable
from difflib import get_close_matches

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def select_parameters(net: nn.Module, patterns: str | Iterable[str] | None) -> frozenset[str]:
    """Names of the trainable parameters of `net` that match any of the shell-style `patterns`.

    None selects all but word vectors: their table is too large to copy for each task, and a support moves few rows.

    Raises:
        ValueError: If there are no trainable parameters, or a pattern matches none of them (the message names close
            ones, or the frozen ones that it matches), or None leaves nothing.
    """
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    if not names:
        raise ValueError(f"{type(net).__name__} has no trainable parameters to adapt")
    if patterns is None:
        tables = {f"{name}.weight" for name, layer in net.named_modules() if isinstance(layer, nn.Embedding)}
        if tables.issuperset(names):
            raise ValueError(f"{type(net).__name__} has only word vectors to adapt; name them if they should: {names}")
        return frozenset(names) - tables
    frozen = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = fnmatch.filter(names, pattern)
        if not found and (still := fnmatch.filter(frozen, pattern)):
            hint = "call requires_grad_() on what should adapt"
            raise ValueError(f"the pattern {pattern!r} matches frozen parameters only, such as {still[:3]}; {hint}")
        if not found:
            close = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(f"the pattern {pattern!r} matches no parameter; there are {len(names)}, such as {close}")
        chosen.update(found)
    return frozenset(chosen)


def adapted_tensors(net: nn.Module, adapted: Collection[str]) -> dict[str, Tensor]:
    """Parameters of `net` that are adapted: where every task starts."""
    return {name: value for name, value in net.named_parameters() if name in adapted}


def frozen_tensors(net: nn.Module, adapted: Collection[str]) -> dict[str, Tensor]:
    """Parameters of `net` that are not adapted, and copies of its buffers, which a forward pass may write into."""
    named = {name: value for name, value in net.named_parameters() if name not in adapted}
    return {**named, **{name: value.clone() for name, value in net.named_buffers()}}


def check_inner_loop_module(net: nn.Module) -> None:
    """Refuse what the batched inner loop cannot serve: running statistics, torch's recurrent layers, float16.

    Raises:
        ValueError: If a normalization layer tracks running statistics, a layer is an RNN, GRU, LSTM or their cell, or
            a parameter is float16.
    """
    check_no_running_statistics(net)
    check_precision(net)
    kinds = (nn.RNNBase, nn.RNNCellBase)
    recurrent = [name or type(layer).__name__ for name, layer in net.named_modules() if isinstance(layer, kinds)]
    if recurrent:
        raise ValueError(
            "the batched inner loop cannot serve torch's recurrent layers, which vmap does not know; "
            f"{type(net).__name__} has {recurrent[:5]}. Write the recurrence with nn.Linear, "
            "or adapt task by task with metaicl.interop.higher.HigherMAML"
        )


def check_precision(net: nn.Module) -> None:
    """Refuse float16.

    Raises:
        ValueError: If a parameter is float16.
    """
    half = [name for name, parameter in net.named_parameters() if parameter.dtype == torch.float16]
    if half:
        raise ValueError(
            "an inner loop cannot run in float16, where gradients and products of them underflow; "
            f"{type(net).__name__} has float16 parameters {half[:5]}. Keep it in float32 (.float()), "
            'and train with autocast="bf16" to save memory'
        )


def check_no_running_statistics(net: nn.Module) -> None:
    """Refuse running statistics: a forward pass would write into the module, and once per task at that.

    Raises:
        ValueError: If a normalization layer tracks running statistics.
    """
    tracking = [
        name for name, layer in net.named_modules() if isinstance(layer, _NormBase) and layer.track_running_stats
    ]
    if tracking:
        raise ValueError(
            f"an inner loop cannot use running statistics; {type(net).__name__} tracks them in {tracking[:5]}. "
            "Use GroupNorm or LayerNorm, metaicl.nets.norm.BatchStatNorm for the batch statistics of the papers, or "
            "metaicl.nets.norm.freeze_statistics(net) to keep those of a pretrained net"
        )
