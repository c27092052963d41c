"""A Transformer over labeled rows: rows of the context see each other, queries see the context."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaicl.checks import check_count, check_positive
from metaicl.spec import Kind

SHARPNESS = {"classification": 3.0, "regression": 0.5}
"""Of the initial attention, by the kind of the tasks. 1 leaves learners of image classes at chance for their first
hundreds of updates. 3 makes learners of linear functions, which gain from rows that are not alike, several times as
slow, and with 1 some starts stay slow."""


class Cache(NamedTuple):
    """What a context leaves behind: keys and values of every layer, and which of them are real.

    Attributes:
        keys: One (B, heads, N + 1, D / heads) per layer; place 0 is a learned start token.
        values: Likewise.
        mask: bool (B, N + 1).
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor


class ContextBlock(nn.Module):
    """Pre-norm attention and a two-layer MLP. What is attended to is passed in, so that it can be cached.

    Args:
        dim: D.
        heads: Attention heads; must divide D.
        sharpness: Factor on the queries and keys of the start, which are the same map: 0 attends to all rows alike.
    """

    def __init__(self, dim: int, heads: int, *, sharpness: float = SHARPNESS["classification"]) -> None:
        """Build projections and MLP."""
        super().__init__()
        if check_count("dim", dim) % check_count("heads", heads):
            raise ValueError(f"heads must divide dim = {dim}; got {heads}")
        self.heads, self.sharpness = heads, sharpness
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_query = nn.Linear(dim, dim)
        self.to_key_value = nn.Linear(dim, 2 * dim)
        self._tie()
        self.project = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def reset_parameters(self) -> None:
        """Fresh queries, keys and values, tied as at first; other parts have their own making."""
        self.to_query.reset_parameters()
        self.to_key_value.reset_parameters()
        self._tie()

    def _tie(self) -> None:
        """Start from attention by similarity, so that alike rows find each other at once."""
        dim = self.to_query.in_features
        with torch.no_grad():
            self.to_query.weight *= self.sharpness
            self.to_key_value.weight[:dim] = self.to_query.weight
            self.to_key_value.bias[:dim] = self.to_query.bias

    def keys_values(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, N, D / heads) of rows h (B, N, D)."""
        keys, values = self.to_key_value(self.attention_norm(h)).chunk(2, -1)
        return self._split(keys), self._split(values)

    def forward(self, h: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Rows h (B, M, D) attend to keys and values where mask (broadcastable to (B, heads, M, N)) is True."""
        query = self._split(self.to_query(self.attention_norm(h)))
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        h = h + self.project(mixed.transpose(1, 2).flatten(2))
        return h + self.mlp(self.mlp_norm(h))

    def _split(self, h: Tensor) -> Tensor:
        return h.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ContextTransformer(nn.Module):
    """Layers of `ContextBlock` with a learned start token and no positional encoding.

    Without `causal` the context is a set: permuting it changes nothing. With it, each row sees the rows before it,
    and the context can grow without computing anything again.

    Args:
        dim: D.
        depth: Layers.
        heads: Attention heads.
        causal: Rows of the context see only themselves and earlier rows.
        kind: "classification" or "regression", what the attention starts from: see `SHARPNESS`.
        sharpness: Of the initial attention, instead of what `kind` gives.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        causal: bool,
        kind: Kind = "classification",
        sharpness: float | None = None,
    ) -> None:
        """Build the layers."""
        super().__init__()
        start = SHARPNESS[kind] if sharpness is None else check_positive("sharpness", sharpness)
        self.causal = causal
        self.start = nn.Parameter(torch.randn(dim) / dim**0.5)
        self.blocks = nn.ModuleList(
            ContextBlock(dim, heads, sharpness=start) for _ in range(check_count("depth", depth))
        )
        self.norm = nn.LayerNorm(dim)

    def read(self, context: Tensor, real: Tensor) -> Cache:
        """Encode a context (B, N, D) whose real rows are marked in `real` (B, N)."""
        start = self.start.expand(context.shape[0], 1, -1)
        mask = F.pad(real, (1, 0), value=True)
        return self._run(torch.cat([start, context], 1), mask, None)

    def extend(self, cache: Cache, context: Tensor, real: Tensor) -> Cache:
        """The cache after more rows; for causal contexts only, where earlier rows never see later ones."""
        if not self.causal:
            raise ValueError("only a causal context can be extended; rows of a set see the new rows too")
        return self._run(context, torch.cat([cache.mask, real], 1), cache)

    def answer(self, cache: Cache, queries: Tensor, *, visible: Tensor | None = None) -> Tensor:
        """Outputs (B, Q, D) for queries (B, Q, D) that see the context but not each other.

        Args:
            cache: From `read`.
            queries: Embedded inputs.
            visible: bool (Q, N + 1), which places of the context each query sees; None is all of them.
        """
        mask = cache.mask[:, None, None, :]
        mask = mask if visible is None else mask & visible
        for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            queries = block(queries, keys, values, mask)
        return self.norm(queries)

    def _run(self, h: Tensor, mask: Tensor, before: Cache | None) -> Cache:
        n_new, n_all = h.shape[1], mask.shape[1]
        attend = mask[:, None, None, :]
        if self.causal:
            attend = attend & torch.ones(n_new, n_all, dtype=torch.bool, device=h.device).tril(n_all - n_new)
        all_keys, all_values = [], []
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, ContextBlock)  # nn.ModuleList does not know its element type
            keys, values = block.keys_values(h)
            if before is not None:
                keys = torch.cat([before.keys[layer], keys], 2)
                values = torch.cat([before.values[layer], values], 2)
            all_keys.append(keys)
            all_values.append(values)
            if layer + 1 < len(self.blocks):  # the last layer's rows are never read
                h = block(h, keys, values, attend)
        return Cache(tuple(all_keys), tuple(all_values), mask)
