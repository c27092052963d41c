"""Looped linear attention that changes targets only: preconditioned gradient descent with a learned preconditioner."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count
from metaicl.episode import Examples
from metaicl.functional import answer, output_scale
from metaicl.learner import Learner, Traits
from metaicl.nets.moments import Moments, row_moments
from metaicl.spec import NotServed, TaskSpec


class LoopedFit(NamedTuple):
    """Moments of the support, and the map W (B, D, y_dim) that the loops have made of it."""

    moments: Moments
    weights: Tensor


class LoopedLinearAttention(Learner[LoopedFit]):
    """One layer of linear attention, applied `loops` times: y <- y - x^T A (1/N) sum_i x_i (y_i + u^T x_i).

    Inputs stay as they are, so the loops are W <- W + A (1/N) sum_i x_i (y_i + u^T x_i - x_i W), kept as moments of
    the support: any number of loops costs D^2 each. A = lr I, u = 0 is gradient descent. `loops` may be changed at any
    time; `predict` needs a state that was made with the present number.

    Args:
        spec: Vector inputs, regression.
        loops: L.
        start: A starts as `start` times the identity, u as zero.

    Raises:
        ValueError: If the inputs are no vectors.

    Reference:
        Gatmiry, Saunshi, Reddi, Jegelka & Kumar, 2024, arXiv:2410.08292, section 3: attention whose value part
        reaches the targets alone (P = [[0, 0], [u^T, 1]], Q = [[A, 0], [0, 0]]). Differs: the scale of the Gaussian
        answer is a learned number per output.
    """

    traits = Traits(kinds=("regression",), instead=(("classification", "LinearTransformer"),))

    def __init__(self, spec: TaskSpec, *, loops: int = 3, start: float = 0.1) -> None:
        """Start as careful gradient descent."""
        super().__init__(spec)
        if spec.x_kind != "vector":
            raise NotServed(f"LoopedLinearAttention needs x_kind 'vector'; got {spec.x_kind!r}")
        self.loops, (dim,) = check_count("loops", loops), spec.x_shape
        self.preconditioner = nn.Parameter(start * torch.eye(dim))
        self.shift = nn.Parameter(torch.zeros(dim, spec.output_size))
        self.raw_scale = output_scale(spec)

    def adapt(self, support: Examples) -> LoopedFit:
        """Moments, and the map after the loops."""
        return self._run(row_moments(support.x, support.y, support.real))

    def update(self, state: LoopedFit, examples: Examples) -> LoopedFit:
        """The fit to the old rows and the new ones."""
        return self._run(state.moments.plus(row_moments(examples.x, examples.y, examples.real)))

    def predict(self, state: LoopedFit, x: Tensor) -> Distribution:
        """Gaussian around x W."""
        return answer(x @ state.weights, self.raw_scale)

    def _run(self, moments: Moments) -> LoopedFit:
        count = moments.count.clamp(min=1)[..., None, None]
        gram, cross = moments.gram / count, moments.cross / count
        weights = torch.zeros_like(cross)
        for _ in range(self.loops):
            weights = weights + self.preconditioner @ (cross + gram @ (self.shift - weights))
        return LoopedFit(moments, weights)
