"""A stack of blocks around any causal mixers, which is a causal mixer itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaicl.checks import check_count
from metaicl.nets.gelu import TanhGELU
from metaicl.nets.sequence.linear import Linear
from metaicl.nets.sequence.mixer import AnyMixer, Mixer
from metaicl.transforms import in_vmap


class Block(Mixer[Any]):
    """h + mixer(norm(h)), then h + MLP(norm(h)); both parts are optional.

    Args:
        dim: D.
        mixer: Mixes tokens; None leaves each token alone.
        expansion: Width of the MLP's hidden layer over D; None leaves the MLP out.

    Reference:
        Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3.
    """

    def __init__(self, dim: int, mixer: AnyMixer | None, *, expansion: int | None = 4) -> None:
        """Build norms and MLP."""
        super().__init__()
        self.mixer, self.mlp = mixer, None
        if mixer is not None:
            self.mixer_norm = nn.LayerNorm(dim)
        if expansion is not None:
            width = check_count("expansion", expansion) * dim
            self.mlp_norm = nn.LayerNorm(dim)
            self.mlp = nn.Sequential(Linear(dim, width), TanhGELU(), Linear(width, dim))

    def start(self, n_tasks: int, like: Tensor) -> Any:
        """The mixer's state; nothing without one."""
        return () if self.mixer is None else self.mixer.start(n_tasks, like)

    def forward(
        self, h: Tensor, state: Any, real: Tensor | None = None, *, places: slice = slice(None)
    ) -> tuple[Tensor, Any]:
        """See `Mixer.forward`; outputs at `places` of T only, which spares the MLP the others."""
        if self.mixer is None:
            return self._alone(h[:, places]), state
        mixed, state = self.mixer(self.mixer_norm(h), state, real)
        return self._alone(h[:, places] + mixed[:, places]), state

    def peek(self, h: Tensor, state: Any, *, own: bool = False) -> Tensor:
        """See `Mixer.peek`."""
        if self.mixer is not None:
            h = h + self.mixer.peek(self.mixer_norm(h), state, own=own)
        return self._alone(h)

    def peek_prefixes(self, h: Tensor, context: Tensor, state: Any, real: Tensor | None = None) -> Tensor:
        """See `Mixer.peek_prefixes`."""
        if self.mixer is not None:
            h = h + self.mixer.peek_prefixes(self.mixer_norm(h), self.mixer_norm(context), state, real)
        return self._alone(h)

    def _alone(self, h: Tensor) -> Tensor:
        return h if self.mlp is None else h + self.mlp(self.mlp_norm(h))


class StackState(NamedTuple):
    """What a stack has read.

    Attributes:
        layers: The state of every block.
        count: long (B, 1), real tokens so far; (B, 0) before any, so that shapes alone tell that nothing was read.
    """

    layers: tuple[Any, ...]
    count: Tensor


