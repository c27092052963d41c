"""Kernel regression on inputs: a softmax over the support, without anything learned."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from metaicl.checks import check_choice, check_positive
from metaicl.collation import concatenate
from metaicl.episode import Examples
from metaicl.functional import gaussian, squared_distances
from metaicl.learner import Learner, Traits
from metaicl.learners.reference.moments import check_vectors
from metaicl.spec import TaskSpec

_HIDDEN = -1e30  # a score no row can have; finite, so that a support without rows gives no NaN


class Rows(NamedTuple):
    """The support itself: inputs (B, N, D) and targets (B, N, y_dim) in float64, real rows (B, N)."""

    x: Tensor
    y: Tensor
    real: Tensor


class KernelRegression(Learner[Rows]):
    """The mean of the targets, weighted by a softmax of how near the inputs are; no row gives zero.

    Args:
        spec: Vector inputs, regression.
        bandwidth: Width h, in the unit of the inputs (of their inner product for "dot").
        kernel: "gaussian" weighs by exp(-|x - x_i|^2 / 2 h^2), "dot" by exp(x . x_i / h), softmax attention.
        scale: Standard deviation of the answer, assumed, not fitted.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Nadaraya, 1964, "On estimating regression"; Watson, 1964, "Smooth regression analysis".
    """

    traits = Traits(kinds=("regression",), instead=(("classification", "NearestNeighbors"),), trainable=False)

    def __init__(self, spec: TaskSpec, *, bandwidth: float = 1.0, kernel: str = "gaussian", scale: float = 1.0) -> None:
        """Keep the kernel."""
        super().__init__(spec)
        check_vectors(spec, type(self).__name__)
        self.bandwidth, self.scale = check_positive("bandwidth", bandwidth), check_positive("scale", scale)
        self.kernel = check_choice("kernel", kernel, ("gaussian", "dot"))

    def adapt(self, support: Examples) -> Rows:
        """Keep the rows."""
        return Rows(support.x.double(), support.y.double(), support.real)

    def update(self, state: Rows, examples: Examples) -> Rows:
        """Old rows, then new ones."""
        more = self.adapt(examples)
        both = concatenate(Examples(state.x, state.y, state.real), Examples(more.x, more.y, more.real))
        return Rows(both.x, both.y, both.real)

    def predict(self, state: Rows, x: Tensor) -> Distribution:
        """Gaussian around the weighted mean."""
        return self._answer(x, state, state.real[:, None])

    def predict_prefixes(self, examples: Examples) -> Distribution:
        """Every row of a stream from the rows before it, in one pass; see `PredictsPrefixes`."""
        earlier = torch.ones(examples.n_rows, examples.n_rows, dtype=torch.bool, device=examples.x.device).tril(-1)
        return self._answer(examples.x, self.adapt(examples), examples.real[:, None] & earlier)

    def _answer(self, x: Tensor, rows: Rows, allowed: Tensor) -> Distribution:
        wide = x.double()
        if self.kernel == "dot":
            scores = wide @ rows.x.mT / self.bandwidth
        else:
            scores = -0.5 * squared_distances(wide, rows.x) / self.bandwidth**2
        weights = torch.softmax(scores.masked_fill(~allowed, _HIDDEN), -1) * allowed
        mean = (weights @ rows.y).to(x.dtype)
        return gaussian(mean, mean.new_tensor(self.scale))
