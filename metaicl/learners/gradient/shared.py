"""What gradient-based learners share: checks, layers that can be factored, the answer they give."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.episode import Examples
from metaicl.functional import categorical, gaussian, positive
from metaicl.inner_loop.answering import call_tasks
from metaicl.inner_loop.factored import LinearLayers, NotFactorable, Weight
from metaicl.inner_loop.optimizers import InnerOptimizer
from metaicl.inner_loop.parameters import (
    adapted_tensors,
    check_inner_loop_module,
    check_precision,
    frozen_tensors,
    select_parameters,
)
from metaicl.inner_loop.supervised import support_loss
from metaicl.inner_loop.unrolling import unroll_path, unroll_tasks
from metaicl.learner import Learner
from metaicl.nets.backbones import build_net
from metaicl.spec import TaskSpec


def check_support(learner: Learner[Any], support: Examples) -> None:
    """Refuse masked rows where a net normalizes by the statistics of all rows, and a learner made float16 since.

    Raises:
        ValueError: If there is a mask and the learner is transductive, or a parameter is float16.
    """
    if support.mask is not None and learner.traits.transductive:
        raise ValueError("a net with batch statistics cannot leave masked rows out; give supports of equal length")
    check_precision(learner)


class PlainDescent(Learner[dict[str, Tensor]]):
    """A learner that adapts by gradient descent on the whole support, which nobody differentiates.

    Args:
        spec: The tasks.
        net: (rows, *x_shape) -> (rows, n_way logits or y_dim means); None builds one from the spec.
        inner_lr: Step size.

    Raises:
        ValueError: If the net cannot be used.
    """

    def __init__(self, spec: TaskSpec, *, net: nn.Module | None, inner_lr: float) -> None:
        """Check the net."""
        super().__init__(spec)
        self.inner_lr = inner_lr
        self.net = build_net(spec) if net is None else net
        check_inner_loop_module(self.net)
        self.declare_nets(self.net)
        self.adapted = select_parameters(self.net, None)
        self.raw_scale = output_scale(spec)

    def descend(self, support: Examples, steps: int) -> dict[str, Tensor]:
        """Fast weights of every task after so many steps: the adapted parameters with leading axis B."""
        check_support(self, support)
        start = adapted_tensors(self.net, self.adapted)
        loss = support_loss(self.spec, self.net, frozen_tensors(self.net, self.adapted))
        data = (support.x, support.y, support.mask)
        return unroll_tasks(loss, start, data, lr=self.inner_lr, steps=steps, first_order=True)

    def predict(self, state: dict[str, Tensor], x: Tensor) -> Distribution:
        """Answer with each task's fast weights."""
        return answer(call_tasks(self.net, state, frozen_tensors(self.net, self.adapted), x), self.raw_scale)


def linear_layers(
    net: nn.Module, spec: TaskSpec, adapted: Collection[str], optimizer: InnerOptimizer, factored: bool | None
) -> LinearLayers | None:
    """The layers whose fast weights can be kept as factors; None if none can be or shall be.

    Args:
        net: What adapts.
        spec: The tasks.
        adapted: Names of the parameters that adapt.
        optimizer: The update rule of the inner loop.
        factored: Whether to factor all layers (True), none (False) or those where it is cheaper (None).

    Raises:
        ValueError: If `factored` is True and no layer can be factored.
    """
    if factored is False or (factored is None and not optimizer.takes_factors):
        return None
    if not optimizer.takes_factors:
        raise ValueError("factored=True needs gradient descent without momentum, decay, clipping or rates per element")
    tokens = spec.x_kind == "tokens"
    try:
        layers = LinearLayers(net, spec.x_shape, integers=tokens, adapted=adapted, cheaper=factored is None)
    except Exception:  # anyone's net, on rows of zeros: it may refuse them, and then its weights are formed
        if factored:
            raise
        return None
    if factored and not layers.names:
        raise ValueError(f"factored=True found no linear layer of {type(net).__name__} that adapts and can be factored")
    return layers


def unroll_support(
    learner: Learner[Any],
    net: nn.Module,
    adapted: Collection[str],
    layers: LinearLayers | None,
    support: Examples,
    *,
    steps: int,
    shared: Mapping[str, Tensor],
    **options: Any,
) -> list[dict[str, Weight]]:
    """`unroll_path` on a support, with linear layers factored where they can be.

    Args:
        learner: Whose tasks and support these are.
        net: What adapts.
        adapted: Names of the parameters that adapt.
        layers: What `linear_layers` found.
        support: B tasks.
        steps: Of the inner loop.
        shared: Tensors of the net that do not adapt.
        options: More arguments of `unroll_path`.

    Raises:
        NotFactorable: If the net uses its layers otherwise than on rows of zeros, and factors are required. Where they
            are not, its weights are formed.
    """
    check_support(learner, support)
    run = partial(
        unroll_path, support_loss(learner.spec, net, {}), adapted_tensors(net, adapted),
        (support.x, support.y, support.mask), steps=steps, shared=shared, **options,
    )  # fmt: skip
    chosen = layers.choose(support.n_rows, steps) if layers else {}
    if not layers or layers.required:
        return run(layers=chosen)
    try:
        return run(layers=chosen)
    except NotFactorable:
        return run()


def output_scale(spec: TaskSpec) -> nn.Parameter | None:
    """The raw scale of a regression answer (y_dim,), a meta-parameter that starts at softplus(0); None otherwise."""
    return nn.Parameter(torch.zeros(spec.output_size)) if spec.kind == "regression" else None


def answer(output: Tensor, raw_scale: Tensor | None) -> Distribution:
    """A distribution with batch shape (B, Q) from the net's output.

    Args:
        output: Logits (B, Q, C) or means (B, Q, y_dim).
        raw_scale: What `output_scale` gave: None makes the answer a distribution over classes.
    """
    return categorical(output) if raw_scale is None else gaussian(output, positive(raw_scale))
