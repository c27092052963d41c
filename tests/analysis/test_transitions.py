"""Following a training changes nothing about it, and a planted break is found."""

from pathlib import Path

import pytest
import torch

from metaicl.analysis.transitions import follow, largest_drop
from metaicl.checkpoint import load_learner_weights
from metaicl.learners.incontext.neural_process import ConditionalNeuralProcess
from metaicl.tasks.functions import LinearRegression
from metaicl.training import outer_loop

TASKS = LinearRegression(dim=2)


def start() -> tuple[ConditionalNeuralProcess, torch.optim.Optimizer]:
    torch.manual_seed(0)
    learner = ConditionalNeuralProcess(TASKS.spec)
    return learner, torch.optim.SGD(learner.parameters(), lr=1e-2)


def norm(one: ConditionalNeuralProcess) -> float:
    return float(sum(p.detach().square().sum() for p in one.parameters()))


def test_measuring_changes_no_update() -> None:
    learner, optimizer = start()
    modes = []

    def metric(one: ConditionalNeuralProcess) -> float:
        modes.append(one.training)
        return norm(one)

    found = follow(learner, TASKS, optimizer, metric=metric, at=(4, 0, 2), meta_batch_size=2)
    other, optimizer = start()
    expected = {0: metric(other)}
    for step in outer_loop(other, TASKS, optimizer, steps=4, meta_batch_size=2):
        if step.index + 1 in (2, 4):
            expected[step.index + 1] = metric(other)
    assert found == expected
    assert list(found) == [0, 2, 4]
    assert modes[:3] == [False, False, False]
    assert learner.training
    with pytest.raises(ValueError, match="at least one"):
        follow(learner, TASKS, optimizer, metric=metric, at=())


def test_kept_weights_are_those_that_were_measured(tmp_path: Path) -> None:
    learner, optimizer = start()
    found = follow(learner, TASKS, optimizer, metric=norm, at=(0, 1, 3), keep=tmp_path / "kept", meta_batch_size=2)
    assert len(set(found.values())) == 3
    for step, value in found.items():
        again, _ = start()
        load_learner_weights(again, tmp_path / "kept" / f"step_{step}.pt")
        assert norm(again) == value


def test_a_planted_break_is_found_with_its_size() -> None:
    steps = [10, 20, 40, 80, 160, 320]
    curve = {step: 4.0 if step < 80 else 0.5 for step in steps}
    found = largest_drop(curve)
    assert found.step.mean == pytest.approx((40 * 80) ** 0.5)
    assert found.factor.mean == pytest.approx(8.0)
    assert found.share.mean == pytest.approx(1.0)
    assert found.step.low is None


def test_seeds_that_break_elsewhere_give_an_interval() -> None:
    steps = [10, 20, 40, 80, 160, 320]
    curves = [{step: 4.0 if step < at else 0.5 for step in steps} for at in (40, 80, 80)]
    found = largest_drop(curves)
    assert found.steps == pytest.approx([800**0.5, 3200**0.5, 3200**0.5])
    assert found.step.low is not None
    assert found.step.high is not None
    assert found.step.low < found.step.mean < found.step.high
    assert (found.factor.low, found.factor.high) == pytest.approx((8.0, 8.0))


def test_a_straight_line_is_told_from_a_step() -> None:
    """Two constants explain three quarters of a straight line (in the limit of many points), and all of a step."""
    line = {step + 1: 2.0 ** (-step) for step in range(200)}
    assert largest_drop(line).share.mean == pytest.approx(0.75, abs=1e-3)


def test_a_rise_is_no_drop() -> None:
    """The curve first jumps up by 16 and then falls by 4: the fall is named, though the rise explains more."""
    steps = [10, 20, 40, 80, 160, 320, 640]
    found = largest_drop(dict(zip(steps, (1.0, 1.0, 16.0, 16.0, 16.0, 4.0, 4.0), strict=True)))
    assert found.factor.mean > 1
    assert largest_drop({step: float(step) for step in steps}).factor.mean == 1.0
    assert largest_drop({step: float(step) for step in steps}).share.mean == 0.0


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="four or more"):
        largest_drop({1: 1.0, 2: 1.0, 3: 0.5})
    with pytest.raises(ValueError, match="same four"):
        largest_drop([{1: 1.0, 2: 1.0, 3: 0.5, 4: 1.0}, {1: 1.0, 2: 1.0, 3: 0.5, 5: 1.0}])
    with pytest.raises(ValueError, match="above zero"):
        largest_drop({1: 1.0, 2: 0.0, 3: 0.5, 4: 1.0})
    with pytest.raises(ValueError, match=r"whose steps rise; got \[1, 3, 2, 4\]"):
        largest_drop({1: 1.0, 3: 1.0, 2: 0.5, 4: 0.5})
