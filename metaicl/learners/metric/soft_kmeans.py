"""Prototypical networks whose prototypes are refined by soft k-means on the queries."""

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count
from metaicl.episode import Examples
from metaicl.functional import categorical, class_weights, without_absent
from metaicl.learner import check_support_labels
from metaicl.learners.metric.embedding import CLASSIFIER, EmbeddingLearner
from metaicl.nets.similarity import Similarity
from metaicl.spec import TaskSpec


class LabeledSums(NamedTuple):
    """What the labeled rows give to the prototypes.

    Attributes:
        sums: (B, C, D), of the embeddings of each class.
        counts: (B, C, 1), real rows of each class.
    """

    sums: Tensor
    counts: Tensor


class SoftKMeansProtoNet(EmbeddingLearner[LabeledSums]):
    """A prototypical network that lets the queries, as unlabeled rows, move its prototypes. Transductive.

    Queries are assigned to the prototypes by a softmax over squared distances, prototypes become weighted means of
    their labeled rows and of their share of all queries. A class without a labeled row gets none of them. A query of
    zeros only, which is what a masked row of an episode holds, is answered but moves nothing.

    Args:
        spec: A classification spec.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec.
        steps: Refinements of the prototypes; 0 is a prototypical network.
        temperature: Start of the learned factor on the scores, the same in assignments and answers; None takes
            1 / sqrt(D). The paper has none (1.0, `learn_temperature=False`).
        learn_temperature: Train the factor.

    Raises:
        ValueError: If the spec is a regression spec; RidgeHead serves those.

    Reference:
        Ren et al. 2018, arXiv:1803.00676, section 3.1.1. Differs: the unlabeled rows are the queries themselves, where
        the paper has unlabeled rows of their own and so is not transductive; the learned temperature.
    """

    traits = replace(CLASSIFIER, transductive=True)

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        steps: int = 1,
        temperature: float | None = None,
        learn_temperature: bool = True,
    ) -> None:
        """Build the encoder where none is given."""
        super().__init__(spec, encoder)
        self.steps = check_count("steps", steps, minimum=0)
        self.similarity = Similarity(self.feature_dim, temperature=temperature, learn_temperature=learn_temperature)

    def adapt(self, support: Examples) -> LabeledSums:
        """Sums and counts of each class."""
        check_support_labels(self.spec, support)
        rows = self.embed(support.x)
        members = class_weights(support.y, self.spec.output_size, support.mask, rows.dtype).mT  # (B, C, N)
        return LabeledSums(members @ rows, members.sum(-1, keepdim=True))

    def predict(self, state: LabeledSums, x: Tensor) -> Distribution:
        """Softmax over negative distances to the refined prototypes."""
        queries, filled = self.embed(x), filled_rows(x)
        present = state.counts[..., 0] > 0
        centers = state.sums / state.counts.clamp(min=1)
        for _ in range(self.steps):
            scores = without_absent(self.similarity(queries, centers), present)
            shares = scores.softmax(-1) * filled[..., None]  # (B, Q, C)
            total = state.counts + shares.sum(1)[..., None]
            centers = (state.sums + shares.mT @ queries) / total.clamp(min=1e-12)
        return categorical(without_absent(self.similarity(queries, centers), present))


def filled_rows(x: Tensor) -> Tensor:
    """Which rows of x (B, Q, *x_shape) hold anything but zeros: bool (B, Q). A masked row of an episode does not."""
    return (x != 0).flatten(2).any(-1)
