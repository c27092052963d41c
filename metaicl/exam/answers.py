"""Checks of what an answer may depend on: not on queries, tasks, row order or masked rows that are not its own."""

import torch
from torch import Tensor

from metaicl.collation import collate
from metaicl.episode import Examples
from metaicl.exam.case import Case, answer, difference, fixed_generator, numbers, require_answer, require_same
from metaicl.prefixes import first_shots

_GARBAGE = 1e6


def check_answer_shape(case: Case) -> None:
    """`predict` returns a distribution with batch shape (B, Q) over what the spec says, of targets one with a mean."""
    learner, support, query = case.learner, case.episode.support, case.episode.query
    found = learner.predict(learner.adapt(support), query.x)
    spec = learner.spec
    require_answer(found, spec, query.x)
    if spec.kind == "classification":
        total = numbers(found, learner, query.x).exp().sum(-1)
        if bool(((total - 1).abs() > 1e-3).any()):
            low, high = float(total.min()), float(total.max())
            raise AssertionError(
                f"probabilities of the n_way = {spec.n_way} classes must sum to 1; the sums lie in "
                f"[{low:.4g}, {high:.4g}]. Hint: give as many logits as the spec has classes"
            )
        return
    try:
        found.mean  # noqa: B018  # a property
    except NotImplementedError:
        raise AssertionError(
            f"a regression answer needs a mean, of which evaluations take the squared error; {type(found).__name__} "
            "has none. Hint: give its class a property `mean`, by quadrature where there is no formula"
        ) from None


def check_answer_finite(case: Case) -> None:
    """Log-probabilities of the query's own labels are finite."""
    learner, support, query = case.learner, case.episode.support, case.episode.query
    log_prob = learner.predict(learner.adapt(support), query.x).log_prob(query.y)
    bad = int((~torch.isfinite(log_prob)).sum())
    if bad:
        raise AssertionError(
            f"log_prob of the query's labels must be finite; {bad} of {log_prob.numel()} are NaN or Inf. "
            "Hint: no logarithm of zero, no scale of zero; see metaicl.functional.positive"
        )


def check_sizes(case: Case) -> None:
    """One shot, one query, one task and many queries work."""
    learner, x = case.learner, case.short.query.x
    wide = torch.cat([x, case.episode.query.x, case.extra.x], 1)
    for what, support, inputs in (
        ("1 shot", first_shots(case.short.support, 1, learner.spec), x),  # in regression it has two
        ("1 query", case.short.support, x[:, :1]),
        ("few shots and many queries", case.short.support, wide),
        ("B = 1", case.short.support[0], x[:1]),
    ):
        found = answer(learner, support, inputs)  # raises where the shape is wrong
        if bool(found.isnan().any()):
            raise AssertionError(
                f"with {what} ({support.n_rows} support rows) the answer holds NaN. "
                "Hint: what divides by N - 1, or by a spread, needs a guard"
            )


def check_same_answer_twice(case: Case) -> None:
    """Adapting again, and asking one state again, give the same answer in eval mode."""
    learner, support, x = case.learner, case.episode.support, case.episode.query.x
    state = learner.adapt(support)
    first = numbers(learner.predict(state, x), learner, x)
    hint = "in eval mode an answer is a function of support and x: no sampling, no counters, no dropout"
    require_same("asking one state twice", first, numbers(learner.predict(state, x), learner, x), hint)
    require_same("adapting twice", first, answer(learner, support, x), hint)


def check_state_returned(case: Case) -> None:
    """`predict` reads the state it is given, whatever was adapted in between."""
    learner, support, x = case.learner, case.episode.support, case.episode.query.x
    state = learner.adapt(support)
    first = numbers(learner.predict(state, x), learner, x)
    learner.adapt(case.short.support)
    again = numbers(learner.predict(state, x), learner, x)
    require_same(
        "an older state after adapting to other tasks",
        first,
        again,
        "return the state from adapt, keep nothing on self",
    )


def check_support_used(case: Case) -> None:
    """Another task's support gives another answer, unless the learner declares that it reads none."""
    support, x = case.episode.support, case.episode.query.x
    other = support[torch.arange(len(support)).roll(1)]
    same = difference(case.answer(), answer(case.learner, other, x)) is None
    if not case.learner.traits.reads_support:
        if not same:
            raise AssertionError(
                "the learner declares Traits(reads_support=False), and the answers change when the tasks swap their "
                "supports. Hint: leave the declaration out"
            )
        return
    if same:
        raise AssertionError(
            "the answers stay the same when the tasks swap their supports. Hint: what adapt learns must reach predict"
        )


def check_query_independence(case: Case) -> None:
    """An answer does not depend on the other queries, unless the learner declares to be transductive."""
    if case.learner.traits.transductive:
        return
    learner, x = case.learner, case.episode.query.x
    state, source = learner.adapt(case.episode.support), fixed_generator()
    hint = "no statistics over the query axis (batch normalization has them), or declare Traits(transductive=True)"

    def ask(inputs: Tensor) -> Tensor:
        return numbers(learner.predict(state, inputs), learner, inputs)

    whole, n_query = ask(x), x.shape[1]
    alone = torch.cat([ask(x[:, q : q + 1]) for q in range(n_query)], 1)
    require_same("queries asked together and one by one", whole, alone, hint)
    order = torch.randperm(n_query, generator=source)
    require_same("queries in another order", whole[:, order], ask(x[:, order]), hint)
    junk = _junk_inputs(case, 2 * n_query, 10.0, source)
    require_same("queries followed by junk", whole, ask(torch.cat([x, junk], 1))[:, :n_query], hint)


