"""Pure functions on tensors, shared by the learners. Everything here has a second derivative."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from metaicl.spec import Kind, TaskSpec

HALF_PRECISION = (torch.float16, torch.bfloat16)
NOTHING = 1e-30  # probability of a class that no row has shown, beside those that have rows

_MIN_SCALE = 1e-3
# Of meta-parameters that stand for one positive number. In regression scales of answers learn as well with 5 and 20; in
# classification a penalty that learns as fast fits the training classes (HuffPost, 5 shots: .428, and .440 with 1).
_GAINS: dict[Kind, int] = {"regression": 10, "classification": 1}


def categorical(logits: Tensor) -> Categorical:
    """A distribution over classes from logits (B, Q, C), without argument checks."""
    return Categorical(logits=logits, validate_args=False)


def gaussian(mean: Tensor, scale: Tensor) -> Independent:
    """A diagonal Gaussian over targets; mean and scale (B, Q, y_dim) give batch shape (B, Q)."""
    return Independent(Normal(mean, scale.expand_as(mean), validate_args=False), 1, validate_args=False)


def positive(raw: Tensor) -> Tensor:
    """Softplus with a floor of 1e-3: a scale from an unconstrained number (Kim et al. 2019 use the same guard)."""
    return _MIN_SCALE + F.softplus(raw)


def learned_positive(raw: Tensor, kind: Kind = "regression") -> Tensor:
    """Positive numbers, such as a scale or a penalty, from a meta-parameter of their own; in the shape of `raw`.

    In regression `positive` of ten times it, in classification of itself. Adam moves a parameter by about its learning
    rate in an update: without the factor, a scale that starts at softplus(0) and belongs at a hundredth is on its way
    for thousands of updates.

    Args:
        raw: The meta-parameter.
        kind: Of the tasks.
    """
    return positive(_GAINS[kind] * raw)


def inverse_learned_positive(value: float, kind: Kind = "regression", *, name: str = "value") -> float:
    """The raw number for which `learned_positive` gives `value`.

    Args:
        value: What `learned_positive` should give.
        kind: Of the tasks.
        name: What an error calls it.

    Raises:
        ValueError: If `value` is not finite and above the floor of 1e-3.
    """
    if not _MIN_SCALE < value < math.inf:
        raise ValueError(f"{name} must be a finite number > {_MIN_SCALE}, the floor of learned_positive(); got {value}")
    above = value - _MIN_SCALE
    return (above + math.log(-math.expm1(-above))) / _GAINS[kind]  # log(exp(x) - 1) without overflow


def output_scale(spec: TaskSpec) -> nn.Parameter | None:
    """The raw scale of a regression answer (y_dim,), a meta-parameter that starts at softplus(0); None otherwise."""
    return nn.Parameter(torch.zeros(spec.output_size)) if spec.kind == "regression" else None


def answer(output: Tensor, raw_scale: Tensor | None) -> Distribution:
    """A distribution with batch shape (B, Q) from the net's output.

    Args:
        output: Logits (B, Q, C) or means (B, Q, y_dim).
        raw_scale: What `output_scale` gave: None makes the answer a distribution over classes.
    """
    return categorical(output) if raw_scale is None else gaussian(output, learned_positive(raw_scale))


def rounding_of(gram: Tensor) -> Tensor:
    """What rounding may have taken from the eigenvalues of Gram matrices (..., N, N): (..., 1, 1), a constant.

    Twice the machine epsilon times the trace. Added to the diagonal, a Cholesky factor exists whatever the scale of the
    rows; the traces of F F' and of F'F are equal.
    """
    trace = gram.detach().diagonal(dim1=-2, dim2=-1).sum(-1)
    return 2 * torch.finfo(gram.dtype).eps * trace[..., None, None]


def masked_mean(values: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Mean of the real rows along `dim`; `mask` has the leading shape of `values`. No real row gives 0."""
    if mask is None:
        return values.mean(dim) if values.shape[dim] else values.sum(dim)
    weights = mask.to(values.dtype).reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    return (values * weights).sum(dim) / weights.sum(dim).clamp(min=1)


