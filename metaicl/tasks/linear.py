"""Linear regression tasks: Gaussian ones, their variants, and the shifts that learners are tested under."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from metaicl.checks import check_choice, check_count, check_positive
from metaicl.collation import split_rows
from metaicl.episode import Episode
from metaicl.learner import Learner
from metaicl.spec import TaskSpec
from metaicl.task import Split, TaskDistribution
from metaicl.tasks.bayes import BayesianLinearRegression
from metaicl.tasks.holdout import hold_out
from metaicl.tasks.inputs import LAWS, VARIANCE, draw_inputs, random_rotations
from metaicl.tasks.sparse import MAX_SUPPORTS, SparseLinearPosterior

CELL = 2.0**-9
_LEAST_NOISE = 1e-5  # assumed by the references, in units of x w

PROMPTS = ("standard", "same orthant", "orthogonal query", "seen query")


class LinearRegression(TaskDistribution):
    """Linear maps: y = x w + noise, w ~ N(0, weight_scale^2 I), x ~ N(0, covariance), and variants.

    A learner trained on one variant can be judged on any other one of equal `dim` and `y_dim`: they share the spec.

    Args:
        dim: D, inputs.
        noise: Standard deviation of the noise on y.
        weight_scale: Standard deviation of each weight. Splits interleave in the first weight (`hold_out`).
        covariance: Input covariance (D, D), positive definite; None is the identity.
        x_scale: Factor on the inputs.
        noisy_query: Query targets carry noise too; False judges against the clean function.
        y_dim: Outputs, each with weights of its own.
        inputs: Law of the inputs before covariance and scale; see `metaicl.tasks.inputs.draw_inputs`. With
            inputs="uniform", `x_scale` is the bound.
        eigenvalues: Input covariance by its eigenvalues (D,), zeros allowed (`skewed`, `subspace`); "exponential"
            draws them from Exp(1) for each task. Not together with `covariance`.
        rotated: A random rotation of the inputs for each task, after the eigenvalues.
        nonzero: Number of weights that are not zero, at random places (the same ones for all outputs); None is all.
        distractors: Support rows per task whose label is replaced by N(0, 1). They are the latent "distractors".
        prompt: How the query relates to the support: "standard"; "same orthant", all support inputs in one random
            orthant; "orthogonal query", orthogonal to all support inputs and as long as drawn, for n_shot < D,
            or below the number of positive eigenvalues; "seen query", one of the support inputs.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Garg et al. 2022, arXiv:2208.01066, sections 3 and 4; for uniform inputs, distractors and the other laws
        von Oswald et al. 2022, arXiv:2212.07677, who scale the laws otherwise.
    """

    identity: tuple[str, ...] = ("weights",)

    def __init__(
        self,
        *,
        dim: int = 8,
        noise: float = 0.5,
        weight_scale: float = 1.0,
        covariance: Tensor | None = None,
        x_scale: float = 1.0,
        noisy_query: bool = True,
        y_dim: int = 1,
        inputs: str = "gaussian",
        eigenvalues: Tensor | str | None = None,
        rotated: bool = False,
        nonzero: int | None = None,
        distractors: int = 0,
        prompt: str = "standard",
    ) -> None:
        """Check the settings and factor the covariance once."""
        dim = check_count("dim", dim)
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise must be a standard deviation >= 0; got {noise}")
        self.noise, self.noisy_query = float(noise), bool(noisy_query)
        self.weight_scale = check_positive("weight_scale", weight_scale)
        self.x_scale = check_positive("x_scale", x_scale)
        self.inputs, self.rotated = check_choice("inputs", inputs, LAWS), bool(rotated)
        self.prompt = check_choice("prompt", prompt, PROMPTS)
        self.distractors = check_count("distractors", distractors, minimum=0)
        self.nonzero = dim if nonzero is None else check_count("nonzero", nonzero)
        if self.nonzero > dim:
            raise ValueError(f"nonzero must be at most dim = {dim}; got {nonzero}")
        if covariance is not None and eigenvalues is not None:
            raise ValueError("covariance and eigenvalues cannot both be given")
        self._factor = None if covariance is None else _factor(covariance, dim)
        self.eigenvalues = _checked_eigenvalues(eigenvalues, dim)
        self.spec = TaskSpec("regression", (dim,), y_dim=y_dim)

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Draw weights and points; see `TaskDistribution.sample`. The latent "weights" is (B, D) or (B, D, y_dim > 1).

        Raises:
            ValueError: If there are too few rows for the distractors or too many for an orthogonal query.
        """
        dim = self.spec.x_shape[0]
        if self.distractors > n_shot:
            raise ValueError(f"n_shot must be at least distractors = {self.distractors}; got {n_shot}")
        rank = int((self.eigenvalues > 0).sum()) if isinstance(self.eigenvalues, Tensor) else dim
        if self.prompt == "orthogonal query" and n_shot >= rank:
            name = "dim" if rank == dim else "the number of positive eigenvalues"
            raise ValueError(
                f"n_shot must be below {name} = {rank} for a query orthogonal to the support; got {n_shot}"
            )
        weights = self._draw_weights(n_tasks, split, generator)
        x = self._draw_inputs(n_tasks, n_shot + n_query, generator)
        x = _arranged(x, n_shot, self.prompt, generator)
        noise = self.noise * torch.randn(n_tasks, n_shot + n_query, self.spec.output_size, generator=generator)
        if not self.noisy_query:
            noise[:, n_shot:] = 0
        y = x @ weights + noise
        latents = {"weights": weights[..., 0] if self.spec.output_size == 1 else weights}
        if self.distractors:
            order = torch.rand(n_tasks, n_shot, generator=generator).argsort(1)
            replaced = order < self.distractors
            junk = torch.randn(n_tasks, n_shot, self.spec.output_size, generator=generator)
            y[:, :n_shot] = torch.where(replaced[..., None], junk, y[:, :n_shot])
            latents["distractors"] = replaced
        return split_rows(x, y, n_shot, latents)

    def references(self) -> Mapping[str, Learner]:
        """The Bayes posterior; without noise it is the minimum-norm least-squares fit.

        Noise of at least 1e-5 of the standard deviation of x w is assumed, well above rounding.
        It is exact for every law of the inputs. With sparse weights it sums over all places of the weights, where
        these are at most `MAX_SUPPORTS`; above, "ridge" is the best linear estimate. With distractors, "ridge" is
        the posterior that takes every label at its word.
        """
        dim, least = self.spec.x_shape[0], _LEAST_NOISE * self._size()
        noise = max(self.noise, least)
        noises = {"noise": noise, "query_noise": noise if self.noisy_query else least}
        if self.nonzero < dim and math.comb(dim, self.nonzero) <= MAX_SUPPORTS and not self.distractors:
            sparse = SparseLinearPosterior(self.spec, nonzero=self.nonzero, weight_scale=self.weight_scale, **noises)
            return {"Bayes": sparse}
        matched = self.weight_scale * (self.nonzero / dim) ** 0.5
        name = "Bayes" if self.nonzero == dim and not self.distractors else "ridge"
        return {name: BayesianLinearRegression(self.spec, weight_scale=matched, **noises)}

    def _size(self) -> float:
        """Standard deviation of x w."""
        dim, variance = self.spec.x_shape[0], VARIANCE.get(self.inputs, 1 / self.spec.x_shape[0])
        if self._factor is not None:
            variance *= float(self._factor.square().sum()) / dim
        elif isinstance(self.eigenvalues, Tensor):
            variance *= float(self.eigenvalues.mean())
        return self.weight_scale * self.x_scale * (self.nonzero * variance) ** 0.5

    def _draw_weights(self, n_tasks: int, split: Split, generator: torch.Generator) -> Tensor:
        dim = self.spec.x_shape[0]
        values = torch.randn(n_tasks, self.nonzero, self.spec.output_size, generator=generator)
        values[:, 0] = hold_out(values[:, 0], split, generator, cell=CELL)
        values = values * self.weight_scale
        if self.nonzero == dim:
            return values
        # Places in rising order, so that the held-out value is the first weight that is not zero.
        places = torch.rand(n_tasks, dim, generator=generator).argsort(1)[:, : self.nonzero].sort(1).values
        return values.new_zeros(n_tasks, dim, values.shape[-1]).scatter(1, places[..., None].expand_as(values), values)

    def _draw_inputs(self, n_tasks: int, n_rows: int, generator: torch.Generator) -> Tensor:
        dim = self.spec.x_shape[0]
        x = draw_inputs(self.inputs, (n_tasks, n_rows, dim), generator)
        if self._factor is not None:
            x = x @ self._factor.T
        if isinstance(self.eigenvalues, str):
            x = x * (-torch.log1p(-torch.rand(n_tasks, 1, dim, generator=generator))).sqrt()
        elif self.eigenvalues is not None:
            x = x * self.eigenvalues.sqrt()
        if self.rotated:
            x = x @ random_rotations(n_tasks, dim, generator)
        return x * self.x_scale


