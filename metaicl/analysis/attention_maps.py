"""Where the tokens of a Transformer look while it answers: attention maps computed again from recorded projections."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metaicl.analysis.activations import recording
from metaicl.episode import Examples
from metaicl.learner import Learner
from metaicl.nets.context import ContextBlock, ContextTransformer
from metaicl.nets.sequence.attention import CausalAttention

Calls = Mapping[str, list[Tensor]]
"""Outputs of modules in the order of their calls."""


@dataclass(frozen=True)
class AttentionMaps:
    """Attention weights of one pass: context tokens first, then the queries, which do not see each other.

    A Transformer over labeled rows has a start token and one token for each row. One over interleaved tokens has two
    for each row, x then y, and its queries see themselves.

    Args:
        weights: For each layer (B, heads, T, T): row t holds what token t looks at, summing to one. Rows that a layer
            does not compute (the context in the last layer of a `ContextTransformer`) are zero.
        scores: The same before the softmax; -inf where a token cannot look.
        n_query: Q; the queries are the last Q tokens.
        inputs: Places of the context tokens that hold x_1, x_2, ..., x_N: (N,).
    """

    weights: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    n_query: int
    inputs: Tensor

    def of_queries(self) -> dict[str, Tensor]:
        """What the queries look at, for each layer (B, heads, Q, T)."""
        return {name: weights[:, :, -self.n_query :] for name, weights in self.weights.items()}


def attention_maps(learner: Learner, support: Examples, x: Tensor) -> AttentionMaps:
    """Adapt to a support, answer for inputs, and see where every token looked; nothing about the learner changes.

    Args:
        learner: Built of `ContextTransformer` or of `CausalAttention` layers, such as `InContextTransformer`,
            `CausalInContextTransformer` and `InterleavedTransformer`. Of `MomentumAttention` these are the weights of
            its attention, without the decaying sum.
        support: (B, N).
        x: Queries (B, Q, *x_shape).

    Raises:
        TypeError: If the learner has no such layers.
        ValueError: If its layers are called more than once for the context and once for the queries (looped models), or
            tokens are neither one nor two for each row.
    """
    blocks = {name: one for name, one in learner.named_modules() if isinstance(one, (ContextBlock, CausalAttention))}
    if not blocks:
        raise TypeError(f"{type(learner).__name__} has no ContextBlock and no CausalAttention to look at")
    names = [f"{name}.{part}" for name, block in blocks.items() for part in _recorded(block)]
    with torch.no_grad(), recording(learner, names) as calls:
        learner(support, x)
    causal = not any(isinstance(one, ContextTransformer) and not one.causal for one in learner.modules())
    scores = {}
    for name, block in blocks.items():
        if isinstance(block, ContextBlock):
            scores[name] = _row_scores(name, block, calls, support.real, causal)
        else:
            scores[name] = _token_scores(name, block, calls, support.real)
    # A row of -inf alone is one that the layer does not compute.
    weights = {name: found.softmax(-1).nan_to_num(0.0) for name, found in scores.items()}
    of_rows = any(isinstance(block, ContextBlock) for block in blocks.values())
    inputs = 1 + torch.arange(support.n_rows) if of_rows else 2 * torch.arange(support.n_rows)
    return AttentionMaps(weights, scores, x.shape[1], inputs)


def _recorded(block: ContextBlock | CausalAttention) -> tuple[str, ...]:
    return ("to_query", "to_key_value") if isinstance(block, ContextBlock) else ("to_query_key_value",)


def _row_scores(name: str, block: ContextBlock, calls: Calls, real: Tensor, causal: bool) -> Tensor:
    """Scores (B, heads, T, T) of a block over labeled rows: T = 1 + N + Q."""
    asked, seen = calls[f"{name}.to_query"], calls[f"{name}.to_key_value"]
    if len(seen) != 1 or len(asked) not in (1, 2):
        raise ValueError(f"{name!r} must be called once for the context and once for the queries")
    keys, n_query = seen[0].chunk(2, -1)[0], asked[-1].shape[1]
    visible = F.pad(real, (1, 0), value=True)[:, None].expand(-1, keys.shape[1], -1)
    if causal:
        visible = visible.tril()
    if len(asked) == 1:  # the last layer: its context is never read
        visible, context = torch.zeros_like(visible), torch.zeros_like(keys)
    else:
        context = asked[0]
    visible = torch.cat([visible, F.pad(real, (1, 0), value=True)[:, None].expand(-1, n_query, -1)], 1)
    queries = torch.cat([context, asked[-1]], 1)
    return _scores(queries, F.pad(keys, (0, 0, 0, n_query)), block.heads, F.pad(visible, (0, n_query)))


def _token_scores(name: str, block: CausalAttention, calls: Calls, real: Tensor) -> Tensor:
    """Scores (B, heads, T, T) of a layer over interleaved tokens: T = 2 N + Q."""
    joint = calls[f"{name}.to_query_key_value"]
    if len(joint) != 2 or joint[0].shape[1] != 2 * real.shape[1]:
        raise ValueError(f"{name!r} must be called once for two tokens of each row and once for the queries")
    n_context, n_query = joint[0].shape[1], joint[1].shape[1]
    queries, keys, _ = torch.cat(joint, 1).chunk(3, -1)
    seen = F.pad(real.repeat_interleave(2, 1), (0, n_query))[:, None].expand(-1, n_context + n_query, -1)
    own = torch.eye(n_context + n_query, dtype=torch.bool, device=real.device)
    return _scores(queries, keys, block.heads, seen.tril() | own)


def _scores(queries: Tensor, keys: Tensor, heads: int, visible: Tensor) -> Tensor:
    """Scaled products (B, heads, T, S) of rows (B, T, D) and (B, S, D), -inf where `visible` (B, T, S) is False."""
    queries, keys = (rows.unflatten(-1, (heads, -1)).transpose(1, 2) for rows in (queries, keys))
    scores = queries @ keys.mT * keys.shape[-1] ** -0.5
    return scores.masked_fill(~visible[:, None], -torch.inf)
