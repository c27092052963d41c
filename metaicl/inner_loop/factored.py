"""Fast weights of linear layers that are never formed: after gradient descent they are W_0 plus a product of factors.

A gradient step on a support of n rows changes the weight of a linear layer by -lr * G^T A, with A (n, in) what went
into the layer and G (n, out) the gradient of the loss with respect to what came out. Applying A and G costs
n * (in + out) per row instead of the in * out of a weight of its own for every task, and what all tasks share,
x W_0^T, becomes one matrix product over the whole meta-batch.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from metaicl.inner_loop.calling import call_net, cloned_tensors
from metaicl.inner_loop.parameters import first_floating
from metaicl.transforms import in_a_transform

Shape = tuple[int, ...]

_HARMLESS = tuple(
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda")
)
"""Readings of a weight that do not look at its numbers."""

_PROBES = (2, 3, 9)  # rows: one that goes through its rows in pieces, or counts them, shows with many
_HINT = "the net calls its linear layers otherwise than when the learner was made; make it with factored=False"


class NotFactorable(RuntimeError):
    """The net used a weight in another way than when its layers were looked for."""


class Factors(NamedTuple):
    """A weight (out, in) as W_0 + outputs^T inputs, without W_0; leading axes as those of a weight.

    Attributes:
        inputs: (r, in).
        outputs: (r, out).
    """

    inputs: Tensor
    outputs: Tensor

    def product(self) -> Tensor:
        """outputs^T inputs (out, in): the distance to W_0."""
        return self.outputs.mT @ self.inputs


Weight = Tensor | Factors  # an adapted weight of each task, formed or not
FastWeights = Mapping[str, Weight]
Either = TypeVar("Either", Tensor, Factors)


def no_factors(weight: Tensor) -> Factors:
    """Factors of rank 0 for a weight (out, in)."""
    n_out, n_in = weight.shape
    return Factors(weight.new_zeros(0, n_in), weight.new_zeros(0, n_out))


def descend(value: Either, rate: float | Tensor, gradient: Either) -> Either:
    """One step of gradient descent, value - rate * gradient, where both are factors or none is."""
    if isinstance(gradient, Factors):
        assert isinstance(value, Factors)
        inputs, outputs = gradient.inputs, -rate * gradient.outputs
        if value.inputs.shape[-2] == 0:
            return Factors(inputs, outputs)
        return Factors(torch.cat([value.inputs, inputs], -2), torch.cat([value.outputs, outputs], -2))
    assert isinstance(value, Tensor)
    return value - rate * gradient


class LinearLayers:
    """Which weights of a net can be factored, and what shape comes out of their layers.

    A weight can be factored if the net uses it for nothing but F.linear, however often, outside of transforms of its
    own such as `torch.func.jvp`. The net is run on a few numbers of rows of zeros to see that, and how the shapes grow.

    Args:
        net: Any module; left alone, and the global random state too.
        x_shape: Shape of one row.
        integers: Whether rows hold token ids.
        adapted: Names of the parameters that an inner loop adapts.
        cheaper: Factor only where factors are cheaper than a weight for every task.
    """

    def __init__(
        self, net: nn.Module, x_shape: Shape, *, integers: bool, adapted: Collection[str], cheaper: bool = True
    ) -> None:
        """Run the net."""
        matrices = {name: value for name, value in net.named_parameters() if name in adapted and value.ndim == 2}
        self._sizes = {name: tuple(value.shape) for name, value in matrices.items() if value.is_floating_point()}
        like = first_floating(net)
        x = torch.zeros(max(_PROBES), *x_shape, dtype=torch.long if integers else like.dtype, device=like.device)
        seen = [_output_shapes(net, self._sizes.keys(), x[:rows]) for rows in _PROBES]
        self._grow = {name: _growth([shapes.get(name, []) for shapes in seen]) for name in self._sizes}
        self._cheaper = cheaper

    @property
    def required(self) -> bool:
        """Whether weights must be factored, and not only where it is cheaper."""
        return not self._cheaper

    @property
    def weights(self) -> int:
        """How many numbers the matrices hold that can be factored."""
        return sum(math.prod(self._sizes[name]) for name in self.names)

    @property
    def names(self) -> list[str]:
        """Names of the weights that can be factored."""
        return [name for name in self._sizes if self._grow.get(name)]

    def choose(self, rows: int, steps: int) -> dict[str, list[Shape]]:
        """The weights to factor, and the shapes of what comes out of their layers in one pass over a support.

        Args:
            rows: Rows of the support of one task.
            steps: Steps of the inner loop.
        """
        chosen = {}
        for name in self.names:
            shapes = [tuple(rows * -size if size < 0 else size for size in shape) for shape in self._grow[name]]
            n_out, n_in = self._sizes[name]
            rank = steps * sum(math.prod(shape[:-1]) for shape in shapes)
            if not self._cheaper or rank * (n_in + n_out) <= n_in * n_out:
                chosen[name] = shapes
        return chosen


class FactoredLinear(TorchFunctionMode):
    """Adds factors to F.linear wherever one of some weights is used; as a mode it reaches inside anyone's modules.

    Args:
        weights: W_0 by name, the very tensors that the net will use.
        factors: What to add, without leading axes.
        nudges: Zeros to add to the outputs of each call, whose gradients are then the G of the next factors.
        inputs: Fills with what goes into each layer, if there are nudges.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        factors: Mapping[str, Factors],
        nudges: Mapping[str, Sequence[Tensor]] | None = None,
        inputs: Mapping[str, list[Tensor]] | None = None,
    ) -> None:
        """Keep them."""
        super().__init__()
        self.weights, self.factors, self.nudges, self.inputs = weights, factors, nudges, inputs

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Change F.linear; refuse to let anything else read W_0 for the fast weight."""
        out = func(*args, **(kwargs or {}))
        if func is not F.linear:
            for name, own in self.weights.items():
                if any(leaf is own for leaf in tree_leaves((args, kwargs))) and func not in _HARMLESS:
                    raise NotFactorable(
                        f"the net gives its weight {name} to {getattr(func, '__name__', func)} now, and gave it to "
                        "F.linear alone when the learner was made; make the learner with factored=False"
                    )
            return out
        x, weight = _linear_arguments(args, kwargs or {})
        name = next((name for name, own in self.weights.items() if own is weight), None)
        if name is None:
            return out
        factors = self.factors[name]
        if factors.inputs.shape[-2]:
            out = out + (x @ factors.inputs.mT) @ factors.outputs
        if self.nudges is None or self.inputs is None:
            return out
        call, nudges = len(self.inputs[name]), self.nudges[name]
        if call == len(nudges) or nudges[call].shape != out.shape:
            raise NotFactorable(f"{_HINT}: call {call + 1} of {name} gives {tuple(out.shape)}")
        self.inputs[name].append(x)
        return out + nudges[call]


def check_all_called(inputs: Mapping[str, Sequence[Tensor]], nudges: Mapping[str, Sequence[Tensor]]) -> None:
    """Refuse a net that used a layer less often than it did when the learner was made.

    Raises:
        NotFactorable: If it did.
    """
    for name, expected in nudges.items():
        if len(inputs[name]) != len(expected):
            raise NotFactorable(f"{_HINT}: it calls {name} {len(inputs[name])} times")


def split(fast: FastWeights) -> tuple[dict[str, Tensor], dict[str, Factors]]:
    """Plain weights and factors."""
    plain = {name: value for name, value in fast.items() if not isinstance(value, Factors)}
    return plain, {name: value for name, value in fast.items() if isinstance(value, Factors)}


def applied(weights: Mapping[str, Tensor], factors: Mapping[str, Factors]) -> AbstractContextManager[Any]:
    """A context in which a net with `weights` acts as if `factors` had been added to them."""
    return FactoredLinear({name: weights[name] for name in factors}, factors) if factors else nullcontext()


def formed(weights: Mapping[str, Tensor], fast: FastWeights) -> dict[str, Tensor]:
    """Fast weights as plain tensors with leading axis B, whatever was kept as factors of the change of `weights`."""
    plain, factors = split(fast)
    return plain | {name: weights[name] + value.product() for name, value in factors.items()}


def rows_of(tensors: Sequence[Tensor]) -> Tensor:
    """Rows (r, features) of tensors (..., features)."""
    return torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])


def _linear_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    x = args[0] if args else kwargs["input"]
    return x, args[1] if len(args) > 1 else kwargs["weight"]


def _output_shapes(net: nn.Module, names: Collection[str], x: Tensor) -> dict[str, list[Shape]]:
    """What comes out of the layers that use their weight for nothing but F.linear, call by call."""
    tensors = cloned_tensors(net)
    watch = _Watch({name: tensors[name] for name in names})
    with torch.random.fork_rng(), torch.no_grad(), watch:
        call_net(net, tensors, (x,))
    return {name: shapes for name, shapes in watch.shapes.items() if shapes and name not in watch.used_otherwise}


class _Watch(TorchFunctionMode):
    """Notes how weights are used."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(value): name for name, value in weights.items()}
        self.shapes: dict[str, list[Shape]] = {name: [] for name in weights}
        self.used_otherwise: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        used = [self.names[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.names]
        if func is F.linear and used:
            _, weight = _linear_arguments(args, kwargs or {})
            # Within a transform of the net's own a layer sees one row, and its input would leak out of the transform.
            if used == [self.names.get(id(weight))] and not in_a_transform():
                self.shapes[used.pop()].append(tuple(out.shape))
        if func not in _HARMLESS:
            self.used_otherwise.update(used)
        return out


def _growth(seen: Sequence[Sequence[Shape]]) -> list[Shape]:
    """Shapes with minus the size per row wherever a size grows with the rows; nothing if they grow otherwise."""
    if len({tuple(map(len, shapes)) for shapes in seen}) != 1:
        return []
    grown = []
    for shapes in zip(*seen, strict=True):  # of one call, for each number of rows
        sizes = []
        for axis in zip(*shapes, strict=True):
            if len(set(axis)) == 1:
                sizes.append(axis[0])
            elif all(size * _PROBES[0] == axis[0] * rows for size, rows in zip(axis, _PROBES, strict=True)):
                sizes.append(-(axis[0] // _PROBES[0]))
            else:
                return []
        grown.append(tuple(sizes))
    return grown
