"""Recurrent learners: the support is read row by row into a hidden state of fixed size."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_choice, check_count
from metaicl.episode import Examples
from metaicl.learner import Learner, Traits, check_support_labels
from metaicl.nets.rows import AnswerHead, RowEmbedding
from metaicl.spec import TaskSpec

_GATES = {"gru": 3, "lstm": 4}
_STATES = {"gru": 1, "lstm": 2}

Layers = tuple[tuple[Tensor, ...], ...]
"""For each layer its hidden state (B, D), and for an LSTM its cell (B, D)."""


class RecurrentLearner(Learner[Layers]):
    """A GRU or LSTM over rows with their targets; a query is one more step without a target, and is forgotten.

    The cells are written out: masked rows are as absent, everything has a second derivative, and compiles.

    Args:
        spec: The tasks.
        cell: "gru" or "lstm".
        encoder: (rows, *x_shape) -> (rows, any); None takes vectors as they are and builds one for other inputs.
        dim: D, of tokens and hidden states. To match another learner in parameters or in size of the state, see
            `matching_dim`.
        depth: Layers.

    Reference:
        Hochreiter, Younger & Conwell, 2001, "Learning to learn using gradient descent"; cells of Cho et al. 2014,
        arXiv:1406.1078 (in the form of torch) and Gers et al. 2000. Differs: a row and its target are one token.
        Forget gates of an LSTM start at sigmoid(1) (Jozefowicz et al. 2015).
    """

    traits = Traits(order_sensitive=True)

    def __init__(
        self,
        spec: TaskSpec,
        *,
        cell: Literal["gru", "lstm"] = "lstm",
        encoder: nn.Module | None = None,
        dim: int = 64,
        depth: int = 1,
    ) -> None:
        """Build embedding, cells and head."""
        super().__init__(spec)
        self.cell, self.dim = check_choice("cell", cell, _GATES), check_count("dim", dim)
        self.embed = RowEmbedding(spec, dim=dim, encoder=encoder)
        self.declare_nets(self.embed)
        gates = _GATES[cell]
        self.inputs = nn.ModuleList(nn.Linear(dim, gates * dim) for _ in range(check_count("depth", depth)))
        self.hidden = nn.ModuleList(nn.Linear(dim, gates * dim) for _ in range(depth))
        if cell == "lstm":
            with torch.no_grad():
                for layer in self.inputs:
                    layer.bias[dim : 2 * dim] += 1  # type: ignore[index]  # a Linear layer's bias
        self.head = AnswerHead(spec, dim=dim)

    def adapt(self, support: Examples) -> Layers:
        """The hidden state after the support."""
        return self._read(self._start(support), support)[1]

    def update(self, state: Layers, examples: Examples) -> Layers:
        """The hidden state after `examples` too."""
        return self._read(state, examples)[1]

    def predict(self, state: Layers, x: Tensor) -> Distribution:
        """One step for each query, all from the same state."""
        wide = pytree.tree_map(lambda leaf: leaf[:, None].expand(-1, x.shape[1], -1), state)
        return self._answer(wide, x)

    def predict_prefixes(self, examples: Examples) -> Distribution:
        """Answer every row (B, N) from the rows before it: one pass, then one step for all queries together."""
        if examples.n_rows == 0:
            return self.predict(self._start(examples), examples.x)
        before = self._read(self._start(examples), examples)[0]
        return self._answer(pytree.tree_map(lambda *leaves: torch.stack(leaves, 1), *before), examples.x)

    def _start(self, examples: Examples) -> Layers:
        zero = self.head.linear.weight.new_zeros(examples.n_tasks, self.dim)
        return tuple((zero,) * _STATES[self.cell] for _ in self.inputs)

    def _answer(self, state: Layers, x: Tensor) -> Distribution:
        h = self.embed(x)
        for index, old in enumerate(state):
            h = self._step(self.inputs[index](h), old, index)[0]
        return self.head(h)

    def _read(self, state: Layers, examples: Examples) -> tuple[list[Layers], Layers]:
        """The states before each row and after the last, layer by layer, so that inputs are one matrix product."""
        check_support_labels(self.spec, examples)
        h, real = self.embed(examples.x, examples.y), examples.real
        courses: list[list[tuple[Tensor, ...]]] = []
        for index, now in enumerate(state):
            drive, course = self.inputs[index](h), [now]
            for t in range(h.shape[1]):
                new = self._step(drive[:, t], now, index)
                here = real[:, t, None]
                now = tuple(torch.where(here, a, b) for a, b in zip(new, now, strict=True))
                course.append(now)
            courses.append(course)
            if h.shape[1]:
                h = torch.stack([one[0] for one in course[1:]], 1)
        states = list(zip(*courses, strict=True))
        return states[:-1], states[-1]

    def _step(self, drive: Tensor, state: tuple[Tensor, ...], index: int) -> tuple[Tensor, ...]:
        """One step of a layer from its input's share of the gates (..., gates D) and its state (..., D)."""
        own = self.hidden[index](state[0])
        if self.cell == "lstm":
            enter, keep, new, leave = (drive + own).chunk(4, -1)
            memory = torch.sigmoid(keep) * state[1] + torch.sigmoid(enter) * torch.tanh(new)
            return torch.sigmoid(leave) * torch.tanh(memory), memory
        (reset, keep, new), (own_reset, own_keep, own_new) = drive.chunk(3, -1), own.chunk(3, -1)
        keep = torch.sigmoid(keep + own_keep)
        new = torch.tanh(new + torch.sigmoid(reset + own_reset) * own_new)
        return (keep * state[0] + (1 - keep) * new,)


def parameter_count(learner: nn.Module) -> int:
    """Trainable numbers."""
    return sum(value.numel() for value in learner.parameters() if value.requires_grad)


def state_size(learner: Learner[Any], support: Examples) -> int:
    """Floating-point numbers of the state that one task of `support` leaves."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(learner.adapt(support[:1]))
    return sum(leaf.numel() for leaf in leaves if leaf.is_floating_point())


def matching_dim(build: Callable[[int], Learner[Any]], size: int, *, of: Callable[[Any], int] = parameter_count) -> int:
    """The width whose learner comes closest to `size`, the smaller of two that are as close.

    ```python
    dim = matching_dim(lambda dim: RecurrentLearner(spec, dim=dim), parameter_count(other))
    dim = matching_dim(lambda dim: RecurrentLearner(spec, dim=dim), state_size(other, support),
                       of=lambda learner: state_size(learner, support))
    ```

    Args:
        build: Makes the learner of a width; its size must grow with the width. The global generator is left alone.
        size: What to match.
        of: Measures a learner.
    """
    size = check_count("size", size)

    def measure(dim: int) -> int:
        with torch.random.fork_rng(devices=[]):
            return of(build(dim))

    low, high = 1, 2
    while measure(high) < size:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if measure(middle) < size else (low, middle)
    return min((low, high), key=lambda dim: (abs(measure(dim) - size), dim))
