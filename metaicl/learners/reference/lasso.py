"""The Lasso: least squares with a penalty on absolute weights, for sparse linear tasks."""

import torch
from torch import Tensor

from metaicl.checks import check_count, check_positive
from metaicl.learners.reference.moments import MomentLearner
from metaicl.nets.moments import Moments
from metaicl.spec import TaskSpec


class Lasso(MomentLearner):
    """Minimizes (1/2N) |X W - Y|^2 + penalty |W|_1 by accelerated proximal gradient (FISTA), without an intercept.

    Args:
        spec: Vector inputs, regression.
        penalty: On absolute weights, relative to the mean over rows (scikit-learn's alpha).
        steps: Iterations. The error falls as 1 / steps^2 at least; small penalties on correlated rows need more.
        scale: Standard deviation of the answer.

    Reference:
        Tibshirani, 1996, JRSS B 58; Beck & Teboulle, 2009, SIAM J. Imaging Sciences 2, equations 4.1 to 4.3.
    """

    def __init__(self, spec: TaskSpec, *, penalty: float = 0.01, steps: int = 500, scale: float = 1.0) -> None:
        """Keep the settings."""
        super().__init__(spec, scale=scale)
        self.strength, self.steps = check_positive("penalty", penalty), check_count("steps", steps)

    def weights(self, moments: Moments) -> Tensor:
        """The last iterate."""
        count = moments.count.clamp(min=1)[..., None, None]
        gram, cross = moments.gram / count, moments.cross / count
        largest = torch.linalg.eigvalsh(gram)[..., -1:, None]
        rate = 1 / torch.where(largest > 0, largest, 1.0)  # no row at all leaves zero
        weights = ahead = torch.zeros_like(cross)
        pace = 1.0
        for _ in range(self.steps):
            stepped = ahead - rate * (gram @ ahead - cross)
            after = stepped.sign() * (stepped.abs() - rate * self.strength).clamp(min=0)
            next_pace = (1 + (1 + 4 * pace**2) ** 0.5) / 2
            weights, ahead, pace = after, after + (pace - 1) / next_pace * (after - weights), next_pace
        return weights
