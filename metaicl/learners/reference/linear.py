"""Linear reference learners: the algorithms that Transformers are compared with on linear tasks.

All of them answer x W without an intercept, in float64 inside. Coefficients may be numbers or tensors that carry
gradients, so that `metaicl.learners.reference.tuning.tune` can fit them to a distribution.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metaicl.checks import check_count
from metaicl.learners.reference.moments import MomentLearner
from metaicl.nets.moments import Moments
from metaicl.spec import NotServed, TaskSpec

Coefficients = float | Sequence[float] | Tensor
"""One number for all steps, or one for each."""

_RANK = 1e-12  # eigenvalues of a Gram matrix below this share of the largest are rounding
_RANK_CROSS = 1e-10  # singular values of a cross moment, likewise


class GradientDescent(MomentLearner):
    """`steps` steps of gradient descent on (1/2N) sum_i |x_i W - y_i|^2 from `start`.

    Args:
        spec: Vector inputs, regression.
        steps: K.
        lr: Step size, one for all steps or one for each.
        momentum: Heavy-ball factor: velocity <- momentum velocity - lr gradient.
        start: W_0 (D, y_dim); None is zero.
        per_row: The gradient is the mean over the N real rows; False takes the sum, so that `lr` stands for the
            rate over a fixed N, as in linear attention without a division by its length.
        scale: Standard deviation of the answer.

    Raises:
        ValueError: If `lr` is neither one number nor `steps` numbers, or `start` has another shape.

    Reference:
        von Oswald et al. 2022, arXiv:2212.07677, section 3 (their rate over N is the `lr` of per_row=False).
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        steps: int = 1,
        lr: Coefficients,
        momentum: float | Tensor = 0.0,
        start: Tensor | None = None,
        per_row: bool = True,
        scale: float = 1.0,
    ) -> None:
        """Keep the schedule."""
        super().__init__(spec, scale=scale)
        self.lr = per_step("lr", lr, check_count("steps", steps))
        self.momentum, self.per_row = momentum, bool(per_row)
        shape = (spec.x_shape[0], spec.output_size)
        if start is not None and start.shape != shape:
            raise ValueError(f"start must be (D, y_dim) = {shape}; got {tuple(start.shape)}")
        self.start = start

    def weights(self, moments: Moments) -> Tensor:
        """The last iterate."""
        gram, cross = _normalized(moments, self.per_row)
        weights = torch.zeros_like(cross) if self.start is None else self.start.to(cross).expand_as(cross)
        velocity = torch.zeros_like(cross)
        for rate in self.lr.to(cross.device):
            velocity = self.momentum * velocity - rate * (gram @ weights - cross)
            weights = weights + velocity
        return weights


class GradientDescentPlusPlus(MomentLearner):
    """GD++: between gradient steps every input is curved by the others, x_j <- x_j - gamma X^T X x_j.

    Step l takes the gradient at zero of the loss on the present inputs x_j and residuals y_j, subtracts the answers
    from the residuals, then changes the inputs; queries take part in the change of inputs, and their answer is the
    sum of the steps. It is linear in the query, so it is kept as one map W. The last gamma has no effect.

    Args:
        spec: Vector inputs, regression.
        steps: Steps (layers).
        lr: eta, shared or one for each step.
        gamma: gamma, shared or one for each step.
        per_row: Both are for moments that are means over the N real rows; False for sums.
        scale: Standard deviation of the answer.

    Reference:
        von Oswald et al. 2022, arXiv:2212.07677, section 4 and appendix A.10.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        steps: int,
        lr: Coefficients,
        gamma: Coefficients,
        per_row: bool = True,
        scale: float = 1.0,
    ) -> None:
        """Keep the coefficients."""
        super().__init__(spec, scale=scale)
        self.lr = per_step("lr", lr, check_count("steps", steps))
        self.gamma = per_step("gamma", gamma, steps)
        self.per_row = bool(per_row)

    def weights(self, moments: Moments) -> Tensor:
        """The sum of the steps, each carried back to the inputs as they came."""
        gram, cross = _normalized(moments, self.per_row)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        inputs, weights = eye, torch.zeros_like(cross)  # the present x_j is inputs @ x_j
        for rate, gamma in zip(self.lr.to(gram.device), self.gamma.to(gram.device), strict=True):
            step = rate * cross
            weights = weights + inputs.mT @ step
            change = eye - gamma * gram
            cross = change @ (cross - gram @ step)
            gram = change @ gram @ change
            inputs = change @ inputs
        return weights


class Averaging(MomentLearner):
    """W = (factor / N) sum_i x_i y_i: the best unbiased guess that never looks at how the inputs correlate.

    Args:
        spec: Vector inputs, regression.
        factor: 1 for inputs of identity covariance.
        scale: Standard deviation of the answer.

    Reference:
        Garg et al. 2022, arXiv:2208.01066, section 3 ("averaging").
    """

    def __init__(self, spec: TaskSpec, *, factor: float = 1.0, scale: float = 1.0) -> None:
        """Keep the factor."""
        super().__init__(spec, scale=scale)
        self.factor = factor

    def weights(self, moments: Moments) -> Tensor:
        """The mean of x y^T."""
        return self.factor * _normalized(moments, True)[1]


class LeastSquares(MomentLearner):
    """Ordinary least squares; of all maps that fit equally well, the one of least norm.

    Directions whose singular value is below 1e-6 of the largest one count as never seen.
    """

    def weights(self, moments: Moments) -> Tensor:
        """pinv(X) Y, from the eigenvalues of the Gram matrix."""
        values, vectors = torch.linalg.eigh(moments.gram)
        seen = values > _RANK * values[..., -1:].clamp(min=torch.finfo(values.dtype).tiny)
        inverse = torch.where(seen, 1 / torch.where(seen, values, 1.0), 0.0)
        return vectors @ (inverse[..., None] * (vectors.mT @ moments.cross))


class PreconditionedDescent(MomentLearner):
    """One gradient step on inputs that momentum-Richardson iterations have preconditioned towards ridge regression.

    The query starts as s_0 = x and is iterated towards (X^T X + penalty I)^-1 x,

        s_{k+1} = s_k + alpha_k (x - (X^T X + penalty I) s_k) + beta_k (s_k - s_{k-1}),   k < steps - 1,

    then the last step answers lr sum_i y_i x_i^T s. With lr = 1 and many steps this is ridge regression; one step is
    gradient descent from zero at rate lr. `chebyshev` gives coefficients from bounds on the eigenvalues.

    Args:
        spec: Vector inputs, regression.
        steps: Layers K, of which the last one is the gradient step.
        alpha: Step sizes, one for all or one for each of the K - 1 iterations.
        beta: Momentum, likewise.
        penalty: On squared weights.
        lr: Factor of the last step.
        scale: Standard deviation of the answer.

    Reference:
        von Oswald et al. 2023, arXiv:2309.05858, proposition 2.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        steps: int,
        alpha: Coefficients,
        beta: Coefficients = 0.0,
        penalty: float | Tensor = 0.0,
        lr: float | Tensor = 1.0,
        scale: float = 1.0,
    ) -> None:
        """Keep the coefficients."""
        super().__init__(spec, scale=scale)
        steps = check_count("steps", steps)
        self.alpha, self.beta = per_step("alpha", alpha, steps - 1), per_step("beta", beta, steps - 1)
        self.strength, self.lr = penalty, lr

    def weights(self, moments: Moments) -> Tensor:
        """The preconditioner, applied to the cross moment."""
        eye = torch.eye(moments.gram.shape[-1], dtype=moments.gram.dtype, device=moments.gram.device)
        system = moments.gram + self.strength * eye
        before = now = eye.expand_as(system)
        for alpha, beta in zip(self.alpha.to(eye.device), self.beta.to(eye.device), strict=True):
            before, now = now, now + alpha * (eye - system @ now) + beta * (now - before)
        return self.lr * (now.mT @ moments.cross)


