"""The inner loss of supervised tasks."""

import torch.nn.functional as F
from torch import Tensor, nn

from metaicl.functional import masked_mean
from metaicl.inner_loop.calling import call_net
from metaicl.inner_loop.loop import Loss
from metaicl.inner_loop.parameters import Params
from metaicl.spec import TaskSpec


def row_loss(spec: TaskSpec, output: Tensor, y: Tensor) -> Tensor:
    """The inner loss of each row, without a reduction over rows.

    Args:
        spec: Its kind decides: cross-entropy in nats for classification, mean over y_dim of squared errors otherwise.
        output: Logits (N, C) or means (N, y_dim).
        y: Class indices (N,) or targets (N, y_dim).

    Returns:
        Losses (N,).

    Raises:
        ValueError: If output or targets are of another shape: targets would be broadcast against outputs.
    """
    check_rows(spec, output, y)
    if spec.kind == "classification":
        return F.cross_entropy(output, y, reduction="none")
    return (output - y).square().mean(-1)


def check_rows(spec: TaskSpec, output: Tensor, y: Tensor) -> None:
    """Check the shapes of what a net says to the rows of one task, and of their targets.

    Args:
        spec: The tasks.
        output: Logits (N, C) or means (N, y_dim).
        y: Class indices (N,) or targets (N, y_dim).

    Raises:
        ValueError: If one has another shape: targets would be broadcast against outputs.
    """
    expected = (len(y), spec.output_size)
    if not isinstance(output, Tensor) or output.shape != expected:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        what = "n_way logits" if spec.kind == "classification" else "y_dim means"
        raise ValueError(f"the net must turn {len(y)} rows into a tensor {expected} of {what} each; got {got}")
    if spec.kind == "regression" and y.shape != expected:
        hint = "; give them an axis y_dim, y[..., None]" if y.ndim == 1 else ""
        raise ValueError(f"targets of {len(y)} rows must be {expected} as the net's means; got {tuple(y.shape)}{hint}")


def support_loss(spec: TaskSpec, net: nn.Module, frozen: Params) -> Loss:
    """The inner loss of one task as a function of (weights, x, y, mask): the mean of `row_loss` over real rows.

    Args:
        spec: The tasks.
        net: (rows, *x_shape) -> (rows, n_way logits or y_dim means).
        frozen: Parameters and buffers of `net` that `weights` will not name.
    """

    def loss(weights: Params, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        output = call_net(net, {**frozen, **weights}, (x,))
        return masked_mean(row_loss(spec, output, y), mask, 0)

    return loss
