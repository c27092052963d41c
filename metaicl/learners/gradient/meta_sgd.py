"""Meta-SGD: MAML that learns a step size and a direction for every weight."""

from collections.abc import Iterable

from torch import nn

from metaicl.inner_loop.optimizers import SGD
from metaicl.inner_loop.rates import Rate
from metaicl.learners.gradient.maml import HoldsMAML, choose_inner_lr
from metaicl.spec import TaskSpec


class MetaSGD(HoldsMAML):
    """Learn initial weights and, for each of them, the step size of the inner loop.

    Rates are free numbers and may turn negative, as in the paper. Losses, answer and default net are those of `MAML`,
    which this learner holds as `maml`.

    Args:
        spec: The tasks.
        net: As in `MAML`.
        inner_lr: Where all rates start; None takes MAML's.
        inner_steps: Updates of the inner loop; the paper takes one.
        first_order: Drop second derivatives.
        adapt: As in `MAML`.
        truncate: As in `MAML`.
        checkpoint: As in `MAML`.

    Raises:
        TypeError, ValueError: As `MAML`.

    Reference:
        Li et al. 2017, arXiv:1707.09835, Algorithm 1. Differs: rates start at one value instead of random ones; with
        more than one inner step all steps share them.
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
        optimizer = SGD(Rate(choose_inner_lr(spec, inner_lr), "element", relative=False))
        super().__init__(
            spec, net=net, optimizer=optimizer, inner_steps=inner_steps, first_order=first_order, adapt=adapt,
            truncate=truncate, checkpoint=checkpoint,
        )  # fmt: skip
