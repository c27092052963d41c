"""Nearest prototypes under which neighboring queries agree."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count, check_positive
from metaicl.episode import Examples
from metaicl.functional import categorical, present_classes, prototypes, squared_distances, without_absent
from metaicl.learner import check_support_labels
from metaicl.learners.metric.embedding import CLASSIFIER, ClassFeatures, EmbeddingLearner
from metaicl.learners.metric.soft_kmeans import filled_rows
from metaicl.nets.similarity import Similarity
from metaicl.spec import TaskSpec


class LaplacianShot(EmbeddingLearner[ClassFeatures]):
    """A prototypical network whose answers for queries that are neighbors are drawn together. Transductive.

    Each step is z_q = softmax(-d_q + strength sum_p w(q, p) z_p), all queries at once, with d the scaled distances to
    the prototypes and w(q, p) = 1 where p is one of the nearest neighbors of q among the queries. For a symmetric w,
    which nearest neighbors need not give, that bounds and lowers
    sum_q z_q . d_q - strength / 2 sum_qp w(q, p) z_q . z_p - entropy(z).
    Needs O(Q^2) numbers for w. A query of zeros only, which is what a masked row of an episode holds, is nobody's
    neighbor.

    Args:
        spec: A classification spec.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec.
        k: Nearest neighbors of each query; all others where there are fewer.
        strength: Start of the learned strength of agreement, in nats per neighbor.
        steps: Bound-optimization steps; 0 is a prototypical network.
        temperature: Start of the learned factor on the scores; None takes 1 / sqrt(D).
        learn_strength: Train the strength.
        learn_temperature: Train the factor.

    Raises:
        ValueError: If the spec is a regression spec; RidgeHead serves those.

    Reference:
        Ziko et al. 2020, arXiv:2006.15486, section 2 and algorithm 1. Differs: trained end to end through the steps
        (the neighborhoods are constants to the gradient), where the paper adds them to a trained encoder; strength and
        temperature are learned, where the paper picks the strength on validation classes; a fixed number of steps; no
        rectification of the prototypes and no centering of features.
    """

    traits = replace(CLASSIFIER, transductive=True)

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        k: int = 3,
        strength: float = 1.0,
        steps: int = 10,
        temperature: float | None = None,
        learn_strength: bool = True,
        learn_temperature: bool = True,
    ) -> None:
        """Build the encoder where none is given."""
        super().__init__(spec, encoder)
        self.k, self.steps = check_count("k", k), check_count("steps", steps, minimum=0)
        self.similarity = Similarity(self.feature_dim, temperature=temperature, learn_temperature=learn_temperature)
        log_strength = torch.tensor(check_positive("strength", strength)).log()
        self.log_strength = nn.Parameter(log_strength, requires_grad=learn_strength)

    def adapt(self, support: Examples) -> ClassFeatures:
        """Prototypes (B, C, D)."""
        check_support_labels(self.spec, support)
        about = support.y, self.spec.output_size, support.mask
        return ClassFeatures(prototypes(self.embed(support.x), *about), present_classes(*about))

    def predict(self, state: ClassFeatures, x: Tensor) -> Distribution:
        """The assignments after the last step."""
        queries = self.embed(x)
        alone = without_absent(self.similarity(queries, state.features), state.present)
        pull = self.log_strength.exp() * nearest_neighbors(queries, filled_rows(x), self.k)
        logits = alone
        for _ in range(self.steps):
            logits = alone + pull @ logits.softmax(-1)
        return categorical(without_absent(logits, state.present))  # what neighbors added is no evidence of it


def nearest_neighbors(rows: Tensor, filled: Tensor, k: int) -> Tensor:
    """Which rows are among the k nearest of each row of (B, Q, D): ones and zeros (B, Q, Q), constants to a gradient.

    A row is not its own neighbor, and a row that is not filled (B, Q) is nobody's. At equal distance any one is taken.
    """
    with torch.no_grad():
        count = rows.shape[1]
        itself = torch.eye(count, dtype=torch.bool, device=rows.device)
        excluded = itself | ~filled[:, None]
        distances = squared_distances(rows, rows).masked_fill(excluded, torch.inf)
        index = distances.topk(min(k, count), -1, largest=False).indices
        return torch.zeros_like(distances).scatter(-1, index, 1.0).masked_fill(excluded, 0)
