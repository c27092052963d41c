"""What gradient-based learners share: checks, layers that can be factored, the answer they give."""

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count, check_positive
from metaicl.episode import Examples
from metaicl.functional import answer, output_scale
from metaicl.inner_loop.answering import call_tasks
from metaicl.inner_loop.calling import unused_parameters
from metaicl.inner_loop.factored import LinearLayers, NotFactorable, Weight
from metaicl.inner_loop.optimizers import SGD, InnerOptimizer
from metaicl.inner_loop.parameters import (
    Params,
    adapted_tensors,
    check_inner_loop_module,
    check_precision,
    frozen_tensors,
    select_parameters,
)
from metaicl.inner_loop.perceptrons import descend
from metaicl.inner_loop.supervised import support_loss
from metaicl.inner_loop.unrolling import unroll_path
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


class PlainDescent(Learner[dict[str, Weight]]):
    """A learner that adapts by gradient descent on the whole support, which nobody differentiates.

    Args:
        spec: The tasks.
        net: (rows, *x_shape) -> (rows, n_way logits or y_dim means); None builds one from the spec.
        optimizer: The update rule, with nothing to learn.
        adapt: As in `MAML`.

    Raises:
        TypeError, ValueError: If the net or the optimizer cannot be used, or a pattern matches nothing.
    """

    def __init__(
        self, spec: TaskSpec, *, net: nn.Module | None, optimizer: InnerOptimizer, adapt: str | Iterable[str] | None
    ) -> None:
        """Check the net."""
        super().__init__(spec)
        self.net = build_net(spec) if net is None else net
        check_inner_loop_module(self.net)
        self.declare_nets(self.net)
        self.adapted = choose_adapted(spec, self.net, adapt)
        self.optimizer = fixed_optimizer(self, optimizer, adapted_tensors(self.net, self.adapted))
        self.raw_scale = output_scale(spec)

    def descend(self, support: Examples, steps: int) -> dict[str, Weight]:
        """Fast weights of every task after so many steps: the adapted parameters with leading axis B."""
        path = unroll_support(
            self, self.net, self.adapted, None, support, steps=steps, optimizer=self.optimizer,
            shared=frozen_tensors(self.net, self.adapted), first_order=True, whole=False,
        )  # fmt: skip
        return path[-1]

    def predict(self, state: dict[str, Weight], x: Tensor) -> Distribution:
        """Answer with each task's fast weights."""
        return answer(call_tasks(self.net, state, frozen_tensors(self.net, self.adapted), x), self.raw_scale)


def choose_adapted(spec: TaskSpec, net: nn.Module, adapt: str | Iterable[str] | None) -> frozenset[str]:
    """Names of the parameters of `net` to adapt; see `select_parameters`.

    Raises:
        TypeError, ValueError: As told there; also if nobody named what adapts and the net leaves a parameter unused.
    """
    adapted = select_parameters(net, adapt)
    if adapt is None:
        unused = unused_parameters(net, spec.x_shape, adapted, integers=spec.x_kind == "tokens")
        if unused:
            raise ValueError(
                f"{type(net).__name__} never uses {len(unused)} of the {len(adapted)} parameters to adapt, such as "
                f"{unused[:3]}: they would not move. Freeze them with requires_grad_(False), or name what adapts by "
                "adapt=, '*' for all, and they get gradients of zero"
            )
    return adapted


def check_truncate(truncate: int | None) -> int | None:
    """`truncate`, once it is known to be None or an int >= 0.

    Raises:
        TypeError, ValueError: If it is not.
    """
    return None if truncate is None else check_count("truncate", truncate, minimum=0)


def check_checkpoint(checkpoint: bool | int) -> bool | int:
    """`checkpoint`, once it is known to be a bool or an int >= 1.

    Raises:
        TypeError, ValueError: If it is not.
    """
    return checkpoint if isinstance(checkpoint, bool) else check_count("checkpoint", checkpoint)


def fixed_optimizer(learner: Learner[Any], optimizer: InnerOptimizer, start: Mapping[str, Tensor]) -> InnerOptimizer:
    """`optimizer` for the weights that start there, in a learner that differentiates no inner loop.

    Raises:
        ValueError: If it has something to learn, which would get no meta-gradient.
    """
    bound = optimizer.bind(start, steps=1)
    learned = [name for name, value in bound.named_parameters() if value.requires_grad]
    if learned:
        raise ValueError(
            f"{type(learner).__name__} does not differentiate through its inner loop and cannot learn an optimizer; "
            f"give {type(optimizer).__name__} fixed rates, or take MAML. Got learned {learned[:5]}"
        )
    return bound


def choose_optimizer(optimizer: InnerOptimizer | None, inner_lr: float | None, *, default: float) -> InnerOptimizer:
    """The update rule of an inner loop: the one given, or gradient descent with `inner_lr`, or with `default`.

    Raises:
        TypeError: If `optimizer` is no InnerOptimizer.
        ValueError: If both are given, or `inner_lr` is no finite number > 0.
    """
    if optimizer is None:
        return SGD(check_positive("inner_lr", default if inner_lr is None else inner_lr))
    if not isinstance(optimizer, InnerOptimizer):
        hint = "such as metaicl.inner_loop.Adam(0.01); a torch.optim optimizer changes weights in place"
        raise TypeError(f"optimizer must be an InnerOptimizer, {hint}; got {type(optimizer).__name__}")
    if inner_lr is not None:
        raise ValueError(f"give inner_lr or an optimizer, which has its own rate, not both; got inner_lr={inner_lr}")
    return optimizer


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
    chosen = layers.choose(support.n_rows, steps) if layers else {}
    # A compiled graph of factors is faster still than a kernel; their operators one by one are not.
    if not chosen or (layers and not layers.required and not torch.compiler.is_compiling()):
        found = _by_kernels(learner.spec, net, adapted, support, steps=steps, shared=shared, **options)
        if found is not None:
            return found
    run = partial(
        unroll_path, support_loss(learner.spec, net, {}), adapted_tensors(net, adapted),
        (support.x, support.y, support.mask), steps=steps, shared=shared, **options,
    )  # fmt: skip
    if not layers or layers.required:
        return run(layers=chosen)
    try:
        return run(layers=chosen)
    except NotFactorable:
        return run()


def _by_kernels(
    spec: TaskSpec,
    net: nn.Module,
    adapted: Collection[str],
    support: Examples,
    *,
    checkpoint: bool | int = False,
    stepwise: Collection[str] = (),
    **options: Any,
) -> list[dict[str, Weight]] | None:
    """The same by a kernel, where there is one; see `metaicl.inner_loop.perceptrons`."""
    if stepwise or checkpoint not in (False, True):  # a kernel keeps the weights of every step, and no activations
        return None
    data = (support.x, support.y, support.mask)

    def by_torch(params: Params, optimizer: InnerOptimizer) -> list[dict[str, Tensor]]:
        start = {name: value for name, value in params.items() if name in adapted}
        rest = {name: value for name, value in params.items() if name not in adapted}
        settings = {**options, "optimizer": optimizer, "shared": {**options["shared"], **rest}}
        return unroll_path(support_loss(spec, net, {}), start, data, **settings)

    settings = {name: value for name, value in options.items() if name != "shared"}
    return descend(net, adapted, data, outputs=spec.output_size, by_torch=by_torch, **settings)
