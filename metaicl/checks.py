"""Checks of values at the boundary: what a shape cannot tell, told early and by name."""

import difflib
import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution

from metaicl.episode import Episode, Examples
from metaicl.spec import NotServed, TaskSpec

_LISTED = 5  # offending values named in a message


def check_count(name: str, value: object, minimum: int = 1) -> int:
    """Return `value` as an int if it is an integer of at least `minimum`, one of NumPy's too (bool is none here).

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int >= {minimum}; got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name} must be an int >= {minimum}; got {value}")
    return int(value)


def check_shots(n_shot: object) -> tuple[int, int]:
    """The ends (low, high) of a range of shots; of one number both are that number.

    Raises:
        TypeError: If an end is not an integer.
        ValueError: If there are not two, one is below 1, or they are in the wrong order.
    """
    ends = n_shot if isinstance(n_shot, (tuple, list)) else (n_shot, n_shot)
    if len(ends) != 2:
        raise ValueError(f"n_shot must be an int or a pair (low, high); got {n_shot!r}")
    low = check_count("n_shot", ends[0])
    return low, check_count("n_shot", ends[1], minimum=low)


def check_positive(name: str, value: float) -> float:
    """Return `value` as a float if it is a finite number above zero, one of NumPy's too.

    Raises:
        ValueError: If it is not.
    """
    if not is_finite_number(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number > 0; got {value!r}")
    return float(value)


def is_finite_number(value: object) -> bool:
    """Whether `value` is a finite int or float of Python or NumPy."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]  # known to be a number


