"""How alike two rows are, on a learned scale."""

from typing import Literal

import torch
from torch import Tensor, nn

from metaicl.checks import check_choice, check_positive
from metaicl.functional import cosine_similarities, squared_distances

Distance = Literal["euclidean", "cosine"]

_COSINE_TEMPERATURE = 10.0  # cosines lie in [-1, 1]: at a factor of one no softmax over many of them is ever sharp


class Similarity(nn.Module):
    """Negative squared Euclidean distances or cosines, times a learned positive factor: scores of a softmax.

    Args:
        dim: D, the size of a row.
        distance: "euclidean" or "cosine".
        temperature: Start of the factor. None takes 1 / sqrt(D) for distances, at which the softmax of a fresh encoder
            is not saturated, and 10 for cosines.
        learn_temperature: Train the factor.

    Raises:
        ValueError: If the distance is unknown or the factor is not positive.

    Reference:
        Oreshkin, Rodriguez & Lacoste, 2018, arXiv:1805.10123, equation 2 (metric scaling).
    """

    def __init__(
        self,
        dim: int,
        *,
        distance: Distance = "euclidean",
        temperature: float | None = None,
        learn_temperature: bool = True,
    ) -> None:
        """Keep the factor as its logarithm."""
        super().__init__()
        self.distance = check_choice("distance", distance, ("euclidean", "cosine"))
        usual = _COSINE_TEMPERATURE if distance == "cosine" else dim**-0.5
        log_temperature = torch.tensor(
            check_positive("temperature", usual if temperature is None else temperature)
        ).log()
        self.log_temperature = nn.Parameter(log_temperature, requires_grad=learn_temperature)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Scores (..., N, M), in nats, of rows a (..., N, D) and b (..., M, D)."""
        scores = cosine_similarities(a, b) if self.distance == "cosine" else -squared_distances(a, b)
        return scores * self.log_temperature.exp()