def check_episode_independence(case: Case) -> None:
    """An answer does not depend on the other tasks of the meta-batch."""
    support, x = case.episode.support, case.episode.query.x
    first, others = case.episode[0], case.episode[torch.tensor([2, 2])]
    mixed = collate([first, others])
    hint = "nothing may mix the task axis B: no statistics over it, no reshape of (B, N) that is not undone"
    expected = answer(case.learner, support, x)[:1]
    require_same("task 0 beside other tasks", expected, answer(case.learner, mixed.support, mixed.query.x)[:1], hint)


def check_batch_equals_loop(case: Case) -> None:
    """A meta-batch gives what its tasks give one at a time."""
    singles = [answer(case.learner, one.support, one.query.x) for one in case.episode]
    hint = "treat axis B as independent tasks; watch for squeeze and for sizes taken from the wrong axis"
    require_same("a meta-batch and a loop over its tasks", case.answer(), torch.cat(singles), hint)


def check_support_order(case: Case) -> None:
    """Shuffling the support changes nothing, unless the learner declares to be order sensitive."""
    if case.learner.traits.order_sensitive:
        return
    support = case.episode.support
    order = torch.rand(support.x.shape[:2], generator=fixed_generator()).argsort(1).to(support.x.device)
    task = torch.arange(len(support), device=order.device)[:, None]
    ids = None if support.ids is None else support.ids[task, order]
    shuffled = Examples(support.x[task, order], support.y[task, order], support.real[task, order], ids)
    hint = "treat the support as a set (no positions, no first or last row), or declare Traits(order_sensitive=True)"
    require_same("a shuffled support", case.answer(), answer(case.learner, shuffled, case.episode.query.x), hint)


def check_masked_rows(case: Case) -> None:
    """Masked rows behave exactly as absent rows, whatever they hold."""
    x, hint = (
        case.episode.query.x,
        "weight rows by support.mask before anything is summed, counted, normalized or attended to",
    )
    got = answer(case.learner, with_garbage(case, case.episode.support), x)
    require_same("a support with masked rows of garbage between the real ones", case.answer(), got, hint)
    both = collate([case.short, case.episode])  # the short one is padded at the end
    expected = answer(case.learner, case.short.support, case.short.query.x)
    got = answer(case.learner, both.support, both.query.x)[: len(case.short)]
    require_same("a support padded to the length of another", expected, got, hint)


def check_full_mask(case: Case) -> None:
    """A mask of True everywhere is the same as no mask."""
    support = case.episode.support
    full = Examples(support.x, support.y, torch.ones_like(support.real), support.ids)
    bare = Examples(support.x, support.y, None, support.ids)
    x, hint = case.episode.query.x, "read support.real, which is all True where there is no mask"
    require_same("mask=None and a mask of True", answer(case.learner, bare, x), answer(case.learner, full, x), hint)


def check_label_permutation(case: Case) -> None:
    """Optional: renaming the classes renames the answers. Learners with embedded labels only approach this."""
    spec, support, x = case.learner.spec, case.episode.support, case.episode.query.x
    if spec.kind != "classification":
        return
    order = torch.arange(spec.output_size, device=x.device).roll(1)
    renamed = Examples(support.x, order[support.y], support.mask, support.ids)
    hint = "treat all classes alike; learners that embed labels cannot, so this check is optional"
    require_same("classes renamed", case.answer(), answer(case.learner, renamed, x)[..., order], hint)


def with_garbage(case: Case, rows: Examples) -> Examples:
    """The same real rows in the same order, with four masked rows before, between and after them."""
    source, n_rows = fixed_generator(), rows.n_rows
    n_all = n_rows + 4
    inner = torch.randperm(n_all - 2, generator=source)[:n_rows].sort().values
    slots = (1 + inner).to(rows.x.device)
    x = _junk_inputs(case, n_all, _GARBAGE, source)
    y = _junk_targets(case, n_all, source)
    mask = torch.zeros(len(rows), n_all, dtype=torch.bool, device=x.device)
    x[:, slots], y[:, slots], mask[:, slots] = rows.x, rows.y, rows.real
    if rows.ids is None:
        return Examples(x, y, mask)
    ids = torch.full_like(mask, -1, dtype=torch.long)
    ids[:, slots] = rows.ids
    return Examples(x, y, mask, ids)


def _junk_inputs(case: Case, n_rows: int, scale: float, source: torch.Generator) -> Tensor:
    x, spec = case.episode.query.x, case.learner.spec
    shape = (x.shape[0], n_rows, *spec.x_shape)
    if spec.vocabulary is not None:
        return torch.randint(0, spec.vocabulary, shape, generator=source).to(x.device)
    return (scale * torch.randn(shape, generator=source)).to(x)


def _junk_targets(case: Case, n_rows: int, source: torch.Generator) -> Tensor:
    y, spec = case.episode.support.y, case.learner.spec
    if spec.kind == "classification":
        return torch.randint(0, spec.output_size, (y.shape[0], n_rows), generator=source).to(y)
    return (_GARBAGE * torch.randn(y.shape[0], n_rows, spec.output_size, generator=source)).to(y)
