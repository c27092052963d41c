"""What gradient-based learners share: checks of their settings, layers that can be factored, plain descent."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count, check_positive
from metaicl.episode import Examples
from metaicl.functional import answer, output_scale
from metaicl.inner_loop.answering import call_tasks
from metaicl.inner_loop.calling import unused_parameters
from metaicl.inner_loop.factored import LinearLayers, Weight
from metaicl.inner_loop.optimizers import SGD, InnerOptimizer
from metaicl.inner_loop.parameters import (
    adapted_tensors,
    check_inner_loop_module,
    frozen_tensors,
    select_parameters,
)
from metaicl.learner import Learner
from metaicl.learners.gradient.support import unroll_support
from metaicl.nets.backbones import build_net
from metaicl.spec import TaskSpec


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
        TypeError, ValueError: As told there; also if nobody named what adapts and the net leaves a parameter unused, or
            if it makes parameters when it is called.
    """
    adapted, before = select_parameters(net, adapt), {name for name, _ in net.named_parameters()}
    unused = unused_parameters(net, spec.x_shape, adapted, integers=spec.x_kind == "tokens")
    made = [name for name, _ in net.named_parameters() if name not in before]
    if made:
        raise ValueError(
            f"{type(net).__name__} makes parameters in its first forward pass, {made[:5]}, after it was chosen what "
            "adapts; call it once on a batch of rows before that"
        )
    if adapt is None and unused:
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
