"""Memories that learn by gradient descent while they read: TTT, Titans and the Omega rule of ATLAS.

A memory M is a linear map or a net of two layers (see `recall`). Token i has the loss
l_i(M) = 1/2 |M(k_i) - v_i|^2, and after token t

    g_t = sum over the last c tokens i of importance_i grad l_i(M*),
    S_t = momentum_t S_{t-1} - step_t g_t,
    M_t = keep_t M_{t-1} + S_t.

M* is M_{t-1}, or in mini-batches of b tokens the memory before the mini-batch. Tokens that are not real are as absent:
they change nothing and do not count, neither for the window nor for the mini-batch.

* TTT: c = 1, no momentum, keep = 1, b > 1 (Sun et al. 2024, arXiv:2407.04620, equation 7 and section 2.4).
* Titans: c = 1 (Behrouz et al. 2025, arXiv:2501.00663, equations 9, 10 and 14, 1 - alpha written as keep).
* Omega: c > 1 (Behrouz et al. 2025, arXiv:2505.23735, equations 9 and 32; the importances depend on token i only).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metaicl.checks import check_count
from metaicl.nets.memory.recall import factors, orthogonalize, recall, recall_by
from metaicl.nets.memory.state import FastWeights

_FREE_CHUNK = 64  # tokens per block where the gradients of all tokens are taken at one place

_Shares = tuple[Tensor, list[tuple[Tensor, Tensor]]]
"""How strongly each token pulls along each gradient (B, H, n, m), and for each layer the gradients as d and a."""


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How a memory descends.

    Args:
        batch: b, tokens whose gradients are taken at one place; None takes all of them at the first.
        window: c, tokens whose losses make a gradient.
        norm: The memory answers with the key plus its normalized output (see `recall`).
        inner_steps: Repetitions of the step at each token, each with a new gradient.
        muon: S_t = momentum_t S_{t-1} - g_t, orthogonalized before it is added: M_t = keep_t M_{t-1} + step_t NS5(S_t).

    Raises:
        ValueError: If mini-batches are combined with inner steps or Muon, whose steps need the latest memory.
    """

    batch: int | None = 1
    window: int = 1
    norm: bool = False
    inner_steps: int = 1
    muon: bool = False

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("window", "inner_steps"):
            check_count(name, getattr(self, name))
        if self.batch is not None:
            check_count("batch", self.batch)
        if self.batch != 1 and (self.inner_steps > 1 or self.muon):
            raise ValueError(
                f"batch must be 1 with inner_steps > 1 or muon, whose steps need the latest memory; got {self.batch}"
            )


class Rates(NamedTuple):
    """Numbers of each token, all (..., T).

    Attributes:
        step: Rate of its step.
        momentum: What it leaves of the momentum, in [0, 1).
        keep: What it leaves of the memory, in (0, 1].
        importance: Weight of its loss.
    """

    step: Tensor
    momentum: Tensor
    keep: Tensor
    importance: Tensor


def start_descent(weights: tuple[Tensor, ...], value_size: int, rule: Descent) -> FastWeights:
    """The state before any token, from the first weights (B, H, out, in)."""
    tasks, heads, _, key_size = weights[0].shape
    window = ()
    if rule.window > 1:
        empty = weights[0].new_zeros(tasks, heads, rule.window - 1, key_size + value_size + 1)
        window = (empty[..., :key_size], empty[..., key_size:-1], empty[..., -1])
    batched = rule.batch != 1
    count = (torch.zeros(tasks, 1, dtype=torch.long, device=weights[0].device),) if batched else ()
    momentum = tuple(torch.zeros_like(one) for one in weights)
    return FastWeights(weights, (), momentum, weights if batched else (), count, window)


def descend(
    queries: Tensor,
    written: tuple[Tensor, Tensor, Rates],
    state: FastWeights,
    rule: Descent,
    real: Tensor,
) -> tuple[Tensor, FastWeights]:
    """Write one token after the other, reading each time.

    Args:
        queries: (B, H, T, K).
        written: Keys (B, H, T, K), values (B, H, T, V), and rates with leaves (B, H, T).
        state: What came before.
        rule: How to descend.
        real: bool (B, 1, T).

    Returns:
        Reads (B, H, T, V) and the state after all tokens.
    """
    reads = []
    keys, values, rates = written
    for t in range(keys.shape[-2]):
        token = (keys[..., t : t + 1, :], values[..., t : t + 1, :], Rates(*(rate[..., t] for rate in rates)))
        state = _step(token, state, rule, real[..., t])
        reads.append(recall(state.weights, queries[..., t : t + 1, :], norm=rule.norm))
    return torch.cat(reads, -2), state


