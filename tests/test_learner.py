"""The base class: what a subclass is told when it uses a name of the contract for something else."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaicl.learner import Learner
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.reference.simple import Constant
from metaicl.spec import TaskSpec

SPEC = TaskSpec("classification", (2,), n_way=2)


def test_a_learner_without_its_state_is_no_unknown_type() -> None:
    (state,) = Learner.__parameters__  # strict checkers refuse whatever takes a Learner[Unknown]
    assert state.__default__ is Any


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("penalty", 0.1, "float"),
        ("update", nn.Linear(2, 2), "Linear"),
        ("at", torch.zeros(()), "Tensor"),
        ("merge", True, "bool"),
        ("predict", None, "NoneType"),
    ],
)
def test_names_of_the_contract_are_not_for_numbers_and_modules(name: str, value: object, kind: str) -> None:
    message = f"{name} is a method of the contract of learners; Own has a {kind} of that name"
    with pytest.raises(TypeError, match=message):
        type("Own", (Constant,), {name: value})
    own = type("Own", (Constant,), {})(SPEC)
    with pytest.raises(TypeError, match=message):
        setattr(own, name, value)


def test_methods_may_be_given_to_one_learner_and_other_names_are_free() -> None:
    learner = ProtoNet(SPEC)

    def penalty(state: object) -> Tensor:
        return torch.zeros(1)

    learner.penalty = penalty
    learner.penalty_weight = 0.1
    learner.updates = nn.Linear(2, 2)
    assert learner.penalty is penalty
    assert "updates.weight" in learner.state_dict()
