"""Which parameters an inner loop adapts, and which nets it refuses."""

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Params = Mapping[str, Tensor]


def select_parameters(net: nn.Module, patterns: str | Iterable[str] | None) -> frozenset[str]:
    """Names of the trainable parameters of `net` that match any of the shell-style `patterns`.

    None selects all but word vectors: their table is too large to copy for each task, and a support moves few rows.

    Raises:
        TypeError: If `patterns` are no strings.
        ValueError: If there are no trainable parameters, or a pattern matches none of them (the message names close
            ones, or the frozen ones that it matches), or there is no pattern, or None leaves nothing.
    """
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    if not names:
        raise ValueError(f"{type(net).__name__} has no trainable parameters to adapt")
    if patterns is None:
        found = beyond_word_vectors(net)
        if not found:
            raise ValueError(f"{type(net).__name__} has only word vectors to adapt; name them if they should: {names}")
        return found
    wanted = [patterns] if isinstance(patterns, str) else patterns
    wanted = list(wanted) if isinstance(wanted, Iterable) else [wanted]
    if not all(isinstance(pattern, str) for pattern in wanted):
        raise TypeError(f"adapt must be patterns of parameter names, such as 'head.*'; got {patterns!r}")
    if not wanted:
        raise ValueError(f"adapt has no pattern, so nothing would adapt; None adapts all {len(names)} parameters")
    frozen = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
    chosen: set[str] = set()
    for pattern in wanted:
        found = fnmatch.filter(names, pattern)
        if not found and (still := fnmatch.filter(frozen, pattern)):
            hint = "call requires_grad_() on what should adapt"
            raise ValueError(f"the pattern {pattern!r} matches frozen parameters only, such as {still[:3]}; {hint}")
        if not found:
            close = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(f"the pattern {pattern!r} matches no parameter; there are {len(names)}, such as {close}")
        chosen.update(found)
    return frozenset(chosen)


def beyond_word_vectors(net: nn.Module) -> frozenset[str]:
    """Names of the trainable parameters of `net` that are no table of word vectors, tied and parametrized ones too."""
    layers = [layer for layer in net.modules() if isinstance(layer, (nn.Embedding, nn.EmbeddingBag))]
    tables = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return frozenset(n for n, value in net.named_parameters() if value.requires_grad and id(value) not in tables)


def named_tensors(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers by name, as `named_parameters` and `named_buffers` have them, in half of the time.

    Every adaptation asks for them, and torch's way took a tenth of one of a small net. A parameter that is registered
    as a buffer too, of some other part, counts as what it is: a parameter.
    """
    kinds = type(net).named_parameters, type(net).named_buffers
    if torch.compiler.is_compiling() or kinds != (nn.Module.named_parameters, nn.Module.named_buffers):
        return dict(net.named_parameters()), dict(net.named_buffers())
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    _gather(net, "", set(), parameters, buffers)
    seen: set[int] = set()
    return _first_names(parameters, seen), _first_names(buffers, seen)


def adapted_tensors(net: nn.Module, adapted: Collection[str]) -> dict[str, Tensor]:
    """Parameters of `net` that are adapted: where every task starts."""
    return {name: value for name, value in named_tensors(net)[0].items() if name in adapted}


def frozen_tensors(net: nn.Module, adapted: Collection[str]) -> dict[str, Tensor]:
    """Parameters of `net` that are not adapted, and copies of its buffers, which a forward pass may write into."""
    parameters, buffers = named_tensors(net)
    named = {name: value for name, value in parameters.items() if name not in adapted}
    return {**named, **{name: value.clone() for name, value in buffers.items()}}


def first_floating(net: nn.Module) -> Tensor:
    """A parameter that says in which dtype and on which device a net computes; a float32 scalar where there is none."""
    return next((value for value in net.parameters() if value.is_floating_point()), torch.empty(()))


def dotless(name: str) -> str:
    """A parameter's name as a name that a module can hold: without dots, and no method of `nn.ParameterDict`."""
    return "/" + name.replace(".", "/")


def check_inner_loop_module(net: nn.Module) -> None:
    """Refuse what the batched inner loop cannot serve: running statistics and float16, and what is no module.

    Raises:
        TypeError: If `net` is no nn.Module, or a scripted one.
        ValueError: If a normalization layer tracks running statistics, or a parameter is float16 or has no shape yet.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"an inner loop needs an nn.Module; got {net!r}")
    if isinstance(net, torch.jit.ScriptModule):
        raise TypeError("an inner loop cannot give other weights to a scripted module; pass the module it was made of")
    lazy = [name for name, value in net.named_parameters() if isinstance(value, nn.UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"{type(net).__name__} has parameters without a shape, {lazy[:5]}; call it once on a batch of rows first"
        )
    check_no_running_statistics(net)
    check_precision(net)


def refuse_complex(name: str, params: Mapping[str, Tensor]) -> None:
    """Refuse complex tensors, for rules that are written for real ones.

    Raises:
        ValueError: Naming the rule and some tensors.
    """
    found = [key for key, value in params.items() if value.is_complex()]
    if found:
        raise ValueError(f"{name} cannot adapt complex parameters, such as {found[:3]}; take MAML with SGD")


def check_precision(net: nn.Module) -> None:
    """Refuse float16.

    Raises:
        ValueError: If a parameter is float16.
    """
    half = [name for name, parameter in named_tensors(net)[0].items() if parameter.dtype == torch.float16]
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


def _gather(
    module: nn.Module, prefix: str, seen: set[int], parameters: dict[str, Tensor], buffers: dict[str, Tensor]
) -> None:
    """Fill in what a module holds and its parts hold, each part under its first name."""
    for tensors, found in ((module._parameters, parameters), (module._buffers, buffers)):
        for name, value in tensors.items():
            if value is not None:
                found[prefix + name] = value
    for name, child in module._modules.items():
        if child is not None and id(child) not in seen:
            seen.add(id(child))
            _gather(child, f"{prefix}{name}.", seen, parameters, buffers)


def _first_names(named: dict[str, Tensor], seen: set[int]) -> dict[str, Tensor]:
    """Each tensor that was not seen yet, under its first name."""
    found = {}
    for name, value in named.items():
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found
