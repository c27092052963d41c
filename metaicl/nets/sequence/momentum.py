"""Softmax attention with a running sum of values beside it: momentum, if attention is a step of gradient descent."""

import torch
import torch.nn.functional as F
from torch import Tensor

from metaicl.nets.sequence.attention import CausalAttention, KeysValues


class MomentumAttention(CausalAttention):
    """Attn(V, K, q_t) + sum over i < t of momentum^(t - i) v_i, then the output projection.

    If demonstrations act through attention as a gradient acts, whose error signals are the values, then a decaying sum
    of earlier values is to attention what momentum is to gradient descent. Tokens that are not real take no place:
    t - i counts real tokens. The token itself is not in the sum, so `own` of `peek` changes the attention alone.

    Args:
        dim: D.
        heads: As in `CausalAttention`.
        momentum: Decay per token, strictly between 0 and 1; the same for all heads and not learned.

    Reference:
        Dai et al. 2022, arXiv:2212.10559 (MoAttn). The token itself is left out of the sum here.
    """

    def __init__(self, dim: int, *, heads: int = 4, momentum: float = 0.5) -> None:
        """Build the projections; the sum adds no weights."""
        super().__init__(dim, heads=heads)
        if not 0 < momentum < 1:
            raise ValueError(f"momentum must lie strictly between 0 and 1; got {momentum!r}")
        self.momentum = float(momentum)

    def forward(self, h: Tensor, state: KeysValues, real: Tensor | None = None) -> tuple[Tensor, KeysValues]:
        """See `Mixer.forward`."""
        out, after = super().forward(h, state, real)
        return out + self._trace(after.values, after.real, h.shape[1]), after

    def peek(self, h: Tensor, state: KeysValues, *, own: bool = False) -> Tensor:
        """See `Mixer.peek`; every token has the same sum, that of the next place."""
        nobody = torch.zeros_like(state.real[:, :1]) if state.real.shape[1] else state.real.new_zeros(h.shape[0], 1)
        values, real = F.pad(state.values, (0, 0, 0, 1)), torch.cat([state.real, nobody], 1)
        return super().peek(h, state, own=own) + self._trace(values, real, 1)

    def peek_prefixes(self, h: Tensor, context: Tensor, state: KeysValues, real: Tensor | None = None) -> Tensor:
        """See `Mixer.peek_prefixes`."""
        new = torch.ones_like(context[..., 0], dtype=torch.bool) if real is None else real
        values = torch.cat([state.values, self._split(context)[2]], 2)
        trace = self._trace(values, torch.cat([state.real, new], 1), context.shape[1])
        return super().peek_prefixes(h, context, state, real) + trace

    def _trace(self, values: Tensor, real: Tensor, n_last: int) -> Tensor:
        """The decaying sum before each of the last places, projected (B, n_last, D), of values (B, heads, N, size)."""
        seen = real.long().cumsum(1)
        before = (seen - real.long())[:, real.shape[1] - n_last :, None]  # real tokens before each last place
        earlier = real[:, None] & (seen[:, None] <= before)
        # momentum^(t - i) with t = before + 1 and i = seen; later places are raised to the power 0, then left out.
        distance = (before + 1 - seen[:, None]).clamp(min=0).to(values.dtype)
        weights = self.momentum**distance * earlier
        return F.linear((weights[:, None] @ values).transpose(1, 2).flatten(2), self.project.weight)