def check_seed(seed: object) -> int:
    """Return `seed` as an int if it is an integer in [0, 2**63), one of NumPy's too.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is out of range.
    """
    found = check_count("seed", seed, minimum=0)
    if found >= 2**63:
        raise ValueError(f"seed must be in [0, 2**63); got {found}")
    return found


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`; the error names the closest one.

    Raises:
        ValueError: If it is none of them.
    """
    choices = list(choices)
    if value in choices:
        return str(value)
    close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{name} must be one of {choices}; got {value!r}{hint}")


def check_device(device: str | torch.device) -> torch.device:
    """Return the device if this machine has it.

    Raises:
        ValueError: If it is unknown or absent; the message lists what there is.
    """
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    here += ["mps"] if torch.backends.mps.is_available() else []
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    name = None if found is None else (f"cuda:{found.index or 0}" if found.type == "cuda" else found.type)
    if found is None or name not in here:
        raise ValueError(f"device must be one of {here} on this machine; got {str(device)!r}")
    return found


def check_episode(episode: Episode, spec: TaskSpec) -> None:
    """Check an episode's values against its spec, so that a bad row is named here and not as a NaN later.

    Args:
        episode: Any number of tasks.
        spec: What they should look like.

    Raises:
        TypeError: If a dtype does not fit the spec.
        ValueError: If a shape, a label or a value does not fit it.
    """
    for name, part in (("support", episode.support), ("query", episode.query)):
        if part.n_rows == 0 or (part.mask is not None and not bool(part.mask.any(1).all())):
            raise ValueError(f"episode.{name} must have at least one real row per task; got none in some task")
        _check_inputs(name, part, spec)
        _check_targets(name, part, spec)
    if spec.kind == "classification" and not spec.ordered:  # in a stream, classes come as they come
        _check_classes_present(episode, spec)


def _check_inputs(name: str, part: Examples, spec: TaskSpec) -> None:
    got = tuple(part.x.shape[2:])
    if got != spec.x_shape:
        raise ValueError(f"episode.{name}.x must have rows of shape {spec.x_shape}; got {got}")
    if spec.x_kind != "tokens":
        if not part.x.is_floating_point():
            raise TypeError(f"episode.{name}.x must be floating point for {spec.x_kind} inputs; got {part.x.dtype}")
        _check_finite(f"episode.{name}.x", part.x, part)
        return
    if part.x.dtype != torch.long:
        raise TypeError(f"episode.{name}.x must be long for token inputs; got {part.x.dtype}")
    low, high = torch.stack(part.x.aminmax()).tolist()
    if low < 0 or high >= (spec.vocabulary or 0):
        raise ValueError(
            f"episode.{name}.x must hold token ids in [0, {spec.vocabulary}); got values in [{low}, {high}]"
        )


def check_built_for(name: str, built: TaskSpec, tasks: TaskSpec) -> None:
    """Refuse a learner of other rows, answers or ways than those of the tasks.

    Raises:
        NotServed: If shapes or kinds differ.
    """
    mine, theirs = built.shapes, tasks.shapes
    if mine != theirs:
        found, expected = (
            ", ".join(f"{key} {one[key]}" for key in mine if mine[key] != theirs[key]) for one in (mine, theirs)
        )
        raise NotServed(f"{name} was built for {found}; the tasks have {expected}. Build one from tasks.spec")


def _check_targets(name: str, part: Examples, spec: TaskSpec) -> None:
    if spec.kind == "regression":
        if part.y.ndim != 3 or part.y.shape[2] != spec.y_dim or not part.y.is_floating_point():
            got = f"{tuple(part.y.shape)} {part.y.dtype}"
            raise ValueError(f"episode.{name}.y must be floating point (B, N, y_dim={spec.y_dim}); got {got}")
        _check_finite(f"episode.{name}.y", part.y, part)
        return
    check_labels(f"episode.{name}.y", part, spec.n_way or 0)


def _no_indices(name: str, part: Examples) -> TypeError:
    hint = "; one-hot rows become indices by .argmax(-1)" if part.y.ndim == 3 else ""
    return TypeError(f"{name} must be long class indices (B, N); got {part.y.dtype} {tuple(part.y.shape)}{hint}")


def check_labels(name: str, part: Examples, n_way: int | None) -> None:
    """Check the labels of real rows; masked ones may hold any. Does nothing within a compiled graph.

    Args:
        name: What the error calls them.
        part: Rows of a classification.
        n_way: Labels are below it; None for a stream, where classes may come.

    Raises:
        TypeError: If they are not long (B, N).
        ValueError: If one is negative or too large.
    """
    if torch.compiler.is_compiling():
        return
    if part.y.ndim != 2 or part.y.dtype != torch.long:
        raise _no_indices(name, part)
    wrong = part.y < 0 if n_way is None else (part.y < 0) | (part.y >= n_way)
    if not bool(wrong.any()):
        return
    wrong = wrong & part.real
    if not bool(wrong.any()):
        return
    found, (task, row) = sorted(set(part.y[wrong].tolist()))[:_LISTED], wrong.nonzero()[0].tolist()
    hint = "; mark rows to ignore in mask" if -100 in found else ""
    expected = ">= 0" if n_way is None else f"in [0, n_way={n_way})"
    raise ValueError(f"{name} must hold labels {expected}; got {found}, the first at task {task}, row {row}{hint}")


def _check_classes_present(episode: Episode, spec: TaskSpec) -> None:
    assert spec.n_way is not None
    support = episode.support
    y = support.y if support.mask is None else support.y.where(support.mask, spec.n_way)
    seen = y.new_zeros((len(y), spec.n_way + 1)).scatter_(1, y, 1)[:, :-1]  # the last column takes the masked rows
    if int(seen.sum()) < seen.numel():
        task, label = (seen == 0).nonzero()[0].tolist()
        raise ValueError(
            f"every class needs a support row; class {label} of task {task} has 0 (n_way={spec.n_way}). "
            "A query label that the support never shows cannot be learned, but in a stream (TaskSpec(ordered=True))"
        )


def check_answer(answer: object, spec: TaskSpec, rows: tuple[int, ...], method: str = "predict") -> None:
    """Check the kind and shapes of what a learner answered; reads no values.

    Args:
        answer: What it returned.
        spec: What the tasks look like.
        rows: Shape (B, Q) of the rows that were asked about.
        method: What was called, `predict` or `predict_prefixes`.

    Raises:
        TypeError: If it is no torch distribution.
        ValueError: If its batch shape is not (B, Q), or its event shape or number of classes is not that of the spec.
    """
    hint = "Hint: metaicl.functional.categorical(logits) makes one from (B, Q, n_way)"
    if spec.kind == "regression":
        hint = "Hint: metaicl.functional.gaussian(mean, scale) makes one from (B, Q, y_dim)"
    if not isinstance(answer, Distribution):
        raise TypeError(f"{method} must return a torch distribution; got {type(answer).__name__}. {hint}")
    found, event = tuple(answer.batch_shape), tuple(answer.event_shape)
    if found != rows:
        raise ValueError(f"{method} must return batch shape (B, Q) = {rows}; got {found}. {hint}")
    expected = () if spec.kind == "classification" else (spec.y_dim,)
    if event != expected:
        raise ValueError(f"{method} must return event shape {expected} for {spec.kind}; got {event}. {hint}")
    if spec.kind == "classification" and isinstance(answer, Categorical) and answer.param_shape[-1] != spec.n_way:
        classes = answer.param_shape[-1]
        raise ValueError(f"{method} must return probabilities of C = n_way = {spec.n_way} classes; got {classes}")


def class_counts(examples: Examples, n_way: int) -> Tensor:
    """Real rows per class, long (B, C)."""
    one_hot = torch.nn.functional.one_hot(examples.y.clamp(0, n_way - 1), n_way)
    return (one_hot * examples.real[..., None]).sum(1)


def _check_finite(name: str, value: Tensor, part: Examples) -> None:
    if math.isfinite(value.detach().sum()):  # one pass; a sum that overflows decides nothing
        return
    finite = torch.isfinite(value).flatten(2).all(2) | ~part.real
    if not bool(finite.all()):
        task, row = (~finite).nonzero()[0].tolist()
        count = int((~finite).sum())
        raise ValueError(f"{name} must be finite; {count} rows hold NaN or Inf, the first at task {task}, row {row}")
