"""Alignment, block structure and interpolation against values known by hand."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from metaicl.analysis.alignment import align, normalized_product
from metaicl.analysis.alignment_plot import draw_alignments
from metaicl.analysis.answers import draw_episodes
from metaicl.analysis.weight_structure import block_structure, interpolate, loss_between
from metaicl.learners.reference.linear import Averaging, GradientDescent, LeastSquares
from metaicl.learners.reference.simple import Constant
from metaicl.task import EVAL_SEED
from metaicl.tasks.functions import LinearRegression
from metaicl.tasks.gaussians import GaussianClasses

TASKS = LinearRegression(dim=3, noise=0.0)


def test_a_learner_is_aligned_with_itself() -> None:
    found = align(
        GradientDescent(TASKS.spec, lr=0.4), GradientDescent(TASKS.spec, lr=0.4), TASKS, n_shot=6, n_episodes=50
    )
    assert found.answer_difference.mean == 0
    assert found.slope_difference.mean == 0
    assert found.cosine.mean == pytest.approx(1, abs=1e-12)
    assert found.loss_difference.mean == 0


def test_averaging_is_one_step_at_another_rate() -> None:
    """The weights are parallel: the cosine is 1, the difference that of the rates times |X'y / k|."""
    found = align(GradientDescent(TASKS.spec, lr=0.4), Averaging(TASKS.spec), TASKS, n_shot=6, n_episodes=50)
    episode = draw_episodes(TASKS, n_shot=6, n_query=1, start=0, stop=50, split="test", seed=EVAL_SEED)
    average = (episode.support.x.mT @ episode.support.y / 6)[..., 0]
    assert found.cosine.mean == pytest.approx(1, abs=1e-6)
    assert found.slope_difference.mean == pytest.approx(float(0.6 * average.norm(dim=-1).mean()), abs=1e-6)
    assert found.slope_norm.mean == pytest.approx(float(average.norm(dim=-1).mean()), abs=1e-6)
    answers = (episode.query.x[:, 0] * average).sum(-1)
    assert found.answer_difference.mean == pytest.approx(float(0.6 * answers.abs().mean()), abs=1e-6)
    loss = 0.5 * (answers - episode.query.y[:, 0, 0]).square().mean()
    assert found.losses[1].mean == pytest.approx(float(loss), abs=1e-6)


def test_several_seeds_and_intervals() -> None:
    rates = [GradientDescent(TASKS.spec, lr=rate) for rate in (0.3, 0.4, 0.5)]
    found = align(rates, LeastSquares(TASKS.spec), TASKS, n_shot=6, n_query=3, n_episodes=50)
    for one in (found.answer_difference, found.cosine, found.slope_difference, found.loss_difference):
        assert one.low < one.mean < one.high
        assert one.n_seeds == 3
    assert found.loss_difference.low > 0


def test_intervals_of_a_cosine_end_at_one() -> None:
    """Of two learners one is the other; two seeds that differ say little about others."""
    pair = [LeastSquares(TASKS.spec), GradientDescent(TASKS.spec, lr=0.4)]
    found = align(pair, LeastSquares(TASKS.spec), TASKS, n_shot=6, n_episodes=20)
    assert found.cosine.high == 1
    assert found.cosine.low is not None
    assert found.cosine.low >= -1


def test_panels_show_each_place_once_and_in_order(tmp_path: Path) -> None:
    step = GradientDescent(TASKS.spec, lr=0.4)
    found = {
        rate: align(GradientDescent(TASKS.spec, lr=rate), step, TASKS, n_shot=6, n_episodes=20) for rate in (0.4, 0.2)
    }
    figure = draw_alignments(found, tmp_path / "panels.png", xlabel="rate")
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    assert list(lines["trained"].get_xdata()) == [0.2, 0.4]
    assert lines["of answers"].get_ydata()[1] == 0
    # slopes differ by |.2 - .4| / .4 of the reference's
    assert lines["of slopes / size"].get_ydata()[0] == pytest.approx(0.5, abs=1e-6)
    assert (tmp_path / "panels.png").stat().st_size > 0
    with pytest.raises(ValueError, match="two places"):
        draw_alignments({0: found[0.4]})


