"""The linear systems of multi-class problems: one kernel for every class, coupled by a sum over classes in each row."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CoupledInverse:
    """The symmetric operator P = E - E R (R' E R)^-1 R' E on tables (B, N, C), in parts.

    E is block-diagonal with one block E_c = (K + W_c^-1)^-1 for each class, and R sums each row over its classes. P r
    solves (K + W_c^-1) u_c = r_c + v for all c, with the v (B, N) for which the rows of u sum to zero.

    Attributes:
        blocks: (B, C, N, N), the E_c.
        factor: (B, N, N), Cholesky factor of the sum of the blocks.

    Reference:
        Rasmussen & Williams, 2006, Gaussian Processes for Machine Learning, equations 3.46 to 3.48 and Algorithm 3.3.
    """

    blocks: Tensor
    factor: Tensor

    def __matmul__(self, table: Tensor) -> Tensor:
        """P applied to a table (B, N, C)."""
        single = self.blocks @ table.mT[..., None]  # (B, C, N, 1)
        shared = torch.cholesky_solve(single.sum(1), self.factor)  # (B, N, 1)
        return (single - self.blocks @ shared[:, None])[..., 0].mT


def coupled_inverse(kernel: Tensor, weights: Tensor) -> CoupledInverse:
    """Factorize; the cost is C + 1 Cholesky factors of size N for each task.

    Args:
        kernel: K (B, N, N), positive semidefinite.
        weights: The diagonals W (B, N, C), positive.
    """
    roots = weights.mT.sqrt()  # (B, C, N); with them outside, what is factorized has no eigenvalue below one
    identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    inner = roots[..., :, None] * kernel[:, None] * roots[..., None, :] + identity
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inner))
    blocks = roots[..., :, None] * inverse * roots[..., None, :]
    return CoupledInverse(blocks, torch.linalg.cholesky(blocks.sum(1)))
