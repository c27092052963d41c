"""Meta-Curvature: MAML that learns to transform the gradients of its inner loop."""

from metaicl.inner_loop.curvature import Curvature
from metaicl.inner_loop.optimizers import SGD, InnerOptimizer
from metaicl.learners.gradient.maml import HoldsMAML


class MetaCurvature(HoldsMAML):
    """Learn initial weights and linear maps of the inner gradients, one matrix per axis of each tensor.

    The maps start as the identity, where this is MAML. Losses, answer and default net are those of `MAML`, which this
    learner holds as `maml`; the matrices stand in `maml.optimizer.precondition`.

    Args:
        spec: The tasks.
        net: As in `MAML`.
        inner_lr: Step size of the inner loop; None takes MAML's.
        inner_steps: Updates of the inner loop; None takes one.
        first_order: Drop second derivatives.
        adapt: As in `MAML`.
        truncate: As in `MAML`.
        checkpoint: As in `MAML`.

    Raises:
        TypeError, ValueError: As `MAML`.

    Reference:
        Park & Oliva, 2019, arXiv:1902.03356 (MC2). Biases and other vectors get a learned scale per element.
    """

    @staticmethod
    def make_optimizer(lr: float) -> InnerOptimizer:
        """Gradient descent on transformed gradients."""
        return SGD(lr, precondition=Curvature())
