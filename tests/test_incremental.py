"""Class-incremental evaluation: what is asked when, of whom, and by how many clients."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.episode import Examples
from metaicl.functional import categorical, prototypes, squared_distances
from metaicl.incremental import IncrementalCurve, incremental_accuracy, plot_curves, rows_by_class
from metaicl.learner import Learner
from metaicl.learners.gradient.maml import MAML
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.metric.ridge_head import RidgeHead
from metaicl.spec import TaskSpec
from metaicl.tasks.arrays import tasks_from_arrays

SPEC = TaskSpec("classification", (3,), n_way=2)


def class_rows(n_classes: int = 12, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    centers = torch.randn(n_classes, 1, 3, generator=source)
    rows = centers + spread * torch.randn(n_classes, 9, 3, generator=source)
    return rows[:, :6], rows[:, 6:]


def nearest_mean() -> ProtoNet:
    return ProtoNet(SPEC, encoder=nn.Identity())


class Recorder(Learner[Any]):
    """Remembers what it was given, and always answers the last class."""

    def __init__(self) -> None:
        super().__init__(SPEC)
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.widths: list[int] = []

    def adapt(self, support: Examples) -> Any:
        assert not bool(support.real.any())
        return torch.zeros(1)

    def update(self, state: Any, examples: Examples) -> Any:
        assert not torch.is_grad_enabled()
        assert not self.training
        self.batches.append((examples.x, examples.y))
        return state + 1

    def merge(self, states: Any) -> Any:
        return sum(states)

    def predict(self, state: Any, x: Tensor) -> Distribution:
        return categorical(torch.arange(50.0).expand(1, x.shape[1], 50))


def test_the_accuracy_is_that_of_the_nearest_mean_of_all_classes_seen():
    train, test = class_rows(spread=0.4)
    curve = incremental_accuracy(nearest_mean(), train, test, checkpoints=(1, 4, 12), orders=[5])
    assert curve.accuracy[0, 0] == 1.0  # one class: nothing else to say
    y, asked = torch.arange(12).repeat_interleave(6), torch.arange(12).repeat_interleave(3)
    centers = prototypes(train.reshape(1, -1, 3), y[None], 12)
    expected = (squared_distances(test.reshape(1, -1, 3), centers).argmin(-1) == asked).double().mean()
    assert curve.accuracy[0, 2] == pytest.approx(float(expected), abs=1e-12)  # whatever the order
    assert 0.3 < expected < 0.95


def test_clients_and_rounds_change_nothing_and_orders_do():
    train, test = class_rows()
    options: dict[str, Any] = {"checkpoints": (2, 5, 8), "orders": (0, 1, 2)}
    alone = incremental_accuracy(nearest_mean(), train, test, **options)
    for more in ({"n_clients": 5}, {"n_clients": 5, "n_holders": 1}, {"n_clients": 3, "classes_per_round": 4}):
        found = incremental_accuracy(nearest_mean(), train, test, **more, **options)
        assert np.array_equal(found.accuracy, alone.accuracy)
    assert len({tuple(row) for row in alone.accuracy}) > 1
    again = incremental_accuracy(nearest_mean(), train, test, **options)
    assert np.array_equal(again.accuracy, alone.accuracy)


def test_every_row_reaches_the_clients_once_and_classes_overlap():
    train, test = class_rows()
    recorder = Recorder().train()
    curve = incremental_accuracy(
        recorder, train, test, checkpoints=(3, 12), orders=[1], n_clients=4, n_holders=3, classes_per_round=2
    )
    assert recorder.training
    given = torch.cat([x[0] for x, _ in recorder.batches])
    assert len(given) == 72
    assert torch.equal(given.sort(0).values, train.reshape(-1, 3).sort(0).values)
    labels = [sorted(set(y[0].tolist())) for _, y in recorder.batches]
    assert max(label for batch in labels for label in batch) == 11
    assert sum(len(batch) for batch in labels) > 24  # most classes are held by two or three
    assert all(len(batch) <= 2 for batch in labels)
    assert curve.accuracy.tolist() == [[pytest.approx(1 / 3), pytest.approx(1 / 12)]]  # "the last class seen"


def test_intervals_are_over_orders():
    curve = IncrementalCurve((10, 20), np.array([[0.9, 0.7], [0.8, 0.6], [0.7, 0.8]]), 1, (0, 1, 2))
    jitter = 1e-9 * np.array([[1.0], [-1.0], [0.0]])
    worse = IncrementalCurve((10, 20), curve.accuracy - 0.1 + jitter, 1, (0, 1, 2))
    found = curve.interval(20)
    assert found.mean == pytest.approx(0.7)
    assert found.low < 0.6
    assert found.covers == "seeds"
    difference = curve.difference(worse, 20)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match=r"one of the checkpoints \(10, 20\); got 15"):
        curve.interval(15)


def test_rows_of_every_class_of_a_split():
    labels = torch.arange(30) // 3
    x = torch.stack([labels.double(), torch.arange(30).double()], 1)
    tasks = tasks_from_arrays(x, labels, n_way=2, standardize=False)
    found = rows_by_class(tasks, split="train", n_rows=2)
    owned = tasks.class_splits["train"]
    assert torch.equal(found[:, :, 0].long(), owned[:, None].expand(-1, 2))
    assert len(found[:, :, 1].unique()) == 2 * len(owned)
    assert torch.equal(found, rows_by_class(tasks, split="train", n_rows=2))
    assert not torch.equal(found, rows_by_class(tasks, split="train", n_rows=2, seed=1))
    with pytest.raises(ValueError, match=r"asked for 4 rows per class; class \d has 3"):
        rows_by_class(tasks, split="test", n_rows=4)


def test_wrong_use_is_named():
    train, test = class_rows()
    with pytest.raises(TypeError, match="needs a learner with update; MAML has none"):
        incremental_accuracy(MAML(SPEC), train, test, checkpoints=(2,))
    learner = nearest_mean()
    for checkpoints in ((), (3, 2), (2, 13)):
        with pytest.raises(ValueError, match="checkpoints must increase and end at most at the 12 classes"):
            incremental_accuracy(learner, train, test, checkpoints=checkpoints)
    with pytest.raises(ValueError, match=r"got \(12, 6, 3\) and \(11, 3, 3\)"):
        incremental_accuracy(learner, train, test[1:], checkpoints=(2,))
    for empty in ((train[:, :0], test), (train, test[:, :0])):
        with pytest.raises(ValueError, match="N and T at least 1; got"):
            incremental_accuracy(learner, *empty, checkpoints=(2,))
    with pytest.raises(TypeError, match="test must be a tensor, classes by rows; got ndarray"):
        incremental_accuracy(learner, train, test.numpy(), checkpoints=(2,))
    with pytest.raises(ValueError, match="orders must be at least one seed"):
        incremental_accuracy(learner, train, test, checkpoints=(2,), orders=[])
    with pytest.raises(ValueError, match="n_clients must be an int >= 1; got 0"):
        incremental_accuracy(learner, train, test, checkpoints=(2,), n_clients=0)
    with pytest.raises(TypeError, match="2 clients need a learner with merge"):
        incremental_accuracy(OnlyUpdates(SPEC), train, test, checkpoints=(2,), n_clients=2)


class OnlyUpdates(MAML):
    def update(self, state: Any, examples: Examples) -> Any:
        return state


class ThreeAnswers(ProtoNet):
    """Takes any class, and forgets those beyond the third in its answers."""

    def predict(self, state: Any, x: Tensor) -> Distribution:
        return categorical(super().predict(state, x).logits[..., :3])


def test_a_learner_that_cannot_answer_over_the_classes_seen_is_refused():
    train, test = class_rows()
    three_way = RidgeHead(SPEC.with_n_way(3), encoder=nn.Identity())
    assert incremental_accuracy(three_way, train, test, checkpoints=[2, 3], orders=[0]).checkpoints == (2, 3)
    with pytest.raises(ValueError, match=r"RidgeHead does not take the classes up to .*n_way=3\).* spec\.with_n_way"):
        incremental_accuracy(three_way, train, test, checkpoints=[4], orders=[0])
    narrow = ThreeAnswers(SPEC, encoder=nn.Identity())
    with pytest.raises(ValueError, match=r"4 classes were seen, and ThreeAnswers answers over 3; .* spec\.with_n_way"):
        incremental_accuracy(narrow, train, test, checkpoints=[4], orders=[0])


def test_nan_is_an_error_and_not_chance():
    train, test = class_rows()
    for rows in ((train, test * torch.nan), (train * torch.nan, test)):
        with pytest.raises(FloatingPointError, match="ProtoNet answers NaN after 4 classes of stream order 5"):
            incremental_accuracy(nearest_mean(), *rows, checkpoints=(4,), orders=[5])


def test_bands_are_drawn_where_orders_differ():
    curve = IncrementalCurve((10, 20), np.array([[1.0, 0.7], [1.0, 0.6], [1.0, 0.8]]), 1, (0, 1, 2))
    (axes,) = plot_curves({"ProtoNet": curve}).axes
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert set(corners[corners[:, 0] == 10, 1]) == {1.0}
    assert np.ptp(corners[corners[:, 0] == 20, 1]) > 0.1


def test_orders_that_agree_are_no_certainty_and_only_the_same_ones_are_paired():
    curve = IncrementalCurve((10,), np.ones((3, 1)), 1, (0, 1, 2))
    assert curve.interval(10).low == pytest.approx(0.05 ** (1 / 3))
    worse = IncrementalCurve((10,), np.zeros((3, 1)), 1, (0, 1, 2))
    assert (curve.difference(worse, 10).p or 0) == pytest.approx(0.5**3)
    with pytest.raises(ValueError, match=r"same stream orders; got \(0, 1, 2\) and \(3, 4, 5\)"):
        curve.difference(replace(worse, orders=(3, 4, 5)), 10)
    with pytest.raises(ValueError, match=r"different seeds; got \(0, 0\)"):
        incremental_accuracy(nearest_mean(), *class_rows(), checkpoints=(4,), orders=(0, 0))
