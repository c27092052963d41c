"""Prototypical networks."""

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_positive
from metaicl.episode import Examples
from metaicl.functional import categorical, prototypes, squared_distances
from metaicl.learner import Learner, Traits
from metaicl.nets.backbones import build_encoder, encode, encoder_dim
from metaicl.spec import TaskSpec


class ProtoNet(Learner[Tensor]):
    """Classify by the squared Euclidean distance to the class means of the embedded support.

    Args:
        spec: A classification spec.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec. `nn.Identity()` (for vectors) gives
            the nearest class mean.
        temperature: Start of the learned factor on the distances; None takes 1 / sqrt(D), at which the softmax of a
            fresh encoder is not saturated. The paper has none (1.0, `learn_temperature=False`).
        learn_temperature: Train the factor; without it the scale of the encoder's output has to do.

    Raises:
        ValueError: If the spec is a regression spec; RidgeHead serves those.

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
        temperature: float | None = None,
        learn_temperature: bool = True,
    ) -> None:
        """Build the encoder where none is given."""
        super().__init__(spec)
        self.encoder = build_encoder(spec) if encoder is None else encoder
        self.declare_nets(self.encoder)
        start = encoder_dim(self.encoder, spec) ** -0.5 if temperature is None else temperature
        log_temperature = torch.tensor(check_positive("temperature", start)).log()
        self.log_temperature = nn.Parameter(log_temperature, requires_grad=learn_temperature)

    def adapt(self, support: Examples) -> Tensor:
        """Prototypes (B, C, D)."""
        embeddings = encode(self.encoder, support.x)
        return prototypes(embeddings, support.y, self.spec.output_size, support.mask)

    def predict(self, state: Tensor, x: Tensor) -> Distribution:
        """Softmax over negative distances to the prototypes."""
        distances = squared_distances(encode(self.encoder, x), state)
        return categorical(-distances * self.log_temperature.exp())
