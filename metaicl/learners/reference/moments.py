"""The common part of reference learners that fit a linear map to the second moments of the rows."""

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor
from torch.distributions import Distribution

from metaicl.checks import check_positive
from metaicl.episode import Examples
from metaicl.functional import gaussian
from metaicl.learner import Learner, Traits
from metaicl.nets.moments import Moments, prefix_moments, row_moments
from metaicl.spec import NotServed, TaskSpec


class LinearFit(NamedTuple):
    """What a linear learner keeps of a support: its moments and the map W (B, D, y_dim), in float64."""

    moments: Moments
    weights: Tensor


class MomentLearner(Learner[LinearFit]):
    """Answers x W, where W depends on the support through its moments; no intercept. A subclass writes `weights`.

    More rows are added with `update`, and every prefix of a stream is fitted in one pass. No row at all gives the
    answer that `weights` gives for moments of zero. Inside, numbers are float64.

    Args:
        spec: Vector inputs, regression.
        scale: Standard deviation of the answer. The fits have no model of the noise, so it is assumed, not fitted.

    Raises:
        ValueError: If the inputs are no vectors or `scale` is not positive.
    """

    traits = Traits(kinds=("regression",), instead=(("classification", "Logistic"),), trainable=False)

    def __init__(self, spec: TaskSpec, *, scale: float = 1.0) -> None:
        """Keep the scale."""
        super().__init__(spec)
        check_vectors(spec, type(self).__name__)
        self.scale = check_positive("scale", scale)

    @abstractmethod
    def weights(self, moments: Moments) -> Tensor:
        """The map W (..., D, y_dim) for moments with any leading axes, in their dtype."""

    def adapt(self, support: Examples) -> LinearFit:
        """Moments and map."""
        return self._fit(row_moments(support.x.double(), support.y.double(), support.real))

    def update(self, state: LinearFit, examples: Examples) -> LinearFit:
        """The fit to the old rows and the new ones."""
        more = row_moments(examples.x.double(), examples.y.double(), examples.real)
        return self._fit(state.moments.plus(more))

    def predict(self, state: LinearFit, x: Tensor) -> Distribution:
        """Gaussian around x W."""
        mean = (x.double() @ state.weights).to(x.dtype)
        return gaussian(mean, mean.new_tensor(self.scale))

    def predict_prefixes(self, examples: Examples) -> Distribution:
        """Every row of a stream (B, T) from the rows before it, all fits in one pass; see `PredictsPrefixes`."""
        wide = examples.x.double()
        weights = self.weights(prefix_moments(wide, examples.y.double(), examples.real))  # (B, T, D, y_dim)
        mean = (wide[..., None, :] @ weights)[..., 0, :].to(examples.x.dtype)
        return gaussian(mean, mean.new_tensor(self.scale))

    def _fit(self, moments: Moments) -> LinearFit:
        return LinearFit(moments, self.weights(moments))


def check_vectors(spec: TaskSpec, name: str) -> None:
    """Require vector inputs.

    Raises:
        NotServed: If they are images or tokens.
    """
    if spec.x_kind != "vector":
        raise NotServed(f"{name} needs x_kind 'vector'; got {spec.x_kind!r}")
