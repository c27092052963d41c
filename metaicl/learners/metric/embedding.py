"""What the learners of this family share: an encoder of single rows, and a head on what it gives."""

from copy import copy
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from metaicl.checks import check_positive
from metaicl.functional import inverse_learned_positive, learned_positive
from metaicl.learner import Learner, Traits
from metaicl.nets.backbones import build_encoder, encode, encoder_dim
from metaicl.spec import TaskSpec

State = TypeVar("State")

CLASSIFIER = Traits(kinds=("classification",), instead=(("regression", "RidgeHead"),))


class ClassFeatures(NamedTuple):
    """What a support leaves of its classes.

    Attributes:
        features: (B, C, ...), of each class; the origin, or what is made of it, for a class without a real row.
        present: bool (B, C), which classes have a real row.
    """

    features: Tensor
    present: Tensor


class EmbeddingLearner(Learner[State]):
    """A learner with an `encoder` of single rows, (rows, *x_shape) -> (rows, D), and its `feature_dim` D.

    Args:
        spec: The tasks.
        encoder: None builds one from the spec.

    Raises:
        TypeError: If the encoder is no module.
        ValueError: If the encoder does not give (rows, D), or the learner does not serve the spec.
    """

    _is_embedded = False

    def __init__(self, spec: TaskSpec, encoder: nn.Module | None) -> None:
        """Build the encoder where none is given, and look at what it gives."""
        super().__init__(spec)
        self.encoder = build_encoder(spec) if encoder is None else encoder
        self.declare_nets(self.encoder)
        self.feature_dim = encoder_dim(self.encoder, spec)

    def embed(self, x: Tensor) -> Tensor:
        """Embedded rows (B, N, D) of inputs x (B, N, *x_shape)."""
        return x if self._is_embedded else encode(self.encoder, x)

    def on_embeddings(self) -> Self:
        """This learner, weights and all, for inputs that are embedded already: `embed` leaves them as they are.

        Subclasses read inputs by `embed` alone. One that looks at them in another way, too, must be transductive: it is
        never asked for this (see `Reading`).
        """
        twin = copy(self)
        twin._is_embedded = True
        return twin

    def _starting_at(self, name: str, value: float) -> nn.Parameter:
        """A meta-parameter from which `_positive` makes `value`; errors call it `name`."""
        return nn.Parameter(
            torch.tensor(inverse_learned_positive(check_positive(name, value), self.spec.kind, name=name))
        )

    def _positive(self, raw: Tensor) -> Tensor:
        return learned_positive(raw, self.spec.kind)
