"""Linear attention and the delta rule, with an optional forgetting gate: token by token, and in chunks.

Leading axes (...) are free, usually (B, heads). A memory M (..., V, K) maps keys of size K to values of size V. A token
with key and value (or strength) zero and gate one leaves the memory exactly as it is.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metaicl.checks import check_count
from metaicl.functional import solvable


def linear_attention(
    queries: Tensor, keys: Tensor, values: Tensor, memory: Tensor, decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Write every token as it is, M_t = alpha_t M_{t-1} + v_t k_t^T, and read M_t q_t; one token after the other.

    Args:
        queries: (..., T, K).
        keys: (..., T, K).
        values: (..., T, V).
        memory: M_0 (..., V, K).
        decay: Logarithms of alpha (..., T), at most zero, -inf where all is forgotten; None forgets nothing.

    Returns:
        Reads (..., T, V) and M_T.

    Reference:
        Katharopoulos et al. 2020, arXiv:2006.16236, equations 18 to 20 without the normalizer; Yang et al. 2024,
        arXiv:2312.06635 (GLA), with one gate for the whole memory as in Mamba-2.
    """
    reads = []
    for t in range(keys.shape[-2]):
        if decay is not None:
            memory = decay[..., t, None, None].exp() * memory
        memory = memory + values[..., t, :, None] * keys[..., t, None, :]
        reads.append((memory @ queries[..., t, :, None])[..., 0])
    return torch.stack(reads, -2), memory


def linear_attention_chunked(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    memory: Tensor,
    decay: Tensor | None = None,
    *,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """`linear_attention` with matrix products over chunks of tokens; arguments and results are the same."""
    decay = torch.zeros_like(keys[..., 0]) if decay is None else _finite(decay)
    reads = []
    for query, key, value, log_gate in cut((queries, keys, values, decay), check_count("chunk", chunk)):
        read, memory = _gated_chunk(query, key, value, log_gate, memory)
        reads.append(read)
    return torch.cat(reads, -2)[..., : keys.shape[-2], :], memory


def delta_rule(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    strength: Tensor,
    memory: Tensor,
    decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Correct what the key recalls, M_t = alpha_t M_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T; token by token.

    Args:
        queries: (..., T, K).
        keys: (..., T, K), of length one where the rule is to be stable for beta up to 2.
        values: (..., T, V).
        strength: beta (..., T).
        memory: M_0 (..., V, K).
        decay: Logarithms of alpha (..., T), at most zero, -inf where all is forgotten; None forgets nothing.

    Returns:
        Reads M_t q_t (..., T, V) and M_T.

    Reference:
        Schlag et al. 2021, arXiv:2102.11174, equation 24; Yang et al. 2025, arXiv:2412.06464 (gated), equation 10.
    """
    reads = []
    for t in range(keys.shape[-2]):
        key, value = keys[..., t, :, None], values[..., t, :, None]
        if decay is not None:
            memory = decay[..., t, None, None].exp() * memory
        memory = memory + strength[..., t, None, None] * (value - memory @ key) * key.mT
        reads.append((memory @ queries[..., t, :, None])[..., 0])
    return torch.stack(reads, -2), memory


def delta_rule_chunked(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    strength: Tensor,
    memory: Tensor,
    decay: Tensor | None = None,
    *,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """`delta_rule` with one triangular solve per chunk; arguments and results are the same.

    A token writes beta (v - alpha M k), the WY form of the product of its chunk's reflections. Those corrections solve
    a unit triangular system, and with them in the place of values the chunk is linear attention.

    Reference:
        Yang et al. 2024, arXiv:2406.06484, section 3; Yang et al. 2025, arXiv:2412.06464, section 3.3. Differs: the
        triangular system is solved, not inverted.
    """
    decay = torch.zeros_like(strength) if decay is None else _finite(decay)
    reads = []
    for query, key, value, beta, log_gate in cut((queries, keys, values, strength, decay), check_count("chunk", chunk)):
        since = log_gate.cumsum(-1)
        overlap = beta[..., None] * (key @ key.mT) * decay_between(since).tril(-1)
        missing = beta[..., None] * (value - since.exp()[..., None] * (key @ memory.mT))
        system = solvable(overlap), solvable(missing)
        corrections = torch.linalg.solve_triangular(*system, upper=False, unitriangular=True).to(value)
        read, memory = _gated_chunk(query, key, corrections, log_gate, memory)
        reads.append(read)
    return torch.cat(reads, -2)[..., : keys.shape[-2], :], memory


def cut(parts: tuple[Tensor, ...], chunk: int) -> list[tuple[Tensor, ...]]:
    """Tokens (..., T, size), and numbers per token (..., T), in chunks; the last one is filled with zeros.

    The first part has an axis more than numbers per token have.
    """
    n_tokens, rank = parts[0].shape[-2], parts[0].ndim
    size = min(chunk, n_tokens)
    missing = -n_tokens % size
    filled = [F.pad(part, (0, 0, 0, missing) if part.ndim == rank else (0, missing)) for part in parts]
    split = [part.split(size, -2 if part.ndim == rank else -1) for part in filled]
    return list(zip(*split, strict=True))


def _finite(decay: Tensor) -> Tensor:
    """Logarithms of gates; one finite number for gates that are zero in the dtype, as differences of -inf are NaN."""
    precision = torch.finfo(decay.dtype)
    return decay.clamp(min=math.log(precision.tiny) + math.log(precision.eps) - 1)


def _gated_chunk(queries: Tensor, keys: Tensor, values: Tensor, decay: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Reads and memory after a chunk of tokens that are written as they are."""
    since = decay.cumsum(-1)
    seen = (queries @ keys.mT) * decay_between(since)
    reads = seen @ values + since.exp()[..., None] * (queries @ memory.mT)
    left = (since[..., -1:] - since).exp()[..., None]
    return reads, since[..., -1, None, None].exp() * memory + values.mT @ (left * keys)


def decay_between(since: Tensor) -> Tensor:
    """What is left at token t of token i, (..., t, i), zero for i > t. Cut before `exp`, which could overflow there."""
    n_tokens = since.shape[-1]
    causal = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=since.device).tril()
    return torch.where(causal, since[..., :, None] - since[..., None, :], -torch.inf).exp()
