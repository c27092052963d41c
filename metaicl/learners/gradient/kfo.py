"""MAML with a Kronecker-factored meta-optimizer: a learned map of each gradient of the inner loop."""

from metaicl.inner_loop.curvature import Kronecker
from metaicl.inner_loop.optimizers import SGD, InnerOptimizer
from metaicl.learners.gradient.maml import HoldsMAML


class KFO(HoldsMAML):
    """Learn initial weights, and apart from them how to adapt: a map of the inner gradients for each tensor.

    What serves adaptation alone needs no room in the net, which may then be small: MAML needs a deep net even where a
    linear one could solve every task. The maps start as the identity, where this is MAML; they stand in
    `maml.optimizer.precondition`. `adapt="head.*"` gives ANIL + KFO.

    Args:
        spec: The tasks.
        net: As in `MAML`.
        inner_lr: Step size of the inner loop; None takes MAML's.
        inner_steps: Updates of the inner loop; None takes five.
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

    default_steps = 5

    @staticmethod
    def make_optimizer(lr: float) -> InnerOptimizer:
        """Gradient descent on mapped gradients."""
        return SGD(lr, precondition=Kronecker())
