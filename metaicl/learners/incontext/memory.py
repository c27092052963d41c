"""Learners whose support is written into fast weights: linear attention, delta rule, mesa, TTT, Titans, Omega."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count
from metaicl.episode import Examples
from metaicl.learner import Learner, Traits, check_support_labels
from metaicl.nets.backbones import encode, encoder_dim, encoder_norm, raw_or_encoded
from metaicl.nets.memory.layers import DeltaRule, FastWeightMixer
from metaicl.nets.memory.state import FastWeights
from metaicl.nets.rows import AnswerHead, RowEmbedding, as_numbers
from metaicl.nets.sequence.model import SequenceModel, StackState
from metaicl.spec import TaskSpec

_delta_rule = partial(DeltaRule, heads=4)


class MemoryLearner(Learner[StackState]):
    """Each row with its target is one token, written into the memory of every block; a query only reads.

    The state has the same size for any number of rows. `update` writes on, and `predict_prefixes` answers every row of
    a stream from the rows before it in one pass.

    Args:
        spec: The tasks.
        memory: Makes a memory layer from D, such as `partial(Mesa, heads=4)`; the default is the delta rule, 4 heads.
        encoder: (rows, *x_shape) -> (rows, any); None takes vectors as they are and builds one for other inputs.
        dim: D, width.
        depth: Blocks of memory and MLP. With one block and a memory that is `order_free` the support is a set.

    Reference:
        Sun et al. 2024, arXiv:2407.04620, and Behrouz et al. 2025, arXiv:2501.00663, for memories in place of
        attention. Differs: tokens are rows, not words, and queries are not written.
    """

    traits = Traits(order_sensitive=True)

    def __init__(
        self,
        spec: TaskSpec,
        *,
        memory: Callable[[int], FastWeightMixer] = _delta_rule,
        encoder: nn.Module | None = None,
        dim: int = 64,
        depth: int = 2,
    ) -> None:
        """Build embedding, blocks and head."""
        super().__init__(spec)
        self.embed = RowEmbedding(spec, dim=check_count("dim", dim), encoder=encoder)
        self.declare_nets(self.embed)
        made: list[FastWeightMixer] = []

        def make(size: int) -> FastWeightMixer:
            made.append(_checked(memory(size)))
            return made[-1]

        self.model = SequenceModel(dim, mixer=make, depth=check_count("depth", depth))
        self.head = AnswerHead(spec, dim=dim)
        if depth == 1 and made[0].order_free:
            self.traits = replace(self.traits, order_sensitive=False)

    def adapt(self, support: Examples) -> StackState:
        """The memories after the support."""
        h = self._rows(support)
        return self.model(h, self.model.start(support.n_tasks, h), support.mask)[1]

    def update(self, state: StackState, examples: Examples) -> StackState:
        """The memories after `examples` too; nothing is read again."""
        return self.model(self._rows(examples), state, examples.mask)[1]

    def predict(self, state: StackState, x: Tensor) -> Distribution:
        """Answer each query from the memories."""
        return self.head(self.model.peek(self.embed(x), state))

    def predict_prefixes(self, examples: Examples) -> Distribution:
        """Answer every row (B, N) from the rows before it, in one pass."""
        context = self._rows(examples)
        state = self.model.start(examples.n_tasks, context)
        return self.head(self.model.peek_prefixes(self.embed(examples.x), context, state, examples.mask))

    def _rows(self, examples: Examples) -> Tensor:
        check_support_labels(self.spec, examples)
        return self.embed(examples.x, examples.y)


class BareMemory(Learner[FastWeights]):
    """One memory and nothing else: keys from inputs, values from targets, an answer linear in what is recalled.

    With `Mesa` this is ridge regression on learned features, with `LinearAttention` one step of gradient descent, and
    with `DeltaRule` one pass of the least-mean-squares rule (Widrow & Hoff, 1960): learners with a known error, to
    study what a memory can do. A token is (x, y), for a query (x, 0). Keys and queries start blind to y and alike,
    values start blind to x; all of it is free to change.

    Args:
        spec: The tasks.
        memory: Makes a memory layer from the size of a token, D + output_size.
        encoder: (rows, *x_shape) -> (rows, D); None takes vectors as they are and builds one for other inputs.

    Reference:
        von Oswald et al. 2022, arXiv:2212.07677, proposition 1 (the construction on tokens (x, y)).
    """

    traits = Traits(order_sensitive=True)

    def __init__(
        self,
        spec: TaskSpec,
        *,
        memory: Callable[[int], FastWeightMixer] = DeltaRule,
        encoder: nn.Module | None = None,
    ) -> None:
        """Build encoder, memory and head."""
        super().__init__(spec)
        self.encoder = raw_or_encoded(spec, encoder)
        size = encoder_dim(self.encoder, spec)
        self.norm = encoder_norm(self.encoder, size)
        self.declare_nets(self.encoder)
        self.memory = _checked(memory(size + spec.output_size))
        self.head = AnswerHead(spec, dim=size + spec.output_size)
        if self.memory.order_free:
            self.traits = replace(self.traits, order_sensitive=False)
        with torch.no_grad():
            self.memory.to_key.weight[:, size:] = 0
            self.memory.to_query.weight.copy_(self.memory.to_key.weight)
            self.memory.to_value.weight[:, :size] = 0

    def adapt(self, support: Examples) -> FastWeights:
        """The memory after the support."""
        h = self._rows(support)
        return self.memory(h, self.memory.start(support.n_tasks, h), support.mask)[1]

    def update(self, state: FastWeights, examples: Examples) -> FastWeights:
        """The memory after `examples` too."""
        return self.memory(self._rows(examples), state, examples.mask)[1]

    def predict(self, state: FastWeights, x: Tensor) -> Distribution:
        """Read each query."""
        return self.head(self.memory.peek(self._queries(x), state))

    def predict_prefixes(self, examples: Examples) -> Distribution:
        """Answer every row (B, N) from the rows before it, in one pass."""
        context = self._rows(examples)
        state = self.memory.start(examples.n_tasks, context)
        return self.head(self.memory.peek_prefixes(self._queries(examples.x), context, state, examples.mask))

    def _rows(self, examples: Examples) -> Tensor:
        check_support_labels(self.spec, examples)
        x = self.norm(encode(self.encoder, examples.x))
        return torch.cat([x, as_numbers(examples.y, self.spec, x.dtype)], -1)

    def _queries(self, x: Tensor) -> Tensor:
        return F.pad(self.norm(encode(self.encoder, x)), (0, self.spec.output_size))


def _checked(memory: Any) -> FastWeightMixer:
    if not isinstance(memory, FastWeightMixer):
        raise TypeError(
            f"memory must make a FastWeightMixer from D, such as DeltaRule or partial(Mesa, heads=4); got {memory!r}"
        )
    return memory
