"""A linear layer whose matrix products may run in oneDNN, where that is faster than the BLAS torch was built with."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from metaicl.transforms import in_a_transform

_MIN_MULTIPLICATIONS = 2**22  # below, the call itself costs more than it saves


class Linear(nn.Linear):
    """`nn.Linear` with the matrix products of its output and of the gradient of its input in oneDNN where that pays.

    On AMD processors with AVX-512 the BLAS of torch (MKL) takes its AVX2 path, oneDNN does not; the precision is the
    same. Everything else goes to `F.linear`: other devices and dtypes, small products, autocast, `torch.func`
    transforms, forward-mode differentiation, `torch.compile`. Second derivatives work and are computed by `F.linear`'s
    own operators.

    Attributes:
        onednn: The switch, for all layers: None decides by the processor, True and False by command.
    """

    onednn: ClassVar[bool | None] = None

    def forward(self, input: Tensor) -> Tensor:
        """Outputs (..., n_out) of inputs (..., n_in)."""
        if self._pays(input):
            return _OneDNN.apply(input, self.weight, self.bias)  # type: ignore[return-value]  # untyped in torch
        return F.linear(input, self.weight, self.bias)

    def _pays(self, input: Tensor) -> bool:
        if Linear.onednn is False or torch.compiler.is_compiling():
            return False
        return (
            (Linear.onednn or (_is_faster() and input.numel() * self.out_features >= _MIN_MULTIPLICATIONS))
            and input.ndim >= 2
            and input.numel() > 0
            and all(_is_plain(part) for part in (input, self.weight))
            and not torch.is_autocast_enabled("cpu")
            and not in_a_transform()
            and forward_ad._current_level < 0
            and is_available()
        )


def is_available() -> bool:
    """Whether this build of torch has oneDNN's linear operator, and it is not switched off in torch.backends.mkldnn."""
    return torch.backends.mkldnn.is_available() and _enabled() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _enabled() -> bool:
    return bool(torch._C._get_mkldnn_enabled())


def _is_faster() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and type(tensor) in (Tensor, nn.Parameter)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """A @ b.T + bias, for a (..., n) and b (m, n)."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _OneDNN(torch.autograd.Function):
    """x W^T + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        slope = slopes[0].contiguous()
        rows, slopes_of_rows = x.flatten(0, -2), slope.flatten(0, -2)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        of_bias = slopes_of_rows.sum(0) if wants_bias else None
        if torch.is_grad_enabled():  # a graph of this backward pass is wanted: use operators that have derivatives
            of_x = slope @ weight if wants_x else None
        else:
            of_x = _product(slope, weight.mT) if wants_x else None
        # oneDNN's operator would copy both sides of this product, which takes longer than it gains.
        return of_x, slopes_of_rows.mT @ rows if wants_weight else None, of_bias
