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

from metaicl.nets.norm import channel_norm, standardize
from metaicl.nets.recurrence import WRITTEN_OUT

_FUNCTIONAL = ("input", "running_mean", "running_var", "weight", "bias")
_TORCH = ("input", "weight", "bias", "running_mean", "running_var")
_CHANNEL_NORMS = {
    F.batch_norm: (*_FUNCTIONAL, "training", "momentum", "eps"),
    torch.batch_norm: (*_TORCH, "training", "momentum", "eps"),
    F.instance_norm: (*_FUNCTIONAL, "use_input_stats", "momentum", "eps"),
    torch.instance_norm: (*_TORCH, "use_input_stats", "momentum", "eps"),
}
"""Arguments of torch's batch and instance normalization, in order."""

_NATIVE = {torch.native_layer_norm: "layer_norm", torch.native_batch_norm: "batch_norm"}
"""Kernels that give their statistics too, and what to call instead."""

_BAG = (
    "input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
    "per_sample_weights", "include_last_offset", "padding_idx",
)  # fmt: skip
"""Arguments of torch's embedding_bag, in order."""

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
        ("embedding_renorm_",),
        "An embedding with max_norm writes into its table at every call: use max_norm=None, and scale the words that "
        "it gives",
    ),
    (
        ("SparseCPU",),
        "Gradients of an embedding with sparse=True cannot be mapped over tasks: use sparse=False",
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
        if func is F.embedding_bag:
            return _embedding_bag({**dict(zip(_BAG, args, strict=False)), **kwargs})
        if func is F.layer_norm or func is torch.layer_norm:
            return _layer_norm(*args, **kwargs)
        if func in _CHANNEL_NORMS:
            names = _CHANNEL_NORMS[func]
            options, over_rows = {**dict(zip(names, args, strict=False)), **kwargs}, "training" in names
            if options.get("running_mean") is None and options.get(names[5], not over_rows):
                return _channel_norm(options, over_rows=over_rows)
        if func in _NATIVE:
            name = _NATIVE[func]
            raise RuntimeError(f"torch.native_{name} has wrong second derivatives over tasks; call F.{name} instead")
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


def _embedding_bag(options: dict[str, Any]) -> Tensor:
    """In torch 2.13 `vmap` takes the indices that the kernel returns for floating ones."""
    bag = {name: options.pop(name, None) for name in ("offsets", "mode", "per_sample_weights", "include_last_offset")}
    x, padding, scale = options["input"], options.pop("padding_idx", None), bag["per_sample_weights"]
    starts = bag["offsets"]
    mode = bag["mode"] or "mean"
    if x.ndim != (2 if starts is None else 1) or (scale is not None and (mode != "sum" or scale.shape != x.shape)):
        return F.embedding_bag(**options, **{**bag, "mode": mode})  # which says what is wrong
    found = _embedding(options)
    found = found if scale is None else found * scale[..., None]
    real = torch.ones_like(x, dtype=torch.bool) if padding is None else x != padding % len(options["weight"])
    if starts is not None:
        places = torch.arange(len(x), device=x.device)
        ends = torch.cat([starts[1:], starts.new_full((1,), len(x))])
        inside = (starts[:, None] <= places) & (places < ends[:, None])
        real = real & (inside[:-1] if bag["include_last_offset"] else inside)  # a bag each, all words
    real = real[..., None]
    if mode == "max":
        return torch.where(real.any(-2), found.where(real, -torch.inf).max(-2).values, 0.0)
    total = found.where(real, 0.0).sum(-2)
    return total / real.sum(-2).clamp(min=1) if mode == "mean" else total


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    shape = tuple(normalized_shape)
    for name, part in (("input", input.shape[-len(shape) :]), ("weight", weight), ("bias", bias)):
        got = part if part is None or isinstance(part, tuple) else part.shape
        if got is not None and got != shape:
            expected = f"end in normalized_shape={shape}" if name == "input" else f"be of normalized_shape={shape}"
            raise ValueError(f"layer_norm: {name} must {expected}; got {tuple(got)} with input {tuple(input.shape)}")
    out = standardize(input, tuple(range(-len(shape), 0)), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _channel_norm(options: Mapping[str, Any], *, over_rows: bool) -> Tensor:
    x, eps = options["input"], options.get("eps", 1e-5)
    return channel_norm(x, options.get("weight"), options.get("bias"), over_rows=over_rows, eps=eps)


def _weight_norm(direction: Tensor, length: Tensor, dim: int = 0) -> Tensor:
    axes = tuple(axis for axis in range(direction.ndim) if dim == -1 or axis != dim % direction.ndim)
    return direction * (length / direction.square().sum(axes, keepdim=dim != -1).sqrt())
