"""Fusion of many views: a few readers attend to the tokens of all of them at once."""

import torch
from torch import Tensor, nn

from metaicl.checks import check_choice
from metaicl.functional import unit_rows

_SHARPNESS, _SCALE = 2.0, 0.5


class FusionHead(nn.Module):
    """Readers (class prototypes) attend to token states, and what each has read becomes one logit.

    Keys and values are projected on the side of the readers, since there are few of them: a token costs two inner
    products per reader and head, whatever the number of views, and no projected token is kept.

    Args:
        dim: D.
        heads: Attention heads; must divide D.
        pool: "attention", or "mean": every reader gets the mean token.
        start_at_zero: The logits start at zero instead of at a similarity of reader and reading.

    Raises:
        ValueError: If `heads` does not divide `dim`, or `pool` is unknown.

    Reference:
        Izacard & Grave, 2021, arXiv:2007.01282 (fusion in the decoder), for the concatenation of views. Attention by
        similarity from the start: queries and keys begin as one identity map, scaled.
    """

    def __init__(self, dim: int, *, heads: int = 1, pool: str = "attention", start_at_zero: bool = False) -> None:
        """Start as attention by cosine similarity, with values as they are."""
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim = {dim}; got {heads}")
        self.heads, self.pool = heads, check_choice("fusion", pool, ("attention", "mean"))
        if pool == "attention":
            self.to_query = nn.Parameter(torch.eye(dim).unflatten(1, (heads, -1)).movedim(1, 0).contiguous())  # (h,D,d)
            self.to_key = nn.Parameter(self.to_query.detach().clone())
            self.log_sharpness = nn.Parameter(torch.tensor(_SHARPNESS).log())
        self.to_value = nn.Parameter(torch.eye(dim).unflatten(1, (heads, -1)).movedim(1, 0).contiguous())
        self.readout = nn.Parameter(torch.full((dim,), 0.0 if start_at_zero else _SCALE))

    def forward(self, readers: Tensor, states: Tensor, real: Tensor, bias: Tensor) -> Tensor:
        """Logits (B, Q, C).

        Args:
            readers: (B, C, D).
            states: Token states of all views of each query (B, Q, L, D).
            real: bool (B, Q, L), False for padding.
            bias: (B, Q, L), added to the logarithm of the attention to a token.
        """
        readers = unit_rows(readers)
        if self.pool == "mean":
            weights = real.to(states.dtype) * bias.exp()
            weights = (weights / weights.sum(-1, keepdim=True).clamp(min=1e-6))[:, :, None, None]
        else:
            weights = self._attend(readers, states, real, bias)
        read = weights.flatten(2, 3) @ states  # (B, Q, h C, D)
        read = read.unflatten(2, weights.shape[2:4])
        values = torch.einsum("bqhcd,hde->bqche", read.expand(-1, -1, self.heads, -1, -1), self.to_value).flatten(3)
        # Cosines in high dimension are small: the scale of the distances of prototypes over sqrt(D) is sqrt(D), too.
        return (unit_rows(values) * readers[:, None] * self.readout).sum(-1) * readers.shape[-1] ** 0.5

    def _attend(self, readers: Tensor, states: Tensor, real: Tensor, bias: Tensor) -> Tensor:
        """Attention weights (B, Q, heads, C, L); all zero for a query without a real token."""
        asked = torch.einsum("bcd,hde,hfe->bhcf", readers, self.to_query, self.to_key)  # (B, h, C, D)
        scores = torch.einsum("bqld,bhcd->bqhcl", states, asked)
        scores = scores * self.log_sharpness.exp() * (self.heads / states.shape[-1]) ** 0.5
        scores = (scores + bias[:, :, None, None]).masked_fill(~real[:, :, None, None], torch.finfo(scores.dtype).min)
        return torch.softmax(scores, -1) * real.any(-1)[:, :, None, None, None]
