"""One model applied again and again to its own output: depth without parameters."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from metaicl.checks import check_count
from metaicl.nets.sequence.mixer import AnyMixer, Mixer


class Looped(Mixer[tuple[Any, ...]]):
    """z <- body(z + h), from z = 0, with tied weights; every pass has a state of its own.

    `loops` may be changed at any time: a trained model can be run longer. A state belongs to the number of loops it
    was made with.

    Args:
        body: What is repeated.
        loops: Passes.
        window: In training, only the last so many passes are differentiated through (and are judged, by those who
            look at `passes`); None takes all.

    Reference:
        Yang, Lee, Nowak & Papailiopoulos, 2023, arXiv:2311.12424, section 4 (input injection, truncated loss).
    """

    def __init__(self, body: AnyMixer, *, loops: int, window: int | None = None) -> None:
        """Keep the body."""
        super().__init__()
        self.body = body
        self.loops = check_count("loops", loops)
        self.window = loops if window is None else check_count("window", window)
        if self.window > loops:
            raise ValueError(f"window must be at most loops = {loops}; got {window}")

    def start(self, n_tasks: int, like: Tensor) -> tuple[Any, ...]:
        """A state of the body for every pass."""
        return tuple(self.body.start(n_tasks, like) for _ in range(self.loops))

    def forward(self, h: Tensor, state: tuple[Any, ...], real: Tensor | None = None) -> tuple[Tensor, tuple[Any, ...]]:
        """See `Mixer.forward`."""
        found = self.passes(h, state, real)
        return found[-1][0], tuple(after for _, after in found)

    def passes(self, h: Tensor, state: tuple[Any, ...], real: Tensor | None = None) -> list[tuple[Tensor, Any]]:
        """Outputs (B, T, D) and new state of every pass in turn."""
        z, found = torch.zeros_like(h), []
        for index, before in self._states(state):
            with self._recorded(index):
                z, after = self.body(z + h, before, real)
            found.append((z, after))
        return found

    def peek(self, h: Tensor, state: tuple[Any, ...], *, own: bool = False) -> Tensor:
        """See `Mixer.peek`."""
        z = torch.zeros_like(h)
        for index, before in self._states(state):
            with self._recorded(index):
                z = self.body.peek(z + h, before, own=own)
        return z

    def peek_prefixes(self, h: Tensor, context: Tensor, state: tuple[Any, ...], real: Tensor | None = None) -> Tensor:
        """See `Mixer.peek_prefixes`."""
        z, of_context = torch.zeros_like(h), torch.zeros_like(context)
        for index, before in self._states(state):
            with self._recorded(index):
                told = of_context + context
                if index + 1 < self.loops:  # nothing reads the context after the last pass
                    of_context = self.body(told, before, real)[0]
                z = self.body.peek_prefixes(z + h, told, before, real)
        return z

    def is_judged(self, index: int) -> bool:
        """Whether pass `index` is among the last `window`."""
        return index >= self.loops - self.window

    def _states(self, state: tuple[Any, ...]) -> list[tuple[int, Any]]:
        if len(state) != self.loops:
            raise ValueError(f"state must come from a model with loops = {self.loops}; got one of {len(state)} loops")
        return list(enumerate(state))

    def _recorded(self, index: int) -> Any:
        return nullcontext() if self.is_judged(index) or not self.training else torch.no_grad()
