"""FEAT: prototypes that attend to each other before queries are compared with them."""

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_positive
from metaicl.collation import concatenate
from metaicl.episode import Episode, Examples
from metaicl.functional import categorical, masked_mean, present_classes, prototypes, without_absent
from metaicl.learner import Learner, check_support_labels
from metaicl.learners.metric.embedding import CLASSIFIER, ClassFeatures, EmbeddingLearner
from metaicl.nets.similarity import Distance, Similarity
from metaicl.objectives import query_loss
from metaicl.spec import TaskSpec

_START = 0.1  # of the set function's output: a fresh FEAT stands beside a prototypical network


class SetAttention(nn.Module):
    """One head of self-attention over a set of rows, added to them.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        """Build the four projections."""
        super().__init__()
        self.to_query, self.to_key, self.to_value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.project = nn.Linear(dim, dim)
        with torch.no_grad():
            for parameter in self.project.parameters():
                parameter *= _START

    def forward(self, rows: Tensor, visible: Tensor) -> Tensor:
        """Rows (B, M, D) plus what they read from the rows of visible (B, M, M) or (B, 1, M)."""
        scores = self.to_query(rows) @ self.to_key(rows).mT * rows.shape[-1] ** -0.5
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1) * visible  # zeros, not an average of nothing, where nothing is visible
        return rows + self.project(weights @ self.to_value(rows))


class FEAT(EmbeddingLearner[ClassFeatures]):
    """A prototypical network whose prototypes are adapted to the task by self-attention among them.

    A 1,000-way episode needs O(C^2 + Q C) numbers beside the embeddings.

    Args:
        spec: A classification spec.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec.
        distance: "euclidean" (squared distances) or "cosine", of queries and adapted prototypes.
        temperature: Start of the learned factor on the scores; None takes 1 / sqrt(D) for distances, 10 for cosines.
        learn_temperature: Train the factor.

    Raises:
        ValueError: If the spec is a regression spec; RidgeHead serves those.

    Reference:
        Ye et al. 2020, arXiv:1812.03664, section 4. Differs: trained from scratch, so no layer normalization
        behind the attention, which would put prototypes on another scale than the queries they are compared with; the
        output of the attention starts at a tenth, so that a fresh learner is nearly a prototypical network (the paper
        pretrains the encoder instead); no dropout; the learned temperature. The contrastive regularizer needs the
        queries' labels, so it is an objective, `ContrastedLoss`.
    """

    traits = CLASSIFIER

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        distance: Distance = "euclidean",
        temperature: float | None = None,
        learn_temperature: bool = True,
    ) -> None:
        """Build the encoder where none is given, and the attention."""
        super().__init__(spec, encoder)
        self.attend = SetAttention(self.feature_dim)
        self.similarity = Similarity(
            self.feature_dim, distance=distance, temperature=temperature, learn_temperature=learn_temperature
        )

    def adapt(self, support: Examples) -> ClassFeatures:
        """Adapted prototypes (B, C, D). Classes without a real row are seen by none."""
        check_support_labels(self.spec, support)
        n_way = self.spec.output_size
        rows = self.embed(support.x)
        present = present_classes(support.y, n_way, support.mask)
        means = prototypes(rows, support.y, n_way, support.mask)
        return ClassFeatures(self.attend(means, present[:, None]), present)

    def predict(self, state: ClassFeatures, x: Tensor) -> Distribution:
        """Softmax over the similarities to the adapted prototypes."""
        return categorical(without_absent(self.similarity(self.embed(x), state.features), state.present))


class ContrastedLoss:
    """The query loss of FEAT plus its contrastive regularizer, which makes the set function keep classes apart.

    All rows of an episode, support and query, are passed through the attention among the rows of their own class; the
    means of what comes out are one center per class, by which every row, as embedded, is to be classified.

    Args:
        weight: Of the regularizer, in nats per nat of query loss.

    Raises:
        ValueError: If the weight is not positive.

    Reference:
        Ye et al. 2020, arXiv:1812.03664, section 4.3.
    """

    def __init__(self, *, weight: float = 0.1) -> None:
        """Keep the weight."""
        self.weight = check_positive("weight", weight)

    def __call__(self, learner: Learner, episode: Episode) -> Tensor:
        """The loss of each task (B,).

        Raises:
            TypeError: If the learner is no FEAT.
        """
        if not isinstance(learner, FEAT):
            raise TypeError(f"ContrastedLoss needs a FEAT; got {type(learner).__name__}")
        return query_loss(learner, episode) + self.weight * _contrast(learner, episode)


def _contrast(learner: FEAT, episode: Episode) -> Tensor:
    everything, n_way = concatenate(episode.support, episode.query), learner.spec.output_size
    rows, real = learner.embed(everything.x), everything.real
    alike = (everything.y[:, :, None] == everything.y[:, None]) & real[:, None]
    centers = prototypes(learner.attend(rows, alike), everything.y, n_way, everything.mask)
    return masked_mean(-categorical(learner.similarity(rows, centers)).log_prob(everything.y), real, 1)