def class_weights(y: Tensor, n_way: int, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One-hot labels (..., N, C) as numbers, zero at masked rows."""
    classes = torch.arange(n_way, device=y.device)  # comparing instead of one_hot: vmap and compile see through it
    weights = (y[..., None] == classes).to(dtype)
    return weights if mask is None else weights * mask[..., None].to(dtype)


def prototypes(embeddings: Tensor, y: Tensor, n_way: int, mask: Tensor | None = None) -> Tensor:
    """Class means (B, C, D) of embeddings (B, N, D). A class without a real row gets the origin."""
    weights = class_weights(y, n_way, mask, embeddings.dtype)
    counts = weights.sum(-2).clamp(min=1)
    return weights.transpose(-1, -2) @ embeddings / counts[..., None]


def present_classes(y: Tensor, n_way: int, mask: Tensor | None = None) -> Tensor:
    """Which classes have a real row: bool (..., C) from labels (..., N)."""
    return class_weights(y, n_way, mask, torch.get_default_dtype()).sum(-2) > 0


def without_absent(scores: Tensor, present: Tensor) -> Tensor:
    """Scores (B, Q, C) of a softmax in which classes that are not present (B, C) get a probability of about 1e-30.

    The probabilities of the others are those of a softmax over them alone. What is not known has no slope: the
    log-probability of an absent class is finite, and a constant. Where no class is present, scores stay as they are.
    """
    absent = (~present & present.any(-1, keepdim=True))[..., None, :]
    total = scores.masked_fill(absent, torch.finfo(scores.dtype).min).logsumexp(-1, keepdim=True)
    return torch.where(absent, total + math.log(NOTHING), scores)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances (..., N, M) of rows a (..., N, D) and b (..., M, D), in square units of the rows.

    Written with a matrix product, never with a (N, M, D) intermediate; unlike `torch.cdist` it has a second
    derivative, and both derivatives are right at coincident points.
    """
    # Distances do not change, but large common offsets would cancel badly.
    center = b.mean(-2, keepdim=True) if b.shape[-2] else a.new_zeros(())
    a, b = a - center, b - center
    product = a @ b.transpose(-1, -2)
    squared = a.square().sum(-1)[..., None] + b.square().sum(-1)[..., None, :] - 2 * product
    # Rounding may leave a coincident pair below zero: correct the value, but do not cut the derivative.
    return squared + (squared.clamp(min=0) - squared).detach()


def cosine_similarities(a: Tensor, b: Tensor) -> Tensor:
    """Cosines (..., N, M) of rows a (..., N, D) and b (..., M, D); 0 for a zero row, with finite derivatives."""
    return unit_rows(a) @ unit_rows(b).transpose(-1, -2)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows scaled to length one, whatever their length and precision; a zero row stays zero, with finite derivatives.

    Rows are divided by their largest entry first, so that no square overflows or vanishes. Lengths of the result do not
    depend on the divisor, so that it counts as a constant in derivatives of any order. Rows with entries below 1e-19
    (6e-5 in float16, 1e-154 in float64) are left alone: slopes grow as one over the length, and would overflow.
    """
    largest, limits = rows.detach().abs().amax(-1, keepdim=True), torch.finfo(rows.dtype)
    short = largest < (limits.tiny if rows.dtype == torch.float16 else limits.tiny**0.5)
    rows = rows / largest.masked_fill(short, 1)
    return rows * (rows.square().sum(-1, keepdim=True) + short).rsqrt()


def solvable(rows: Tensor) -> Tensor:
    """The rows in a precision that linear systems can be solved in: single where they are in half."""
    return rows.float() if rows.dtype in HALF_PRECISION else rows


def ridge_solve(x: Tensor, y: Tensor, penalty: Tensor | float, mask: Tensor | None = None) -> Tensor:
    """Ridge weights W (..., D, K) minimizing |x W - y|^2 + penalty |W|^2, in the smaller of the two dimensions.

    Rows in half precision are solved for in single, and get their weights in half.

    Args:
        x: Rows (..., N, D).
        y: Targets (..., N, K).
        penalty: Positive number.
        mask: bool (..., N); masked rows count as absent.

    Reference:
        Bertinetto et al. 2019, arXiv:1805.08136, equations 4 and 6 (Woodbury when N < D).
    """
    if mask is not None:
        x, y = x * mask[..., None], y * mask[..., None]
    dtype, x, y = x.dtype, solvable(x), solvable(y)
    n_rows, dim = x.shape[-2:]
    transposed = x.transpose(-1, -2)
    if n_rows < dim:
        gram = x @ transposed + penalty * torch.eye(n_rows, dtype=x.dtype, device=x.device)
        return (transposed @ torch.linalg.solve(gram, y)).to(dtype)
    gram = transposed @ x + penalty * torch.eye(dim, dtype=x.dtype, device=x.device)
    return torch.linalg.solve(gram, transposed @ y).to(dtype)


def raw_features(x: Tensor, spec: TaskSpec, *, buckets: int = 1024) -> Tensor:
    """Inputs (B, N, *x_shape) as rows of numbers (B, N, D): flattened, or unit-length word counts for tokens.

    Args:
        x: Inputs.
        spec: Their kind.
        buckets: Token ids are folded into so many counts, to bound memory.
    """
    if spec.x_kind != "tokens":
        return x.flatten(2)
    weights = (x != 0).to(torch.get_default_dtype())
    counts = torch.zeros(*x.shape[:2], buckets, dtype=weights.dtype, device=x.device)
    counts = counts.scatter_add(-1, x % buckets, weights)
    return unit_rows(counts)
