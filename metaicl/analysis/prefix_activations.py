"""Activations with one place for each row of a stream, which know what came before that row and not its target."""

from collections.abc import Sequence

import torch
from torch import Tensor

from metaicl.analysis.activations import collect_activations
from metaicl.episode import Episode, Examples
from metaicl.learner import Learner
from metaicl.learners.incontext.sequence import SequenceLearner
from metaicl.spec import TaskSpec

_SHIFT = 10.0  # spreads by which targets are moved: far, so that what reads them stands out from rounding
_ROUNDING = 1e-4  # of the largest activation; float32 keeps seven digits, of which sums and solvers lose some


def prefix_activations(
    learner: Learner,
    episode: Episode,
    names: Sequence[str],
    *,
    positions: slice | None = None,
    sees_target: bool = False,
    call: int = -1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Activations (B, T, H) of modules at the T rows of the stream support then query, on the CPU.

    Position t may depend on rows 0 .. t - 1 and x_t. This is checked on as many tasks as there are rows: from another
    row on in each task, all targets are changed, and no activation up to there may change.

    Args:
        learner: Any learner; see `collect_activations`.
        episode: B tasks.
        names: Modules, see `recording`.
        positions: Places of an output (B, places, H) that are the rows. None takes all, and of a `SequenceLearner`,
            which reads two tokens for each row, those of the inputs, where an output has a place for every token.
        sees_target: Position t may depend on y_t too, as the token of y_t does; only later rows may not show.
        call: As in `collect_activations`.
        seed: Of the learner's own randomness.

    Raises:
        ValueError: If a name matches nothing, an output has no place for each row, or a position knows too much.
    """
    n_rows = episode.support.n_rows + episode.query.n_rows
    some = episode[: min(n_rows, episode.n_tasks)]
    cuts = torch.arange(some.n_tasks) * n_rows // some.n_tasks
    changed = _with_other_targets(some, cuts, learner.spec)
    kept, moved = (_at_rows(learner, one, names, positions, call, seed) for one in (some, changed))
    place = torch.arange(n_rows)
    before = place < cuts[:, None] if sees_target else place <= cuts[:, None]
    for name, rows in kept.items():
        gap = torch.where(before, (moved[name] - rows).abs().amax(-1), 0.0)
        if float(gap.max()) > _ROUNDING * float(rows.abs().max()):
            task = int(gap.amax(1).argmax())
            who = f"{name!r} of {type(learner).__name__}"
            raise ValueError(
                f"{who} knows too much at position {int(gap[task].argmax())}: it changes "
                f"with the targets from row {int(cuts[task])} on, so a probe would read what is to be predicted. Name "
                "another module, or choose the call or the positions that are about the queries"
            )
    return _at_rows(learner, episode, names, positions, call, seed)


def _at_rows(
    learner: Learner, episode: Episode, names: Sequence[str], positions: slice | None, call: int, seed: int
) -> dict[str, Tensor]:
    n_rows = episode.support.n_rows + episode.query.n_rows
    found = collect_activations(learner, episode, names, call=call, seed=seed)
    return {
        name: _rows_of(name, value, n_rows, _places(learner, value, n_rows, positions)) for name, value in found.items()
    }


def _places(learner: Learner, value: Tensor, n_rows: int, positions: slice | None) -> slice:
    if positions is not None:
        return positions
    # The last block of a stack computes nothing but the inputs' places.
    both = isinstance(learner, SequenceLearner) and value.ndim == 3 and value.shape[1] == 2 * n_rows
    return SequenceLearner.input_places if both else slice(None)


def _rows_of(name: str, value: Tensor, n_rows: int, places: slice) -> Tensor:
    rows = value[:, places]
    if rows.ndim != 3 or rows.shape[1] != n_rows:
        raise ValueError(
            f"the output of {name!r} must have shape (B, {n_rows}, H), with a place for each row of the stream, or "
            f"positions must choose {n_rows} of its places; got {tuple(value.shape)}"
        )
    return rows


def _with_other_targets(episode: Episode, cuts: Tensor, spec: TaskSpec) -> Episode:
    """The same tasks with other targets from row cuts[b] of task b on."""
    n_support = episode.support.n_rows
    y = torch.cat([episode.support.y, episode.query.y], 1)
    later = torch.arange(y.shape[1]) >= cuts[:, None]
    if spec.kind == "classification":
        y = torch.where(later, (y + 1) % spec.output_size, y)
    else:
        spread = float(y.std()) or 1.0
        y = torch.where(later[..., None], y + _SHIFT * spread, y)
    parts = ((episode.support, y[:, :n_support]), (episode.query, y[:, n_support:]))
    support, query = (Examples(part.x, values, part.mask, part.ids) for part, values in parts)
    return Episode(support, query, episode.latents)
