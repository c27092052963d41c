"""Logistic regression on a learned encoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_positive
from metaicl.convex.logistic import logistic_weights
from metaicl.episode import Examples
from metaicl.functional import categorical
from metaicl.learner import check_support_labels
from metaicl.learners.metric.embedding import CLASSIFIER, EmbeddingLearner
from metaicl.spec import TaskSpec


class LogisticHead(EmbeddingLearner[Tensor]):
    """Multinomial logistic regression fitted to each support, trained end to end through its solution.

    Solved in float64 with C N^2 numbers for each task, so not for episodes of a thousand classes.

    Args:
        spec: A classification spec.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec.
        penalty: Start of the learned penalty on squared weights, for features divided by sqrt(D).
        temperature: Start of the learned factor on the scores.

    Raises:
        ValueError: If a number is out of range, or the spec is a regression spec; RidgeHead serves those.

    Reference:
        Bertinetto et al. 2019, arXiv:1805.08136 (LR-D2), section 3.3. Differs: any number of classes, where the paper
        has two; Newton's method to the end instead of a fixed number of its steps, differentiated at the solution; a
        constant feature for the bias.
    """

    traits = CLASSIFIER

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        penalty: float = 0.1,
        temperature: float = 2.0,
    ) -> None:
        """Build the encoder where none is given."""
        super().__init__(spec, encoder)
        self.raw_penalty = self._starting_at("penalty", penalty)
        self.log_temperature = nn.Parameter(torch.tensor(check_positive("temperature", temperature)).log())

    def adapt(self, support: Examples) -> Tensor:
        """Weights (B, D + 1, C), the bias last."""
        check_support_labels(self.spec, support)
        features, n_way, penalty = self._features(support.x), self.spec.output_size, self._positive(self.raw_penalty)
        return logistic_weights(features, support.y, n_way, penalty=penalty, mask=support.mask)

    def predict(self, state: Tensor, x: Tensor) -> Distribution:
        """Softmax of the scores."""
        return categorical(self._features(x) @ state * self.log_temperature.exp())

    def _features(self, x: Tensor) -> Tensor:
        embedded = self.embed(x)
        return F.pad(embedded / embedded.shape[-1] ** 0.5, (0, 1), value=1.0)
