"""A ridge regression head on a learned encoder: the metric family's learner for both kinds of task."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_labels, check_positive
from metaicl.episode import Examples
from metaicl.functional import categorical, gaussian, rounding_of, solvable
from metaicl.learners.metric.embedding import EmbeddingLearner
from metaicl.nets.backbones import MLP
from metaicl.nets.rows import as_numbers
from metaicl.spec import TaskSpec


class RowState(NamedTuple):
    """The posterior of a Bayesian linear head in the space of the rows, for N < D.

    Attributes:
        features: F (B, N, D), masked rows zero.
        targets: Y (B, N, K), masked rows zero.
        factor: (B, N, N), Cholesky factor of F F' + penalty I.
        weights: (B, D, K), F' (F F' + penalty I)^-1 Y.
    """

    features: Tensor
    targets: Tensor
    factor: Tensor
    weights: Tensor


class SumState(NamedTuple):
    """The same posterior by sums over rows, for N >= D: it does not grow with more rows.

    Attributes:
        gram: F'F (B, D, D).
        cross: F'Y (B, D, K).
        factor: (B, D, D), Cholesky factor of F'F + penalty I.
        weights: (B, D, K), (F'F + penalty I)^-1 F'Y.
    """

    gram: Tensor
    cross: Tensor
    factor: Tensor
    weights: Tensor


RidgeState = RowState | SumState


class RidgeHead(EmbeddingLearner[RidgeState]):
    """Closed-form ridge regression from embeddings to targets (one-hot for classification), trained end to end.

    Regression answers with the posterior predictive of Bayesian linear regression on the embeddings.

    Args:
        spec: The tasks.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec.
        penalty: Start of the learned ridge penalty.
        temperature: Start of the learned factor on the scores of a classification.

    Raises:
        ValueError: If a number is out of range.

    Reference:
        Bertinetto et al. 2019, arXiv:1805.08136 (R2D2), equations 4 to 6, for classification; Harrison, Sharma &
        Pavone, 2018, arXiv:1807.08912 (ALPaCA), equation 8, for the variance in regression. Differs: features divided
        by sqrt(D), so that one start of the penalty suits all encoders, and with them a temperature that starts at
        e^2 instead of 1; centered one-hot targets; no learned shift of the logits, which a softmax would not show; an
        isotropic instead of a learned prior; a constant feature for the bias.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        penalty: float = 1.0,
        temperature: float = math.exp(2),
    ) -> None:
        """Build the encoder where none is given."""
        # A linear head needs one hidden layer more than prototypes. What is no spec is refused after this.
        if encoder is None and getattr(spec, "x_kind", None) == "vector":
            encoder = MLP((spec.x_shape[0], 64, 64, 64))
        super().__init__(spec, encoder)
        self.raw_penalty = self._starting_at("penalty", penalty)
        start = math.log(check_positive("temperature", temperature))
        if spec.kind == "classification":
            self.log_temperature = nn.Parameter(torch.tensor(start))
        else:
            self.raw_noise = nn.Parameter(torch.zeros(spec.output_size))

    def adapt(self, support: Examples) -> RidgeState:
        """Solve in the smaller of the two dimensions, rows or features."""
        return self._solve(*self._rows(support))

    def update(self, state: RidgeState, examples: Examples) -> RidgeState:
        """Add rows to the sums; fewer rows than features are kept instead."""
        features, targets = self._rows(examples)
        if isinstance(state, SumState):
            return self._from_sums(state.gram + features.mT @ features, state.cross + features.mT @ targets)
        return self._solve(torch.cat([state.features, features], 1), torch.cat([state.targets, targets], 1))

    def predict(self, state: RidgeState, x: Tensor) -> Distribution:
        """Linear scores; for regression see the class for their variance."""
        features = self._features(x)
        mean = features @ state.weights
        if self.spec.kind == "classification":
            return categorical(mean * self.log_temperature.exp())
        if isinstance(state, SumState):
            spread = _quadratic(state.factor, features)
        else:
            explained = _quadratic(state.factor, features @ state.features.mT)
            spread = (features.square().sum(-1) - explained).clamp(min=0) / self._positive(self.raw_penalty)
        return gaussian(mean, self._positive(self.raw_noise) * (1 + spread).sqrt()[..., None])

    def _rows(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Features (B, N, D) and targets (B, N, K), masked rows zero."""
        if self.spec.kind == "classification":
            check_labels("examples.y", examples, self.spec.output_size)
        features = self._features(examples.x)
        targets = as_numbers(examples.y, self.spec, features.dtype)
        if self.spec.kind == "classification":
            targets = targets - 1 / self.spec.output_size
        if examples.mask is None:
            return features, targets
        return features * examples.mask[..., None], targets * examples.mask[..., None]

    def _solve(self, features: Tensor, targets: Tensor) -> RidgeState:
        if features.shape[1] >= features.shape[2]:
            return self._from_sums(features.mT @ features, features.mT @ targets)
        factor = self._factor(features @ features.mT)
        return RowState(features, targets, factor, features.mT @ torch.cholesky_solve(targets, factor))

    def _from_sums(self, gram: Tensor, cross: Tensor) -> SumState:
        factor = self._factor(gram)
        return SumState(gram, cross, factor, torch.cholesky_solve(cross, factor))

    def _factor(self, gram: Tensor) -> Tensor:
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        penalty = self._positive(self.raw_penalty) + rounding_of(gram)  # the same for rows and for features
        return torch.linalg.cholesky(gram + penalty * identity)

    def _features(self, x: Tensor) -> Tensor:
        embedded = solvable(self.embed(x))
        return F.pad(embedded / embedded.shape[-1] ** 0.5, (0, 1), value=1.0)


def _quadratic(factor: Tensor, rows: Tensor) -> Tensor:
    """The quadratic form r' (L L')^-1 r (B, Q) of rows (B, Q, n)."""
    return torch.linalg.solve_triangular(factor, rows.mT, upper=False).square().sum(-2)
