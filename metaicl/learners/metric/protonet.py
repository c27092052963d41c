"""Prototypical networks, in episodes and in streams."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_choice, check_positive
from metaicl.episode import Examples
from metaicl.functional import categorical, cosine_similarities, squared_distances
from metaicl.learner import Learner, Traits
from metaicl.nets.backbones import build_encoder, encode, encoder_dim
from metaicl.nets.exact_sums import ClassSums, add_class_sums, class_sums
from metaicl.spec import TaskSpec


class ProtoNet(Learner[ClassSums]):
    """Classify by the distance to the class means of the embedded support.

    The state is the sum and the number of the embedded rows of each class, kept such that a state does not depend on
    the order in which rows came, nor on who saw them, to the last bit (see `class_sums`; given equal embeddings: an
    encoder may round a row differently in batches of different sizes). So it can be streamed: `update` adds rows, also
    of classes that were never seen before, and `merge` joins the states of clients.

    Args:
        spec: A classification spec. `adapt` answers over its n_way classes; streams may go beyond.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec. `nn.Identity()` (for vectors) gives
            the nearest class mean.
        distance: "euclidean" (squared) or "cosine" (one minus the cosine).
        temperature: Start of the learned factor on the distances; None takes 1 / sqrt(D), at which the softmax of a
            fresh encoder is not saturated, and 10 for cosines, which lie in [-1, 1]. The paper has none (1.0,
            `learn_temperature=False`).
        learn_temperature: Train the factor; without it the scale of the encoder's output has to do.

    Raises:
        ValueError: If the spec is a regression spec (RidgeHead serves those) or the distance is unknown.

    Reference:
        Snell, Swersky & Zemel, 2017, arXiv:1703.05175, equations 1 and 2. Differs: group normalization in the encoder
        built here; the learned temperature (Oreshkin et al. 2018, arXiv:1805.10123, equation 2).
    """

    traits = Traits(kinds=("classification",), instead=(("regression", "RidgeHead"),))

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        temperature: float | None = None,
        learn_temperature: bool = True,
    ) -> None:
        """Build the encoder where none is given."""
        super().__init__(spec)
        self.encoder = build_encoder(spec) if encoder is None else encoder
        self.declare_nets(self.encoder)
        self.distance = check_choice("distance", distance, ("euclidean", "cosine"))
        dim = encoder_dim(self.encoder, spec)
        default = 10.0 if self.distance == "cosine" else dim**-0.5
        log_temperature = torch.tensor(check_positive("temperature", default if temperature is None else temperature))
        self.log_temperature = nn.Parameter(log_temperature.log(), requires_grad=learn_temperature)

    def adapt(self, support: Examples) -> ClassSums:
        """The sums of each class, C = n_way."""
        return self._sums(support, self.spec.output_size)

    def predict(self, state: ClassSums, x: Tensor) -> Distribution:
        """Softmax over negative distances to the prototypes, over all classes of the state."""
        embeddings = encode(self.encoder, x)
        centers = state.means().to(embeddings.dtype)
        if self.distance == "cosine":
            distances = 1 - cosine_similarities(embeddings, centers)
        else:
            distances = squared_distances(embeddings, centers)
        return categorical(-distances * self.log_temperature.exp())

    def update(self, state: ClassSums, examples: Examples) -> ClassSums:
        """The state after these rows too; a label that no row had so far adds classes up to it."""
        n_classes = max(state.n_classes, int(examples.y.max()) + 1 if examples.n_rows else 0)
        return add_class_sums([state, self._sums(examples, n_classes)])

    def merge(self, states: Sequence[ClassSums]) -> ClassSums:
        """The state after the rows of all states; one that lacks the last classes counts as having no row of them.

        Reference:
            Hendryx et al. 2021, "Federated reconnaissance" (running prototypes that clients and server merge). Differs:
            sums are merged instead of means, so that nothing is rounded.
        """
        return add_class_sums(states)

    def _sums(self, rows: Examples, n_classes: int) -> ClassSums:
        return class_sums(encode(self.encoder, rows.x), rows.y, n_classes, rows.mask)
