"""A finite pool of latent tasks, each with a cue in the input: what can be looked up in rows of the same task."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributions import Distribution

from metaicl.checks import check_choice, check_count, check_positive
from metaicl.collation import split_rows
from metaicl.episode import Episode, Examples
from metaicl.functional import gaussian, squared_distances
from metaicl.learner import Learner, Traits
from metaicl.mixtures import marginal
from metaicl.spec import TaskSpec
from metaicl.task import SPLITS, Split, TaskDistribution, derive_generator
from metaicl.tasks.bayes import BayesianLinearRegression, LinearPosterior
from metaicl.tasks.classes import split_classes
from metaicl.tasks.holdout import hold_out


class TaskMixture(TaskDistribution):
    """Linear functions from a pool: x = (cue of the task + noise, z), y = w_task . z + noise, z ~ N(0, I).

    The cue says which of the pool's tasks a row belongs to, and nothing about that task's weights: a query with a
    support too small to give w away can only be answered by who remembers, or retrieves, rows of the same task. What
    the input shares with rows of other tasks, z, is what a retriever has to learn to overlook.

    Latents: `task_ids` long (B, 1), `weights` (B, D).

    Args:
        n_pool: P, latent tasks of all splits together.
        dim: D, size of z.
        cue_dim: Size of the cue.
        cue_scale: Length of a cue; against it, z has length sqrt(D).
        cue_noise: Standard deviation of the noise on each coordinate of a cue.
        noise: Standard deviation of the noise on y.
        held_out: "rows": every split has all latent tasks, and rows of its own (the first coordinate of z interleaves
            in cells, `hold_out`); "tasks": no latent task of one split is in another.
        seed: Of the pool: cues and weights, which are N(0, 1).

    Raises:
        ValueError: If a size is out of range or `held_out` is unknown.
    """

    def __init__(
        self,
        *,
        n_pool: int = 200,
        dim: int = 2,
        cue_dim: int = 8,
        cue_scale: float = 1.0,
        cue_noise: float = 0.1,
        noise: float = 0.1,
        held_out: str = "rows",
        seed: int = 0,
    ) -> None:
        """Draw the pool."""
        n_pool = check_count("n_pool", n_pool, minimum=len(SPLITS))
        self.dim, self.cue_dim = check_count("dim", dim), check_count("cue_dim", cue_dim, minimum=2)
        self.cue_noise, self.noise = check_positive("cue_noise", cue_noise), check_positive("noise", noise)
        self.spec = TaskSpec("regression", (cue_dim + dim,), y_dim=1)
        generator = derive_generator(seed, "pool")
        cues = torch.randn(n_pool, cue_dim, generator=generator, dtype=torch.float64)
        # unit_rows rounds otherwise, and a seed names its episodes to the last bit
        cues = cues * (cues.square().sum(-1, keepdim=True) + 1e-12).rsqrt()
        self.cues = (check_positive("cue_scale", cue_scale) * cues).float()
        self.weights = torch.randn(n_pool, dim, generator=generator)
        self.held_out = check_choice("held_out", held_out, ("rows", "tasks"))
        parts: dict[Split, list[int]] = {split: list(range(n_pool)) for split in SPLITS}
        if held_out == "tasks":
            parts = split_classes(n_pool, seed=seed)
        self.task_splits = {split: torch.tensor(owned) for split, owned in parts.items()}
        if held_out == "tasks":
            self.identity = ("task_ids",)  # which splits are disjoint is a choice here

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Draw latent tasks with replacement, then rows; see `TaskDistribution.sample`."""
        owned = self.task_splits[split]
        ids = owned[torch.randint(len(owned), (n_tasks,), generator=generator)]
        shape = (n_tasks, n_shot + n_query)
        cue = self.cues[ids][:, None] + self.cue_noise * torch.randn(*shape, self.cue_dim, generator=generator)
        z = torch.randn(*shape, self.dim, generator=generator)
        z[..., 0] = hold_out(z[..., 0], split, generator, cell=2.0**-9)
        y = (z * self.weights[ids][:, None]).sum(-1, keepdim=True)
        y = y + self.noise * torch.randn(y.shape, generator=generator)
        latents = {"task_ids": ids[:, None], "weights": self.weights[ids]}
        return split_rows(torch.cat([cue, z], -1), y, n_shot, latents)

    def codes(self, x: Tensor) -> Tensor:
        """What an oracle retriever compares: one-hot codes (..., P) of the latent tasks whose cues are nearest to x."""
        cues = self.cues.to(x)
        nearest = (x[..., : self.cue_dim] @ cues.mT).argmax(-1)  # all cues have one length
        return torch.nn.functional.one_hot(nearest, len(cues)).to(x.dtype)

    def references(self) -> Mapping[str, Learner]:
        """Who knows the weights of every latent task, and the posterior of who knows the support alone."""
        return {"pool known": KnownPool(self.spec, self), "support alone": SupportAlone(self.spec, self)}


