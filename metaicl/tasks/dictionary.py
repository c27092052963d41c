"""Linear maps of inputs that can take a few orthogonal values only."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metaicl.checks import check_count
from metaicl.collation import split_rows
from metaicl.episode import Episode
from metaicl.learner import Learner
from metaicl.spec import TaskSpec
from metaicl.task import Split, TaskDistribution
from metaicl.tasks.bayes import BayesianLinearRegression
from metaicl.tasks.holdout import hold_out

_NOISE = 1e-4  # the exact posterior needs a noise level; this one is far below every answer


class DictionaryRegression(TaskDistribution):
    """y = w . x without noise, w ~ N(0, I), where x is one of K orthonormal features.

    A query can be answered exactly when its feature has been seen in the support, and not at all otherwise.

    Args:
        n_features: K, which is also the dimension of x.
        probabilities: Of each feature (K,); None makes them equal.

    Raises:
        ValueError: If the probabilities are not K positive finite numbers; they are normalized.

    Reference:
        Huang, Cheng & Liang 2023, arXiv:2310.05249, section 2. The features are the unit vectors, which loses no
        generality for a learner that may rotate its inputs.
    """

    identity: tuple[str, ...] = ("weights",)

    def __init__(self, *, n_features: int = 8, probabilities: Sequence[float] | None = None) -> None:
        """Normalize the probabilities."""
        given = [1.0] * check_count("n_features", n_features, 2) if probabilities is None else list(probabilities)
        if len(given) != n_features or not all(0 < share < math.inf for share in given):
            raise ValueError(f"probabilities must be K = {n_features} positive numbers, all finite; got {given}")
        self.probabilities = torch.tensor(given) / sum(given)
        self.spec = TaskSpec("regression", (n_features,), y_dim=1)

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Draw weights and features; see `TaskDistribution.sample`."""
        n_rows, n_features = n_shot + n_query, self.spec.x_shape[0]
        weights = torch.randn(n_tasks, n_features, generator=generator)
        weights[:, 0] = hold_out(weights[:, 0], split, generator, cell=2.0**-9)
        features = torch.multinomial(self.probabilities, n_tasks * n_rows, replacement=True, generator=generator)
        features = features.view(n_tasks, n_rows)
        x = torch.nn.functional.one_hot(features, n_features).float()
        return split_rows(x, weights.gather(1, features)[..., None], n_shot, {"weights": weights})

    def unseen(self, n_shot: int) -> Tensor:
        """Probability that a query's feature is not among `n_shot` rows, and its expected squared error with it: ()."""
        return (self.probabilities * (1 - self.probabilities) ** n_shot).sum()

    def references(self) -> Mapping[str, Learner]:
        """The exact posterior: the label of the same feature, or zero."""
        return {"Bayes": BayesianLinearRegression(self.spec, noise=_NOISE)}
