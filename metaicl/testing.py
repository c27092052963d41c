"""The public exam: does a learner, or a task distribution, keep its contract?

`check_learner(MyLearner, tasks)` and `check_tasks(tasks)` belong into the tests of your own subclasses.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from metaicl.checks import check_choice, check_count
from metaicl.exam import answers, conduct, learning, streaming
from metaicl.exam import tasks as family
from metaicl.exam.case import Case, build_case
from metaicl.exam.results import CheckError, Exam, LearnerCheckError, TaskCheckError
from metaicl.learner import Learner
from metaicl.task import TaskDistribution, check_distribution

__all__ = [
    "LEARNER_CHECKS",
    "TASK_CHECKS",
    "CheckError",
    "LearnerCheckError",
    "TaskCheckError",
    "check_learner",
    "check_tasks",
    "parametrize_with_checks",
]

Factory = Callable[..., Learner]
Reasons = Mapping[str, str]


def _named(*checks: Callable[[Any], None]) -> dict[str, Callable[[Any], None]]:
    return {check.__name__.removeprefix("check_"): check for check in checks}


_LEARNER_EXAM = Exam(
    error=LearnerCheckError,
    checks=_named(
        answers.check_answer_shape,
        answers.check_answer_finite,
        answers.check_sizes,
        answers.check_same_answer_twice,
        answers.check_state_returned,
        answers.check_support_used,
        answers.check_query_independence,
        answers.check_episode_independence,
        answers.check_batch_equals_loop,
        answers.check_support_order,
        answers.check_masked_rows,
        answers.check_full_mask,
        answers.check_label_permutation,
        conduct.check_module_untouched,
        conduct.check_episode_untouched,
        conduct.check_train_mode,
        conduct.check_global_rng,
        conduct.check_history,
        conduct.check_no_grad,
        conduct.check_state_dict,
        conduct.check_float64,
        conduct.check_prepare_split,
        streaming.check_update,
        streaming.check_merge,
        streaming.check_predict_prefixes,
        learning.check_meta_gradient,
        learning.check_gradient_slope,
        learning.check_batch_gradient,
        learning.check_learns,
    ),
    optional=("label_permutation",),
    gate="answer_shape",
)

_TASK_EXAM = Exam(
    error=TaskCheckError,
    checks=_named(
        family.check_spec,
        family.check_counts,
        family.check_deterministic,
        family.check_addressed,
        family.check_rows_disjoint,
        family.check_splits_disjoint,
        family.check_global_rng,
        family.check_bad_counts,
        family.check_row_order,
        family.check_references,
    ),
    gate="spec",
)

LEARNER_CHECKS: Reasons = {name: (check.__doc__ or "").strip() for name, check in _LEARNER_EXAM.checks.items()}
"""What each check of a learner asks for, by name."""

TASK_CHECKS: Reasons = {name: (check.__doc__ or "").strip() for name, check in _TASK_EXAM.checks.items()}
"""What each check of a task distribution asks for, by name."""


def check_learner(
    learner: Learner | Factory,
    tasks: TaskDistribution,
    *,
    checks: Iterable[str] | None = None,
    expected_failures: Reasons | None = None,
) -> None:
    """Examine whether a learner keeps the contract of `Learner`; a few seconds for a small one.

    The exam works on copies, in float64 where the learner can (tolerances in `metaicl.exam.case.TOLERANCES`), and
    leaves learner, tasks and global random generators alone. A learner with `prepare` is prepared on `tasks` first.
    Checks of what a learner does not offer or declares not to keep (its traits) pass.

    Args:
        learner: A learner built for `tasks.spec`, or a function spec -> Learner such as its class.
        tasks: Where episodes come from; small ones make a fast exam.
        checks: Names of the checks to run, from `LEARNER_CHECKS`. None runs all but "label_permutation": renaming
            the classes renames the answers of metric learners, while learners that embed labels or start from
            one weight per class need not keep it.
        expected_failures: Reasons, by the name of the check that is known to fail. Strict: an expected failure that
            passes is an error.

    Raises:
        LearnerCheckError: With every failure: property, numbers and a hint.
        TypeError: If `learner` is neither a learner nor builds one, or has complex parameters.
        ValueError: If the learner has another spec, or the name of a check is unknown.
    """
    expected = expected_failures or {}
    names = _LEARNER_EXAM.select(checks, expected)
    case = build_case(learner, tasks)
    _LEARNER_EXAM.sit(type(case.learner).__name__, case, names, expected)


def check_tasks(
    tasks: TaskDistribution,
    *,
    checks: Iterable[str] | None = None,
    expected_failures: Reasons | None = None,
    n_shot: int = 2,
    n_query: int = 3,
) -> None:
    """Examine whether a task distribution keeps the contract of `TaskDistribution`.

    Args:
        tasks: The distribution.
        checks: Names of the checks to run, from `TASK_CHECKS`; None runs all.
        expected_failures: Reasons, by the name of the check that is known to fail; strict.
        n_shot: Support rows to ask for, per class or per task.
        n_query: Query rows to ask for, likewise.

    Raises:
        TaskCheckError: With every failure.
        TypeError: If `tasks` is no TaskDistribution.
        ValueError: If the name of a check is unknown or a count is out of range.
    """
    if not isinstance(tasks, TaskDistribution):  # what its spec is, the exam says
        check_distribution(tasks)
    case = family.TaskCase(tasks, check_count("n_shot", n_shot), check_count("n_query", n_query))
    expected = expected_failures or {}
    names = _TASK_EXAM.select(checks, expected)
    _TASK_EXAM.sit(type(tasks).__name__, case, names, expected)


def parametrize_with_checks(
    learners: Mapping[str, Learner | Factory],
    tasks: Mapping[str, TaskDistribution],
    *,
    expected_failures: Mapping[str, Reasons] | None = None,
) -> Any:
    """A pytest decorator: one test for each learner, family and check.

        @parametrize_with_checks({"MAML": MAML, "mine": MyLearner}, {"sine": Sinusoid()})
        def test_contract(check):
            check()

    Args:
        learners: Learners or functions spec -> Learner, by the name to show. Families of a kind that a learner does
            not serve (`Traits.kinds`) are left out for it.
        tasks: Families, by the name to show.
        expected_failures: Reasons by check, by the learner's name, or by "learner-family" for one family only. Strict.

    Returns:
        A `pytest.mark.parametrize` of the argument `check`.

    Raises:
        ValueError: If a learner serves none of the families, or a name is unknown.
    """
    import pytest

    pairs = {f"{a}-{b}": (learners[a], tasks[b], a) for a in learners for b in tasks if _serves(learners[a], tasks[b])}
    idle = [name for name in learners if name not in {owner for _, _, owner in pairs.values()}]
    if idle:
        raise ValueError(f"every learner needs a family of its kind; {idle} have none among {list(tasks)}")
    expected = expected_failures or {}
    for name, reasons in expected.items():
        check_choice("expected_failures", name, [*learners, *pairs])
        _LEARNER_EXAM.select(None, reasons)
    parameters = []
    for pair, (learner, family_of, owner) in pairs.items():
        reasons = {**expected.get(owner, {}), **expected.get(pair, {})}
        case = functools.cache(functools.partial(build_case, learner, family_of))
        for name in _LEARNER_EXAM.select(None, {}):
            known = name in reasons
            mark = [pytest.mark.xfail(strict=True, reason=reasons[name], raises=LearnerCheckError)] if known else []
            parameters.append(pytest.param(functools.partial(_sit_one, case, name), id=f"{pair}-{name}", marks=mark))
    return pytest.mark.parametrize("check", parameters)


def _sit_one(build: Callable[[], Case], name: str) -> None:
    case = build()
    _LEARNER_EXAM.sit(type(case.learner).__name__, case, [name], {})


def _serves(learner: Learner | Factory, tasks: TaskDistribution) -> bool:
    if isinstance(learner, Learner):
        return learner.spec == tasks.spec
    maker = learner.func if isinstance(learner, functools.partial) else learner
    traits = getattr(maker, "traits", None)
    return traits is None or tasks.spec.kind in traits.kinds
