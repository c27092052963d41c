"""Which nets are plain perceptrons, and their inner loops and answers by the kernels of `metaicl.native`.

What is computed is what the engine computes for any net; derivatives of the meta-gradient are the engine's. Wherever
somebody could notice that torch was passed by (hooks, modes, transforms, traces of inner losses), or asks for something
that the kernels do not know, the engine serves.

Reference: the way back is that of Finn, Abbeel & Levine, 2017, arXiv:1703.03400, by Hessian-vector products after
Pearlmutter, 1994, Neural Computation 6(1).
"""

import functools
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from metaicl.inner_loop.optimizers import SGD, InnerOptimizer, Slots
from metaicl.inner_loop.parameters import Params
from metaicl.inner_loop.rates import LearnedRate
from metaicl.inner_loop.tracing import is_traced
from metaicl.native import perceptron as kernels
from metaicl.native.operators import ACTIVATIONS, MOST_LAYERS, is_available, pays
from metaicl.native.perceptron import Descent, Layers
from metaicl.transforms import in_a_transform

_MOST_WEIGHTS = 1 << 15  # of a layer: torch is as fast with larger ones, which leave a core's caches
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Supervised = tuple[Tensor, Tensor, Tensor | None]  # x (B, N, ...), y, mask (B, N)


class Perceptron(NamedTuple):
    """A net of linear layers with one kind of activation between them.

    Attributes:
        names: Of its parameters: matrix and bias of each layer in turn.
        parts: These parameters.
        layers: Their sizes.
        flattens: Whether it begins by making vectors of its inputs.
    """

    names: list[str]
    parts: list[Tensor]
    layers: Layers
    flattens: bool


def as_perceptron(net: nn.Module) -> Perceptron | None:
    """`net` as a perceptron; None if it is another net, or does more than its layers say."""
    if module_hooks._has_any_global_hook():  # type: ignore[attr-defined]
        return None
    places = _flat("", net, [])
    flattens = bool(places) and _is_flatten(places[0][1])
    places = places[flattens:]
    linear, between = places[::2], places[1::2]
    if any(type(layer) is nn.Linear for _, layer in between):  # no activations: layer after layer
        linear, between = places, []
    activations = {type(layer) for _, layer in between}
    if not 1 <= len(linear) <= MOST_LAYERS or len(activations) > 1 or (between and len(between) != len(linear) - 1):
        return None
    activation = ACTIVATIONS.get(activations.pop() if activations else None)
    if activation is None or not all(type(layer) is nn.Linear for _, layer in linear):
        return None
    layers = [layer for _, layer in linear if isinstance(layer, nn.Linear)]
    if any(layer.bias is None or layer.weight.numel() > _MOST_WEIGHTS for layer in layers):
        return None
    # Sizes are those of the tensors: whoever prunes a layer by hand leaves in_features and out_features as they were.
    if any(layer.weight.ndim != 2 or layer.bias.shape != layer.weight.shape[:1] for layer in layers):
        return None
    if any(one.weight.shape[0] != other.weight.shape[1] for one, other in pairwise(layers)):
        return None
    names = [f"{prefix}{name}" for prefix, _ in linear for name in ("weight", "bias")]
    parts = [part for layer in layers for part in (layer.weight, layer.bias)]
    if len(set(map(id, parts))) < len(parts):  # tied
        return None
    sizes = (layers[0].weight.shape[1], *(layer.weight.shape[0] for layer in layers))
    return Perceptron(names, parts, Layers(sizes, activation), flattens)


