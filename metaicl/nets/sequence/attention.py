"""Causal softmax attention that keeps the keys and values of what it has read."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metaicl.checks import check_count
from metaicl.native.transformer import causal_attention
from metaicl.nets.sequence.linear import Linear
from metaicl.nets.sequence.mixer import Mixer


class KeysValues(NamedTuple):
    """All tokens read so far.

    Attributes:
        keys: (B, heads, N, D / heads).
        values: Likewise.
        real: bool (B, N); what is not real is never attended to.
    """

    keys: Tensor
    values: Tensor
    real: Tensor


class CausalAttention(Mixer[KeysValues]):
    """Multi-head softmax attention over the token itself and all real ones before it, without positions.

    A token that sees nothing (the first one of `peek_prefixes`, or a `peek` at nothing) gets the output of a zero
    value. Fused kernels are used where there are any; inside `twice_differentiable` the plain one is.

    Args:
        dim: D.
        heads: Attention heads; must divide D.

    Reference:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.2.
    """

    def __init__(self, dim: int, *, heads: int = 4) -> None:
        """Build the projections."""
        super().__init__()
        heads = check_count("heads", heads)
        if check_count("dim", dim) % heads:
            raise ValueError(f"heads must divide dim = {dim}; got {heads}")
        self.heads = heads
        self.to_query_key_value = Linear(dim, 3 * dim)
        self.project = Linear(dim, dim)

    def start(self, n_tasks: int, like: Tensor) -> KeysValues:
        """No keys and no values."""
        size = self.project.in_features // self.heads
        nothing = like.new_zeros(n_tasks, self.heads, 0, size)
        return KeysValues(nothing, nothing, torch.ones(n_tasks, 0, dtype=torch.bool, device=like.device))

    def forward(self, h: Tensor, state: KeysValues, real: Tensor | None = None) -> tuple[Tensor, KeysValues]:
        """See `Mixer.forward`; the state grows by T."""
        tokens = self.to_query_key_value(h)
        query, keys, values = self._parts(tokens)
        if state.keys.shape[2] == 0 and real is None:  # needs no mask, which is faster
            mixed = causal_attention(tokens, self.heads)
            if mixed is None:
                mixed = _joined(F.scaled_dot_product_attention(query, keys, values, is_causal=True))
            return self.project(mixed), KeysValues(keys, values, torch.ones_like(h[..., 0], dtype=torch.bool))
        after = _append(state, keys, values, _all_real(h) if real is None else real)
        n_new, n_all = h.shape[1], after.keys.shape[2]
        place = torch.arange(n_all, device=h.device)
        own = place[n_all - n_new :, None]
        visible = (after.real[:, None] & (place < own)) | (place == own)
        mixed = F.scaled_dot_product_attention(query, after.keys, after.values, attn_mask=visible[:, None])
        return self._join(mixed), after

    def peek(self, h: Tensor, state: KeysValues, *, own: bool = False) -> Tensor:
        """See `Mixer.peek`; costs a row of scores per token."""
        query, key, value = self._split(h)
        query = query * query.shape[-1] ** -0.5
        scores = (query @ state.keys.mT).masked_fill(~state.real[:, None, None], -torch.inf)
        last, value = ((query * key).sum(-1, keepdim=True), value) if own else _nothing(scores, value)
        weights = torch.cat([scores, last], -1).softmax(-1)
        return self._join(weights[..., :-1] @ state.values + weights[..., -1:] * value)

    def peek_prefixes(self, h: Tensor, context: Tensor, state: KeysValues, real: Tensor | None = None) -> Tensor:
        """See `Mixer.peek_prefixes`."""
        query = self._split(h)[0]
        _, keys, values = self._split(context)
        after = _append(state, keys, values, _all_real(context) if real is None else real)
        n_new, n_all = h.shape[1], after.keys.shape[2]
        place = torch.arange(n_all, device=h.device)
        visible = after.real[:, None] & (place < place[n_all - n_new :, None])
        # One more place, of zeros, for those that see nothing.
        visible = torch.cat([visible, ~visible.any(-1, keepdim=True)], -1)
        keys, values = F.pad(after.keys, (0, 0, 0, 1)), F.pad(after.values, (0, 0, 0, 1))
        return self._join(F.scaled_dot_product_attention(query, keys, values, attn_mask=visible[:, None]))

    def _split(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._parts(self.to_query_key_value(h))

    def _parts(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = tokens.unflatten(-1, (3, self.heads, -1))  # (B, T, 3, heads, D / heads)
        query, keys, values = parts.transpose(1, 3).unbind(2)
        return query, keys, values

    def _join(self, mixed: Tensor) -> Tensor:
        return self.project(_joined(mixed))


def _joined(mixed: Tensor) -> Tensor:
    """Heads side by side: (B, heads, T, D / heads) -> (B, T, D)."""
    return mixed.transpose(1, 2).flatten(2)


def _append(state: KeysValues, keys: Tensor, values: Tensor, real: Tensor) -> KeysValues:
    return KeysValues(
        torch.cat([state.keys, keys], 2), torch.cat([state.values, values], 2), torch.cat([state.real, real], 1)
    )


def _all_real(h: Tensor) -> Tensor:
    return torch.ones_like(h[..., 0], dtype=torch.bool)


def _nothing(scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A last place of zeros that counts only where no other does."""
    blind = scores.isneginf().all(-1, keepdim=True)
    return torch.where(blind, 0.0, -torch.inf).to(scores), torch.zeros_like(value)
