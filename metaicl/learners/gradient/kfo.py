"""MAML with a Kronecker-factored meta-optimizer: a learned map of each gradient of the inner loop."""

from collections.abc import Iterable

from torch import nn

from metaicl.inner_loop.curvature import Kronecker
from metaicl.inner_loop.optimizers import SGD
from metaicl.learners.gradient.maml import HoldsMAML, choose_inner_lr
from metaicl.spec import TaskSpec


class KFO(HoldsMAML):
    """Learn initial weights, and apart from them how to adapt: a map of the inner gradients for each tensor.

    What serves adaptation alone needs no room in the net, which may then be small: MAML needs a deep net even where a
    linear one could solve every task. The maps start as the identity, where this is MAML; they stand in
    `maml.optimizer.precondition`. `adapt="head.*"` gives ANIL + KFO.

    Args:
        spec: The tasks.
        net: As in `MAML`.
        inner_lr: Step size of the inner loop; None takes MAML's.
        inner_steps: Updates of the inner loop.
        first_order: As in `MAML`.
        adapt: As in `MAML`.
        truncate: As in `MAML`.
        checkpoint: As in `MAML`.

    Raises:
        TypeError, ValueError: As `MAML`.

    Reference:
        Arnold, Iqbal & Sha, 2021, arXiv:1910.13603 (Meta-KFO), by the linear positive maps and the five inner steps of
        the authors' code. Differs: no nonlinear maps; maps do not change within a task, as they do in that code from
        the second inner step on.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        net: nn.Module | None = None,
        inner_lr: float | None = None,
        inner_steps: int = 5,
        first_order: bool = False,
        adapt: str | Iterable[str] | None = None,
        truncate: int | None = None,
        checkpoint: bool | int = False,
    ) -> None:
        """Build the MAML inside."""
        optimizer = SGD(choose_inner_lr(spec, inner_lr), precondition=Kronecker())
        super().__init__(
            spec, net=net, optimizer=optimizer, inner_steps=inner_steps, first_order=first_order, adapt=adapt,
            truncate=truncate, checkpoint=checkpoint,
        )  # fmt: skip