def descend_chunked(
    queries: Tensor,
    written: tuple[Tensor, Tensor, Rates],
    state: FastWeights,
    rule: Descent,
    real: Tensor,
) -> tuple[Tensor, FastWeights]:
    """`descend` in mini-batches with matrix products over blocks of tokens; arguments and results are the same.

    Within a mini-batch the memory is linear in the gradients, which are outer products: no memory but the last is
    ever formed, and tokens read through their inner products (the dual form). A block has as many tokens as a
    mini-batch, so that at most one mini-batch ends within it, at another place in every task if some tokens are not
    real: its tokens have their gradients from before or from after that place.

    Raises:
        ValueError: If the rule takes every gradient at the latest memory.
    """
    if rule.batch == 1:
        raise ValueError("descend_chunked needs gradients that share a place, batch > 1 or None; got batch = 1")
    keys, values, rates = written
    n_tokens = keys.shape[-2]
    size = min(_FREE_CHUNK if rule.batch is None else rule.batch, n_tokens)
    missing = -n_tokens % size
    wide = [F.pad(one, (0, 0, 0, missing)).split(size, -2) for one in (queries, keys, values)]
    flat = [F.pad(rate, (0, missing)).unflatten(-1, (-1, size)) for rate in rates]
    real = F.pad(real, (0, missing)).unflatten(-1, (-1, size))
    after = _responses(Rates(*flat), real)  # (2, B, H, blocks, n, n + 2)
    reads = []
    for index, (query, key, value) in enumerate(zip(*wide, strict=True)):
        block = (key, value, Rates(*(rate[..., index, :] for rate in flat)))
        read, state = _block(query, block, state, rule, (real[..., index, :], after[..., index, :, :]))
        reads.append(read)
    return torch.cat(reads, -2)[..., :n_tokens, :], state


def _step(token: tuple[Tensor, Tensor, Rates], state: FastWeights, rule: Descent, real: Tensor) -> FastWeights:
    """One token, its rates (B, H) and real (B, 1)."""
    key, value, rates = token
    real = real.expand(rates.step.shape)
    seen = (key, value, (rates.importance * real)[..., None])
    if state.window:
        seen = tuple(torch.cat([old, new], 2) for old, new in zip(state.window, seen, strict=True))
    weights, momentum = state.weights, state.momentum
    step, fade, keep = (one[..., None, None] for one in rates[:3])
    for _ in range(rule.inner_steps):
        place = state.base if state.base else weights
        grads = [(d * seen[2][..., None]).mT @ a for d, a in factors(place, seen[0], seen[1], norm=rule.norm)]
        size = 1.0 if rule.muon else step
        momentum = tuple(fade * old - size * grad for old, grad in zip(momentum, grads, strict=True))
        moves = [step * orthogonalize(one) for one in momentum] if rule.muon else momentum
        weights = tuple(keep * old + move for old, move in zip(weights, moves, strict=True))
    weights = _where(real, weights, state.weights)
    momentum = _where(real, momentum, state.momentum)
    window = _where(real, tuple(one[:, :, 1:] for one in seen), state.window) if state.window else ()
    base, count = state.base, state.count
    if rule.batch is not None and count:
        number = count[0] + real[:, :1]
        full = number == rule.batch
        base = _where(full, weights, base)
        count = (torch.where(full, 0, number),)
    return FastWeights(weights, (), momentum, base, count, window)


def _responses(rates: Rates, real: Tensor) -> Tensor:
    """How memory and momentum after each token of a block depend on those before it, and on each token's gradient.

    Returns:
        (2, B, H, blocks, n, n + 2): for the memory and for the momentum after token t the factors of M_0, of S_0, and
        of each token's own change.
    """
    n_tokens = real.shape[-1]
    unit = torch.eye(n_tokens + 2, dtype=rates.step.dtype, device=real.device).expand(*rates.step.shape[:-1], -1, -1)
    memory, momentum, rows = unit[..., 0, :], unit[..., 1, :], []
    for t in range(n_tokens):
        here = real[..., t, None]
        momentum_new = rates.momentum[..., t, None] * momentum + unit[..., t + 2, :]
        memory = torch.where(here, rates.keep[..., t, None] * memory + momentum_new, memory)
        momentum = torch.where(here, momentum_new, momentum)
        rows.append(torch.stack([memory, momentum]))
    return torch.stack(rows, -2)


