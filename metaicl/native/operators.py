"""The kernels of perceptron.c as operators of torch, which a compiled graph can call."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metaicl.native.calls import call
from metaicl.native.library import VECTOR_BYTES, load

ACTIVATIONS = {None: 0, torch.nn.ReLU: 1, torch.nn.Tanh: 2, torch.nn.Sigmoid: 3}
MOST_LAYERS = 16

_KINDS = (torch.float32, torch.float64)
_LITTLE = 1 << 20  # products of a pass forward, which one thread makes in about 50 microseconds
_INTEGERS = (
    "layers",
    "activation",
    "tasks",
    "rows",
    "steps",
    "rate_rows",
    "rates_of_parts",
    "exact_from",
    "threads",
    "new_rows",
)
_POINTERS = ("sizes", "strides", "x", "targets", "labels", "importance", "new_x")


class _Problem(ctypes.Structure):
    """The same in perceptron.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("order", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


@torch.compiler.assume_constant_result  # a graph asks once
def is_available(dtype: torch.dtype) -> bool:
    """Whether there are kernels for numbers of this type on this machine."""
    return dtype in _KINDS and load("perceptron") is not None


@torch.compiler.assume_constant_result
def pays(n_tasks: int, rows: int, weights: int) -> bool:
    """Whether a kernel, which gives each task one thread, has work for all threads, or next to nothing to do."""
    return n_tasks >= torch.get_num_threads() or n_tasks * rows * weights <= _LITTLE


def operator(name: str) -> Callable[..., Any]:
    """`descend`, `answer`, `adapt_and_answer` or one of these with `_backward`; see perceptron.c for what they take."""
    return getattr(torch.ops.metaicl, name).default if torch.compiler.is_compiling() else _EAGER[name]


def _descend(rates: Tensor, start: Sequence[Tensor], data: Sequence[Tensor], *, path: bool, **how: Any) -> list[Tensor]:
    """The wanted parts after the wanted steps, and the path for the way back, empty if it is not asked for.

    Args:
        rates: As in `metaicl.native.perceptron.descend`, like `start`.
        start: 2 * layers tensors.
        data: x, y, importance and order of a `Descent`.
        path: Whether there will be a way back.
        how: The settings of a `Descent`.
    """
    made = _room_for_descent(rates, start, data, path=path, **how)
    problem, _kept = _problem_of_descent(rates, data, **how)
    fast = _pointers(_spread(made[:-1], **how))
    call("perceptron", "descend", rates.dtype, problem, _pointers(start), rates, made[-1] if path else None, fast)
    return made


def _descend_backward(
    rates: Tensor,
    start: Sequence[Tensor],
    data: Sequence[Tensor],
    path: Tensor,
    slopes: Sequence[Tensor | None],
    *,
    learned: bool,
    **how: Any,
) -> list[Tensor]:
    """Gradients at the rates, if they are learned, and at the parts of the start, from those at what came out."""
    found = _room_for_slopes(rates, start, learned=learned)
    problem, _kept = _problem_of_descent(rates, data, **how)
    fast = _spread([None if slope is None else slope.contiguous() for slope in slopes], **how)
    call(
        "perceptron", "descend_backward", rates.dtype, problem, _pointers(start), rates, path, _pointers(fast),
        _pointers(found[learned:]), found[0] if learned else None,
    )  # fmt: skip
    return found


def _adapt_and_answer(
    rates: Tensor, start: Sequence[Tensor], data: Sequence[Tensor], new_x: Tensor, *, path: bool, **how: Any
) -> list[Tensor]:
    """What weights answer to `new_x` after the last step, and the path, empty if it is not asked for."""
    made = _room_for_answers(rates, start, data, new_x, path=path, **how)
    problem, _kept = _problem_of_descent(rates, data, new_x, **how)
    call(
        "perceptron", "adapt_and_answer", rates.dtype, problem, _pointers(start), rates, made[1] if path else None,
        made[0],
    )  # fmt: skip
    return made


def _adapt_and_answer_backward(
    rates: Tensor,
    start: Sequence[Tensor],
    data: Sequence[Tensor],
    new_x: Tensor,
    path: Tensor,
    slopes: Tensor,
    *,
    learned: bool,
    **how: Any,
) -> list[Tensor]:
    """Gradients at the rates, if they are learned, and at the parts of the start, from those at the answers."""
    found = _room_for_slopes(rates, start, learned=learned)
    problem, _kept = _problem_of_descent(rates, data, new_x, **how)
    call(
        "perceptron", "adapt_and_answer_backward", rates.dtype, problem, _pointers(start), rates, path,
        slopes.contiguous(), _pointers(found[learned:]), found[0] if learned else None,
    )  # fmt: skip
    return found


def _answer(parts: Sequence[Tensor], x: Tensor, sizes: Sequence[int], activation: int) -> Tensor:
    """What each task's weights make of x."""
    out = x.new_empty(*x.shape[:2], sizes[-1])
    problem, _kept = _problem(x, sizes, activation, _of_tasks(parts))
    call("perceptron", "answer", x.dtype, problem, _pointers(parts), out)
    return out


def _answer_backward(
    parts: Sequence[Tensor], slopes: Tensor, x: Tensor, sizes: Sequence[int], activation: int
) -> list[Tensor]:
    """Gradients at the parts."""
    found = [torch.empty_like(part) for part in parts]
    problem, _kept = _problem(x, sizes, activation, _of_tasks(parts))
    call("perceptron", "answer_backward", x.dtype, problem, _pointers(parts), slopes.contiguous(), _pointers(found))
    return found


def _room_for_descent(
    rates: Tensor, start: Sequence[Tensor], data: Sequence[Tensor], *, path: bool, **how: Any
) -> list[Tensor]:
    x, steps = data[0], how["steps"]
    chosen = [part for part, own in zip(start, how["wanted"], strict=True) if own]
    fast = [part.new_empty(len(x), *part.shape) for _ in range(steps if how["whole"] else 1) for part in chosen]
    kept = (len(x), steps - 1, _padded_count(how["sizes"], x.element_size())) if path else 0
    return [*fast, x.new_empty(kept)]


def _room_for_answers(
    rates: Tensor, start: Sequence[Tensor], data: Sequence[Tensor], new_x: Tensor, *, path: bool, **how: Any
) -> list[Tensor]:
    x, sizes = data[0], how["sizes"]
    kept = (len(x), how["steps"], _padded_count(sizes, x.element_size())) if path else 0
    return [x.new_empty(*new_x.shape[:2], sizes[-1]), x.new_empty(kept)]


def _room_for_slopes(rates: Tensor, start: Sequence[Tensor], *rest: Any, learned: bool, **how: Any) -> list[Tensor]:
    return [torch.empty_like(part) for part in ((rates, *start) if learned else start)]


def _padded_count(sizes: Sequence[int], bytes_each: int) -> int:
    """Numbers of a set of weights whose rows are padded to whole vectors; as in perceptron.c."""
    lanes = VECTOR_BYTES // bytes_each
    widths = [-(-size // lanes) * lanes for size in sizes]
    return sum(
        n_out * wide_in + wide_out for n_out, (wide_in, wide_out) in zip(sizes[1:], pairwise(widths), strict=True)
    )


def _spread(
    given: Sequence[Tensor | None], *, wanted: Sequence[bool], steps: int, whole: bool, **how: Any
) -> list[Tensor | None]:
    """One entry for each part after each step, None where it is not wanted."""
    rest = iter(given)
    return [next(rest) if own and (whole or step + 1 == steps) else None for step in range(steps) for own in wanted]


def _of_tasks(parts: Sequence[Tensor]) -> list[bool]:
    """Which parts have an axis of tasks: matrices have two axes without it, biases one."""
    return [part.ndim > 2 - i % 2 for i, part in enumerate(parts)]


def _problem(x: Tensor, sizes: Sequence[int], activation: int, of_tasks: Sequence[bool]) -> tuple[_Problem, Any]:
    """The structure without what belongs to a descent, and the arrays that it points to."""
    kept = _sizes_and_strides(tuple(sizes), tuple(of_tasks))
    problem = _Problem(
        layers=len(sizes) - 1, activation=activation, tasks=x.shape[0], rows=x.shape[1], steps=1, rate_rows=1,
        threads=min(torch.get_num_threads(), x.shape[0]), sizes=ctypes.addressof(kept[0]),
        strides=ctypes.addressof(kept[1]), x=x.data_ptr(),
    )  # fmt: skip
    return problem, kept


@functools.lru_cache(maxsize=64)
def _sizes_and_strides(sizes: tuple[int, ...], of_tasks: tuple[bool, ...]) -> tuple[Any, Any]:
    counts = [count for n_in, n_out in pairwise(sizes) for count in (n_in * n_out, n_out)]
    strides = [count * own for count, own in zip(counts, of_tasks, strict=True)]
    return (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_int64 * len(strides))(*strides)


def _problem_of_descent(
    rates: Tensor, data: Sequence[Tensor], new_x: Tensor | None = None, **how: Any
) -> tuple[_Problem, Any]:
    x, y, importance, order = data
    problem, kept = _problem(x, how["sizes"], how["activation"], how["wanted"])
    problem.steps, problem.exact_from, problem.order = how["steps"], how["exact_from"], float(order)
    problem.rate_rows, problem.rates_of_parts = len(rates), rates.shape == (1, 2 * problem.layers)
    problem.importance = importance.data_ptr()
    if new_x is not None:
        problem.new_x, problem.new_rows = new_x.data_ptr(), new_x.shape[1]
    setattr(problem, "targets" if y.is_floating_point() else "labels", y.data_ptr())
    return problem, kept


def _pointers(tensors: Sequence[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(None if value is None else value.data_ptr() for value in tensors))


_HOW = "int steps, int exact_from, bool[] wanted, bool whole, int[] sizes, int activation"
_SCHEMAS = {
    "descend": f"(Tensor rates, Tensor[] start, Tensor[] data, *, bool path, {_HOW}) -> Tensor[]",
    "descend_backward": "(Tensor rates, Tensor[] start, Tensor[] data, Tensor path, Tensor?[] slopes, *, bool learned, "
    f"{_HOW}) -> Tensor[]",
    "adapt_and_answer": "(Tensor rates, Tensor[] start, Tensor[] data, Tensor new_x, *, bool path, "
    f"{_HOW}) -> Tensor[]",
    "adapt_and_answer_backward": "(Tensor rates, Tensor[] start, Tensor[] data, Tensor new_x, Tensor path, "
    f"Tensor slopes, *, bool learned, {_HOW}) -> Tensor[]",
    "answer": "(Tensor[] parts, Tensor x, int[] sizes, int activation) -> Tensor",
    "answer_backward": "(Tensor[] parts, Tensor slopes, Tensor x, int[] sizes, int activation) -> Tensor[]",
}
_EAGER: dict[str, Callable[..., Any]] = {
    "descend": _descend,
    "descend_backward": _descend_backward,
    "adapt_and_answer": _adapt_and_answer,
    "adapt_and_answer_backward": _adapt_and_answer_backward,
    "answer": _answer,
    "answer_backward": _answer_backward,
}
_FAKE: dict[str, Callable[..., Any]] = {
    "descend": _room_for_descent,
    "descend_backward": _room_for_slopes,
    "adapt_and_answer": _room_for_answers,
    "adapt_and_answer_backward": _room_for_slopes,
    "answer": lambda parts, x, sizes, activation: x.new_empty(*x.shape[:2], sizes[-1]),
    "answer_backward": lambda parts, *rest: [torch.empty_like(part) for part in parts],
}
_LIBRARY = torch.library.Library("metaicl", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _EAGER[_name], "CPU")
    torch.library.register_fake(f"metaicl::{_name}", _FAKE[_name], lib=_LIBRARY)
