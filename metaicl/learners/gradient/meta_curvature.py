"""Meta-Curvature: MAML that learns to transform the gradients of its inner loop."""

from collections.abc import Iterable

from torch import nn

from metaicl.inner_loop.curvature import Curvature
from metaicl.inner_loop.optimizers import SGD
from metaicl.learners.gradient.maml import HoldsMAML, choose_inner_lr
from metaicl.spec import TaskSpec


class MetaCurvature(HoldsMAML):
    """Learn initial weights and linear maps of the inner gradients, one matrix per axis of each tensor.

    The maps start as the identity, where this is MAML. Losses, answer and default net are those of `MAML`, which this
    learner holds as `maml`; the matrices stand in `maml.optimizer.precondition`.

    Args:
        spec: The tasks.
        net: As in `MAML`.
        inner_lr: Step size of the inner loop; None takes MAML's.
        inner_steps: Updates of the inner loop.
        first_order: Drop second derivatives.
        adapt: As in `MAML`.
        truncate: As in `MAML`.
        checkpoint: As in `MAML`.

    Raises:
        TypeError, ValueError: As `MAML`.

    Reference:
        Park & Oliva, 2019, arXiv:1902.03356 (MC2). Biases and other vectors get a learned scale per element.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        net: nn.Module | None = None,
        inner_lr: float | None = None,
        inner_steps: int = 1,
        first_order: bool = False,
        adapt: str | Iterable[str] | None = None,
        truncate: int | None = None,
        checkpoint: bool | int = False,
    ) -> None:
        """Build the MAML inside."""
        optimizer = SGD(choose_inner_lr(spec, inner_lr), precondition=Curvature())
        super().__init__(
            spec, net=net, optimizer=optimizer, inner_steps=inner_steps, first_order=first_order, adapt=adapt,
            truncate=truncate, checkpoint=checkpoint,
        )  # fmt: skip
