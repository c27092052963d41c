"""What went wrong in an update that is not made: which loss or gradient, and what the inner loops did before it."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metaicl.episode import Episode
from metaicl.inner_loop.tracing import trace_steps
from metaicl.meta_step import MetaStep

_FAR = 1e4  # an inner loss or weight beyond this is a sign of divergence
_SHOWN = 4  # steps at either end of a long inner loop


def name_problem(losses: Tensor, gradients: Mapping[str, Tensor]) -> str:
    """The first task without a finite loss, or else the first parameter without a finite meta-gradient."""
    wrong = _not_finite(losses)
    if wrong:
        value = losses.flatten()[wrong[0]].item()
        more = f" ({len(wrong)} of {losses.numel()} tasks)" if len(wrong) > 1 else ""
        return f"the loss of task {wrong[0]} is {value}{more}"
    for name, gradient in gradients.items():
        if not bool(gradient.isfinite().all()):
            return (
                f"the meta-gradient of parameter {name} has {int((~gradient.isfinite()).sum())} NaN or infinite values"
            )
    name = max(gradients, key=lambda name: float(gradients[name].abs().max()) if gradients[name].numel() else 0.0)
    return f"the norm of the meta-gradient overflows, with the largest values in parameter {name}"


def explain_inner_loops(
    meta_step: MetaStep, episode: Episode, losses: Tensor, micro_batch_size: int | None = None
) -> str:
    """What the inner loops of a failed update did step by step, in a sentence; empty for a learner without any.

    They run once more, eagerly and without a graph: for the task whose loss is not finite, where one is, and otherwise
    for all. A learner that draws noise draws other noise then.

    Args:
        meta_step: The step that failed, with the weights it failed at.
        episode: Its B tasks, on the learner's device.
        losses: Theirs (B,), or their mean.
        micro_batch_size: Tasks in memory at a time; None: all.
    """
    wrong, size = _not_finite(losses), micro_batch_size or episode.n_tasks
    known = wrong[:1] if losses.numel() == episode.n_tasks else []
    pieces = [slice(i, i + 1) for i in known] or [slice(i, i + size) for i in range(0, episode.n_tasks, size)]
    traces = []
    try:
        for piece in pieces:
            with trace_steps() as steps:
                meta_step.replay(episode[piece])
            traces.append(steps)
        worst = [torch.cat(columns).amax(0).tolist() for columns in zip(*traces, strict=True)]
    except Exception:  # whatever a second run meets, the failure to report is that of the first
        return ""
    return _describe(worst)


def _describe(steps: Sequence[Sequence[float]]) -> str:
    """A sentence about pairs of inner loss and largest weight, one for each step."""
    if not steps:
        return ""
    losses, sizes = zip(*steps, strict=True)
    text = (
        f"Its inner loss before each step was {_listed(losses)}; the largest adapted weight after it {_listed(sizes)}."
    )
    if all(math.isfinite(value) and abs(value) <= _FAR for value in (*losses, *sizes)):
        return text
    return (
        f"{text} The inner loop diverges: lower its step size (inner_lr), clip its gradients "
        "(optimizer=SGD(lr, clip_norm=...) in MAML) or normalize inside the net."
    )


def _listed(values: Sequence[float]) -> str:
    texts = [f"{value:.3g}" for value in values]
    return ", ".join(texts if len(texts) <= 2 * _SHOWN + 1 else [*texts[:_SHOWN], "...", *texts[-_SHOWN:]])


def _not_finite(losses: Tensor) -> list[int]:
    return (~losses.isfinite()).flatten().nonzero().flatten().tolist()
