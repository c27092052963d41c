"""Operations whose fused kernels have no second derivative, or a wrong one, written out where inner loops run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_OPTIONS = ("input", "running_mean", "running_var", "weight", "bias", "statistics", "momentum", "eps")
"""Arguments of torch's batch and instance normalization, in order."""


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Make whatever net runs inside safe under `vmap` and under second derivatives.

    Attention runs by its plain kernel: the fused ones have no second derivative (pytorch issue 116350). Layer, batch
    and instance normalization are written out: in torch 2.13 `vmap` over the native ones gives wrong second
    derivatives, without an error, when their weights differ between tasks. Native batch and instance normalization
    with running statistics are left as they are. Works inside `torch.compile`.
    """
    if torch.compiler.is_compiling():  # a compiled graph writes attention out by itself
        with _WrittenOut():
            yield
    else:
        with _WrittenOut(), sdpa_kernel(SDPBackend.MATH):
            yield


@contextmanager
def hint_at_first_order() -> Iterator[None]:
    """Add a way out to torch's message about an operator without a second derivative, which names the operator."""
    try:
        yield
    except RuntimeError as error:
        if "is not implemented" not in str(error) or "derivative" not in str(error):
            raise
        raise RuntimeError(
            f"{str(error).rstrip('.')}. An inner loop needs the second derivative of every operator of its net: "
            "replace this one, or give the learner first_order=True where it has that option"
        ) from error


class _WrittenOut(TorchFunctionMode):
    """Replaces three functions of torch.nn.functional; as a mode it reaches them inside anyone's modules."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        if func is F.batch_norm or func is F.instance_norm:
            options = {**dict(zip(_OPTIONS, args, strict=False)), **kwargs}
            if options.get("running_mean") is None:
                return _channel_norm(options, over_rows=func is F.batch_norm)
        return func(*args, **kwargs)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    out = _standardize(input, tuple(range(-len(normalized_shape), 0)), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _channel_norm(options: Mapping[str, Any], *, over_rows: bool) -> Tensor:
    """Batch normalization (over rows and places) or instance normalization (over places) of (rows, channels, ...)."""
    x, weight, bias = options["input"], options.get("weight"), options.get("bias")
    places = tuple(range(2, x.ndim))
    out = _standardize(x, (0, *places) if over_rows else places, options.get("eps", 1e-5))
    shape = (-1,) + (1,) * len(places)
    out = out if weight is None else out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)


def _standardize(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centered = x - x.mean(axes, keepdim=True)
    return centered * (centered.square().mean(axes, keepdim=True) + eps).rsqrt()