class SequenceModel(Mixer[StackState]):
    """Blocks with tied width, a last normalization and, where wanted, learned absolute positions.

    Positions count real tokens only: a token that is not real takes no place. A token that is peeked at has the
    position of the next one.

    Args:
        dim: D.
        mixer: Makes the mixer of a block from D, such as `CausalAttention` or a memory layer.
        depth: Blocks.
        expansion: Of the MLPs, see `Block`; None leaves them out.
        max_length: Tokens for which positions are learned; None learns none.

    Raises:
        ValueError: From the methods, when more than `max_length` real tokens are read.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: Callable[[int], AnyMixer],
        depth: int = 4,
        expansion: int | None = 4,
        max_length: int | None = None,
    ) -> None:
        """Build the blocks; positions start small, as in GPT-2."""
        super().__init__()
        dim = check_count("dim", dim)
        self.positions = None
        if max_length is not None:
            self.positions = nn.Embedding(check_count("max_length", max_length), dim)
            self.reset_parameters()
        self.blocks = nn.ModuleList(
            Block(dim, mixer(dim), expansion=expansion) for _ in range(check_count("depth", depth))
        )
        self.norm = nn.LayerNorm(dim)

    def reset_parameters(self) -> None:
        """First positions; the blocks have their own making."""
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)

    def start(self, n_tasks: int, like: Tensor) -> StackState:
        """The blocks' states, and a count of nothing."""
        count = torch.zeros(n_tasks, 0, dtype=torch.long, device=like.device)
        return StackState(tuple(block.start(n_tasks, like) for block in self._blocks()), count)

    def forward(
        self, h: Tensor, state: StackState, real: Tensor | None = None, *, places: slice = slice(None)
    ) -> tuple[Tensor, StackState]:
        """See `Mixer.forward`.

        Args:
            h: As there.
            state: As there.
            real: As there.
            places: Which of the T outputs are wanted; the last block computes as little else as it can.
        """
        count = _counted(state, h, real)
        h, layers = self._placed(h, state, real), []
        for block, before in zip(self._blocks(), state.layers, strict=True):
            is_last = len(layers) + 1 == len(self.blocks)
            h, after = block(h, before, real, places=places if is_last else slice(None))
            layers.append(after)
        return self.norm(h), StackState(tuple(layers), count)

    def peek(self, h: Tensor, state: StackState, *, own: bool = False) -> Tensor:
        """See `Mixer.peek`."""
        if self.positions is not None:
            last = self._checked(state.count.sum(1, keepdim=True), 0 if state.count.shape[1] == 0 else None)
            h = h + self.positions(last)
        for block, before in zip(self._blocks(), state.layers, strict=True):
            h = block.peek(h, before, own=own)
        return self.norm(h)

    def peek_prefixes(self, h: Tensor, context: Tensor, state: StackState, real: Tensor | None = None) -> Tensor:
        """See `Mixer.peek_prefixes`: the context goes through the blocks too, beside the tokens that peek at it.

        In every block the context comes first, so that what a block computes last is about the tokens that peek.
        """
        h, context = self._placed(h, state, real), self._placed(context, state, real)
        for index, (block, before) in enumerate(zip(self._blocks(), state.layers, strict=True)):
            is_last = index + 1 == len(self.blocks)  # nothing reads the context after it
            after = context if is_last else block(context, before, real)[0]
            h, context = block.peek_prefixes(h, context, before, real), after
        return self.norm(h)

    def _blocks(self) -> tuple[Block, ...]:
        return tuple(self.blocks)  # type: ignore[arg-type]  # nn.ModuleList does not know its element type

    def _placed(self, h: Tensor, state: StackState, real: Tensor | None) -> Tensor:
        """Tokens with their positions: the number of real tokens before each."""
        if self.positions is None:
            return h
        n_new, fresh = h.shape[1], state.count.shape[1] == 0
        places = torch.arange(n_new, device=h.device)
        if fresh and real is None:
            self._checked(places, n_new - 1)
            return h + self.positions.weight[:n_new]
        if real is not None:
            places = real.cumsum(1) - real.long()
        places = state.count.sum(1, keepdim=True) + places
        return h + self.positions(self._checked(places, n_new - 1 if fresh else None, real))

    def _checked(self, places: Tensor, highest: int | None, real: Tensor | None = None) -> Tensor:
        """The places, unless a real token is beyond the last; `highest` is a bound that needs no look at the values."""
        assert self.positions is not None
        limit = self.positions.num_embeddings
        if highest is not None and highest < limit:
            return places
        # Inside a graph and under vmap values cannot be looked at; the look-up itself refuses there.
        if not torch.compiler.is_compiling() and not in_vmap():
            beyond = (places >= limit) if real is None else (places >= limit) & real
            if bool(beyond.any()):
                raise ValueError(
                    f"max_length must be at least the number of tokens, {int(places[beyond].max()) + 1}; got {limit}. "
                    "Positions are learned one by one: build the model with a larger max_length"
                )
        return places if real is None else torch.where(real, places, places.clamp(max=limit - 1))


def _counted(state: StackState, h: Tensor, real: Tensor | None) -> Tensor:
    before = state.count.sum(1, keepdim=True)
    return before + (h.shape[1] if real is None else real.sum(1, keepdim=True))
