"""The beginnings of a support: nested shots, and every prefix of a stream."""

import torch
from torch.distributions import Categorical, Distribution, Independent, Normal

from metaicl.episode import Examples
from metaicl.functional import categorical, gaussian
from metaicl.learner import Learner, PredictsPrefixes
from metaicl.spec import TaskSpec


def first_shots(support: Examples, n_shot: int, spec: TaskSpec) -> Examples:
    """The first `n_shot` real rows of each class (of each task in regression), in their order.

    Classes of a stream come as they come: of it the first `n_way * n_shot` rows are kept, whatever their classes.

    Args:
        support: (B, N) rows; a class or task with fewer rows keeps what it has.
        n_shot: Rows to keep, per class or per task.
        spec: What the tasks look like.

    Returns:
        Support with as many rows as the largest task needs, the others padded by the mask.
    """
    keep = support.real
    if spec.kind == "classification" and not spec.ordered:
        classes = torch.arange(spec.output_size, device=support.y.device)
        of_class = (support.y[..., None] == classes) & keep[..., None]  # (B, N, C)
        keep = ((of_class.cumsum(1) <= n_shot) & of_class).any(-1)
    else:
        keep = keep & (keep.cumsum(1) <= n_shot * (spec.n_way or 1))
    n_rows = int(keep.sum(1).max())
    order = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)[:, :n_rows]
    task = torch.arange(support.n_tasks, device=order.device)[:, None]
    kept = keep[task, order]
    ids = None if support.ids is None else support.ids[task, order]
    return Examples(support.x[task, order], support.y[task, order], None if bool(kept.all()) else kept, ids)


def take_prefix(examples: Examples, length: int) -> Examples:
    """The first `length` rows; the empty prefix is one masked row, because every learner takes at least one."""
    if length:
        return examples.rows(slice(length))
    nothing = examples.rows(slice(1))
    return Examples(nothing.x, nothing.y, torch.zeros_like(nothing.real), nothing.ids)


def predict_prefixes(learner: Learner, examples: Examples) -> Distribution:
    """Predict every row of a stream from the rows before it, by the learner's own method where it has one.

    The default adapts to each prefix, all tasks in one call per prefix; the empty one is a single masked row.

    Args:
        learner: Any learner.
        examples: Streams (B, N).

    Returns:
        A distribution (B, N); row t predicts y_t from rows 0 .. t - 1 and x_t.

    Raises:
        TypeError: If the learner's distributions cannot be joined: a Categorical or a diagonal Gaussian can.
    """
    if isinstance(learner, PredictsPrefixes):
        return learner.predict_prefixes(examples)
    parts = [learner(take_prefix(examples, t), examples.x[:, t : t + 1]) for t in range(examples.n_rows)]
    if all(isinstance(part, Categorical) for part in parts):
        return categorical(torch.cat([part.logits for part in parts], 1))
    if all(isinstance(part, Independent) and isinstance(part.base_dist, Normal) for part in parts):
        bases = [part.base_dist for part in parts]
        return gaussian(torch.cat([base.loc for base in bases], 1), torch.cat([base.scale for base in bases], 1))
    found = sorted({type(part).__name__ for part in parts})
    raise TypeError(f"predict_prefixes joins Categorical or Independent Normal predictions; got {found}")
