"""Which parameters an inner loop adapts, and which nets it refuses."""

import fnmatch
from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def select_parameters(net: nn.Module, patterns: str | Iterable[str] | None) -> frozenset[str]:
    """Names of the trainable parameters of `net` that match any of the shell-style `patterns`.

    None selects all but word vectors: their table is too large to copy for each task, and a support moves few rows.

    Raises:
        ValueError: If there are no trainable parameters, or a pattern matches none (the message names close ones).
    """
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    if not names:
        raise ValueError(f"{type(net).__name__} has no trainable parameters to adapt")
    if patterns is None:
        tables = {f"{name}.weight" for name, layer in net.named_modules() if isinstance(layer, nn.Embedding)}
        return frozenset(names) - tables
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            close = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(f"the pattern {pattern!r} matches no parameter; there are {len(names)}, such as {close}")
        chosen.update(found)
    return frozenset(chosen)


def check_inner_loop_module(net: nn.Module) -> None:
    """Refuse what the batched inner loop cannot serve: running statistics and torch's recurrent layers.

    Raises:
        ValueError: If a normalization layer tracks running statistics, or a layer is an RNN, GRU, LSTM or their cell.
    """
    check_no_running_statistics(net)
    kinds = (nn.RNNBase, nn.RNNCellBase)
    recurrent = [name or type(layer).__name__ for name, layer in net.named_modules() if isinstance(layer, kinds)]
    if recurrent:
        raise ValueError(
            "the batched inner loop cannot serve torch's recurrent layers, which vmap does not know; "
            f"{type(net).__name__} has {recurrent[:5]}. Write the recurrence with nn.Linear, "
            "or adapt task by task with metaicl.interop.higher.HigherMAML"
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
            "Use GroupNorm or LayerNorm, or metaicl.nets.norm.BatchStatNorm for the batch statistics of the papers"
        )
