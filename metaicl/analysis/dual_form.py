"""The dual form of linear attention: what demonstrations do to a query is a change of a weight matrix.

A head of linear attention that sees query tokens X and demonstrations X' answers

    F(q) = W_V X (W_K X)^T q + W_V X' (W_K X')^T q = (W_ZSL + Delta W_ICL) q

and Delta W_ICL, a sum of outer products of values and keys, is the step of gradient descent on a linear layer whose
inputs are the keys and whose error signals are the values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from metaicl.nets.linear_attention import LinearAttention as DualLinearAttention
from metaicl.nets.memory.layers import LinearAttention as LinearMemory


@dataclass(frozen=True)
class DualForm:
    """Linear attention taken apart; every value is already multiplied by the output projection of its head.

    Args:
        zero_shot: W_ZSL (B, H, D, K), from the tokens of the query alone.
        update: Delta W_ICL (B, H, D, K), from the demonstrations.
        queries: q (B, H, Q, K).
    """

    zero_shot: Tensor
    update: Tensor
    queries: Tensor

    def output(self, *, demonstrations: bool = True) -> Tensor:
        """(W_ZSL + Delta W_ICL) q summed over heads, (B, Q, D); without demonstrations W_ZSL q."""
        weights = self.zero_shot + self.update if demonstrations else self.zero_shot
        return torch.einsum("bhdk,bhqk->bqd", weights, self.queries)


def dual_form(
    layer: DualLinearAttention | LinearMemory, demonstrations: Tensor, own: Tensor, queries: Tensor
) -> DualForm:
    """Take a layer of linear attention apart.

    Args:
        layer: `metaicl.nets.linear_attention.LinearAttention`, or the ungated `LinearAttention` of
            `metaicl.nets.memory.layers`.
        demonstrations: Tokens X' (B, N, D).
        own: Tokens X (B, M, D) that the query sees without demonstrations; M may be 0.
        queries: Tokens (B, Q, D).

    Raises:
        TypeError: If the layer is something else: softmax attention has no such form.
        ValueError: If the layer forgets, so that a value counts less the older it is.

    Reference:
        Dai et al. 2022, arXiv:2212.10559; Irie et al. 2022, arXiv:2202.05798, for the duality.
    """
    keys, values = _written(layer, demonstrations)
    own_keys, own_values = _written(layer, own)
    return DualForm(own_values.mT @ own_keys, values.mT @ keys, _asked(layer, queries))


def _written(layer: DualLinearAttention | LinearMemory, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (B, H, N, K) and projected values (B, H, N, D)."""
    if isinstance(layer, DualLinearAttention):
        keys, values = (tokens[:, None] @ weights.mT for weights in (layer.key, layer.value))
        return keys, values @ layer.project
    if not isinstance(layer, LinearMemory):
        raise TypeError(f"layer must be a layer of linear attention; got {type(layer).__name__}")
    if layer.to_gates is not None:
        raise ValueError("layer must have no gate: with one, a value counts less the older it is")
    values = layer._split(layer.to_value(tokens))
    project = layer.project.weight.unflatten(1, (layer.heads, -1)).movedim(1, 0)  # (H, D, V)
    return layer._rows(layer.to_key, tokens), values @ project.mT


def _asked(layer: DualLinearAttention | LinearMemory, tokens: Tensor) -> Tensor:
    """Queries (B, H, Q, K)."""
    if isinstance(layer, DualLinearAttention):
        return tokens[:, None] @ layer.query.mT
    return layer._rows(layer.to_query, tokens)
