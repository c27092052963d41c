"""A support vector machine on a learned encoder."""

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_positive
from metaicl.convex.support_vectors import support_vector_weights
from metaicl.episode import Examples
from metaicl.functional import categorical
from metaicl.learner import check_support_labels
from metaicl.learners.metric.embedding import CLASSIFIER, EmbeddingLearner
from metaicl.spec import TaskSpec


class SVMHead(EmbeddingLearner[Tensor]):
    """A linear multi-class support vector machine fitted to each support, trained end to end through its solution.

    Solved in float64 with C N^2 numbers for each task, so not for episodes of a thousand classes.

    Args:
        spec: A classification spec.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec.
        slack_penalty: Price of a violated margin, for features divided by sqrt(D).
        temperature: Start of the learned factor on the scores.

    Raises:
        ValueError: If a number is not positive, or the spec is a regression spec; RidgeHead serves those.

    Reference:
        Lee et al. 2019, arXiv:1904.03758 (MetaOptNet-SVM), equations 4 to 6 and 12. Differs: features divided by
        sqrt(D), so that one penalty suits all encoders; solved to the end, where the released code stops after 15
        iterations of a solver for a kernel with one added to its diagonal; no label smoothing.
    """

    traits = CLASSIFIER

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        slack_penalty: float = 10.0,
        temperature: float = 8.0,
    ) -> None:
        """Build the encoder where none is given."""
        super().__init__(spec, encoder)
        self.slack_penalty = check_positive("slack_penalty", slack_penalty)
        self.log_temperature = nn.Parameter(torch.tensor(check_positive("temperature", temperature)).log())

    def adapt(self, support: Examples) -> Tensor:
        """Weights (B, D, C)."""
        check_support_labels(self.spec, support)
        features, n_way = self._features(support.x), self.spec.output_size
        return support_vector_weights(features, support.y, n_way, slack_penalty=self.slack_penalty, mask=support.mask)

    def predict(self, state: Tensor, x: Tensor) -> Distribution:
        """Softmax of the scores."""
        return categorical(self._features(x) @ state * self.log_temperature.exp())

    def _features(self, x: Tensor) -> Tensor:
        embedded = self.embed(x)
        return embedded / embedded.shape[-1] ** 0.5
