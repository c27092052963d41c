"""The contract of a causal layer that mixes tokens and can go on where it stopped."""

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

State = TypeVar("State")


class Mixer(nn.Module, ABC, Generic[State]):
    """A causal layer: what it knows of the past is a state, a pytree of tensors with leading axis B.

    A subclass may keep all earlier tokens (attention: keys and values) or a memory of fixed size (fast weights). The
    four methods agree: tokens read in pieces, peeked at, or seen as prefixes give the same numbers as one pass.
    """

    @abstractmethod
    def start(self, n_tasks: int, like: Tensor) -> State:
        """The state before any token, for B = `n_tasks`, on the device and in the dtype of `like`."""

    @abstractmethod
    def forward(self, h: Tensor, state: State, real: Tensor | None = None) -> tuple[Tensor, State]:
        """Read tokens that follow those in the state.

        Args:
            h: Tokens (B, T, D).
            state: What earlier tokens left.
            real: bool (B, T); a token that is not real leaves the state alone. None: all are.

        Returns:
            Outputs (B, T, D), each of which knows its own token and all real ones before it; the new state.
        """

    @abstractmethod
    def peek(self, h: Tensor, state: State, *, own: bool = False) -> Tensor:
        """Outputs (B, Q, D) for tokens h (B, Q, D), each as if it alone came next; the state stays as it is.

        Args:
            h: Tokens that do not see each other.
            state: What earlier tokens left.
            own: Whether each token also knows itself, as it does in `forward`.
        """

    @abstractmethod
    def peek_prefixes(self, h: Tensor, context: Tensor, state: State, real: Tensor | None = None) -> Tensor:
        """Outputs (B, T, D) for tokens h (B, T, D): token t knows `state` and the real ones of context 0 .. t - 1.

        Args:
            h: Tokens that do not see each other or themselves, one for each prefix.
            context: Tokens (B, T, D) as `forward` would read them.
            state: What came before the context.
            real: bool (B, T), of the context.
        """


AnyMixer = Mixer[Any]
