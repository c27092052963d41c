"""Relation networks."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.episode import Episode, Examples
from metaicl.functional import categorical, class_weights, masked_mean, prototypes
from metaicl.learner import Learner, Traits
from metaicl.nets.backbones import build_encoder, encode, encoder_dim
from metaicl.nets.pairs import PairMLP
from metaicl.spec import TaskSpec


class RelationNet(Learner[Tensor]):
    """Compare class feature and query feature by a learned module instead of a fixed distance.

    Large episodes need O(Q C H) numbers, H the widest hidden layer, because every pair passes through the module;
    never O(Q C D). Without autograd the pairs are worked off a few queries at a time, in O(Q C) + 16 MiB.

    Args:
        spec: A classification spec.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec.
        hidden: Widths H of the hidden layers of the relation module.

    Raises:
        ValueError: If the spec is a regression spec; RidgeHead serves those.

    Reference:
        Sung et al. 2018, arXiv:1711.06025, section 3. Differs: the answer is a softmax over the relation scores,
        trained by its log-likelihood; the paper squashes each score by a sigmoid and regresses it on one-hot labels,
        for which there is `relation_error`. Class features are means, not sums, so that their scale does not grow with
        the shots; a class without a real row has the origin. The module is an MLP on vectors, as in the paper's
        zero-shot experiments, also for images.
    """

    traits = Traits(kinds=("classification",), instead=(("regression", "RidgeHead"),))

    def __init__(self, spec: TaskSpec, *, encoder: nn.Module | None = None, hidden: Sequence[int] = (128,)) -> None:
        """Build the encoder where none is given, and the relation module."""
        super().__init__(spec)
        self.encoder = build_encoder(spec) if encoder is None else encoder
        self.declare_nets(self.encoder)
        self.relation = PairMLP(encoder_dim(self.encoder, spec), hidden=hidden)

    def adapt(self, support: Examples) -> Tensor:
        """Class features (B, C, D)."""
        return prototypes(encode(self.encoder, support.x), support.y, self.spec.output_size, support.mask)

    def scores(self, state: Tensor, x: Tensor) -> Tensor:
        """Relation scores (B, Q, C) before the sigmoid."""
        return self.relation(state, encode(self.encoder, x))

    def predict(self, state: Tensor, x: Tensor) -> Distribution:
        """Softmax over the relation scores."""
        return categorical(self.scores(state, x))


def relation_error(learner: Learner, episode: Episode) -> Tensor:
    """Squared error of sigmoid relation scores against one-hot labels, summed over classes, mean over rows: (B,).

    The published objective; the module of `RelationNet` has no output bias, its hidden layers have to make one.

    Raises:
        TypeError: If the learner is not a RelationNet.

    Reference:
        Sung et al. 2018, arXiv:1711.06025, equation 2.
    """
    if not isinstance(learner, RelationNet):
        raise TypeError(f"relation_error needs a RelationNet; got {type(learner).__name__}")
    query = episode.query
    found = learner.scores(learner.adapt(episode.support), query.x).sigmoid()
    wanted = class_weights(query.y, learner.spec.output_size, None, found.dtype)
    return masked_mean((found - wanted).square().sum(-1), query.mask, 1)
