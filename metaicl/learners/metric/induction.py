"""Induction networks."""

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count
from metaicl.episode import Examples
from metaicl.functional import categorical, class_weights, present_classes, without_absent
from metaicl.learner import check_support_labels
from metaicl.learners.metric.embedding import CLASSIFIER, ClassFeatures, EmbeddingLearner
from metaicl.nets.pairs import SLOW, NeuralTensor
from metaicl.spec import TaskSpec


class InductionNet(EmbeddingLearner[ClassFeatures]):
    """Induce a class vector from its rows by dynamic routing, compare it with queries by a neural tensor layer.

    Large episodes need O(Q C h) numbers, because every pair passes through the tensor layer, and O(C h D) for its
    parts that belong to classes. Without autograd the pairs are worked off a few queries at a time.

    Args:
        spec: A classification spec.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec.
        steps: Iterations of dynamic routing. After one, all rows of a class have had equal weight.
        n_slices: h, slices of the neural tensor layer.

    Raises:
        ValueError: If the spec is a regression spec; RidgeHead serves those.

    Reference:
        Geng et al. 2019, arXiv:1902.10482, induction and relation module. Differs: the answer is a softmax over the
        relation scores, trained by its log-likelihood, where the paper regresses sigmoids of the scores on one-hot
        labels, for which there is `relation_error`; the transformation of the rows is the identity plus a small
        multiple of what is trained, and the tensor layer starts as `NeuralTensor` says; the encoder is any, where the
        paper has a self-attentive bidirectional LSTM.
    """

    traits = CLASSIFIER

    def __init__(
        self, spec: TaskSpec, *, encoder: nn.Module | None = None, steps: int = 3, n_slices: int = 100
    ) -> None:
        """Build the encoder where none is given, the transformation and the tensor layer."""
        super().__init__(spec, encoder)
        self.steps = check_count("steps", steps)
        self.transform = nn.Linear(self.feature_dim, self.feature_dim)
        for parameter in self.transform.parameters():
            nn.init.zeros_(parameter)
        self.relation = NeuralTensor(self.feature_dim, n_slices=n_slices)

    def adapt(self, support: Examples) -> ClassFeatures:
        """Class vectors (B, C, D), of length below one."""
        check_support_labels(self.spec, support)
        rows = self.embed(support.x)
        rows = squash(rows + SLOW * self.transform(rows))
        n_way = self.spec.output_size
        classes = route(rows, support.y, support.real, n_way, steps=self.steps)
        return ClassFeatures(classes, present_classes(support.y, n_way, support.mask))

    def scores(self, state: ClassFeatures, x: Tensor) -> Tensor:
        """Relation scores (B, Q, C) before the sigmoid."""
        return self.relation(state.features, self.embed(x))

    def predict(self, state: ClassFeatures, x: Tensor) -> Distribution:
        """Softmax over the relation scores of classes that have rows."""
        return categorical(without_absent(self.scores(state, x), state.present))


def squash(rows: Tensor) -> Tensor:
    """Rows (..., D) with their length r replaced by r^2 / (1 + r^2); zero rows stay, with finite derivatives."""
    squared = rows.square().sum(-1, keepdim=True)
    return rows * (squared + 1e-24).sqrt() / (1 + squared)


def route(rows: Tensor, y: Tensor, real: Tensor, n_way: int, *, steps: int) -> Tensor:
    """Class vectors (B, C, D) of squashed rows (B, N, D) with labels y (B, N), of which real (B, N) count.

    Rows of a class that agree with its vector get more weight in each iteration. There is one coupling per row, not one
    per row and class, since a row can only be routed to its own class.
    """
    membership = class_weights(y, n_way, real, rows.dtype)  # (B, N, C)
    of_own_class = y[..., None].expand_as(rows)
    logits = rows.new_zeros(y.shape)
    classes = torch.empty_like(rows)
    for step in range(steps):
        weights = logits.exp()[..., None]  # rows and classes are shorter than one: logits stay below `steps`
        totals = membership.mT @ weights  # (B, C, 1)
        classes = squash(membership.mT @ (weights * rows) / torch.where(totals > 0, totals, 1))
        if step + 1 < steps:
            logits = logits + (rows * classes.gather(1, of_own_class)).sum(-1)
    return classes
