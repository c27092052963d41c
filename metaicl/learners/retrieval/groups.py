"""Groups of rows: which rows of a support ask together, groups of a ready-made bank, and groups as more support."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaicl.checks import check_choice
from metaicl.collation import concatenate
from metaicl.episode import Examples
from metaicl.functional import class_weights
from metaicl.learners.retrieval.bank import MemoryBank
from metaicl.learners.retrieval.content import ids_in_all_precisions
from metaicl.learners.retrieval.retriever import Oracle
from metaicl.spec import TaskSpec


class RetrievalState(NamedTuple):
    """What `predict` needs.

    Attributes:
        inner: States of the wrapped learner for S = k + 1 supports per task (axis B S).
        log_weights: Log-weights of the sets (B, S).
        content: long (B, S, any), `ids_in_all_precisions` of the retrieved rows; -1 where a row cannot be one that is
            asked.
    """

    inner: Any
    log_weights: Tensor
    content: Tensor


def asking_groups(support: Examples, spec: TaskSpec) -> Tensor:
    """Bool (B, G, N): the rows of each group that looks for its like, a class or the whole support in regression."""
    if spec.kind == "regression":
        return support.real[:, None]
    return class_weights(support.y, spec.output_size, support.mask, torch.float32).mT > 0


def group_classes(classes: Tensor, asking: Tensor) -> Tensor:
    """Source class (B, G) of each group, for those of the rows (B, N); -1 where none is known."""
    return F.pad(classes[:, None].masked_fill(~asking, -1), (1, 0), value=-1).amax(-1)


def with_groups(support: Examples, x: Tensor, y: Tensor, found: Tensor, *, labeled: bool) -> Examples:
    """The support alone and with each retrieved set, axis (B S), S = k + 1.

    Args:
        support: (B, N) rows.
        x: Retrieved rows (B, G, k, R, *x_shape).
        y: Their targets (B, G, k, R, y_dim); not read where groups are `labeled`.
        found: bool (B, G, k), which groups are real.
        labeled: Group g has the label g.
    """
    n_tasks, n_groups, k = found.shape
    n_rows = x.shape[3]
    if labeled:
        labels = torch.arange(n_groups, device=x.device)[None, None, :, None]
        y = labels.expand(n_tasks, k, n_groups, n_rows)
    else:
        y = y.transpose(1, 2)
    real = found.transpose(1, 2)[..., None].expand(n_tasks, k, n_groups, n_rows)
    # Set 0 is the support alone: its retrieved rows are masked.
    x, y = (torch.cat([value[:, :1], value], 1).flatten(0, 1).flatten(1, 2) for value in (x.transpose(1, 2), y))
    real = F.pad(real.flatten(2), (0, 0, 1, 0), value=False).flatten(0, 1)
    return read_beside(support, k + 1, x, y, real)


def read_beside(support: Examples, n_sets: int, x: Tensor, y: Tensor, real: Tensor) -> Examples:
    """The rows of each support, `n_sets` times over, with retrieved rows appended: axis (B S).

    The support keeps its ids and a retrieved row has none, so that a learner that reads here and retrieves itself
    leaves out the rows and classes of the task, too.

    Args:
        support: (B, N) rows.
        n_sets: S.
        x: Retrieved rows (B S, R, ...).
        y: Their targets (B S, R, ...).
        real: bool (B S, R).
    """
    ids = None if support.ids is None else support.ids.repeat_interleave(n_sets, 0)
    own = (value.repeat_interleave(n_sets, 0) for value in (support.x, support.y, support.real))
    none = None if ids is None else torch.full_like(real, -1, dtype=torch.long)
    return concatenate(Examples(*own, ids=ids), Examples(x, y, real, none))


def set_log_weights(scores: Tensor, found: Tensor, nothing: Tensor | float) -> Tensor:
    """Log-weights (B, S) of nothing and of the retrieved sets; their exponentials add up to one.

    Args:
        scores: (B, G, k), of the groups; a set has one of each asking group, and their mean score.
        found: bool (B, G, k), which groups are real. A set without any has no weight.
        nothing: Its score, a scalar tensor; or, as a number, the sum of the weights of the sets.
    """
    count = found.sum(1)
    scores = ((scores * found).sum(1) / count.clamp(min=1)).masked_fill(count == 0, -torch.inf)
    if isinstance(nothing, Tensor):
        return torch.log_softmax(torch.cat([nothing.expand(len(scores), 1), scores], 1), 1)
    empty = scores.isneginf().all(1, keepdim=True)
    kept = scores.new_full((len(scores), 1), math.log1p(-nothing)).masked_fill(empty, 0.0)
    among = torch.log_softmax(scores.masked_fill(empty, 0.0), 1) + math.log(nothing)
    return torch.cat([kept, among.masked_fill(empty, -torch.inf)], 1)


def check_switches(
    spec: TaskSpec, retriever: str, *, search: str, encoder: nn.Module | None, oracle: Oracle | None
) -> None:
    """Hold that no switch of `RetrievalAugmented` is without effect.

    Raises:
        ValueError: If one is, if the search is unknown, or if an oracle of regression has no function.
    """
    if encoder is not None and retriever != "learned":
        raise ValueError(f"an encoder goes with retriever 'learned' alone; got one for {retriever!r}")
    if check_choice("search", search, ("fixed", "learned")) == "learned" and retriever != "learned":
        raise ValueError(f"search 'learned' goes with retriever 'learned' alone; got {retriever!r}")
    if oracle is not None and retriever != "oracle":
        raise ValueError(f"an oracle goes with retriever 'oracle' alone; got {oracle!r} for {retriever!r}")
    if retriever == "oracle" and oracle is None and spec.kind == "regression":
        raise ValueError("retriever 'oracle' on regression needs oracle=..., a function: no source names tasks")


def ready_made(bank: MemoryBank, spec: TaskSpec, *, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows (M, R, *x_shape), targets, row ids, class ids and the names of the rows' content, of a bank.

    Args:
        bank: Its items must be groups of rows of such tasks, see `RetrievalAugmented`.
        spec: The tasks.
        like: Everything goes to its device, and numbers to its dtype.

    Raises:
        TypeError: If it is no bank, or its rows are of another kind of number.
        ValueError: If it is empty, or rows or targets are missing or have another shape.
    """
    _check_ready_made(bank, spec)
    x, y = bank.values["x"], bank.values.get("y", bank.keys)
    content = ids_in_all_precisions(x, spec).to(like.device)
    x = x.to(like) if x.is_floating_point() else x.to(like.device)
    return x, y.to(like), bank.row_ids.to(like.device), bank.class_ids.to(like.device), content


