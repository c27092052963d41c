"""The exact posterior of sparse linear regression, by a sum over all places of the weights."""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from metaicl.checks import check_count, check_positive
from metaicl.episode import Examples
from metaicl.functional import gaussian
from metaicl.learner import Learner, Traits
from metaicl.nets.moments import row_moments
from metaicl.spec import TaskSpec

MAX_SUPPORTS = 2000
"""Sets of places that are summed over at most: the memory of a task grows with their number."""


class SparseState(NamedTuple):
    """Mean (B, D, y_dim) and covariance (B, y_dim, D, D) of the weights, in float64."""

    mean: Tensor
    covariance: Tensor


class SparseLinearPosterior(Learner[SparseState]):
    """The posterior of y = x w + noise where `nonzero` of D weights are N(0, weight_scale^2), at unknown places.

    Every set of places has a Gaussian posterior and an evidence in closed form; the answer has the mean and the
    variance of their mixture, so its mean is exact while its shape is the Gaussian nearest to the mixture. All
    outputs share the places.

    Args:
        spec: Vector inputs, regression.
        nonzero: s.
        noise: Standard deviation of the support's noise.
        weight_scale: Standard deviation of the weights that are not zero.
        query_noise: Standard deviation of the query's noise; None takes `noise`.

    Raises:
        ValueError: If there are more than `MAX_SUPPORTS` sets of places.

    Reference:
        Mitchell & Beauchamp, 1988, "Bayesian variable selection in linear regression", JASA 83.
    """

    traits = Traits(kinds=("regression",), trainable=False)

    def __init__(
        self,
        spec: TaskSpec,
        *,
        nonzero: int,
        noise: float,
        weight_scale: float = 1.0,
        query_noise: float | None = None,
    ) -> None:
        """List the sets of places."""
        super().__init__(spec)
        dim = spec.x_shape[0]
        if math.comb(dim, check_count("nonzero", nonzero)) > MAX_SUPPORTS:
            raise ValueError(f"nonzero = {nonzero} of {dim} weights must give at most {MAX_SUPPORTS} sets of places")
        self.noise, self.weight_scale = check_positive("noise", noise), check_positive("weight_scale", weight_scale)
        self.query_noise = self.noise if query_noise is None else check_positive("query_noise", query_noise)
        self.places: Tensor
        self.register_buffer("places", torch.tensor(list(itertools.combinations(range(dim), nonzero))))

    def adapt(self, support: Examples) -> SparseState:
        """Mixture mean and covariance of the weights."""
        gram, cross, _ = row_moments(support.x.double(), support.y.double(), support.real)
        dim, nonzero, n_tasks, n_outputs = gram.shape[-1], self.places.shape[1], len(gram), cross.shape[-1]
        rows, columns = self.places[:, :, None], self.places[:, None, :]
        penalty = (self.noise / self.weight_scale) ** 2
        eye = torch.eye(nonzero, dtype=gram.dtype, device=gram.device)
        factor = torch.linalg.cholesky(gram[:, rows, columns] + penalty * eye)  # (B, S, s, s)
        seen = cross[:, self.places]  # (B, S, s, y_dim)
        local = torch.cholesky_solve(seen, factor)
        logdet = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        # The evidence up to what all sets share: y' (I + X X' / penalty)^-1 y = y'y - seen' local.
        log_evidence = 0.5 * (seen * local).sum((-2, -1)) / self.noise**2 - 0.5 * n_outputs * logdet
        share = torch.softmax(log_evidence, -1)  # (B, S)
        full = local.new_zeros(*local.shape[:2], dim, n_outputs)
        index = self.places[None, :, :, None].expand(n_tasks, -1, -1, n_outputs)
        full = full.scatter(2, index, local)
        mean = (share[..., None, None] * full).sum(1)
        within = gram.new_zeros(n_tasks, dim * dim)
        flat = (rows * dim + columns).reshape(1, -1).expand(n_tasks, -1)
        terms = share[..., None, None] * torch.cholesky_inverse(factor) * self.noise**2
        within = within.scatter_add(1, flat, terms.reshape(n_tasks, -1)).view(n_tasks, 1, dim, dim)
        weighted = (share.sqrt()[..., None, None] * (full - mean[:, None])).permute(0, 3, 2, 1)  # (B, y_dim, D, S)
        return SparseState(mean, within + weighted @ weighted.mT)

    def predict(self, state: SparseState, x: Tensor) -> Distribution:
        """Gaussian with the mixture's mean and variance, query noise included."""
        wide = x.double()
        spread = torch.einsum("bqd,bkde,bqe->bqk", wide, state.covariance, wide)
        scale = (spread.clamp(min=0) + self.query_noise**2).sqrt()
        return gaussian((wide @ state.mean).to(x.dtype), scale.to(x.dtype))
