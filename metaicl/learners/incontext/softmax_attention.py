"""One layer of softmax attention whose only weight is what it compares by."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.episode import Examples
from metaicl.functional import answer, output_scale
from metaicl.learner import Learner, Traits, check_support_labels
from metaicl.nets.backbones import encode, encoder_dim, raw_or_encoded
from metaicl.nets.rows import as_numbers
from metaicl.spec import TaskSpec

_TINY = 1e-6


class Support(NamedTuple):
    """What is attended to.

    Attributes:
        x: Features (B, N, D).
        y: Targets, or one-hot labels (B, N, output_size).
        real: bool (B, N).
    """

    x: Tensor
    y: Tensor
    real: Tensor


class SoftmaxAttention(Learner[Support]):
    """Answers sum_i softmax_i(x^T Q x_i) y_i: the labels of the support, weighted by a learned similarity.

    A meta-learned kernel smoother. Q starts at zero, where every row weighs the same and the answer is the mean label.
    An empty support gives zero, or equal class probabilities.

    Args:
        spec: The tasks.
        encoder: (rows, *x_shape) -> (rows, D); None takes vectors as they are and builds one for other inputs.

    Reference:
        Huang, Cheng & Liang 2023, arXiv:2310.05249, equation 3, with W_V fixed and Q = W_K^T W_Q as there. For
        classification: Vinyals et al. 2016, arXiv:1606.04080, equation 1, with a bilinear similarity.
    """

    traits = Traits()

    def __init__(self, spec: TaskSpec, *, encoder: nn.Module | None = None) -> None:
        """Start at equal weights."""
        super().__init__(spec)
        self.encoder = raw_or_encoded(spec, encoder)
        self.declare_nets(self.encoder)
        dim = encoder_dim(self.encoder, spec)
        self.query_key = nn.Parameter(torch.zeros(dim, dim))
        self.raw_scale = output_scale(spec)

    def adapt(self, support: Examples) -> Support:
        """Features and labels; nothing is computed from them."""
        check_support_labels(self.spec, support)
        x = encode(self.encoder, support.x)
        return Support(x, as_numbers(support.y, self.spec, x.dtype), support.real)

    def update(self, state: Support, examples: Examples) -> Support:
        """The support with `examples` appended."""
        more = self.adapt(examples)
        return Support(*(torch.cat(pair, 1) for pair in zip(state, more, strict=True)))

    def weights(self, state: Support, x: Tensor) -> Tensor:
        """How much each query attends to each row of the support (B, Q, N); zeros where there is no real row."""
        queries = encode(self.encoder, x) @ self.query_key
        return _softmax(queries @ state.x.mT, state.real[:, None])

    def predict(self, state: Support, x: Tensor) -> Distribution:
        """The weighted mean of the labels."""
        return self._answer(self.weights(state, x) @ state.y)

    def predict_prefixes(self, examples: Examples) -> Distribution:
        """Answer every row (B, N) from the rows before it, in one pass."""
        state, n_rows = self.adapt(examples), examples.n_rows
        earlier = torch.ones(n_rows, n_rows, dtype=torch.bool, device=state.x.device).tril(-1)
        weights = _softmax(state.x @ self.query_key @ state.x.mT, earlier & state.real[:, None])
        return self._answer(weights @ state.y)

    def _answer(self, output: Tensor) -> Distribution:
        if self.raw_scale is not None:
            return answer(output, self.raw_scale)
        # Mixed with a trace of the uniform distribution: a class that nothing votes for has a finite loss.
        uniform = 1 / self.spec.output_size
        mixed = output + (1 - output.sum(-1, keepdim=True)) * uniform
        return torch.distributions.Categorical(probs=(1 - _TINY) * mixed + _TINY * uniform, validate_args=False)


def _softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible rows (..., N); zeros where nothing is visible."""
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(~visible, lowest), -1) * visible
