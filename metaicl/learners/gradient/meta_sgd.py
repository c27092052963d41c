"""Meta-SGD: MAML that learns a step size and a direction for every weight."""

from metaicl.inner_loop.optimizers import SGD, InnerOptimizer
from metaicl.inner_loop.rates import Rate
from metaicl.learners.gradient.maml import HoldsMAML


class MetaSGD(HoldsMAML):
    """Learn initial weights and, for each of them, the step size of the inner loop.

    Rates are free numbers and may turn negative, as in the paper. Losses, answer and default net are those of `MAML`,
    which this learner holds as `maml`.

    Args:
        spec: The tasks.
        net: As in `MAML`.
        inner_lr: Where all rates start; None takes MAML's.
        inner_steps: Updates of the inner loop; None takes one, as the paper does.
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

    @staticmethod
    def make_optimizer(lr: float) -> InnerOptimizer:
        """Gradient descent with a rate for each weight."""
        return SGD(Rate(lr, "element", relative=False))
