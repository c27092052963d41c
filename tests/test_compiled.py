import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from training_helpers import make_normalized, weights_of

from metaicl.compiled import find_problem


def result(loss: float = 1.0, small: float = 1e-6, large: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.full((3,), loss), {
        "small": torch.full((2,), small),
        "large": torch.full((2,), large),
        "empty": torch.zeros(0),
    }


def problem(graph: Callable[[], object], eager: Callable[[], object] = result) -> str | None:
    learner = make_normalized()
    before = weights_of(learner)
    found = find_problem(graph, eager, learner, names=["raw_scale"], tolerance=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(learner).items())
    return found


def test_equal_results_are_no_problem() -> None:
    assert problem(result) is None
    assert problem(lambda: result(loss=1.00005, large=0.99995)) is None
    assert problem(lambda: result(small=1.5e-6)) is None  # rounding, next to the large one


@pytest.mark.parametrize(
    "wrong",
    [{"loss": 1.001}, {"large": 1.001}, {"small": 1e-2}, {"loss": math.nan}, {"small": math.nan}, {"large": math.inf}],
)
def test_different_results_are_a_problem(wrong: dict[str, float]) -> None:
    assert "at the current weights the compiled step differs from the eager one by" in (
        problem(lambda: result(**wrong)) or ""
    )


@pytest.mark.parametrize(
    ("slope", "graph", "accepted"),
    [
        (2e3, {"large": 1.001}, True),  # the eager step moves by as much when its weights move by rounding
        (2e3, {"large": 1.1}, False),  # but not by a tenth
        (0.0, {"large": 1.001}, False),
        (2e3, {"loss": 1.001}, False),  # losses have no kinks
        (2e3, {"large": math.nan}, False),
        (2e6, {"large": 1.5}, False),  # noise alone: nothing can be told
    ],
)
def test_rounding_is_told_from_an_error(slope: float, graph: dict[str, float], accepted: bool) -> None:
    learner = make_normalized()
    with torch.no_grad():
        learner.raw_scale.fill_(1.0)

    def eager() -> tuple[Tensor, dict[str, Tensor]]:
        value = float(learner.raw_scale.detach().mean())
        return result(large=1.0 + slope * min(value - 1.0, value - 1.021, key=abs))  # nothing but rounding matters

    found = find_problem(lambda: result(**graph), eager, learner, names=["raw_scale"], tolerance=1e-4)
    assert (found is None) == accepted
    assert float(learner.raw_scale.detach().mean()) == 1.0


def test_results_that_are_not_finite_are_left_to_the_outer_loop() -> None:
    assert problem(result, lambda: result(loss=math.nan)) is None


def test_a_compiler_that_fails_is_quoted_in_one_line() -> None:
    def graph() -> None:
        raise RuntimeError("\nfirst\n\nsecond\nthird")

    assert problem(graph) == "torch.compile failed: RuntimeError: first second"


def test_a_learner_that_fails_is_not_blamed_on_the_compiler() -> None:
    def eager() -> None:
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        problem(result, eager)


def test_both_draw_the_same_numbers_and_the_state_comes_back() -> None:
    state = torch.random.get_rng_state()
    drawn = []

    def draw() -> tuple[Tensor, dict[str, Tensor]]:
        drawn.append(float(torch.rand(())))
        return result()

    learner = make_normalized()
    torch.random.set_rng_state(state)
    assert find_problem(draw, draw, learner, names=["raw_scale"], tolerance=0.0) is None
    assert len(set(drawn)) == 1
    assert torch.equal(torch.random.get_rng_state(), state)


def test_moved_weights_and_changed_buffers_are_seen() -> None:
    learner = make_normalized()
    seen = []

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(float(learner.raw_scale.detach()))
        return result()

    assert find_problem(step, step, learner, names=["raw_scale"], tolerance=0.0) is None
    assert seen == pytest.approx([0.0, 0.0, 1e-3, 1e-3])

    def change() -> tuple[Tensor, dict[str, Tensor]]:
        learner.encoder[1].running_mean.add_(1.0)
        return result()

    found = find_problem(change, change, learner, names=["raw_scale"], tolerance=0.0)
    assert found == "a step changes its buffers ['encoder.1.running_mean']"
    assert learner.encoder[1].running_mean.abs().sum() == 0
