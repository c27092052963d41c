"""The mesa memory: after every token the exact least-squares map from keys to values, by three routes.

A memory is a pair: the map Phi (..., V, K), and R (..., K, K), the inverse of the regularized covariance of the keys.
Before any token Phi = 0 and R = lambda I. With a gate the past fades, the regularizer with it:
A_t = gamma_t A_{t-1} + k_t k_t^T, C_t = gamma_t C_{t-1} + v_t k_t^T, R = A^-1, Phi = C R. A zero key with gate one
leaves the memory exactly as it is. R grows as 1 / gamma^t along directions that no key reaches. The first two routes
bear that until the condition of R is that of the dtype, the third one without end.

Where keys have single precision, R may have double in the last two routes. It should, where tokens come in pieces: in
single precision it knows the directions that keys have reached only to lambda times the rounding.

* `least_squares` is the recursion of Sherman and Morrison as one writes it down. Autograd keeps R of every token.
* `least_squares_recursive` is the same with its own backward, which keeps few R or none.
* `least_squares_chunked` has one Cholesky factorization per chunk and no loop within, where that keeps the digits, as
  with a moderate lambda. It is the fast one.

Reference:
    von Oswald et al. 2023, arXiv:2309.05858, equations 7 and 8 and appendix B (the mesa layer). Differs: the gate, and
    the chunked form, which is exact. Without a gate, lambda near 0 gives lambda times linear attention.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaicl.checks import check_count
from metaicl.nets.memory.delta import cut
from metaicl.nets.memory.fit import Fit, symmetric, unless_unread, write_chunk, write_token
from metaicl.nets.memory.normal_equations import inverse_of, precision_of, write_by_normal_equations
from metaicl.transforms import in_a_transform, in_vmap

_SHORTEST = 8  # tokens of a chunk below which a product over chunks is no faster than the normal equations


def least_squares(
    queries: Tensor, keys: Tensor, values: Tensor, fit: Fit, decay: Tensor | None = None
) -> tuple[Tensor, Fit]:
    """Write each token by a rank-one update and read Phi_t q_t.

    Args:
        queries: (..., T, K).
        keys: (..., T, K).
        values: (..., T, V).
        fit: What came before.
        decay: Logarithms of gamma (..., T), at most zero; None forgets nothing.

    Returns:
        Reads (..., T, V) and the fit after all tokens.
    """
    reads = []
    for t in range(keys.shape[-2]):
        fit = write_token(fit, keys[..., t, :], values[..., t, :], None if decay is None else decay[..., t].exp())
        reads.append((fit.weights @ queries[..., t, :, None])[..., 0])
    return torch.stack(reads, -2), fit


def least_squares_chunked(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    fit: Fit,
    decay: Tensor | None = None,
    *,
    chunk: int = 64,
) -> tuple[Tensor, Fit]:
    """`least_squares` with one Cholesky factorization per chunk; arguments and results are the same.

    Within a chunk the fit is kernel regression on the residuals of the fit before it, with kernel k^T R k'. The leading
    blocks of I + K R K^T share one Cholesky factor L: with Y = L^-1 (V - K Phi^T) and Z = L^-1 K R Q^T token t reads
    Phi q_t + sum_{i <= t} Z_it Y_i. Nothing is close to singular as long as I is not lost beside K R K^T, which costs
    the digits of lambda |k|^2: a third of those of the dtype may go. Where more would, from 204 in single precision on,
    chunks are computed in double, and where that is not enough either, from 165,000 on, by the recursion. In a compiled
    graph and under vmap, where numbers cannot be asked for, it is chunks in double: five digits are left at 1e10.

    With a gate, keys and values are divided by the root of what the gates have left since the start of the chunk, and
    the steeper the gates, the shorter are chunks. That is accurate as long as little of the past is lost within a chunk
    and R is of moderate size. From the first chunk on where that is not so, and in a compiled graph or under vmap,
    where numbers cannot be asked for, gated tokens are written by the normal equations (`write_by_normal_equations`),
    which take several times as long and about one inverse per token.
    """
    size = check_count("chunk", chunk)
    start = fit.inverse
    if decay is None and not _knows_to_be(True, _keeps_digits(fit, keys)):
        if keys.dtype != torch.float64:
            return _in_double(least_squares_chunked, (queries, keys, values), fit, None, chunk=chunk)
        if not _cannot_ask():
            return least_squares(queries, keys, values, fit)
    gates = torch.zeros_like(keys[..., 0]) if decay is None else decay
    while decay is not None and size > _SHORTEST and _knows_to_be(False, _mild(decay.mean(-1) * size)):
        size //= 2
    reads, precision = [], None
    for query, key, value, log_gate in cut((queries, keys, values, gates), size):
        mild = _mild(log_gate.sum(-1) - _largest(fit, key).log().clamp(min=0))
        if precision is None and decay is not None and not _knows_to_be(True, mild):
            precision = precision_of(fit.inverse)
        if precision is None:
            read, fit = write_chunk(query, key, value, log_gate, Fit(fit.weights, fit.inverse.to(key)))
        else:
            tokens = (query, key, value, log_gate)
            read, weights, precision = write_by_normal_equations(tokens, fit.weights, precision)
            fit = Fit(weights, fit.inverse)
        reads.append(read)
    inverse = fit.inverse if precision is None else inverse_of(precision, start.dtype)
    if precision is not None or start.dtype != keys.dtype:
        inverse = unless_unread(inverse, start, keys, gates)
    return torch.cat(reads, -2)[..., : keys.shape[-2], :], Fit(fit.weights, inverse)


def least_squares_recursive(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    fit: Fit,
    decay: Tensor | None = None,
    *,
    keep_every: int | None = 0,
) -> tuple[Tensor, Fit]:
    """`least_squares` whose backward does not need R of every token; arguments and results are the same.

    Going back a step divides by 1 - k^T R_t k = 1 / (1 + k^T R_{t-1} k), so that a rounding error along k grows by 1 +
    k^T R_{t-1} k, up to 1 + lambda |k|^2. With 64 unit keys of size 8 and no fit kept, gradients in float32 are off by
    1e-6 of their norm at lambda = 1 and 1e-4 at 100; from 204 on all is computed in double, where they are off by 1e-10
    at 10,000, 1e-6 at a million and everything from 1e9 on. What a gate has made to fade does not come back: at gamma =
    .9 and lambda = 1 they are off by 1e-4 in float32, at .7 by everything. Where fits are kept, the steps between two
    of them are done again from the first, which is always stable.

    The second derivative goes through `least_squares_chunked`, which is the same function, and so does everything
    within transforms of `torch.func`.

    Args:
        queries: (..., T, K).
        keys: (..., T, K).
        values: (..., T, V).
        fit: What came before.
        decay: Logarithms of gamma (..., T); None forgets nothing.
        keep_every: Keep the fit before every so many tokens for the backward; 0 takes the root of T, which keeps about
            2 root(T) fits at a time; None keeps none and runs the recursion in reverse, for gates near one.
    """
    decay = torch.zeros_like(keys[..., 0]) if decay is None else decay
    n_tokens = keys.shape[-2]
    every = math.isqrt(max(n_tokens - 1, 0)) + 1 if keep_every == 0 else keep_every
    if every is not None:
        check_count("keep_every", every)
    if in_a_transform():
        return least_squares_chunked(queries, keys, values, fit, decay)
    if keys.dtype != torch.float64 and not bool(_keeps_digits(fit, keys)):
        return _in_double(least_squares_recursive, (queries, keys, values), fit, decay, keep_every=keep_every)
    start = fit.inverse
    reads, weights, inverse = _Recursion.apply(queries, keys, values, fit.weights, start.to(keys), decay, every)
    return reads, Fit(weights, inverse if start.dtype == keys.dtype else unless_unread(inverse, start, keys, decay))


def ridge_start(regularizer: Tensor, key_size: int, value_size: int) -> Fit:
    """The fit before any token, for lambda (...): Phi = 0 and R = lambda I."""
    eye = torch.eye(key_size, dtype=regularizer.dtype, device=regularizer.device)
    return Fit(regularizer.new_zeros(*regularizer.shape, value_size, key_size), regularizer[..., None, None] * eye)


def _mild(decay: Tensor) -> Tensor:
    """Whether what is left of the past, from its logarithm, costs at most a third of the digits of the dtype."""
    return (decay >= math.log(torch.finfo(decay.dtype).eps) / 3).all()


def _largest(fit: Fit, keys: Tensor) -> Tensor:
    """A bound (...) on k^T R k for any of the keys, as far as the diagonal of R tells: lambda |k|^2 at first."""
    return fit.inverse.diagonal(dim1=-2, dim2=-1).amax(-1).to(keys) * keys.square().sum(-1).amax(-1)


def _keeps_digits(fit: Fit, keys: Tensor) -> Tensor:
    """Whether R and the keys leave most digits of the dtype of the keys, gates apart."""
    return _mild(-_largest(fit, keys).log().clamp(min=0))


def _cannot_ask() -> bool:
    """Whether numbers cannot be looked at: in a compiled graph and under vmap."""
    return torch.compiler.is_compiling() or in_vmap()


def _knows_to_be(value: bool, flag: Tensor) -> bool:
    """Whether a flag is known to have this value."""
    return not _cannot_ask() and bool(flag) == value


def _in_double(
    run: Callable[..., tuple[Tensor, Fit]],
    tokens: tuple[Tensor, Tensor, Tensor],
    fit: Fit,
    decay: Tensor | None,
    **options: int | None,
) -> tuple[Tensor, Fit]:
    wide = Fit(fit.weights.double(), fit.inverse.double())
    reads, after = run(*(one.double() for one in tokens), wide, None if decay is None else decay.double(), **options)
    return reads.to(tokens[1]), Fit(after.weights.to(tokens[1]), after.inverse.to(fit.inverse))


def _unwrite(fit: Fit, key: Tensor, value: Tensor, gate: Tensor) -> Fit:
    """What the fit was before its last token: Sherman-Morrison in reverse."""
    gain = (fit.inverse @ key[..., None])[..., 0]  # R_t k = R k / (1 + k^T R k)
    scale = 1 / (1 - (key * gain).sum(-1, keepdim=True))
    error = scale * (value - (fit.weights @ key[..., None])[..., 0])
    prior = symmetric(fit.inverse + scale[..., None] * gain[..., :, None] * gain[..., None, :])
    return Fit(fit.weights - error[..., :, None] * gain[..., None, :], gate[..., None, None] * prior)


class _Recursion(torch.autograd.Function):
    """The recursion without a tape."""

    @staticmethod
    def forward(  # one argument for each tensor that has a gradient
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor, inverse: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        decay, every = rest
        fit, reads, kept = Fit(weights, inverse), [], []
        for t in range(keys.shape[-2]):
            if every is not None and t and t % every == 0:
                kept += fit
            fit = write_token(fit, keys[..., t, :], values[..., t, :], decay[..., t].exp())
            reads.append((fit.weights @ queries[..., t, :, None])[..., 0])
        ctx.every = every
        ctx.save_for_backward(queries, keys, values, weights, inverse, decay, *fit, *kept)
        return torch.stack(reads, -2), fit.weights, fit.inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, last, kept = ctx.saved_tensors[:6], Fit(*ctx.saved_tensors[6:8]), ctx.saved_tensors[8:]
        if torch.is_grad_enabled():  # create_graph: what is kept knows no graph, so the function is done again
            return (*_differentiable_backward(inputs, grads), None)
        queries, keys, values, weights, inverse, decay = inputs
        n_tokens, gates = keys.shape[-2], decay.exp()
        if ctx.every is None:
            pieces = [(0, n_tokens, None)]
        else:
            starts = [Fit(weights, inverse), *(Fit(*kept[i : i + 2]) for i in range(0, len(kept), 2))]
            pieces = [(i * ctx.every, min((i + 1) * ctx.every, n_tokens), fit) for i, fit in enumerate(starts)]
        found = [torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values), torch.zeros_like(decay)]
        later = Fit(grads[1], grads[2])
        for start, stop, fit in reversed(pieces):
            states = None if fit is None else _states(fit, keys, values, gates, range(start, stop))
            for t in reversed(range(start, stop)):
                token = (keys[..., t, :], values[..., t, :], gates[..., t])
                before = _unwrite(last, *token) if states is None else states[t - start]
                after = last if states is None else states[t - start + 1]
                read = (queries[..., t, :], grads[0][..., t, :])
                later = _step_back(later, before, after, token, read, [one[..., t, :] for one in found[:3]])
                found[3][..., t] = -(later.inverse * before.inverse).sum((-2, -1))
                last = before
        return found[0], found[1], found[2], later.weights, later.inverse, found[3], None


def _states(fit: Fit, keys: Tensor, values: Tensor, gates: Tensor, tokens: range) -> list[Fit]:
    fits = [fit]
    for t in tokens:
        fits.append(write_token(fits[-1], keys[..., t, :], values[..., t, :], gates[..., t]))
    return fits


def _step_back(
    later: Fit,
    before: Fit,
    after: Fit,
    token: tuple[Tensor, Tensor, Tensor],
    read: tuple[Tensor, Tensor],
    found: list[Tensor],
) -> Fit:
    """The gradient before a token, from the one after it; fills in those of query, key and value."""
    (key, value, gate), (query, grad_read) = token, read
    grad_inverse = symmetric(later.inverse)  # as R_t was made symmetric
    found[0].copy_((after.weights.mT @ grad_read[..., None])[..., 0])
    grad_weights = later.weights + grad_read[..., :, None] * query[..., None, :]
    prior = before.inverse / gate[..., None, None]
    reach = (prior @ key[..., None])[..., 0]
    scale = 1 + (key * reach).sum(-1, keepdim=True)
    gain = reach / scale
    error = value - (before.weights @ key[..., None])[..., 0]
    grad_error = (grad_weights @ gain[..., None])[..., 0]
    grad_gain = (grad_weights.mT @ error[..., None])[..., 0]
    # R_t = P - reach reach^T / scale, gain = reach / scale, scale = 1 + k^T reach, reach = P k
    turned = 2 * (grad_inverse @ reach[..., None])[..., 0]
    grad_scale = ((turned * reach).sum(-1, keepdim=True) / 2 - (grad_gain * reach).sum(-1, keepdim=True)) / scale**2
    grad_reach = (grad_gain - turned) / scale + grad_scale * key
    grad_key = grad_scale * reach + (prior.mT @ grad_reach[..., None])[..., 0]
    found[1].copy_(grad_key - (before.weights.mT @ grad_error[..., None])[..., 0])
    found[2].copy_(grad_error)
    grad_prior = grad_inverse + grad_reach[..., :, None] * key[..., None, :]
    grad_weights = grad_weights - grad_error[..., :, None] * key[..., None, :]
    return Fit(grad_weights, grad_prior / gate[..., None, None])


def _differentiable_backward(inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    wanted = [one for one in inputs if one.requires_grad]
    queries, keys, values, weights, inverse, decay = inputs
    reads, fit = least_squares_chunked(queries, keys, values, Fit(weights, inverse), decay)
    found = iter(torch.autograd.grad((reads, *fit), wanted, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if one.requires_grad else None for one in inputs)