class KnownPool(Learner[Tensor]):
    """The posterior predictive of who knows the cue and the weights of every latent task, and how noisy rows are.

    The best answer where rows of every latent task have been seen without end: a mixture over the pool, by the cues and
    targets of the support and by the query's own cue. All tasks of the pool count as equally likely, whatever split
    they are in.
    """

    traits = Traits(kinds=("regression",), trainable=False)

    def __init__(self, spec: TaskSpec, tasks: TaskMixture) -> None:
        """Keep the pool."""
        super().__init__(spec)
        self.tasks = tasks

    def adapt(self, support: Examples) -> Tensor:
        """Log-likelihood of the support under each latent task, up to a constant: (B, P), float64."""
        residual = (support.y.double() - self._means(support.x)) / self.tasks.noise
        rows = self._cue_fit(support.x) - 0.5 * residual.square()
        return torch.where(support.real[..., None], rows, 0.0).sum(1)

    def update(self, state: Tensor, examples: Examples) -> Tensor:
        """That of the new rows added."""
        return state + self.adapt(examples)

    def predict(self, state: Tensor, x: Tensor) -> Distribution:
        """A mixture over the latent tasks."""
        means = self._means(x)[..., None].to(x.dtype)  # (B, Q, P, 1)
        weights = (state[:, None] + self._cue_fit(x)).log_softmax(-1)
        return marginal(gaussian(means, means.new_tensor(self.tasks.noise)), weights.to(x.dtype))

    def _means(self, x: Tensor) -> Tensor:
        """What each latent task makes of rows x: (B, N, P)."""
        z = x[..., self.tasks.cue_dim :].double()
        return z @ self.tasks.weights.to(z).mT

    def _cue_fit(self, x: Tensor) -> Tensor:
        """Log-density of the cues of rows x under each latent task, up to a constant: (B, N, P)."""
        cues = x[..., : self.tasks.cue_dim].double()
        return -0.5 * squared_distances(cues, self.tasks.cues.to(cues)) / self.tasks.cue_noise**2


class SupportAlone(BayesianLinearRegression):
    """The posterior of the weights given the support, by who has never met the task."""

    def __init__(self, spec: TaskSpec, tasks: TaskMixture) -> None:
        """Keep where the cue ends."""
        super().__init__(spec, noise=tasks.noise)
        self.cue_dim = tasks.cue_dim

    def adapt(self, support: Examples) -> LinearPosterior:
        """The posterior from z alone."""
        return super().adapt(self._without_cue(support))

    def update(self, state: LinearPosterior, examples: Examples) -> LinearPosterior:
        """The posterior after the new rows too."""
        return super().update(state, self._without_cue(examples))

    def predict(self, state: LinearPosterior, x: Tensor) -> Distribution:
        """The posterior predictive."""
        return super().predict(state, x[..., self.cue_dim :])

    def predict_prefixes(self, examples: Examples) -> Distribution:
        """Every row from the rows before it."""
        return super().predict_prefixes(self._without_cue(examples))

    def _without_cue(self, rows: Examples) -> Examples:
        return Examples(rows.x[..., self.cue_dim :], rows.y, rows.mask, rows.ids)