def _check_ready_made(bank: MemoryBank, spec: TaskSpec) -> None:
    if not isinstance(bank, MemoryBank):
        raise TypeError(f"bank must be a MemoryBank or None; got {type(bank).__name__}")
    if not len(bank):
        raise ValueError("bank must hold groups of rows; this one is empty. Leave it out, and prepare fills a memory")
    shapes = {"x": spec.x_shape, **({"y": (spec.output_size,)} if spec.kind == "regression" else {})}
    for name, shape in shapes.items():
        value = bank.values.get(name)
        if value is None or value.ndim != 2 + len(shape) or value.shape[2:] != shape or not value.shape[1]:
            got = "none" if value is None else str(tuple(value.shape))
            wanted = ", ".join(["M", "R", *map(str, shape)])
            raise ValueError(f"bank must hold values {name!r} ({wanted}), R rows for each of its M items; got {got}")
        if (name == "x" and spec.x_kind == "tokens") == value.is_floating_point():
            kind = "token ids, long" if spec.x_kind == "tokens" and name == "x" else "floating point"
            raise TypeError(f"values {name!r} of the bank must be {kind}; got {value.dtype}")
    if spec.vocabulary is not None:
        low, high = bank.values["x"].aminmax()
        if not 0 <= int(low) <= int(high) < spec.vocabulary:
            raise ValueError(f"tokens of the bank must be in [0, {spec.vocabulary}); got {int(low)} .. {int(high)}")
