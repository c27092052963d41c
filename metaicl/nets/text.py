"""Encoders of texts: token ids (rows, T), 0 = padding, to vectors (rows, D). Words or characters, they do not care."""

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaicl.checks import check_count
from metaicl.functional import masked_mean
from metaicl.nets.context import ContextBlock
from metaicl.nets.lstm import BidirectionalLSTM


@runtime_checkable
class HasTokenStates(Protocol):
    """An encoder that can be asked for a vector of every token, for learners that attend to tokens."""

    def states(self, tokens: Tensor) -> Tensor:
        """Vectors (rows, T, D) of token ids (rows, T), zero at padding; real tokens are those with `tokens != 0`."""
        ...


class TextCNN(nn.Module):
    """Filters over windows of tokens, and for each the strongest answer in the text.

    A window counts if its first token is real; what it sees beyond the end of the text is zeros, so padding a text
    further changes nothing, and a text shorter than a filter is fine.

    Args:
        vocabulary: Token ids, padding (0) included.
        dim: Size of the token vectors.
        filters: Of each width; D = filters * len(widths).
        widths: Tokens that a filter sees.

    Reference:
        Kim, 2014, arXiv:1408.5882, section 2; the sizes are those of Bao et al. 2020, arXiv:1908.06039. Differs: no
        pretrained vectors, no dropout; the windows at the end of a text.
    """

    def __init__(
        self, vocabulary: int, *, dim: int = 128, filters: int = 50, widths: Sequence[int] = (3, 4, 5)
    ) -> None:
        """Build vectors and filters."""
        super().__init__()
        self.vectors = token_vectors(vocabulary, dim)
        self.widths = tuple(widths)
        self.filters = nn.ModuleList(
            nn.Conv1d(dim, check_count("filters", filters), check_count("widths", width)) for width in self.widths
        )
        if not self.widths:
            raise ValueError("widths must name at least one width; got none")

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed token ids (rows, T) as (rows, D); a text without a token is the origin."""
        real = tokens != 0
        h = (self.vectors(tokens) * real[..., None]).mT  # (rows, dim, T)
        pooled = []
        for width, one in zip(self.widths, self.filters, strict=True):
            answers = F.relu(one(F.pad(h, (0, width - 1))))
            pooled.append((answers * real[:, None]).amax(-1))
        return torch.cat(pooled, -1)


class BiLSTM(nn.Module):
    """A forward and a backward LSTM over the tokens, and the mean of their states weighted by learned attention.

    Padding is passed over wherever it stands.

    Args:
        vocabulary: Token ids, padding (0) included.
        dim: Size of the token vectors.
        hidden: Of each direction; D = 2 * hidden.

    Reference:
        Lin et al. 2017, arXiv:1703.03130, with one attention row; the encoder of Geng et al. 2019, arXiv:1902.10482,
        section 3.2. Forget gates start at sigmoid(1).
    """

    def __init__(self, vocabulary: int, *, dim: int = 128, hidden: int = 64) -> None:
        """Build vectors, cells and attention."""
        super().__init__()
        self.vectors = token_vectors(vocabulary, dim)
        self.cells = BidirectionalLSTM(dim, hidden)
        self.attention = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1, bias=False))

    def states(self, tokens: Tensor) -> Tensor:
        """See `HasTokenStates`."""
        return self.cells(self.vectors(tokens), tokens != 0)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed token ids (rows, T) as (rows, D); a text without a token is the origin."""
        h, real = self.states(tokens), tokens != 0
        return (h * masked_softmax(self.attention(h)[..., 0], real)[..., None]).sum(-2)


class WordTransformer(nn.Module):
    """A small pre-norm Transformer over tokens; a text is the mean of its tokens' last states.

    Args:
        vocabulary: Token ids, padding (0) included.
        dim: D; even, and divided by `heads`.
        depth: Blocks.
        heads: Attention heads.

    Reference:
        Vaswani et al. 2017, arXiv:1706.03762, with their sinusoidal positions (section 3.5), so that any length can
        be read; pre-norm as Xiong et al. 2020, arXiv:2002.04745.
    """

    def __init__(self, vocabulary: int, *, dim: int = 128, depth: int = 2, heads: int = 4) -> None:
        """Build vectors and blocks."""
        super().__init__()
        if check_count("dim", dim) % 2:
            raise ValueError(f"dim must be even, for sines and cosines of the place; got {dim}")
        self.vectors = token_vectors(vocabulary, dim)
        self.blocks = nn.ModuleList(ContextBlock(dim, heads) for _ in range(check_count("depth", depth)))
        self.norm = nn.LayerNorm(dim)

    def states(self, tokens: Tensor) -> Tensor:
        """See `HasTokenStates`."""
        real = tokens != 0
        vectors = self.vectors(tokens)
        h = vectors + sinusoids(tokens.shape[1], vectors.shape[-1], like=vectors)
        visible = (real | ~real.any(1, keepdim=True))[:, None, None]  # attention needs something to look at
        for block in self.blocks:
            assert isinstance(block, ContextBlock)  # nn.ModuleList does not know its element type
            h = block(h, *block.keys_values(h), visible)
        return self.norm(h) * real[..., None]

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed token ids (rows, T) as (rows, D); a text without a token is the origin."""
        return masked_mean(self.states(tokens), tokens != 0, 1)


def token_vectors(vocabulary: int, dim: int) -> nn.Embedding:
    """Unit-variance vectors of token ids, to be learned."""
    return nn.Embedding(check_count("vocabulary", vocabulary, minimum=2), check_count("dim", dim))


def masked_softmax(scores: Tensor, real: Tensor) -> Tensor:
    """Weights (..., T) from scores (..., T), zero where not real; all zero where nothing is."""
    far = torch.finfo(scores.dtype).min  # not minus infinity: a text without a token gets a finite answer
    return scores.masked_fill(~real, far).softmax(-1) * real


def sinusoids(n_places: int, dim: int, *, like: Tensor) -> Tensor:
    """Sines and cosines (n_places, dim) of the place at wavelengths from 2 pi to 20,000 pi; `dim` is even."""
    place = torch.arange(n_places, dtype=like.dtype, device=like.device)[:, None]
    rate = torch.arange(0, dim, 2, dtype=like.dtype, device=like.device) * (-math.log(10_000.0) / dim)
    angle = place * rate.exp()
    return torch.cat([angle.sin(), angle.cos()], -1)
