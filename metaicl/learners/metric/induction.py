"""Induction networks."""

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count
from metaicl.episode import Examples
from metaicl.functional import categorical, class_weights
from metaicl.learner import Learner, Traits
from metaicl.nets.backbones import build_encoder, encode, encoder_dim
from metaicl.nets.pairs import NeuralTensor
from metaicl.spec import TaskSpec


class InductionNet(Learner[Tensor]):
    """Induce a class vector from its rows by dynamic routing, compare it with queries by a neural tensor layer.

    Large episodes need O(Q C h) numbers, because every pair passes through the tensor layer, and O(C h D) for its
    parts that belong to classes. Without autograd the pairs are worked off a few queries at a time.

    Args:
        spec: A classification spec.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec.
        routing_steps: Iterations of dynamic routing. After one, all rows of a class have had equal weight.
        n_slices: h, slices of the neural tensor layer.

    Raises:
        ValueError: If the spec is a regression spec; RidgeHead serves those.

    Reference:
        Geng et al. 2019, arXiv:1902.10482, induction and relation module. Differs: the answer is a softmax over the
        relation scores, trained by its log-likelihood, where the paper regresses sigmoids of the scores on one-hot
        labels; the transformation of the rows starts as the identity, and the tensor layer as `NeuralTensor` says; the
        encoder is any, where the paper has a self-attentive bidirectional LSTM.
    """

    traits = Traits(kinds=("classification",), instead=(("regression", "RidgeHead"),))

    def __init__(
        self, spec: TaskSpec, *, encoder: nn.Module | None = None, routing_steps: int = 3, n_slices: int = 100
    ) -> None:
        """Build the encoder where none is given, the transformation and the tensor layer."""
        super().__init__(spec)
        self.encoder = build_encoder(spec) if encoder is None else encoder
        self.declare_nets(self.encoder)
        dim = encoder_dim(self.encoder, spec)
        self.routing_steps = check_count("routing_steps", routing_steps)
        self.transform = nn.Linear(dim, dim)
        nn.init.eye_(self.transform.weight)
        nn.init.zeros_(self.transform.bias)
        self.relation = NeuralTensor(dim, n_slices=n_slices)

    def adapt(self, support: Examples) -> Tensor:
        """Class vectors (B, C, D), of length below one; the origin for a class without a real row."""
        rows = squash(self.transform(encode(self.encoder, support.x)))
        return route(rows, support.y, support.real, self.spec.output_size, steps=self.routing_steps)

    def predict(self, state: Tensor, x: Tensor) -> Distribution:
        """Softmax over the scores of the tensor layer."""
        return categorical(self.relation(state, encode(self.encoder, x)))


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
