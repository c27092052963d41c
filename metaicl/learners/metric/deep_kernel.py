"""Gaussian processes whose kernel looks at a learned encoding."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_choice, check_positive
from metaicl.episode import Episode, Examples
from metaicl.functional import (
    categorical,
    class_weights,
    gaussian,
    rounding_of,
    solvable,
    squared_distances,
    unit_rows,
)
from metaicl.learner import check_support_labels
from metaicl.learners.metric.embedding import EmbeddingLearner
from metaicl.objectives import stream_of
from metaicl.spec import TaskSpec

KERNELS = ("linear", "rbf", "cosine")


class ProcessState(NamedTuple):
    """A Gaussian process given its rows.

    Attributes:
        features: (B, N, D), masked rows as they are.
        real: bool (B, N).
        factor: (B, N, N), Cholesky factor L of the covariance of the targets; identity at masked rows.
        whitened: (B, N, K), L^-1 times the targets.
    """

    features: Tensor
    real: Tensor
    factor: Tensor
    whitened: Tensor


class DeepKernel(EmbeddingLearner[ProcessState]):
    """Exact Gaussian process regression with zero mean on embeddings; labels are regressed as +1 against -1.

    Regression answers with the posterior predictive, noise included. Classification fits one process for each class
    and answers with the softmax of the posterior means, times a learned temperature.

    Train it by `query_loss`, or by `marginal_likelihood_loss` as the paper does:

        meta_train(learner, tasks, config, objective=marginal_likelihood_loss)

    Args:
        spec: The tasks.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec, whose last bias "rbf" does not train.
        kernel: "linear", "rbf" or "cosine", of embeddings divided by sqrt(D); None takes "rbf" for regression and
            "cosine" for classification.
        noise: Start of the learned standard deviation of the observations.
        temperature: Start of the learned factor on the means of a classification.

    Raises:
        ValueError: If the kernel is unknown or a number is out of range.

    Reference:
        Patacchiola et al. 2020, arXiv:1910.05199 (DKT), sections 3.2 to 3.4. Differs: softmax instead of sigmoids of
        the means; one kernel and one noise for all classes, or outputs; "cosine" has no batch normalization before it.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        kernel: str | None = None,
        noise: float = 0.3,
        temperature: float = 4.0,
    ) -> None:
        """Build the encoder where none is given."""
        super().__init__(spec, encoder)
        default = "cosine" if spec.kind == "classification" else "rbf"
        self.kernel = check_choice("kernel", default if kernel is None else kernel, KERNELS)
        self.raw_noise = self._starting_at("noise", noise)
        self.raw_variance = self._starting_at("variance", 1.0)
        if self.kernel == "rbf":
            self.raw_length = self._starting_at("length", 1.0)
            last = list(self.encoder.modules())[-1]
            if encoder is None and isinstance(last, nn.Linear):
                # The kernel does not see a shift: what this bias would get is rounding, which Adam makes steps of.
                last.bias.requires_grad_(False)
        if spec.kind == "classification":
            self.log_temperature = nn.Parameter(torch.tensor(check_positive("temperature", temperature)).log())

    def adapt(self, support: Examples) -> ProcessState:
        """Factorize the covariance of the support."""
        check_support_labels(self.spec, support)
        features = self._features(support.x)
        targets = self._targets(support, features.dtype)
        both = support.real[..., :, None] & support.real[..., None, :]
        noise = self._positive(self.raw_noise).square()
        identity = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
        covariance = torch.where(both, self._covariance(features, features), 0.0)
        noise = noise + rounding_of(covariance)  # or a linear kernel of long features would have no factor
        factor = torch.linalg.cholesky(torch.where(both, covariance + noise * identity, identity))
        return ProcessState(features, support.real, factor, _solve(factor, targets))

    def predict(self, state: ProcessState, x: Tensor) -> Distribution:
        """The posterior at x."""
        features = self._features(x)
        across = self._covariance(state.features, features) * state.real[..., None]  # (B, N, Q)
        whitened = _solve(state.factor, across)
        mean = whitened.mT @ state.whitened
        if self.spec.kind == "classification":
            return categorical(mean * self.log_temperature.exp())
        variance = self._variance(features) - whitened.square().sum(-2)
        variance = variance.clamp(min=0) + self._positive(self.raw_noise).square()
        return gaussian(mean, variance.sqrt()[..., None])

    def negative_log_marginal(self, examples: Examples) -> Tensor:
        """-log p(y | x) of the rows (B,), in nats, summed over rows and outputs; classes are outputs of +1 and -1."""
        state = self.adapt(examples)
        outputs = state.whitened.shape[-1]
        log_determinant = 2 * state.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = math.log(2 * math.pi) * state.real.sum(-1).to(log_determinant)
        return 0.5 * (state.whitened.square().sum((-1, -2)) + outputs * (log_determinant + constant))

    def _features(self, x: Tensor) -> Tensor:
        embedded = solvable(self.embed(x))
        return embedded / embedded.shape[-1] ** 0.5

    def _targets(self, examples: Examples, dtype: torch.dtype) -> Tensor:
        """Targets (B, N, K), masked rows zero."""
        y = examples.y
        if self.spec.kind == "classification":
            y = 2 * class_weights(y, self.spec.output_size, None, dtype) - 1
        return y * examples.real[..., None]

    def _covariance(self, a: Tensor, b: Tensor) -> Tensor:
        variance = self._positive(self.raw_variance)
        if self.kernel == "rbf":
            return variance * (-0.5 * squared_distances(a, b) / self._positive(self.raw_length).square()).exp()
        if self.kernel == "cosine":
            a, b = unit_rows(a), unit_rows(b)
        return variance * a @ b.mT

    def _variance(self, features: Tensor) -> Tensor:
        """The diagonal (B, Q) of the covariance of rows with themselves."""
        variance = self._positive(self.raw_variance)
        if self.kernel == "rbf":
            return variance.expand(features.shape[:-1])
        rows = unit_rows(features) if self.kernel == "cosine" else features
        return variance * rows.square().sum(-1)


def marginal_likelihood_loss(learner: DeepKernel, episode: Episode) -> Tensor:
    """Negative log marginal likelihood of support and query together, (B,), in nats per row and output.

    An objective for `meta_train`. It leaves the temperature of classifiers untrained.

    Raises:
        TypeError: If the learner is no DeepKernel.

    Reference:
        Patacchiola et al. 2020, arXiv:1910.05199, equation 5 and Algorithm 1.
    """
    if not isinstance(learner, DeepKernel):
        raise TypeError(f"marginal_likelihood_loss needs a DeepKernel; got {type(learner).__name__}")
    rows = stream_of(episode)
    return learner.negative_log_marginal(rows) / (rows.real.sum(-1).clamp(min=1) * learner.spec.output_size)


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, right, upper=False)
