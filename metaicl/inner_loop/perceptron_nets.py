"""Which nets are plain perceptrons, so that the kernels of `metaicl.native` may pass torch by.

Wherever somebody could notice that (by hooks, modes, transforms, traces of inner losses), they may not.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metaicl.inner_loop.tracing import is_traced
from metaicl.native.guards import all_modules_are_hooked, is_as_made, is_plain, nobody_watches
from metaicl.native.operators import ACTIVATIONS, MOST_LAYERS, is_available, pays
from metaicl.native.perceptron import Layers

_MOST_WEIGHTS = 1 << 15  # of a layer: torch is as fast with larger ones, which leave a core's caches
_CHAIN = {name: getattr(nn.Sequential, name) for name in ("__call__", "__iter__", "forward")}  # what makes it one


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
    if all_modules_are_hooked():
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


def torch_may_be_passed_by() -> bool:
    """Whether nobody watches what torch does, or changes it."""
    if torch.is_autocast_enabled("cpu"):
        return False
    return torch.compiler.is_compiling() or (nobody_watches() and not is_traced())


def serves(perceptron: Perceptron, parts: Sequence[Tensor], x: Tensor) -> bool:
    """Whether there are kernels for these numbers."""
    n_axes = 3 if not perceptron.flattens else max(3, x.ndim)
    return (
        x.ndim == n_axes
        and x.shape[2:].numel() == perceptron.layers.sizes[0]
        and x.numel() > 0
        and not x.requires_grad
        and all(is_plain(value) and value.dtype == x.dtype for value in (x, *parts))
        and pays(x.shape[0], x.shape[1], perceptron.layers.weights)
        and is_available(x.dtype)
    )


def _flat(prefix: str, module: nn.Module, places: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Add to `places` the layers of nested Sequentials in order, with the prefix of their parameters' names."""
    if not is_as_made(module):
        places.append((prefix, nn.Module()))  # no layer that anyone knows
    elif isinstance(module, nn.Sequential) and all(
        getattr(type(module), name) is rule for name, rule in _CHAIN.items()
    ):
        for name, child in module._modules.items():
            if child is not None:
                _flat(f"{prefix}{name}.", child, places)
    elif type(module) is not nn.Identity:
        places.append((prefix, module))
    return places


def _is_flatten(layer: nn.Module) -> bool:
    return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)
