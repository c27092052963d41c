"""torch's recurrent layers written out: `vmap` does not know their kernels, and these have no second derivatives.

The functions take the arguments of the kernels that `nn.LSTM`, `nn.GRU`, `nn.RNN` and their cells call, and give what
those give. `WRITTEN_OUT` maps one to the other.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]  # the hidden state (N, H), and of an LSTM the cell (N, H)


class Weights(NamedTuple):
    """Of one layer in one direction, with an axis G H for the G gates in torch's order.

    Attributes:
        of_input: (G H, D).
        of_state: (G H, H); (G H, P) in an LSTM that projects its state.
        input_bias: (G H,) or None.
        state_bias: (G H,) or None.
        projection: (P, H) in such an LSTM, else None.
    """

    of_input: Tensor
    of_state: Tensor
    input_bias: Tensor | None = None
    state_bias: Tensor | None = None
    projection: Tensor | None = None


def _lstm_step(given: Tensor, state: State, weights: Weights) -> State:
    hidden, cell = state
    write, keep, value, show = (given + F.linear(hidden, weights.of_state, weights.state_bias)).chunk(4, -1)
    cell = keep.sigmoid() * cell + write.sigmoid() * value.tanh()
    hidden = show.sigmoid() * cell.tanh()
    return hidden if weights.projection is None else F.linear(hidden, weights.projection), cell


def _gru_step(given: Tensor, state: State, weights: Weights) -> State:
    (hidden,) = state
    recalled = F.linear(hidden, weights.of_state, weights.state_bias).chunk(3, -1)
    reset, keep, value = given.chunk(3, -1)
    keep = (keep + recalled[1]).sigmoid()
    value = (value + (reset + recalled[0]).sigmoid() * recalled[2]).tanh()
    return (value + keep * (hidden - value),)


def _rnn_step(given: Tensor, state: State, weights: Weights, *, activation: Callable[[Tensor], Tensor]) -> State:
    return (activation(given + F.linear(state[0], weights.of_state, weights.state_bias)),)


_Step = Callable[[Tensor, State, Weights], State]
_STEPS: Mapping[str, _Step] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": partial(_rnn_step, activation=torch.tanh),
    "rnn_relu": partial(_rnn_step, activation=torch.relu),
}


def run_layers(
    step: _Step,
    x: Tensor,
    start: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    """All layers of an LSTM, GRU or RNN over sequences of equal length.

    Args:
        step: One time step.
        x: (N, T, D), or (T, N, D) unless `batch_first`.
        start: The state (layers * directions, N, H), of an LSTM a pair of them.
        weights: Of all layers and directions, in torch's order.
        has_biases: Whether there are biases among them.
        num_layers: Layers.
        options: dropout, train, bidirectional, batch_first.

    Returns:
        The outputs of the last layer, shaped as `x`, and the last states.
    """
    dropout, train, bidirectional, batch_first = options
    n_directions = 2 if bidirectional else 1
    size = len(weights) // (num_layers * n_directions)
    starts = (start,) if isinstance(start, Tensor) else tuple(start)
    sequence = x.transpose(0, 1) if batch_first else x
    ends = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(n_directions):
            place = layer * n_directions + direction
            own = _in_order(weights[place * size : (place + 1) * size], has_biases)
            output, end = _run(step, sequence, tuple(part[place] for part in starts), own, backwards=direction == 1)
            outputs.append(output)
            ends.append(end)
        sequence = torch.cat(outputs, -1)
        if dropout and train and layer < num_layers - 1:
            sequence = F.dropout(sequence, dropout)
    last = [torch.stack(parts) for parts in zip(*ends, strict=True)]
    return (sequence.transpose(0, 1) if batch_first else sequence, *last)


def run_cell(step: _Step, x: Tensor, start: Tensor | Sequence[Tensor], *weights: Tensor) -> Any:
    """One step of an LSTMCell, GRUCell or RNNCell: the hidden state, of an LSTM the pair of states."""
    states = (start,) if isinstance(start, Tensor) else tuple(start)
    own = Weights(*weights)
    found = step(F.linear(x, own.of_input, own.input_bias), states, own)
    return found[0] if isinstance(start, Tensor) else found


def _in_order(weights: Sequence[Tensor], has_biases: bool) -> Weights:
    biases, rest = (weights[2:4], weights[4:]) if has_biases else ((None, None), weights[2:])
    return Weights(*weights[:2], *biases, *rest)


def _run(step: _Step, x: Tensor, state: State, weights: Weights, *, backwards: bool) -> tuple[Tensor, State]:
    """Outputs (T, N, H) of one layer in one direction over x (T, N, D), and the last state."""
    given = F.linear(x, weights.of_input, weights.input_bias)  # of all time steps at once
    outputs = []
    for row in reversed(given.unbind(0)) if backwards else given.unbind(0):
        state = step(row, state, weights)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


WRITTEN_OUT: Mapping[Any, Callable[..., Any]] = {
    **{getattr(torch, name): partial(run_layers, step) for name, step in _STEPS.items()},
    **{getattr(torch, f"{name}_cell"): partial(run_cell, step) for name, step in _STEPS.items()},
}
"""What stands in for each kernel of torch. Packed sequences, whose arguments differ, are not served."""