def _block(
    query: Tensor,
    block: tuple[Tensor, Tensor, Rates],
    state: FastWeights,
    rule: Descent,
    course: tuple[Tensor, Tensor],
) -> tuple[Tensor, FastWeights]:
    """One block: real (B, 1, n) and responses (2, B, H, n, n + 2) come in `course`."""
    (key, value, rates), (real, after) = block, course
    rank = real.long().cumsum(-1)  # (B, 1, n)
    seen = (key, value, rates.importance * real)
    old_rank = rank[..., :0]
    if state.window:
        seen = tuple(torch.cat([old, new], 2) for old, new in zip(state.window, seen, strict=True))
        old_rank = torch.arange(2 - rule.window, 1, device=rank.device).expand(*rank.shape[:2], -1)
    age = rank[..., :, None] - torch.cat([old_rank, rank], -1)[..., None, :]
    position = torch.arange(rank.shape[-1], device=rank.device)
    causal = F.pad(position[:, None] >= position, (old_rank.shape[-1], 0), value=True)
    used = (age >= 0) & (age < rule.window) & causal & real[..., None]
    pull = torch.where(used, rates.step[..., None] * seen[2][..., None, :], 0.0)  # (B, H, n, window - 1 + n)

    base, count, limit = state.base, state.count, None
    if rule.batch is not None:
        limit = rule.batch - count[0]  # (B, 1) tokens until the mini-batch is full
    early = real if limit is None else real & (rank <= limit[..., None])
    parts = [_shares(early, pull, base, seen, rule)]
    if limit is not None:
        number = rank[..., -1]
        at = (real & (rank == limit[..., None])).to(after.dtype)[..., None, :]  # (B, 1, 1, n)
        full = number >= limit
        base = _where(full, _combine(state, at @ after[0], parts), base)
        count = (torch.where(full, number - limit, count[0] + number),)
        parts.append(_shares(real & ~early, pull, base, seen, rule))
    reads = recall_by(lambda layer, x: _through(layer, x, state, after[0], parts), len(base), query, norm=rule.norm)
    weights = _combine(state, after[0][..., -1:, :], parts)
    momentum = _combine(state, after[1][..., -1:, :], parts)
    window = _newest(seen, real, rule.window - 1) if state.window else ()
    return reads, FastWeights(weights, (), momentum, base, count, window)


def _shares(
    tokens: Tensor, pull: Tensor, place: tuple[Tensor, ...], seen: tuple[Tensor, ...], rule: Descent
) -> _Shares:
    return torch.where(tokens[..., None], pull, 0.0), factors(place, seen[0], seen[1], norm=rule.norm)


def _combine(state: FastWeights, response: Tensor, parts: list[_Shares]) -> tuple[Tensor, ...]:
    """The memory or the momentum, from its response (B, H, 1, n + 2)."""
    combined = []
    for layer, (memory, momentum) in enumerate(zip(state.weights, state.momentum, strict=True)):
        total = response[..., :1] * memory + response[..., 1:2] * momentum
        for pull, grads in parts:
            d, a = grads[layer]
            total = total - (d * (response[..., 2:] @ pull).mT).mT @ a
        combined.append(total)
    return tuple(combined)


def _through(layer: int, x: Tensor, state: FastWeights, response: Tensor, parts: list[_Shares]) -> Tensor:
    """Rows x (B, H, n, in) through a layer, row t through the memory after token t, from responses (B, H, n, n + 2)."""
    out = response[..., :1] * (x @ state.weights[layer].mT) + response[..., 1:2] * (x @ state.momentum[layer].mT)
    for pull, grads in parts:
        d, a = grads[layer]
        out = out - ((response[..., 2:] @ pull) * (x @ a.mT)) @ d
    return out


def _newest(seen: tuple[Tensor, ...], real: Tensor, count: int) -> tuple[Tensor, ...]:
    """The last `count` of the tokens in the old window (all of which stay in line) and the real ones after them."""
    present = F.pad(real[:, 0], (count, 0), value=True)
    order = torch.argsort(present.to(torch.uint8), dim=1, stable=True)[:, -count:]  # (B, c - 1)
    heads = seen[2].shape[1]
    index = order[:, None].expand(-1, heads, -1)
    kept = [one.gather(2, index[..., None].expand(-1, -1, -1, one.shape[-1])) for one in seen[:2]]
    return (*kept, seen[2].gather(2, index))


def _where(real: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """New leaves (B, H, ...) where `real` (B, 1 or H) is True."""
    pairs = zip(new, old, strict=True)
    return tuple(torch.where(real.reshape(*real.shape, *(1,) * (a.ndim - 2)), a, b) for a, b in pairs)