def _factor(covariance: Tensor, dim: int) -> Tensor:
    """The Cholesky factor of an input covariance, once it is known to be one."""
    covariance = torch.as_tensor(covariance, dtype=torch.float32)
    if covariance.shape != (dim, dim):
        raise ValueError(f"covariance must be (D, D) = ({dim}, {dim}); got {tuple(covariance.shape)}")
    scale = float(covariance.abs().max())
    if not math.isfinite(scale):
        raise ValueError("covariance must be finite; it holds NaN or infinity")
    if not torch.allclose(covariance, covariance.mT, rtol=1e-5, atol=1e-6 * scale):  # as estimated in float32
        apart = float((covariance - covariance.mT).abs().max())
        raise ValueError(f"covariance must be symmetric; it differs from its transpose by up to {apart:g}")
    factor, failed = torch.linalg.cholesky_ex(((covariance + covariance.mT) / 2).double())
    if int(failed):
        raise ValueError("covariance must be positive definite; an eigenvalue of it is not above 0")
    return factor.float()


def _checked_eigenvalues(eigenvalues: Tensor | str | None, dim: int) -> Tensor | str | None:
    if eigenvalues is None or isinstance(eigenvalues, str):
        return eigenvalues if eigenvalues is None else check_choice("eigenvalues", eigenvalues, ("exponential",))
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float32)
    if eigenvalues.shape != (dim,):
        raise ValueError(f"eigenvalues must be (D,) = ({dim},); got {tuple(eigenvalues.shape)}")
    if not bool(((eigenvalues >= 0) & eigenvalues.isfinite()).all()) or not bool((eigenvalues > 0).any()):
        raise ValueError(f"eigenvalues must be >= 0 and finite, and one of them above 0; got {eigenvalues.tolist()}")
    return eigenvalues


def _arranged(x: Tensor, n_shot: int, prompt: str, generator: torch.Generator) -> Tensor:
    """Inputs (B, rows, D) whose first `n_shot` rows are the support, arranged as the prompt asks."""
    support, query = x[:, :n_shot], x[:, n_shot:]
    if prompt == "same orthant":
        signs = 2.0 * torch.randint(0, 2, (len(x), 1, x.shape[-1]), generator=generator) - 1
        support = support.abs() * signs
    elif prompt == "orthogonal query":
        span = torch.linalg.qr(support.double().mT).Q  # (B, D, n_shot)
        wide = query.double()
        rest = wide - (wide @ span) @ span.mT
        length = wide.norm(dim=-1, keepdim=True) / rest.norm(dim=-1, keepdim=True)
        query = (rest * length).to(x.dtype)
    elif prompt == "seen query":
        order = torch.rand(support.shape[:2], generator=generator).argsort(1)
        rows = order[:, torch.arange(query.shape[1]) % n_shot]  # none twice before every one has come once
        query = support.gather(1, rows[..., None].expand_as(query))
    return torch.cat([support, query], 1)
