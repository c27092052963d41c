"""Linear self-attention without anything else: the layer that can be a step of gradient descent.

Tokens e_j of size D move by

    e_j <- e_j + sum_h P_h M_h e_j,    M_h = sum_i (W_V,h e_i) (W_K,h e_i)^T W_Q,h

where i runs over the tokens of the context. What a layer knows of its context is S = sum_i e_i e_i^T, (D, D).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from metaicl.checks import check_count, check_positive


class LinearAttention(nn.Module):
    """One layer of linear self-attention: no softmax, no bias, no norm, no MLP.

    Args:
        dim: D, size of a token.
        heads: H.
        key_size: Size of keys, queries and values of each head; None takes D.
        init_variance: Weights start as N(0, init_variance / fan-in). Small values start near the identity.

    Reference:
        von Oswald et al. 2022, arXiv:2212.07677, equation 2.
    """

    def __init__(self, dim: int, *, heads: int = 1, key_size: int | None = None, init_variance: float = 0.002) -> None:
        """Draw the weights."""
        super().__init__()
        size = check_count("dim", dim) if key_size is None else check_count("key_size", key_size)
        shape, std = (check_count("heads", heads), size, dim), check_positive("init_variance", init_variance) ** 0.5
        self.query = nn.Parameter(torch.randn(shape) * std / dim**0.5)
        self.key = nn.Parameter(torch.randn(shape) * std / dim**0.5)
        self.value = nn.Parameter(torch.randn(shape) * std / dim**0.5)
        self.project = nn.Parameter(torch.randn(shape) * std / size**0.5)

    def products(self) -> tuple[Tensor, Tensor]:
        """What the layer computes with: W_K^T W_Q and P W_V of each head, (H, D, D) each."""
        return self.key.mT @ self.query, self.project.mT @ self.value

    def set_products(self, key_query: Tensor, project_value: Tensor) -> None:
        """Choose weights with these products (H, D, D).

        Raises:
            ValueError: If heads or sizes differ, or key_size is not D, for then not every product can be had.
        """
        heads, size, dim = self.query.shape
        for name, given in (("key_query", key_query), ("project_value", project_value)):
            if given.shape != (heads, dim, dim) or size != dim:
                raise ValueError(
                    f"{name} must be (H, D, D) = {(heads, dim, dim)} and key_size D = {dim}; "
                    f"got {tuple(given.shape)} and key_size {size}"
                )
        eye = torch.eye(dim, dtype=self.query.dtype, device=self.query.device).expand_as(self.query)
        with torch.no_grad():
            for parameter, value in zip(
                (self.key, self.query, self.project, self.value), (eye, key_query, eye, project_value), strict=True
            ):
                parameter.copy_(value)

    def forward(self, h: Tensor, change: Tensor, clip: float | None = None) -> Tensor:
        """Tokens (B, T, D) after the layer: h moved by what `read` or `read_rows` found, kept in [-clip, clip].

        It is a call of its own so that forward hooks see the tokens that leave each layer.
        """
        h = h + change
        return h if clip is None else h.clamp(-clip, clip)

    def read(self, h: Tensor, moment: Tensor) -> Tensor:
        """The change (B, T, D) of tokens h (B, T, D) that see a context with second moment `moment` (B, D, D)."""
        seen = self._asked(h).flatten(1, 2) @ moment
        return self._told(seen.unflatten(1, (h.shape[1], len(self.query))))  # -1 is ambiguous where T = 0

    def read_rows(self, h: Tensor, context: Tensor, visible: Tensor) -> Tensor:
        """The change (B, T, D) of tokens h (B, T, D) that see different parts of a context.

        Args:
            h: Tokens.
            context: Tokens (B, N, D).
            visible: Weight of context token i for token t, (T, N).
        """
        scores = self._asked(h).transpose(1, 2) @ context[:, None].mT
        return self._told(((scores * visible) @ context[:, None]).transpose(1, 2))

    def _asked(self, h: Tensor) -> Tensor:
        """What each head of each token compares context tokens with, (B, T, H, D)."""
        key_query, _ = self.products()
        return (h @ key_query.flatten(0, 1).mT).unflatten(-1, key_query.shape[:2])

    def _told(self, seen: Tensor) -> Tensor:
        """The change (B, T, D) for sums of context tokens (B, T, H, D), each weighted by its score."""
        _, project_value = self.products()
        return seen.flatten(2) @ project_value.mT.flatten(0, 1)


class LinearAttentionStack(nn.Module):
    """Layers of linear self-attention, each read once or the whole stack several times.

    Args:
        dim: D.
        depth: Layers with weights of their own.
        loops: Times the stack is run, with the same weights; may be changed later.
        heads: As in `LinearAttention`.
        key_size: As in `LinearAttention`.
        init_variance: As in `LinearAttention`, divided by the number of layers.
        clip: Tokens are kept in [-clip, clip] after each layer; None leaves them alone.

    Reference:
        von Oswald et al. 2022, arXiv:2212.07677; the looped form as in Gatmiry et al. 2024, arXiv:2410.08292.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int = 1,
        loops: int = 1,
        heads: int = 1,
        key_size: int | None = None,
        init_variance: float = 0.002,
        clip: float | None = None,
    ) -> None:
        """Build the layers."""
        super().__init__()
        variance = check_positive("init_variance", init_variance) / check_count("depth", depth)
        self.layers = nn.ModuleList(
            LinearAttention(dim, heads=heads, key_size=key_size, init_variance=variance) for _ in range(depth)
        )
        self.loops = check_count("loops", loops)
        self.clip = None if clip is None else check_positive("clip", clip)
        self.damping = 1.0  # factor on the change made by every layer

    def __getitem__(self, index: int) -> LinearAttention:
        """Layer `index`."""
        layer = self.layers[index]
        assert isinstance(layer, LinearAttention)  # a ModuleList does not know what it holds
        return layer

    def __len__(self) -> int:
        """Layers with weights of their own."""
        return len(self.layers)

    def run(self) -> Iterator[LinearAttention]:
        """The layers in the order in which tokens pass them."""
        for _ in range(self.loops):
            for index in range(len(self)):
                yield self[index]

    def step(self, layer: LinearAttention, h: Tensor, change: Tensor) -> Tensor:
        """Tokens after a layer that changes them by `change`."""
        return layer(h, self.damping * change, self.clip)
