"""Matching networks."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count
from metaicl.episode import Examples
from metaicl.functional import categorical, class_weights, without_absent
from metaicl.learner import check_support_labels
from metaicl.learners.metric.embedding import CLASSIFIER, EmbeddingLearner
from metaicl.nets.full_context import AttentionalLSTM, SupportLSTM
from metaicl.nets.similarity import Distance, Similarity
from metaicl.spec import TaskSpec


class MatchingState(NamedTuple):
    """The embedded support.

    Attributes:
        rows: (B, N, D).
        y: long (B, N).
        real: bool (B, N).
    """

    rows: Tensor
    y: Tensor
    real: Tensor


class MatchingNet(EmbeddingLearner[MatchingState]):
    """Attend to the embedded support rows; a class is as probable as the attention that its rows get.

    Cosines without a factor, as published, lie in [-1, 1], so no softmax over 20 of them can be sharp: at 20-way 1-shot
    Omniglot a public re-implementation reached 75.6 % that way and 92.8 % with squared Euclidean distances. Hence the
    learned factor, which starts at 10 for cosines; `temperature=1.0, learn_temperature=False` is the published form.
    With one row per class and distances this is a prototypical network.

    A 1,000-way episode needs O(Q (N + C)) numbers beside the embeddings. With full context the N support rows are read
    one after another.

    Args:
        spec: A classification spec.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec.
        distance: "cosine" or "euclidean" (squared distances).
        temperature: Start of the learned factor on the scores; None takes 1 / sqrt(D) for distances, 10 for cosines.
        learn_temperature: Train the factor.
        full_context: Let a bidirectional LSTM embed the support as a sequence, and an attentional LSTM the query in
            view of it. The answer then depends on the order of the support.
        reading_steps: K, how often a query reads the support in its full-context embedding.

    Raises:
        ValueError: If the spec is a regression spec; RidgeHead serves those.

    Reference:
        Vinyals et al. 2016, arXiv:1606.04080, equation 1 (attention), section 2.1.2 and appendix A (full context).
        Differs: the learned factor; group normalization in the encoder built here; see `AttentionalLSTM`. A class
        without a real row has a probability of about 1e-30 instead of zero.
    """

    traits = CLASSIFIER

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        distance: Distance = "cosine",
        temperature: float | None = None,
        learn_temperature: bool = True,
        full_context: bool = False,
        reading_steps: int = 3,
    ) -> None:
        """Build the encoder where none is given, and the LSTMs where asked for."""
        super().__init__(spec, encoder)
        self.similarity = Similarity(
            self.feature_dim, distance=distance, temperature=temperature, learn_temperature=learn_temperature
        )
        self.read_support = SupportLSTM(self.feature_dim) if full_context else None
        steps = check_count("reading_steps", reading_steps)
        self.read_query = AttentionalLSTM(self.feature_dim, steps=steps) if full_context else None
        if full_context:
            self.traits = replace(self.traits, order_sensitive=True)

    def adapt(self, support: Examples) -> MatchingState:
        """Embed the support."""
        check_support_labels(self.spec, support)
        rows = self.embed(support.x)
        if self.read_support is not None:
            rows = self.read_support(rows, support.real)
        return MatchingState(rows, support.y, support.real)

    def predict(self, state: MatchingState, x: Tensor) -> Distribution:
        """Logits are log-sums, over the rows of a class, of their exponentiated scores."""
        queries = self.embed(x)
        if self.read_query is not None:
            queries = self.read_query(queries, state.rows, state.real)
        scores = self.similarity(queries, state.rows)
        return categorical(sum_by_class(scores, state.y, state.real, self.spec.output_size))


def sum_by_class(scores: Tensor, y: Tensor, real: Tensor, n_way: int) -> Tensor:
    """Log-sum-exp of scores (B, Q, N) over the real rows of each class: (B, Q, C), in O(Q (N + C)) memory.

    Each class is summed relative to its own best row, so no class underflows. For a class without a real row see
    `without_absent`.
    """
    index, lowest = y[:, None].expand_as(scores), torch.finfo(scores.dtype).min
    held = scores.detach().masked_fill(~real[:, None], lowest)
    best = held.new_full((*scores.shape[:2], n_way), lowest).scatter_reduce(-1, index, held, "amax")
    shares = (scores - best.gather(-1, index)).masked_fill(~real[:, None], -torch.inf).exp()
    weights = class_weights(y, n_way, real, scores.dtype)
    present = weights.sum(-2) > 0
    total = torch.where(present[:, None], shares @ weights, 1)  # finite slopes where there is nothing to sum
    return without_absent(torch.where(present[:, None], best, 0) + total.log(), present)
