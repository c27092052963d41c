import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from metaicl.comparison import compare
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.reference.simple import Constant, NearestNeighbors
from metaicl.plots import (
    COLORS,
    GRAY,
    learner_styles,
    name_text,
    plot_calibration,
    plot_cost,
    plot_differences,
    plot_examples,
    plot_shots,
    plot_training,
    task_figures,
)
from metaicl.tasks.functions import Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.train_config import TrainConfig

TASKS = {"plane": GaussianClasses(dim=2, n_way=3), "waves": Sinusoid()}


@pytest.fixture(scope="module")
def report():
    learners = {"ProtoNet": ProtoNet, "constant": Constant, "neighbors": NearestNeighbors}
    train = TrainConfig(steps=4, meta_batch_size=2, n_shot=2, n_query=3, validate_every=None, log_every=1)
    return compare(learners, TASKS, train=train, n_episodes=30, seeds=2, shots=(1, 2, 4), progress=False)


@pytest.fixture(scope="module")
def bare():
    return compare(
        {"constant": Constant}, GaussianClasses(), n_shot=1, n_query=2, n_episodes=1, references=False, progress=False
    )


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].lines}


def test_shots_are_the_means_of_the_report(report):
    found = lines(plot_shots(report, "plane"))["neighbors"]
    assert found.get_xdata().tolist() == [1, 2, 4]
    expected = [report.values("plane", "neighbors", shots=k).mean() for k in (1, 2, 4)]
    np.testing.assert_allclose(found.get_ydata(), expected)


def test_differences_are_those_of_the_report(report):
    figure = plot_differences(report, "plane")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    baseline = report.baseline("plane")
    assert names == [first for first, _ in report.differences("plane", baseline=baseline)][::-1]
    dots = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"]
    expected = [report.differences("plane", baseline=baseline)[name, baseline].mean for name in names]
    np.testing.assert_allclose(dots, expected)
    assert "right is better" in figure.axes[0].get_xlabel()
    assert "left is better" in plot_differences(report, "waves").axes[0].get_xlabel()


def test_training_has_one_line_per_seed(report):
    assert len(plot_training(report, "plane").axes[0].lines) == 2
    assert plot_training(report, "waves") is None


def test_cost_is_in_milliseconds(report):
    row = report.rows("plane")[0]
    figure = plot_cost(report, "plane")
    x = figure.axes[0].containers[0].lines[0].get_xdata()[0]
    assert x == pytest.approx(1e3 * (row.adapt_seconds + row.predict_seconds))


def test_calibration_has_the_diagonal_and_the_learners(report):
    assert {"constant", "neighbors"} <= set(lines(plot_calibration(report, "waves")))


def test_examples_show_points_and_predictions(report):
    curve = plot_examples(report, "waves")
    assert len(curve.axes) == 3
    assert {"constant", "neighbors", "Bayes"} <= set(lines(curve))
    plane = plot_examples(report, "plane")
    assert [len(part.get_offsets()) for part in plane.axes[0].collections] == [9, 6]


def test_a_learner_has_one_color_everywhere_and_references_are_gray(report):
    styles = learner_styles(report)
    assert [style["color"] for style in styles.values()] == [*COLORS[:3], GRAY]
    for figure in (plot_shots(report, "plane"), plot_calibration(report, "waves"), plot_examples(report, "waves")):
        assert lines(figure)["neighbors"].get_color() == styles["neighbors"]["color"]


def test_nothing_to_draw_gives_nothing(bare):
    task = "GaussianClasses"
    assert plot_shots(bare, task) is None
    assert plot_differences(bare, task) is None
    assert plot_training(bare, task) is None
    assert plot_examples(bare, task) is None
    assert plot_calibration(bare, task) is None  # ten rows are too few for any bin
    assert len(list(task_figures(bare, task))) == 1  # cost, of one episode


def test_all_figures_have_labels(report):
    for task in report.tasks:
        for caption, figure in task_figures(report, task):
            assert isinstance(figure, Figure)
            assert caption.endswith(".")
            assert figure.axes[0].get_xlabel()
            assert figure.axes[0].get_title(loc="left")


def test_long_and_odd_names_and_many_learners_leave_room_for_the_axes():
    names = [f"prototypes with a temperature of one over {i} and a long name" for i in range(11)]
    names += ["$\\frac{1}$ & $", "_hidden", "学习"]
    found = compare(
        dict.fromkeys(names, NearestNeighbors),
        Sinusoid(),
        n_shot=2,
        n_query=2,
        shots=(1,),
        n_episodes=4,
        progress=False,
    )
    for drawn in (plot_shots, plot_differences, plot_cost, plot_examples):
        figure = drawn(found, "Sinusoid")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            figure.canvas.draw()
        boxes = [axes.get_window_extent() for axes in figure.axes]
        assert sum(box.width for box in boxes) > 0.5 * figure.bbox.width
        assert boxes[0].height > 90  # dots, of 100 to the inch
        legends = figure.legends
        assert all(len(legend.get_texts()) == len(names) + 1 for legend in legends)  # and Bayes
        assert len(legends) == (drawn is not plot_differences)


def test_names_become_labels():
    assert name_text("ProtoNet") == "ProtoNet"
    assert name_text("a name of two lines and no more") == "a name of two lines and no\nmore"
    assert name_text("b" * 30 + "c" * 40 + "d" * 30) == "b" * 26 + "\n…" + "d" * 25
    assert name_text("_x $y$") == r" _x \$y\$"


def test_more_learners_than_colors_get_broken_lines():
    learners = {f"l{i}": Constant for i in range(9)}
    found = compare(learners, GaussianClasses(), n_shot=1, n_query=1, n_episodes=2, references=False, progress=False)
    styles = learner_styles(found)
    assert styles["l8"] == {"color": COLORS[0], "linestyle": "--"}