def test_no_difference_is_drawn_in_proportion_to_slopes_of_zero() -> None:
    flat = align(GradientDescent(TASKS.spec, lr=0.4), Constant(TASKS.spec), TASKS, n_shot=6, n_episodes=20)
    assert flat.slope_norm.mean == 0
    figure = draw_alignments({0: flat, 1: flat})
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    assert all(math.isnan(value) for value in lines["of slopes / size"].get_ydata())
    assert lines["of answers"].get_ydata()[0] == flat.answer_difference.mean


def test_alignment_refuses_what_it_is_not_for() -> None:
    classes = GaussianClasses()
    with pytest.raises(ValueError, match="regression"):
        align(Constant(classes.spec), Constant(classes.spec), classes, n_shot=1)
    with pytest.raises(TypeError, match="must be a Learner; got list"):
        align(Averaging(TASKS.spec), [Averaging(TASKS.spec)] * 2, TASKS, n_shot=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="built for"):
        align(Averaging(TASKS.spec), Averaging(LinearRegression(dim=2).spec), TASKS, n_shot=1)


def test_block_structure_of_a_construction() -> None:
    """Tokens (x, y) with D = 2: a scaled identity on x, one entry for y, and a known amount of dirt."""
    matrix = torch.zeros(3, 3, dtype=torch.float64)
    matrix[:2, :2] = 2 * torch.eye(2)
    clean = block_structure(matrix, (2, 1), [(0, 0)])
    assert (clean.off_block, clean.off_diagonal) == (0.0, 0.0)
    assert clean.scales == {(0, 0): 2.0}
    matrix[0, 1], matrix[2, 2] = 0.2, 1.0
    dirty = block_structure(matrix, (2, 1), [(0, 0)])
    assert dirty.off_block == pytest.approx(1 / (8 + 0.04 + 1))
    assert dirty.off_diagonal == pytest.approx((0.04 / 2) ** 0.5 / 2)
    assert block_structure(matrix, (2, 1), [(0, 0), (1, 1)]).off_block == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="add up"):
        block_structure(matrix, (2, 2), [(0, 0)])
    with pytest.raises(ValueError, match="square blocks"):
        block_structure(matrix, (2, 1), [(0, 1)])


def test_products_lose_their_scale() -> None:
    first, second = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    one = normalized_product(first, second)
    assert torch.allclose(one, normalized_product(-5 * first, 3 * second))
    assert float(one.diagonal().mean()) == pytest.approx(1)
    with pytest.raises(ValueError, match="square"):
        normalized_product(first)
    with pytest.raises(ValueError, match="mean 0"):
        normalized_product(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_the_loss_on_a_line() -> None:
    first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        first.weight.fill_(1.0)
        second.weight.fill_(3.0)

    def loss(one: nn.Linear) -> float:
        return float(one.weight.detach() ** 2)

    assert loss_between(first, second.state_dict(), loss, shares=(0, 0.5, 1)) == {0.0: 1.0, 0.5: 4.0, 1.0: 9.0}
    assert float(first.weight.detach()) == 1.0
    assert float(interpolate(first.state_dict(), second.state_dict(), 0.25)["weight"].detach()) == 1.5
    with pytest.raises(ValueError, match="same names"):
        interpolate({"a": torch.ones(1)}, {"b": torch.ones(1)}, 0.5)
    with pytest.raises(ValueError, match="one shape"):
        interpolate({"a": torch.ones(1)}, {"a": torch.ones(2)}, 0.5)
    with pytest.raises(ValueError, match="integers"):
        interpolate({"a": torch.ones(1).long()}, {"a": torch.zeros(1).long()}, 0.5)
