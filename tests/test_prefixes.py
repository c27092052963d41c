from dataclasses import replace

import pytest
import torch
from torch.distributions import Laplace

from metaicl.episode import Examples
from metaicl.functional import categorical, gaussian, masked_mean
from metaicl.learner import Learner
from metaicl.prefixes import first_shots, predict_prefixes
from metaicl.spec import TaskSpec

NUMBERS = TaskSpec("regression", (1,), y_dim=1)
CLASSES = TaskSpec("classification", (1,), n_way=2)


class Mean(Learner):
    """Predicts the mean of the support, 0 for an empty one."""

    def adapt(self, support):
        return masked_mean(support.y, support.mask, 1)

    def predict(self, state, x):
        mean = state[:, None].expand(-1, x.shape[1], -1)
        return gaussian(mean, torch.ones_like(mean))


class Counts(Learner):
    def adapt(self, support):
        ones = torch.stack([(support.y == c) & support.real for c in range(2)], -1)
        return 1.0 + ones.sum(1)

    def predict(self, state, x):
        return categorical(state.log()[:, None].expand(-1, x.shape[1], -1))


class Odd(Mean):
    def predict(self, state, x):
        return Laplace(state[:, None, 0].expand(-1, x.shape[1]), 1.0)


class Fast(Mean):
    def predict_prefixes(self, examples):
        return gaussian(torch.full_like(examples.y, 7.0), torch.ones_like(examples.y))


def rows(y, mask=None):
    y = torch.tensor(y)
    x = torch.arange(y.shape[1], dtype=torch.float32).expand(len(y), -1)[..., None]
    return Examples(x, y, None if mask is None else torch.tensor(mask), torch.arange(y.shape[1]).expand(len(y), -1))


def test_every_row_is_predicted_from_the_rows_before_it():
    examples = rows([[[2.0], [4.0], [9.0]]])
    assert predict_prefixes(Mean(NUMBERS), examples).mean[0, :, 0].tolist() == [0.0, 2.0, 3.0]


def test_masked_rows_of_a_stream_teach_nothing():
    examples = rows([[[2.0], [4.0], [9.0]]], [[True, False, True]])
    assert predict_prefixes(Mean(NUMBERS), examples).mean[0, :, 0].tolist() == [0.0, 2.0, 2.0]


def test_classes_are_joined_too():
    found = predict_prefixes(Counts(CLASSES), rows([[0, 0, 1]])).probs[0, :, 0]
    assert found.tolist() == pytest.approx([1 / 2, 2 / 3, 3 / 4])


def test_the_learners_own_method_is_used():
    assert predict_prefixes(Fast(NUMBERS), rows([[[2.0], [4.0]]])).mean[0, :, 0].tolist() == [7.0, 7.0]


def test_distributions_that_cannot_be_joined_are_named():
    with pytest.raises(TypeError, match=r"\['Laplace'\]"):
        predict_prefixes(Odd(NUMBERS), rows([[[2.0], [4.0]]]))


def test_first_shots_of_each_class_keep_their_order():
    support = rows([[1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1]])
    found = first_shots(support, 2, CLASSES)
    assert found.x[..., 0].tolist() == [[0, 1, 2, 3], [0, 1, 3, 4]]
    assert found.y.tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]
    assert found.ids.tolist() == [[0, 1, 2, 3], [0, 1, 3, 4]]
    assert found.mask is None


def test_first_shots_are_nested():
    support = rows([torch.randint(2, (40,), generator=torch.Generator().manual_seed(0)).tolist()])
    previous: set[float] = set()
    for k in (1, 2, 5, 10):
        kept = set(first_shots(support, k, CLASSES).x[0, :, 0].tolist())
        assert previous < kept
        previous = kept


def test_a_class_with_too_few_rows_is_padded_by_the_mask():
    found = first_shots(rows([[1, 1, 1, 0], [0, 1, 0, 1]]), 2, CLASSES)
    assert found.real.sum(1).tolist() == [3, 4]
    assert found.x[0, :3, 0].tolist() == [0, 1, 3]


def test_first_shots_of_regression_pass_over_masked_rows():
    found = first_shots(rows([[[1.0], [2.0], [3.0]]], [[False, True, True]]), 1, NUMBERS)
    assert found.y.tolist() == [[[2.0]]]


def test_first_shots_of_a_stream_are_its_first_rows_whatever_their_classes():
    spec = replace(CLASSES, ordered=True)
    found = first_shots(rows([[1, 1, 1, 0, 1, 0]], [[True, False, True, True, True, True]]), 2, spec)
    assert found.y.tolist() == [[1, 1, 0, 1]]
