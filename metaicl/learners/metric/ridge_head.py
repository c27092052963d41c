"""A ridge regression head on a learned encoder: the metric family's learner for both kinds of task."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_positive
from metaicl.episode import Examples
from metaicl.functional import categorical, gaussian, inverse_positive, positive
from metaicl.learner import Learner, Traits
from metaicl.nets.backbones import MLP, build_encoder, encode
from metaicl.nets.rows import as_numbers
from metaicl.spec import TaskSpec


class RidgeState(NamedTuple):
    """The posterior of a Bayesian linear head: dual weights and what is needed for the variance.

    Attributes:
        features: (B, N, D), masked rows zero.
        solved: (B, N, K), (F F' + penalty I)^-1 Y.
        factor: (B, N, N), Cholesky factor of F F' + penalty I.
    """

    features: Tensor
    solved: Tensor
    factor: Tensor


class RidgeHead(Learner[RidgeState]):
    """Closed-form ridge regression from embeddings to targets (one-hot for classification), trained end to end.

    Regression answers with the posterior predictive of Bayesian linear regression on the embeddings.

    Args:
        spec: The tasks.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec.
        penalty: Start of the learned ridge penalty.

    Reference:
        Bertinetto et al. 2019, arXiv:1805.08136 (R2D2), equations 4 to 6, for classification; Harrison, Sharma &
        Pavone, 2018, arXiv:1807.08912 (ALPaCA), equation 8, for the variance in regression. Differs: an isotropic
        instead of a learned prior; solved in the rows (Woodbury), whatever N and D; a constant feature for the bias.
    """

    traits = Traits()

    def __init__(self, spec: TaskSpec, *, encoder: nn.Module | None = None, penalty: float = 1.0) -> None:
        """Build the encoder where none is given."""
        super().__init__(spec)
        if encoder is None and spec.x_kind == "vector":
            encoder = MLP((spec.x_shape[0], 64, 64, 64))  # a linear head needs one hidden layer more than prototypes
        self.encoder = build_encoder(spec) if encoder is None else encoder
        self.declare_nets(self.encoder)
        self.raw_penalty = nn.Parameter(torch.tensor(inverse_positive(check_positive("penalty", penalty))))
        if spec.kind == "classification":
            self.log_temperature = nn.Parameter(torch.tensor(2.0))
        else:
            self.raw_noise = nn.Parameter(torch.zeros(spec.output_size))

    def adapt(self, support: Examples) -> RidgeState:
        """Solve for the dual weights."""
        features = self._features(support.x)
        y = as_numbers(support.y, self.spec, features.dtype)
        if self.spec.kind == "classification":
            y = y - 1 / self.spec.output_size
        if support.mask is not None:
            features, y = features * support.mask[..., None], y * support.mask[..., None]
        identity = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
        factor = torch.linalg.cholesky(features @ features.mT + positive(self.raw_penalty) * identity)
        return RidgeState(features, torch.cholesky_solve(y, factor), factor)

    def predict(self, state: RidgeState, x: Tensor) -> Distribution:
        """Kernel ridge prediction; see the class for its variance."""
        features = self._features(x)
        kernel = features @ state.features.mT  # (B, Q, N)
        mean = kernel @ state.solved
        if self.spec.kind == "classification":
            return categorical(mean * self.log_temperature.exp())
        explained = torch.linalg.solve_triangular(state.factor, kernel.mT, upper=False).square().sum(-2)
        spread = (features.square().sum(-1) - explained).clamp(min=0) / positive(self.raw_penalty)
        return gaussian(mean, positive(self.raw_noise) * (1 + spread).sqrt()[..., None])

    def _features(self, x: Tensor) -> Tensor:
        embedded = encode(self.encoder, x)
        return F.pad(embedded / embedded.shape[-1] ** 0.5, (0, 1), value=1.0)
