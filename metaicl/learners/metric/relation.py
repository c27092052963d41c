"""Relation networks."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.episode import Episode, Examples
from metaicl.functional import (
    categorical,
    class_weights,
    masked_mean,
    present_classes,
    prototypes,
    without_absent,
)
from metaicl.learner import Learner, check_support_labels
from metaicl.learners.metric.embedding import CLASSIFIER, ClassFeatures
from metaicl.nets.backbones import build_encoder, encode, encoder_shape
from metaicl.nets.pairs import PairConv, PairMLP
from metaicl.spec import TaskSpec


class RelationNet(Learner[ClassFeatures]):
    """Compare class feature and query feature by a learned module instead of a fixed distance.

    The module is an MLP on vectors, and a convolutional net where the encoder gives feature maps, as published for
    images:

        RelationNet(spec, encoder=Conv4(1, n_pools=2, flatten=False))

    Large episodes need O(Q C H) numbers, H the widest hidden layer (for maps, all numbers of one), because every pair
    passes through the module; for vectors never O(Q C D). Without autograd the pairs are worked off a few queries at a
    time, in O(Q C) + 16 MiB.

    Args:
        spec: A classification spec.
        encoder: (rows, *x_shape) -> (rows, D), or maps (rows, channels, h, w); None builds one of vectors from the
            spec.
        hidden: Widths H of the hidden layers of the relation module; None takes (128,) for vectors and, behind the
            convolutions, (8,) for maps.
        relation: Another relation module: classes (B, C, ...) and queries (B, Q, ...) to scores (B, Q, C), each pair by
            itself.

    Raises:
        ValueError: If the encoder gives neither vectors nor maps, `hidden` is given beside a module of your own, or the
            spec is a regression spec; RidgeHead serves those.

    Reference:
        Sung et al. 2018, arXiv:1711.06025, section 3. Differs: the answer is a softmax over the relation scores,
        trained by its log-likelihood; the paper squashes each score by a sigmoid and regresses it on one-hot labels,
        for which there is `relation_error`. Class features are means, not sums, so that their scale does not grow with
        the shots; a class without a real row has a probability of about 1e-30. By default the module is an MLP on
        vectors, as in the paper's zero-shot experiments, also for images; see `PairMLP` and `PairConv` for how they
        start.
    """

    traits = CLASSIFIER

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        hidden: Sequence[int] | None = None,
        relation: nn.Module | None = None,
    ) -> None:
        """Build the encoder where none is given, and the relation module."""
        super().__init__(spec)
        self.encoder = build_encoder(spec) if encoder is None else encoder
        self.declare_nets(self.encoder)
        shape = encoder_shape(self.encoder, spec)
        if len(shape) not in (1, 3):
            raise ValueError(
                f"an encoder must give vectors (rows, D) or maps (rows, channels, h, w); got (2, *{shape})"
            )
        if relation is not None and hidden is not None:
            raise ValueError(f"hidden is for the built relation module, and relation was given; got hidden {hidden}")
        if relation is not None:
            self.relation = relation
        elif len(shape) == 1:
            self.relation = PairMLP(shape[0], hidden=(128,) if hidden is None else hidden)
        else:
            self.relation = PairConv(shape, hidden=(8,) if hidden is None else hidden)
        self.declare_nets(self.relation)

    def adapt(self, support: Examples) -> ClassFeatures:
        """Class features (B, C, D), or maps (B, C, channels, h, w)."""
        check_support_labels(self.spec, support)
        rows = encode(self.encoder, support.x)
        about = support.y, self.spec.output_size, support.mask
        means = prototypes(rows.flatten(2), *about).unflatten(2, rows.shape[2:])
        return ClassFeatures(means, present_classes(*about))

    def scores(self, state: ClassFeatures, x: Tensor) -> Tensor:
        """Relation scores (B, Q, C) before the sigmoid."""
        return self.relation(state.features, encode(self.encoder, x))

    def predict(self, state: ClassFeatures, x: Tensor) -> Distribution:
        """Softmax over the relation scores of classes that have rows."""
        return categorical(without_absent(self.scores(state, x), state.present))


@runtime_checkable
class ScoresPairs(Protocol):
    """A learner that scores pairs of class and query one by one, such as RelationNet and InductionNet."""

    def scores(self, state: Any, x: Tensor) -> Tensor:
        """Scores (B, Q, C) before the sigmoid."""
        ...


def relation_error(learner: Learner, episode: Episode) -> Tensor:
    """Squared error of sigmoid relation scores against one-hot labels, summed over classes, mean over rows: (B,).

    The published objective of RelationNet and InductionNet; their modules have no output bias, hidden layers have to
    make one.

    Raises:
        TypeError: If the learner gives no relation scores.

    Reference:
        Sung et al. 2018, arXiv:1711.06025, equation 2; Geng et al. 2019, arXiv:1902.10482, section 3.
    """
    if not isinstance(learner, ScoresPairs):
        raise TypeError(f"relation_error needs a RelationNet or an InductionNet; got {type(learner).__name__}")
    query = episode.query
    found = learner.scores(learner.adapt(episode.support), query.x).sigmoid()
    wanted = class_weights(query.y, learner.spec.output_size, None, found.dtype)
    return masked_mean((found - wanted).square().sum(-1), query.mask, 1)