def descend(
    net: nn.Module,
    adapted: Collection[str],
    data: Supervised,
    *,
    outputs: int,
    by_torch: Callable[..., list[dict[str, Tensor]]],
    steps: int,
    optimizer: InnerOptimizer,
    first_order: bool | Tensor = False,
    truncate: int | None = None,
    whole: bool = True,
) -> list[dict[str, Any]] | None:
    """What `unroll_path` gives for a supervised loss; None where its own way has to be taken.

    Args:
        net: What adapts.
        adapted: Names of the parameters that adapt.
        data: Supports of B tasks.
        outputs: Classes, or numbers to a target.
        by_torch: (params, optimizer) -> the same by `unroll_path`, from the start and by the rule given.
        steps: As in `unroll_path`, like all that follow.
        optimizer: The update rule, bound.
        first_order: Drop second derivatives, or a gate.
        truncate: Second order in the last so many steps only.
        whole: False leaves out all steps but the last.
    """
    x, y, mask = data
    plain = type(optimizer) is SGD and optimizer.is_plain  # a subclass may have a rule of its own
    found = as_perceptron(net) if plain and steps > 0 and _torch_may_be_passed_by() else None
    if found is None or not _serves(found, found.parts, x) or found.layers.sizes[-1] != outputs:
        return None
    x = x.flatten(2) if found.flattens else x
    labels = not y.is_floating_point()
    expected = x.shape[:2] if labels else (*x.shape[:2], outputs)
    if y.shape != expected or y.requires_grad or y.dtype not in (torch.long, x.dtype):
        return None
    if labels and not torch.compiler.is_compiling() and not bool(((y >= 0) & (y < outputs)).all()):
        return None  # torch knows what to say
    wanted = tuple(name in adapted for name in found.names)

    def again(rates: Tensor, *start: Tensor) -> tuple[Tensor, ...]:
        path = by_torch(dict(zip(found.names, start, strict=True)), _GivenRates(rates, found))
        return tuple(fast[name] for fast in path for name, own in zip(found.names, wanted, strict=True) if own)

    descent = Descent(
        x.contiguous(), y.contiguous(), _importance(mask, x), _order(first_order), steps,
        exact_from=0 if truncate is None else max(0, steps - truncate), wanted=list(wanted), whole=whole,
        sizes=list(found.layers.sizes), activation=found.layers.activation,
    )  # fmt: skip
    fast = kernels.descend(descent, _rates(optimizer, found, wanted, steps), found.parts, again)
    names = [name for name, own in zip(found.names, wanted, strict=True) if own]
    return [dict(zip(names, fast[i : i + len(names)], strict=True)) for i in range(0, len(fast), len(names))]


def answers(
    net: nn.Module, fast: Params, frozen: Params, x: Tensor, by_torch: Callable[[Params, Params], Tensor]
) -> Tensor | None:
    """What `call_tasks` gives for weights that are formed; None where its own way has to be taken.

    Args:
        net: The net.
        fast: Weights of each task.
        frozen: Weights that tasks share.
        x: Inputs (B, Q, ...).
        by_torch: (fast, frozen) -> the same by `call_tasks`.
    """
    found = as_perceptron(net) if _torch_may_be_passed_by() else None
    if found is None or {*fast, *frozen} != set(found.names):
        return None
    parts = [fast[name] if name in fast else frozen[name] for name in found.names]
    if not _serves(found, parts, x):
        return None
    for name, part, shape in zip(found.names, parts, found.layers.shapes, strict=True):
        if part.shape != ((len(x), *shape) if name in fast else shape):
            return None

    def again(*parts: Tensor) -> tuple[Tensor]:
        given = dict(zip(found.names, parts, strict=True))
        return (by_torch({name: given[name] for name in fast}, {name: given[name] for name in frozen}),)

    return kernels.answer(found.layers, (x.flatten(2) if found.flattens else x).contiguous(), parts, again)


class _GivenRates(InnerOptimizer):
    """Gradient descent with a rate for every element, taken from one tensor (1 or steps, parameters)."""

    def __init__(self, rates: Tensor, perceptron: Perceptron) -> None:
        super().__init__(clip_norm=None, precondition=None)
        sizes = [part.numel() for part in perceptron.parts]
        self.given = dict(zip(perceptron.names, rates.split(sizes, -1), strict=True))

    def update(self, name: str, value: Tensor, gradient: Tensor, slots: Slots, step: int) -> tuple[Tensor, Slots]:
        rates = self.given[name]
        return value - rates[min(step, len(rates) - 1)].view(value.shape) * gradient, slots


