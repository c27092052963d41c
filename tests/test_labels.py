"""A label of a support that is none of the task's classes is named, whichever learner is asked."""

import inspect

import pytest
import torch

from metaicl import learners
from metaicl.episode import Examples
from metaicl.learner import Learner, PredictsPrefixes, Prepares, Updates
from metaicl.native import without_kernels
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.tasks.recall import AssociativeRecall

SPEC = GaussianClasses(n_way=3, dim=4).spec


def classifiers() -> dict[str, Learner]:
    """All bundled learners of classification that can be made from a spec alone."""
    found: dict[str, Learner] = {}
    for name in learners.__all__:
        made = getattr(learners, name)
        if inspect.isclass(made) and issubclass(made, Learner):
            try:
                found[name] = made(SPEC)
            except (TypeError, ValueError):  # needs more than a spec, or serves something else
                continue
    return found


@pytest.mark.parametrize("wrong", [3, -1, -100])
def test_labels_that_are_no_class(wrong: int) -> None:
    torch.manual_seed(0)
    support = Examples(torch.randn(1, 4, 4), torch.tensor([[0, 1, 2, wrong]]))
    asked = classifiers()
    assert len(asked) > 25
    for learner in asked.values():
        with pytest.raises(ValueError, match=r"support.y must hold labels in \[0, n_way=3\)"):
            learner.eval()(support, support.x)
        with pytest.raises(ValueError, match=r"(support|examples)\.y must hold labels in \[0, n_way=3\)"):
            learner.adapt(support)


def test_labels_of_streams_that_are_no_class() -> None:
    """Rows that come later, and all rows of a stream; classes of a stream may come, where a learner has prototypes."""
    rows = torch.randn(1, 3, 4)
    known, wrong = Examples(rows, torch.tensor([[0, 1, 2]])), Examples(rows, torch.tensor([[1, 2, 3]]))
    for name, learner in classifiers().items():
        if isinstance(learner, PredictsPrefixes):
            with pytest.raises(ValueError, match=r"y must hold labels in \[0, n_way=3\)"):
                learner.predict_prefixes(wrong)
        if isinstance(learner, Updates) and not isinstance(learner, Prepares) and name != "ProtoNet":
            state = learner.adapt(known)
            with pytest.raises(ValueError, match=r"y must hold labels in \[0, n_way=3\)"):
                learner.update(state, wrong)


def test_references_of_tasks_name_labels_that_are_no_class() -> None:
    wrong = Examples(torch.randn(1, 3, 4), torch.tensor([[1, 2, 3]]))
    for tasks in (GaussianClasses(n_way=3, dim=4), AssociativeRecall(n_values=3, n_keys=9, key_dim=4)):
        for learner in tasks.references().values():
            with pytest.raises(ValueError, match=r"support.y must hold labels in \[0, n_way=3\)"):
                learner.adapt(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int32])
def test_labels_that_are_not_long(dtype: torch.dtype) -> None:
    support = Examples(torch.randn(1, 4, 4), torch.tensor([[0, 1, 2, 0]]).to(dtype))
    for learner in classifiers().values():
        with pytest.raises(TypeError, match=rf"y must be long class indices \(B, N\); got {dtype} \(1, 4\)"):
            learner.adapt(support)


GRADIENT = ["MAML", "MAMLPlusPlus", "MetaSGD", "IMAML", "CAVIA", "ProtoMAML", "Reptile", "AmortizedBayes"]


@pytest.mark.parametrize("name", GRADIENT)
def test_labels_are_looked_at_in_an_inner_loop_too_and_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, rows = getattr(learners, name)(SPEC), torch.randn(1, 4, 4)
    for wrong in (-100, -1, 7):
        with pytest.raises(ValueError, match=r"support.y must hold labels in \[0, n_way=3\)"):
            learner.adapt(Examples(rows, torch.tensor([[0, 1, 2, wrong]])))
    looks: list[str] = []
    monkeypatch.setattr("metaicl.learner.check_labels", lambda name, *_: looks.append(name))
    with without_kernels():
        learner(Examples(rows, torch.tensor([[0, 1, 2, 0]])), rows)
    assert looks == ["support.y"]


def test_masked_rows_may_hold_any_label() -> None:
    real = torch.tensor([[True, True, True, False]])
    support = Examples(torch.randn(1, 4, 4), torch.tensor([[0, 1, 2, 7]]), real)
    assert learners.MAML(SPEC)(support, support.x).probs.shape == (1, 4, 3)
    for learner in classifiers().values():
        if not isinstance(learner, Prepares):
            learner.adapt(support)
