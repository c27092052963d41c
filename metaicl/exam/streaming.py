"""Checks of the optional methods for streams."""

import torch
from torch import Tensor

from metaicl.collation import concatenate
from metaicl.episode import Examples
from metaicl.exam.answers import with_garbage
from metaicl.exam.case import Case, answer, numbers, require_answer, require_same
from metaicl.learner import Merges, PredictsPrefixes, Updates

_MASKED = "a masked row is an absent row: read examples.real wherever rows are summed, counted or attended to"


def check_update(case: Case) -> None:
    """Learning in pieces equals learning all at once, where `update` is offered."""
    learner = case.learner
    if not isinstance(learner, Updates):
        return
    support, extra, x = case.episode.support, case.extra, case.episode.query.x
    expected = answer(learner, concatenate(support, extra), x)
    hint = "update(state, examples) is the state after the old rows and the new ones, in this order"
    state = learner.adapt(support)
    require_same("update with all new rows", expected, _ask(case, learner.update(state, extra)), hint)
    require_same(
        "the state before update", answer(learner, support, x), _ask(case, state), "update returns a new state"
    )
    half = learner.update(state, extra.rows(slice(1)))
    half = learner.update(half, extra.rows(slice(1, None)))
    require_same("update in two pieces", expected, _ask(case, half), hint)
    got = _ask(case, learner.update(state, with_garbage(case, extra)))
    require_same("update with masked rows of garbage between the new ones", expected, got, _MASKED)


def check_merge(case: Case) -> None:
    """Joining what was learned from disjoint rows equals learning from all of them, where `merge` is offered."""
    learner = case.learner
    if not isinstance(learner, Merges):
        return
    rows, x = concatenate(case.episode.support, case.extra), case.episode.query.x
    expected = answer(learner, rows, x)
    parts = [rows.rows(slice(1)), rows.rows(slice(1, 3)), rows.rows(slice(3, None))]
    states = [learner.adapt(part) for part in parts]
    hint = "merge(states) is the state after the rows of all states, however many each has seen"
    require_same("merge of three states", expected, _ask(case, learner.merge(states)), hint)
    pair = learner.merge([learner.merge(states[:2]), states[2]])
    require_same("merge of a merged state and another", expected, _ask(case, pair), hint)
    if not learner.traits.order_sensitive:
        require_same("merge in another order", expected, _ask(case, learner.merge(states[::-1])), hint)
    for i, (part, state) in enumerate(zip(parts, states, strict=True)):
        hint = "merge returns a new state"
        require_same(f"state {i} after merge", answer(learner, part, x), _ask(case, state), hint)


def check_predict_prefixes(case: Case) -> None:
    """Every prefix gives the answer of adapting to it, where `predict_prefixes` is offered."""
    learner = case.learner
    if not isinstance(learner, PredictsPrefixes):
        return
    rows = concatenate(case.episode.support, case.extra)
    answers = learner.predict_prefixes(rows)
    require_answer(answers, learner.spec, rows.x, "predict_prefixes")
    found = numbers(answers, learner, rows.x)
    hint = "row t sees rows 0 .. t-1 and x_t; it never sees y_t. No row at all is the same as one masked row"
    first = rows.rows(slice(1))
    nothing = Examples(first.x, first.y, torch.zeros_like(first.real), first.ids)
    prefixes = [nothing, *(rows.rows(slice(t)) for t in range(1, rows.n_rows))]
    for t, prefix in enumerate(prefixes):
        expected = answer(learner, prefix, rows.x[:, t : t + 1])
        require_same(f"predict_prefixes at row {t}", expected, found[:, t : t + 1], hint)
    mixed = with_garbage(case, rows)
    got = numbers(learner.predict_prefixes(mixed), learner, mixed.x)[mixed.real]
    require_same("predict_prefixes with masked rows of garbage between the real ones", found[rows.real], got, _MASKED)


def _ask(case: Case, state: object) -> Tensor:
    x = case.episode.query.x
    return numbers(case.learner.predict(state, x), case.learner, x)