def _flat(prefix: str, module: nn.Module, places: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Add to `places` the layers of nested Sequentials in order, with the prefix of their parameters' names."""
    own = module.__dict__
    hidden = "forward" in own or any(own[hooks] for hooks in _HOOKS)
    if hidden or not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        places.append((prefix, nn.Module() if hidden else module))
    else:
        for name, child in module._modules.items():
            if child is not None and type(child) is not nn.Identity:
                _flat(f"{prefix}{name}.", child, places)
    return places


def _is_flatten(layer: nn.Module) -> bool:
    return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)


def _torch_may_be_passed_by() -> bool:
    """Whether nobody watches what torch does, or changes it."""
    if torch.is_autocast_enabled("cpu"):
        return False
    return torch.compiler.is_compiling() or not (
        in_a_transform()
        or torch._C._len_torch_function_stack()  # type: ignore[attr-defined]
        or torch._C._len_torch_dispatch_stack()  # type: ignore[attr-defined]
        or forward_ad._current_level >= 0
        or is_traced()
    )


def _serves(perceptron: Perceptron, parts: Sequence[Tensor], x: Tensor) -> bool:
    """Whether there are kernels for these numbers."""
    n_axes = 3 if not perceptron.flattens else max(3, x.ndim)
    return (
        x.ndim == n_axes
        and x.shape[2:].numel() == perceptron.layers.sizes[0]
        and x.numel() > 0
        and not x.requires_grad
        and all(_is_plain_tensor(value) and value.dtype == x.dtype for value in (x, *parts))
        and pays(x.shape[0], x.shape[1], perceptron.layers.weights)
        and is_available(x.dtype)
    )


def _is_plain_tensor(value: Tensor) -> bool:
    plain = type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu" and value.layout is torch.strided
    # A kernel reads memory as it stands; compiled graphs make no such views, and cannot ask.
    return plain and (torch.compiler.is_compiling() or not value.is_neg())


def _order(first_order: bool | Tensor) -> Tensor:
    """What second derivatives are multiplied by."""
    return 1 - first_order.detach() if isinstance(first_order, Tensor) else torch.tensor(1.0 - first_order)


def _importance(mask: Tensor | None, x: Tensor) -> Tensor:
    """What each row of the support counts (B, N): `masked_mean` as a sum."""
    if mask is None:
        return _equal_importance(x.shape[0], x.shape[1], x.dtype)
    weights = mask.to(x.dtype)
    return (weights / weights.sum(1, keepdim=True).clamp(min=1)).contiguous()


@functools.lru_cache(maxsize=8)
def _equal_importance(n_tasks: int, rows: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # what is kept may serve calls that want gradients
        return torch.full((n_tasks, rows), 1 / rows, dtype=dtype)


def _rates(optimizer: InnerOptimizer, perceptron: Perceptron, wanted: Sequence[bool], steps: int) -> Tensor:
    """The rate of every element (1 or steps, parameters), zero where nothing adapts."""
    rate, like = optimizer.rates["lr"], perceptron.parts[0]
    sizes = tuple(part.numel() for part in perceptron.parts)
    if rate.learn is None:
        return _fixed_rates(rate.value, sizes, tuple(wanted), like.dtype)
    learned = optimizer.learned["lr"]
    assert isinstance(learned, LearnedRate)
    rows = steps if rate.per_step else 1
    pieces = [
        torch.stack([learned(name, step).expand(part.shape).reshape(-1) for step in range(rows)])
        if own
        else like.new_zeros(rows, part.numel())
        for name, part, own in zip(perceptron.names, perceptron.parts, wanted, strict=True)
    ]
    return torch.cat(pieces, -1)


@functools.lru_cache(maxsize=8)
def _fixed_rates(value: float, sizes: tuple[int, ...], wanted: tuple[bool, ...], dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # what is kept may serve calls that want gradients
        rates = [torch.full((1, size), value * own, dtype=dtype) for size, own in zip(sizes, wanted, strict=True)]
        return torch.cat(rates, -1)
