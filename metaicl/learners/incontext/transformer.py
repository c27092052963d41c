"""In-context Transformers: the support is the context, learning is the forward pass."""

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.episode import Examples
from metaicl.learner import Learner, Traits, check_support_labels
from metaicl.nets.context import Cache, ContextTransformer
from metaicl.nets.rows import AnswerHead, RowEmbedding
from metaicl.spec import TaskSpec


class InContextTransformer(Learner[Cache]):
    """A Transformer that reads the support as a set and answers each query by looking at it.

    The support is encoded once and kept as keys and values, so that any number of queries costs one pass
    each. There is no positional encoding: permuting the support changes nothing.

    Args:
        spec: The tasks.
        encoder: (rows, *x_shape) -> (rows, any); None takes vectors as they are and builds one for other inputs.
        dim: D, width.
        depth: Layers.
        heads: Attention heads. One compares rows over the whole width, so that it finds alike ones with the least
            noise; several serve functions (sine waves, 1,500 updates: squared errors of .04 with four, .39 with one).
        sharpness: Factor on the queries and keys of the start, which are the same map; None takes 3 for classes and .5
            for functions. One head with 4 learns to tell image classes apart within 90 updates, four with 3 often not.

    Reference:
        Nguyen & Grover, 2022, arXiv:2207.04179 (TNP-D) and Müller et al. 2022, arXiv:2112.10510 (PFN), whose mask
        this computes. Differs: queries do not attend to themselves (their residual stream carries them).
    """

    traits = Traits()

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        sharpness: float | None = None,
    ) -> None:
        """Build embedding, layers and head."""
        super().__init__(spec)
        self.embed = RowEmbedding(spec, dim=dim, encoder=encoder)
        self.declare_nets(self.embed)
        self.transformer = ContextTransformer(
            dim=dim, depth=depth, heads=heads, causal=False, kind=spec.kind, sharpness=sharpness
        )
        self.head = AnswerHead(spec, dim=dim)

    def adapt(self, support: Examples) -> Cache:
        """Keys and values of the support in every layer."""
        check_support_labels(self.spec, support)
        return self.transformer.read(self.embed(support.x, support.y), support.real)

    def predict(self, state: Cache, x: Tensor) -> Distribution:
        """Answer each query from the cache."""
        return self.head(self.transformer.answer(state, self.embed(x)))


class CausalInContextTransformer(Learner[Cache]):
    """The in-context Transformer for streams: rows see only earlier rows, and the context can grow.

    `predict_prefixes` answers every row of a stream from the rows before it in one pass; `update` extends the cache.

    Args:
        spec: The tasks.
        encoder: As in `InContextTransformer`.
        dim: D, width.
        depth: Layers.
        heads: Attention heads.
        sharpness: As in `InContextTransformer`.

    Reference:
        Garg et al. 2022, arXiv:2208.01066. Differs: a row and its target are one token, and queries are a second
        stream, so that a sequence of N rows takes N + 1 places instead of 2 N; no positional encoding.
    """

    traits = Traits(order_sensitive=True)

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        sharpness: float | None = None,
    ) -> None:
        """Build embedding, layers and head."""
        super().__init__(spec)
        self.embed = RowEmbedding(spec, dim=dim, encoder=encoder)
        self.declare_nets(self.embed)
        self.transformer = ContextTransformer(
            dim=dim, depth=depth, heads=heads, causal=True, kind=spec.kind, sharpness=sharpness
        )
        self.head = AnswerHead(spec, dim=dim)

    def adapt(self, support: Examples) -> Cache:
        """Keys and values of the support in every layer."""
        check_support_labels(self.spec, support)
        return self.transformer.read(self.embed(support.x, support.y), support.real)

    def update(self, state: Cache, examples: Examples) -> Cache:
        """The cache after `examples` too; nothing is computed again."""
        check_support_labels(self.spec, examples)
        return self.transformer.extend(state, self.embed(examples.x, examples.y), examples.real)

    def predict(self, state: Cache, x: Tensor) -> Distribution:
        """Answer each query from the cache."""
        return self.head(self.transformer.answer(state, self.embed(x)))

    def predict_prefixes(self, examples: Examples) -> Distribution:
        """Answer every row (B, N) from the rows before it, in one pass."""
        cache = self.adapt(examples)
        n_rows = examples.n_rows
        # Row t sees the start token (place 0) and rows 0 .. t-1 (places 1 .. t).
        earlier = torch.ones(n_rows, n_rows + 1, dtype=torch.bool, device=examples.x.device).tril()
        return self.head(self.transformer.answer(cache, self.embed(examples.x), visible=earlier))
