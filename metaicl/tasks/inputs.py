"""Laws of random inputs, and random rotations."""

import torch
from torch import Tensor

from metaicl.checks import check_choice, check_count

KURTOSIS = {"gaussian": 3.0, "uniform": 1.8, "exponential": 9.0, "laplace": 6.0}
"""E z^4 / (E z^2)^2 of one coordinate, for the laws whose coordinates are independent."""

VARIANCE = {"gaussian": 1.0, "uniform": 1 / 3, "exponential": 1.0, "laplace": 1.0}
"""E z^2 of one coordinate, for the same laws; on the sphere it is 1 / D."""

LAWS = (*KURTOSIS, "sphere")


def draw_inputs(law: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Inputs of one of the laws, all of mean zero.

    Args:
        law: "gaussian" N(0, I); "uniform" on [-1, 1]; "exponential", Exp(1) - 1, and "laplace", both of variance one
            per coordinate; "sphere", Gaussian directions of length one.
        shape: (..., D).
        generator: The source of randomness.

    Raises:
        ValueError: If the law is unknown.
    """
    if check_choice("inputs", law, LAWS) in ("gaussian", "sphere"):
        normal = torch.randn(shape, generator=generator)
        return normal if law == "gaussian" else normal / normal.norm(dim=-1, keepdim=True)
    place = torch.rand(shape, generator=generator)
    if law == "uniform":
        return 2 * place - 1
    exponential = -torch.log1p(-place)
    if law == "exponential":
        return exponential - 1
    sign = 2 * torch.randint(0, 2, shape, generator=generator) - 1
    return sign * exponential / 2**0.5  # Laplace of variance one


def random_rotations(n: int, dim: int, generator: torch.Generator) -> Tensor:
    """Orthogonal matrices (n, D, D), uniform in the group (reflections included).

    Reference:
        Mezzadri, 2007, arXiv:math-ph/0609050, section 5.
    """
    q, r = torch.linalg.qr(torch.randn(n, dim, dim, generator=generator))
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]


def skewed(dim: int, *, power: float = 2.0) -> Tensor:
    """Eigenvalues (D,) proportional to 1 / i^power whose mean is one.

    Reference:
        Garg et al. 2022, arXiv:2208.01066, section 4 ("skewed covariance").
    """
    values = torch.arange(1, check_count("dim", dim) + 1, dtype=torch.float64) ** -power
    return (values / values.mean()).float()


def subspace(dim: int, rank: int) -> Tensor:
    """Eigenvalues (D,) of inputs in a subspace: `rank` times dim / rank, then zero, so that their mean is one.

    Reference:
        Garg et al. 2022, arXiv:2208.01066, section 4 ("d/2-dimensional subspace").
    """
    if not 1 <= check_count("rank", rank) <= dim:
        raise ValueError(f"rank must be in [1, dim = {dim}]; got {rank}")
    return torch.tensor([dim / rank] * rank + [0.0] * (dim - rank))
