"""Recursive least squares: ridge regression of a stream, one rank-one update for each row."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from metaicl.checks import check_positive
from metaicl.episode import Examples
from metaicl.functional import gaussian
from metaicl.learner import Learner, Traits
from metaicl.learners.reference.moments import check_vectors
from metaicl.spec import TaskSpec

_FLOOR = 1e-14  # added to a Gram matrix that has faded, in units of its trace: a hundred times its rounding


class Recursion(NamedTuple):
    """Without forgetting: the map W (B, D, y_dim) and the inverse Gram matrix R (B, D, D), in float64."""

    weights: Tensor
    inverse: Tensor


class Faded(NamedTuple):
    """With forgetting, in float64: unlike R its sums do not grow where no row reaches a direction.

    Attributes:
        weights: The map W (B, D, y_dim).
        gram: The faded sum (B, D, D) of the penalty and x x^T.
        cross: That of x y^T (B, D, y_dim).
    """

    weights: Tensor
    gram: Tensor
    cross: Tensor


class RecursiveLeastSquares(Learner[Recursion | Faded]):
    """Minimizes sum_i forgetting^(t - i) |x_i W - y_i|^2 + forgetting^t penalty |W|^2 at every row t of a stream.

    Each row costs one rank-one update (Sherman & Morrison 1950). Without forgetting it is ridge regression. With it the
    order of the rows matters, and each row costs a solution of the faded normal equations: once the penalty has faded
    below rounding, directions that no recent row reaches have weights near zero, and the others do not notice. Masked
    rows leave the state alone. Inside, numbers are float64.

    Args:
        spec: Vector inputs, regression.
        penalty: On squared weights; sigma^2 / tau^2 makes it the Bayes posterior mean.
        forgetting: In (0, 1]; 1 forgets nothing.
        scale: Standard deviation of the answer, assumed, not fitted.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Haykin, 2002, Adaptive Filter Theory, chapter 9; von Oswald et al. 2023, arXiv:2309.05858, section 4 (the
        mesa layer, with R_0 = I / penalty).
    """

    traits = Traits(kinds=("regression",), instead=(("classification", "Logistic"),), trainable=False)

    def __init__(self, spec: TaskSpec, *, penalty: float, forgetting: float = 1.0, scale: float = 1.0) -> None:
        """Keep the settings; with forgetting the learner declares that order matters."""
        super().__init__(spec)
        check_vectors(spec, type(self).__name__)
        self.strength, self.scale = check_positive("penalty", penalty), check_positive("scale", scale)
        self.forgetting = check_positive("forgetting", forgetting)
        if self.forgetting > 1:
            raise ValueError(f"forgetting must be in (0, 1]; got {forgetting}")
        if self.forgetting < 1:
            self.traits = replace(self.traits, order_sensitive=True)

    def adapt(self, support: Examples) -> Recursion | Faded:
        """The state after all rows."""
        return self.update(self._start(support), support)

    def update(self, state: Recursion | Faded, examples: Examples) -> Recursion | Faded:
        """The state after the new rows, in their order."""
        x, y = examples.x.double(), examples.y.double()
        for t in range(examples.n_rows):
            state = self._step(state, x[:, t], y[:, t], examples.real[:, t])
        return state

    def predict(self, state: Recursion | Faded, x: Tensor) -> Distribution:
        """Gaussian around x W."""
        mean = (x.double() @ state.weights).to(x.dtype)
        return gaussian(mean, mean.new_tensor(self.scale))

    def predict_prefixes(self, examples: Examples) -> Distribution:
        """Every row of a stream from the rows before it, in one pass over the rows; see `PredictsPrefixes`."""
        x, y, state = examples.x.double(), examples.y.double(), self._start(examples)
        means = []
        for t in range(examples.n_rows):
            means.append(x[:, t, None] @ state.weights)
            state = self._step(state, x[:, t], y[:, t], examples.real[:, t])
        mean = torch.cat(means, 1).to(examples.x.dtype) if means else examples.x @ state.weights.to(examples.x.dtype)
        return gaussian(mean, mean.new_tensor(self.scale))

    def _start(self, examples: Examples) -> Recursion | Faded:
        n_tasks, dim = len(examples), self.spec.x_shape[0]
        wide = examples.x.new_zeros(n_tasks, dim, self.spec.output_size, dtype=torch.float64)
        eye = torch.eye(dim, dtype=wide.dtype, device=wide.device).expand(n_tasks, dim, dim)
        if self.forgetting < 1:
            return Faded(wide, self.strength * eye, wide)
        return Recursion(wide, eye / self.strength)

    def _step(self, state: Recursion | Faded, x: Tensor, y: Tensor, real: Tensor) -> Recursion | Faded:
        if isinstance(state, Faded):
            return self._fade(state, x, y, real)
        column = (state.inverse @ x[..., None]) * real[:, None, None]  # (B, D, 1)
        gain = column / (1 + (x[:, None] @ column))
        error = y[:, None] - x[:, None] @ state.weights
        inverse = state.inverse - gain * column.mT
        return Recursion(state.weights + gain * error, (inverse + inverse.mT) / 2)

    def _fade(self, state: Faded, x: Tensor, y: Tensor, real: Tensor) -> Faded:
        fade = torch.where(real, x.new_tensor(self.forgetting), 1.0)[:, None, None]
        row = (x * real[:, None])[..., None]  # (B, D, 1)
        gram, cross = fade * state.gram + row * row.mT, fade * state.cross + row * y[:, None]
        floor = _FLOOR * gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=torch.finfo(gram.dtype).tiny / _FLOOR)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor = torch.linalg.cholesky_ex(gram + floor[:, None, None] * eye).L
        return Faded(torch.cholesky_solve(cross, factor), gram, cross)
