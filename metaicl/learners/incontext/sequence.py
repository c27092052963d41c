"""Causal sequence models that read x_1, y_1, x_2, y_2, ... and predict y at every x."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count
from metaicl.episode import Examples
from metaicl.learner import Learner, Traits, check_support_labels
from metaicl.nets.rows import AnswerHead
from metaicl.nets.sequence.attention import CausalAttention
from metaicl.nets.sequence.looped import Looped
from metaicl.nets.sequence.mixer import AnyMixer, Mixer
from metaicl.nets.sequence.model import SequenceModel
from metaicl.nets.sequence.momentum import MomentumAttention
from metaicl.nets.sequence.tokens import InterleavedTokens
from metaicl.spec import TaskSpec


class SequenceLearner(Learner[Any]):
    """Any causal model of interleaved tokens as a learner: adapting is reading, an input is one more token.

    `predict_prefixes` answers every row of a stream in a single pass, `update` reads on, and `predict` lets every
    query be the next token of the same context, so that the support is read once for any number of queries. Train it
    with `prefix_loss` (or `prefix_squared_error`): then one pass learns from every length of context.

    Args:
        spec: The tasks.
        model: Makes a causal model from D: a single memory layer, or a stack such as
            `partial(SequenceModel, mixer=DeltaRule, depth=2)`.
        encoder: (rows, *x_shape) -> (rows, any); None takes vectors as they are and builds one for other inputs.
        dim: D, width.

    Raises:
        TypeError: If the model is no `Mixer`.

    Reference:
        Garg et al. 2022, arXiv:2208.01066, section 2. Differs: see `InterleavedTokens`; class labels are one-hot.
    """

    traits = Traits(order_sensitive=True)
    input_places: ClassVar[slice] = slice(0, None, 2)
    """Where the inputs stand among the tokens of a stream."""

    def __init__(
        self,
        spec: TaskSpec,
        *,
        model: Callable[[int], AnyMixer],
        encoder: nn.Module | None = None,
        dim: int = 64,
    ) -> None:
        """Build tokens, model and head."""
        super().__init__(spec)
        self.tokens = InterleavedTokens(spec, dim=check_count("dim", dim), encoder=encoder)
        self.declare_nets(self.tokens)
        self.model = model(dim)
        if not isinstance(self.model, Mixer):
            raise TypeError(
                f"model must make a Mixer from D, such as DeltaRule or partial(SequenceModel, mixer=DeltaRule); got "
                f"{type(self.model).__name__}"
            )
        self.head = AnswerHead(spec, dim=dim)

    def adapt(self, support: Examples) -> Any:
        """The model's state after the 2 N tokens of the support."""
        h, real = self._tokens(support)
        return self._read(h, self.model.start(support.n_tasks, h), real, slice(0))[1]

    def update(self, state: Any, examples: Examples) -> Any:
        """The state after `examples` too; nothing is read again."""
        h, real = self._tokens(examples)
        return self._read(h, state, real, slice(0))[1]

    def predict(self, state: Any, x: Tensor) -> Distribution:
        """Answer each query as if it alone came next."""
        return self.head(self.model.peek(self.tokens.inputs(x), state, own=True))

    def predict_prefixes(self, examples: Examples) -> Distribution:
        """Answer every row (B, N) from the rows before it, in one pass."""
        h, real = self._tokens(examples)
        return self.head(self._read(h, self.model.start(examples.n_tasks, h), real, self.input_places)[0])

    def _tokens(self, examples: Examples) -> tuple[Tensor, Tensor | None]:
        check_support_labels(self.spec, examples)
        return self.tokens(examples)

    def _read(self, h: Tensor, state: Any, real: Tensor | None, places: slice) -> tuple[Tensor, Any]:
        """Outputs at some places, and the new state; a stack need not compute the others."""
        if isinstance(self.model, SequenceModel):
            return self.model(h, state, real, places=places)
        out, state = self.model(h, state, real)
        return out[:, places], state


class InterleavedTransformer(SequenceLearner):
    """The decoder-only Transformer of in-context learning: softmax attention over x_1, y_1, x_2, y_2, ...

    Args:
        spec: The tasks.
        encoder: As in `SequenceLearner`.
        dim: D, width.
        depth: Layers.
        heads: Attention heads.
        max_length: Tokens (two for each row, one for a query) for which positions are learned. None learns none, and
            then it takes far longer to find out which target belongs to which input.
        momentum: Decay of `MomentumAttention`, in (0, 1); None takes plain attention.

    Reference:
        Garg et al. 2022, arXiv:2208.01066, section 2: a GPT-2 of 12 layers, 8 heads, D = 256 with learned positions.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        max_length: int | None = 256,
        momentum: float | None = None,
    ) -> None:
        """Build a stack of attention blocks."""
        attention: Callable[[int], AnyMixer] = partial(CausalAttention, heads=heads)
        if momentum is not None:
            attention = partial(MomentumAttention, heads=heads, momentum=momentum)
        model = partial(SequenceModel, mixer=attention, depth=depth, max_length=max_length)
        super().__init__(spec, model=model, encoder=encoder, dim=dim)


class LoopedTransformer(SequenceLearner):
    """A few Transformer blocks applied again and again to their own output plus the tokens, with tied weights.

    In train mode `prefix_loss` and `prefix_squared_error` are the mean over the last `window` loops, and earlier loops
    are not differentiated through. `loops` can be raised after training.

    Args:
        spec: The tasks.
        encoder: As in `SequenceLearner`.
        dim: D, width.
        depth: Blocks in the loop.
        heads: Attention heads.
        max_length: As in `InterleavedTransformer`; positions are added in every loop.
        loops: Passes through the blocks.
        window: Passes that training looks at; None takes all.

    Reference:
        Yang, Lee, Nowak & Papailiopoulos, 2023, arXiv:2311.12424: one block, 8 heads, D = 256; linear functions with
        loops = 30, window = 15. Differs: the number of loops is not raised during training.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        dim: int = 64,
        depth: int = 1,
        heads: int = 4,
        max_length: int | None = 256,
        loops: int = 12,
        window: int | None = 5,
    ) -> None:
        """Build a looped stack of attention blocks."""

        def model(dim: int) -> Looped:
            attention = partial(CausalAttention, heads=heads)
            return Looped(
                SequenceModel(dim, mixer=attention, depth=depth, max_length=max_length), loops=loops, window=window
            )

        super().__init__(spec, model=model, encoder=encoder, dim=dim)

    @property
    def loops(self) -> int:
        """Passes through the blocks; states belong to the number they were made with."""
        return self._looped.loops

    @loops.setter
    def loops(self, value: int) -> None:
        self._looped.loops = check_count("loops", value, minimum=1)

    def prefix_stages(self, examples: Examples) -> list[tuple[float, Distribution]]:
        """Answers to every row from the rows before it after each of the last `window` loops, equally weighted."""
        h, real = self._tokens(examples)
        passes = self._looped.passes(h, self._looped.start(examples.n_tasks, h), real)
        judged = [out for index, (out, _) in enumerate(passes) if self._looped.is_judged(index)]
        return [(1 / len(judged), self.head(out[:, self.input_places])) for out in judged]

    @property
    def _looped(self) -> Looped:
        assert isinstance(self.model, Looped)
        return self.model