class Procrustes(MomentLearner):
    """The orthogonal map that fits best: W = U V^T, where U S V^T is the singular value decomposition of X^T Y.

    In directions that the rows have not reached the best map is not unique; there it answers zero, the mean over all
    completions. Needs as many outputs as inputs.

    Raises:
        ValueError: If y_dim differs from the number of inputs.

    Reference:
        Schoenemann, 1966, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 31.
    """

    def __init__(self, spec: TaskSpec, *, scale: float = 1.0) -> None:
        """Require a square map."""
        super().__init__(spec, scale=scale)
        if spec.x_shape[0] != spec.output_size:
            raise NotServed(f"Procrustes needs y_dim = D; got {spec.output_size} outputs of {spec.x_shape[0]} inputs")

    def weights(self, moments: Moments) -> Tensor:
        """The polar factor of the cross moment, on its range."""
        left, values, right = torch.linalg.svd(moments.cross)
        seen = values > _RANK_CROSS * values[..., :1].clamp(min=torch.finfo(values.dtype).tiny)
        return (left * seen[..., None, :]) @ right


def chebyshev(low: float, high: float, iterations: int) -> tuple[list[float], list[float]]:
    """Coefficients (alpha, beta) of `PreconditionedDescent` that are best for eigenvalues in [low, high].

    Args:
        low: Smallest eigenvalue of X^T X + penalty I, above zero.
        high: Largest one, above `low`.
        iterations: K - 1.

    Raises:
        ValueError: If not 0 < low < high.

    Reference:
        Saad, 2003, Iterative Methods for Sparse Linear Systems, algorithm 12.1.
    """
    if not 0 < low < high:
        raise ValueError(f"low and high must be eigenvalues with 0 < low < high; got {low} and {high}")
    center, radius = (high + low) / 2, (high - low) / 2
    alpha, beta, ratio = [1 / center], [0.0], radius / center
    while len(alpha) < check_count("iterations", iterations):
        after = 1 / (2 * center / radius - ratio)
        alpha.append(2 * after / radius)
        beta.append(after * ratio)
        ratio = after
    return alpha, beta


def per_step(name: str, value: Coefficients, steps: int) -> Tensor:
    """`value` as one float64 number for each step (steps,); a tensor keeps its graph.

    Raises:
        ValueError: If it is neither one number nor `steps` numbers.
    """
    found = torch.as_tensor(value, dtype=torch.float64)
    if found.ndim > 1 or (found.ndim == 1 and len(found) != steps):
        raise ValueError(f"{name} must be one number or {steps} of them; got shape {tuple(found.shape)}")
    return found.expand(steps)


def _normalized(moments: Moments, per_row: bool) -> tuple[Tensor, Tensor]:
    """Gram and cross moments as means over the real rows, or as they are."""
    if not per_row:
        return moments.gram, moments.cross
    count = moments.count.clamp(min=1)[..., None, None]
    return moments.gram / count, moments.cross / count
