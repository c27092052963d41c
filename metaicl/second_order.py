"""Operations whose fused kernels have no second derivative, or a wrong one, written out where inner loops run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from metaicl.nets.recurrence import WRITTEN_OUT

_OPTIONS = ("input", "running_mean", "running_var", "weight", "bias", "statistics", "momentum", "eps")
"""Arguments of torch's batch and instance normalization, in order."""

_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
"""Arguments of torch's embedding, in order."""

_FUSED_WEIGHT_NORM = torch._VF._weight_norm  # type: ignore[attr-defined]  # the same function as torch._weight_norm


_TASK_BY_TASK = "or adapt task by task with metaicl.interop.higher.HigherMAML"
_WAYS_OUT = (
    (
        ("derivative", "is not implemented"),
        "An inner loop needs the second derivative of every operator of its net: replace this one, or give the learner "
        "first_order=True where it has that option",
    ),
    (
        ("saved tensor hooks",),
        "torch.utils.checkpoint and other hooks on saved tensors do not work in a net inside an inner loop; save "
        "memory with the learner's own checkpoint=True",
    ),
    (
        ("setup_context",),
        "The net uses an autograd.Function of the old style (torch.utils.checkpoint with use_reentrant=True and full "
        "backward hooks are such): give it setup_context and generate_vmap_rule=True, or leave it out",
    ),
    (
        ("data-dependent control flow",),
        f"The net branches on the numbers it sees, and they differ between tasks: use torch.where, {_TASK_BY_TASK}",
    ),
    (
        ("operators that can support dynamic shape",),
        "The net makes tensors whose shape depends on numbers, by a boolean mask as an index or by an embedding with "
        f"sparse=True: use torch.where and sparse=False, {_TASK_BY_TASK}",
    ),
    (
        ("vmap: we do not yet support",),
        f"The net uses an operator that cannot be mapped over tasks: replace it, {_TASK_BY_TASK}",
    ),
    (
        ("Batching rule not implemented",),
        "The net uses an operator that cannot be mapped over tasks, or writes into memory that they share, as spectral "
        f"normalization does: replace that layer, {_TASK_BY_TASK}",
    ),
    (
        ("requires_grad_()", "functorch"),
        f"The net differentiates by torch.autograd inside its forward pass: use torch.func.grad there, {_TASK_BY_TASK}",
    ),
    (
        ("called random operation while in randomness error mode",),
        "An implicit gradient needs an inner loss that is the same at every call, and the net draws random numbers: "
        "take its dropout out, or use MAML",
    ),
)
"""Parts of torch's messages, and what to do."""


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Make whatever net runs inside safe under `vmap` and under second derivatives.

    Attention runs by its plain kernel: the fused ones have no second derivative (pytorch issue 116350). Layer, batch
    and instance normalization are written out: in torch 2.13 `vmap` over the native ones gives wrong second
    derivatives, without an error, when their weights differ between tasks. Native batch and instance normalization
    with running statistics are left as they are. The kernel of weight normalization has wrong second derivatives
    even without `vmap`, and those of LSTM, GRU, RNN and their cells are unknown to it: they are written out too, but
    for packed sequences. So is the padding of word tables. Works inside `torch.compile`, which takes no recurrent
    layers.
    """
    if torch.compiler.is_compiling():  # a compiled graph writes attention out by itself
        with _WrittenOut():
            yield
    else:
        with _WrittenOut(), _PLAIN_KERNELS:
            yield


class _PlainKernels:
    """Attention by its plain kernel, inside. Torch's switches are those of the process: the last to leave turns them.

    With a context of its own, the second of two threads would find, and restore, what the first had left.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.switches = Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.switches.enter_context(sdpa_kernel(SDPBackend.MATH))
                self.switches.enter_context(_no_fast_path())
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.switches.close()


_PLAIN_KERNELS = _PlainKernels()


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Keep torch's Transformer layers from the one kernel that they call in evaluation, which vmap does not know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def hint_at_ways_out() -> Iterator[None]:
    """Add to torch's message about a net that it cannot map over tasks, or differentiate twice, what to do instead."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        hint = next((hint for parts, hint in _WAYS_OUT if all(part in str(error) for part in parts)), None)
        if hint is None:
            raise
        raise RuntimeError(f"{str(error).rstrip('. ')}. {hint}") from error


class _WrittenOut(TorchFunctionMode):
    """Replaces some functions of torch; as a mode it reaches them inside anyone's modules."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            return _embedding({**dict(zip(_EMBEDDING, args, strict=False)), **kwargs})
        if func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        if func is F.batch_norm or func is F.instance_norm:
            options = {**dict(zip(_OPTIONS, args, strict=False)), **kwargs}
            if options.get("running_mean") is None:
                return _channel_norm(options, over_rows=func is F.batch_norm)
        if func is _FUSED_WEIGHT_NORM:
            return _weight_norm(*args, **kwargs)
        if func in WRITTEN_OUT and not (len(args) > 3 and isinstance(args[3], Sequence)):  # a packed sequence
            return WRITTEN_OUT[func](*args, **kwargs)
        return func(*args, **kwargs)


def _embedding(options: dict[str, Any]) -> Tensor:
    """In torch 2.13 `vmap` over tables takes the gradient from the padding of the first task alone."""
    padding, x, weight = options.pop("padding_idx", None), options["input"], options["weight"]
    if options.get("scale_grad_by_freq"):
        raise RuntimeError(
            "scale_grad_by_freq=True counts words over the rows of all tasks; leave it out of a net in an inner loop"
        )
    found = F.embedding(**options)
    if padding is None:
        return found
    return torch.where((x == padding % weight.shape[0])[..., None], weight[padding].detach(), found)


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


def _weight_norm(direction: Tensor, length: Tensor, dim: int = 0) -> Tensor:
    axes = tuple(axis for axis in range(direction.ndim) if dim == -1 or axis != dim % direction.ndim)
    return direction * (length / direction.square().sum(axes, keepdim=dim != -1).sqrt())
