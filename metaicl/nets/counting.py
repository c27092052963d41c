"""A small Transformer for questions of the kind "how often does it occur?" over integer tokens."""

import torch
from torch import Tensor, nn

from metaicl.checks import check_count
from metaicl.functional import unit_rows
from metaicl.nets.context import ContextBlock

_SHARPNESS, _THRESHOLD = 8.0, 0.5  # equal tokens count fully at the start, unequal ones hardly at all
_SCALE = 0.25  # a token occurs some four times


class CountingReader(nn.Module):
    """Reads rows of tokens, each with S sets of explanations: (R, T) and (R, S, C, E) to features (R, S, D).

    Some places of a row are counted, the others ask, and so do the tokens of the explanations. In the first layer each
    asking token looks at the counted ones by a sigmoid for every pair, not by a softmax over them:

        h_a = embedding_a + role_a + W sum_j sigmoid(s (q_a . k_j - t)) v_j,

    with unit queries and keys that start as the embeddings themselves. A softmax would average, so that a number of
    equal tokens would have to be read from the share of what is not equal; a sum is the number. Layers of ordinary
    attention among the asking tokens follow, and the second place of the row is read out. Token 0 is padding: it
    asks nothing and is not looked at.

    Args:
        vocabulary: Token ids, padding included.
        length: T.
        explanation_length: E.
        dim: D.
        depth: Layers of ordinary attention.
        heads: Of all layers; must divide D.
        counted: First and last + 1 of the places that are counted.

    Reference:
        Sigmoid attention: Ramapuram et al. 2024, arXiv:2409.04431, equation 2. Differs: unit queries and keys, and
        a learned threshold in the place of a constant one.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        explanation_length: int,
        *,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        counted: tuple[int, int] = (2, 20),
    ) -> None:
        """Build embeddings and layers."""
        super().__init__()
        if check_count("dim", dim) % check_count("heads", heads):
            raise ValueError(f"heads must divide dim = {dim}; got {heads}")
        if not 2 <= counted[0] < counted[1]:
            raise ValueError(f"counted must be a range of places after the second one; got {counted}")
        self.heads, self.counted = heads, slice(*counted)
        self.register_buffer("asking", torch.tensor([*range(min(2, length)), *range(counted[1], length)]))
        self.vectors = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.vectors.weight, std=dim**-0.5)
        self.roles = nn.Parameter(0.5 * torch.randn(len(self.asking) + explanation_length, dim))
        self.to_query, self.to_key = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.to_query.weight)
        nn.init.eye_(self.to_key.weight)
        self.to_value, self.project = nn.Linear(dim, dim), nn.Linear(dim, dim)
        nn.init.ones_(self.to_value.bias)
        self.sharpness = nn.Parameter(torch.full((heads, 1, 1), _SHARPNESS))
        self.threshold = nn.Parameter(torch.full((heads, 1, 1), _THRESHOLD))
        self.blocks = nn.ModuleList(ContextBlock(dim, heads) for _ in range(check_count("depth", depth)))
        self.norm = nn.LayerNorm(dim)

    asking: Tensor

    def forward(self, x: Tensor, explanations: Tensor) -> Tensor:
        """Features (R, S, D) of rows x (R, T), each read with S sets of explanations (R, S, C, E); C may be 0."""
        n_rows, n_sets = explanations.shape[:2]
        own, said = x[:, self.asking], explanations.flatten(2)
        tokens = torch.cat([own, said.flatten(1)], 1)  # what is counted does not depend on the set
        h = self._embed(tokens)
        h = h + self._count(h, x[:, self.counted])
        sizes = [own.shape[1], tokens.shape[1] - own.shape[1]]
        h_own, h_said = h.split(sizes, 1)
        h = torch.cat([h_own[:, None].expand(-1, n_sets, -1, -1), h_said.unflatten(1, said.shape[1:])], 2).flatten(0, 1)
        known, told = self.roles.split([len(self.asking), len(self.roles) - len(self.asking)])
        h = h + torch.cat([known, told.repeat(explanations.shape[2], 1)])
        read_out = torch.arange(sizes[0], device=x.device) == 1  # is there, whatever it holds
        real = torch.cat([((own != 0) | read_out)[:, None].expand(-1, n_sets, -1), said != 0], 2)
        return self._attend(h, real.flatten(0, 1)[:, None, None]).unflatten(0, (n_rows, n_sets))

    def _attend(self, h: Tensor, real: Tensor) -> Tensor:
        """The read-out (R, D) after attention among tokens h (R, A, D); `real` bool (R, 1, 1, A)."""
        *blocks, last = self.blocks
        for block in blocks:
            assert isinstance(block, ContextBlock)  # nn.ModuleList does not know its element type
            h = block(h, *block.keys_values(h), real)
        assert isinstance(last, ContextBlock)
        return self.norm(last(h[:, 1:2], *last.keys_values(h), real))[:, 0]  # the other rows would not be read

    def _embed(self, tokens: Tensor) -> Tensor:
        weight = self.vectors.weight
        return self.vectors(tokens) * weight.shape[1] ** 0.5  # unit variance; a rare token moves as far as the others

    def _count(self, asking: Tensor, counted: Tensor) -> Tensor:
        """What asking tokens (R, A, D) find among counted ones (R, S), all of it summed: (R, A, D)."""
        there = self._embed(counted)
        query, key = unit_rows(self._split(self.to_query(asking))), unit_rows(self._split(self.to_key(there)))
        weight = torch.sigmoid(self.sharpness * (query @ key.mT - self.threshold)) * (counted != 0)[:, None, None]
        found = weight @ self._split(self.to_value(there))
        return self.project(_SCALE * found.transpose(1, 2).flatten(2))

    def _split(self, h: Tensor) -> Tensor:
        return h.unflatten(-1, (self.heads, -1)).transpose(1, 2)
