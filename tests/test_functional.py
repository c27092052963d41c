"""Every function against an oracle in float64, with first and second derivatives, masks and the nasty points."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import cosine_similarity, euclidean_distances
from sklearn.neighbors import NearestCentroid
from torch.autograd import gradcheck, gradgradcheck

from metaicl import functional
from metaicl.spec import TaskSpec
from metaicl.task import derive_generator


def randn(*shape, name="functional"):
    return torch.randn(*shape, generator=derive_generator(name, *shape), dtype=torch.float64)


def twice(function, *inputs):
    """First and second derivatives against finite differences."""
    inputs = tuple(value.clone().requires_grad_() for value in inputs)
    return gradcheck(function, inputs) and gradgradcheck(function, inputs)


MASK = torch.tensor([[True, False, True, True], [True, True, False, False]])


@pytest.mark.parametrize("spread", [0.01, 1.0])
def test_a_learned_scale_keeps_pace_with_adam(spread):
    raw = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=2e-3)
    assert functional.learned_positive(raw) == functional.positive(raw)
    for _ in range(400):
        scale = functional.learned_positive(raw)
        optimizer.zero_grad()
        (0.5 * (spread / scale) ** 2 + scale.log()).backward()  # errors of one size: the best scale is that size
        optimizer.step()
    assert functional.learned_positive(raw).item() == pytest.approx(spread, rel=0.02)


def test_categorical_and_gaussian():
    logits = randn(2, 3, 4)
    found = functional.categorical(logits)
    expected = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(-1, keepdims=True)
    assert np.abs(found.probs.numpy() - expected).max() < 1e-14
    assert found.batch_shape == (2, 3)
    mean, scale, y = randn(2, 3, 2), torch.tensor([0.5, 2.0], dtype=torch.float64), randn(2, 3, 2, name="y")
    found = functional.gaussian(mean, scale)
    density = -0.5 * ((y - mean) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)
    assert found.batch_shape == (2, 3)
    assert found.event_shape == (2,)
    assert float((found.log_prob(y) - density.sum(-1)).abs().max()) < 1e-13


def test_positive_and_its_inverse():
    raw = torch.tensor([-800.0, -3.0, 0.0, 5.0, 800.0], dtype=torch.float64)
    expected = 1e-3 + np.logaddexp(0, raw.numpy())
    assert np.abs(functional.positive(raw).numpy() - expected).max() < 1e-14
    for value, kind in itertools.product((0.0011, 0.5, 1.0, 30.0, 1e6), ("regression", "classification")):
        raw = torch.tensor(functional.inverse_learned_positive(value, kind), dtype=torch.float64)
        back = functional.learned_positive(raw, kind)
        assert float(back) == pytest.approx(value, rel=1e-9)
    for value in (1e-3, 0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"finite number > 0\.001"):
            functional.inverse_learned_positive(value)
    with pytest.raises(ValueError, match=r"penalty must be a finite number > 0\.001"):
        functional.inverse_learned_positive(1e-4, name="penalty")
    assert twice(functional.positive, randn(5))


def test_masked_mean():
    values = randn(2, 4, 3)
    expected = np.stack([values[i].numpy()[MASK[i].numpy()].mean(0) for i in range(2)])
    assert np.abs(functional.masked_mean(values, MASK, 1).numpy() - expected).max() < 1e-14
    assert np.abs(functional.masked_mean(values, None, 1).numpy() - values.numpy().mean(1)).max() < 1e-14
    nothing = functional.masked_mean(values, torch.zeros_like(MASK), 1)
    assert torch.equal(nothing, torch.zeros_like(nothing))
    assert torch.equal(functional.masked_mean(values[:, :0], None, 1), nothing)
    assert twice(lambda v: functional.masked_mean(v.square(), MASK, 1), values)


def test_class_weights_and_prototypes():
    x, y = randn(2, 4, 3), torch.tensor([[0, 1, 2, 0], [1, 0, 2, 1]])
    weights = functional.class_weights(y, 3, MASK, torch.float64)
    expected = np.eye(3)[y.numpy()] * MASK.numpy()[..., None]
    assert np.array_equal(weights.numpy(), expected)
    assert np.array_equal(functional.class_weights(y, 3, None, torch.float64).numpy(), np.eye(3)[y.numpy()])
    means = functional.prototypes(x, y, 3)
    for i in range(2):
        oracle = NearestCentroid().fit(x[i].numpy(), y[i].numpy()).centroids_
        assert np.abs(means[i].numpy() - oracle).max() < 1e-14
    masked = functional.prototypes(x, y, 3, MASK)
    assert torch.equal(masked[0, 1], torch.zeros(3, dtype=torch.float64))  # its only row is masked
    assert float((masked[0, 0] - x[0, [0, 3]].mean(0)).abs().max()) < 1e-15
    assert twice(lambda v: functional.prototypes(v, y, 3, MASK).square(), x)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_squared_distances_of_any_size(n, m, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(2, rows, dim, generator=generator, dtype=torch.float64) for rows in (n, m))
    found = functional.squared_distances(a, b)
    direct = (a[:, :, None] - b[:, None]).square().sum(-1)
    assert found.shape == (2, n, m)
    assert float((found - direct).abs().max()) < 1e-12
    assert float(found.min()) >= 0


def test_squared_distances_to_no_rows():
    a = randn(2, 3, 4).requires_grad_()
    found = functional.squared_distances(a, randn(2, 0, 4))
    assert found.shape == (2, 3, 0)
    (gradient,) = torch.autograd.grad(found.sum(), a)
    assert not gradient.any()


def test_squared_distances_with_large_offsets():
    a, b = randn(5, 3), randn(4, 3)
    expected = euclidean_distances(a.numpy(), b.numpy(), squared=True)
    offset = torch.tensor([2.0**13, -(2.0**13), 2.0**13], dtype=torch.float64)
    near = (a + offset, b + offset)  # rounding the rows themselves moves a distance by about 1e-11
    assert np.abs(functional.squared_distances(*near).numpy() - expected).max() < 1e-10
    single = functional.squared_distances(*(rows.float() for rows in near))
    direct = (near[0].float()[:, None] - near[1].float()[None]).square().sum(-1)
    assert float((single - direct).abs().max()) < 0.02  # the naive expansion is off by 30 here
    far = (a + 0.0, b.clone())
    far[1][0] += 1e4
    direct = (far[0][:, None] - far[1][None]).square().sum(-1)
    assert float(((functional.squared_distances(*far) - direct) / direct).abs().max()) < 1e-7


def test_squared_distances_at_coincident_points():
    for seed in range(20):  # rounding puts about half of them below zero before the correction
        rows = randn(3, 7, name=f"coincident {seed}")
        assert float(functional.squared_distances(rows, rows).diagonal().min()) >= 0
    assert twice(functional.squared_distances, rows, rows)
    same = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    distances = functional.squared_distances(same, torch.ones(3, 2, dtype=torch.float64))
    (first,) = torch.autograd.grad(distances.sum(), same, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum() + first.sum(), same)
    assert torch.equal(first, torch.zeros_like(first))
    assert float((second - 2 * 3).abs().max()) < 1e-12  # d/da of sum over three points of 2 (a - b)


def test_cosine_similarities_and_unit_rows():
    a, b = randn(5, 3), randn(4, 3)
    found = functional.cosine_similarities(a, b)
    assert np.abs(found.numpy() - cosine_similarity(a.numpy(), b.numpy())).max() < 1e-10
    length = functional.unit_rows(1e6 * a).norm(dim=-1)
    assert float((length - 1).abs().max()) < 1e-12
    assert twice(functional.cosine_similarities, a, b)
    assert twice(functional.cosine_similarities, a, a)
    zero = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    similar = functional.cosine_similarities(zero, b)
    assert torch.equal(similar, torch.zeros_like(similar))
    (first,) = torch.autograd.grad(similar.sum(), zero, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), zero)
    assert first.isfinite().all()
    assert second.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "scales", "tolerance"),
    [
        (torch.float64, (1e-150, 1e-20, 1e-7, 1.0, 1e160), 1e-14),
        (torch.float32, (1e-18, 1e-8, 1e-7, 1.0, 1e36), 1e-6),
        (torch.bfloat16, (1e-18, 1e-7, 1.0, 1e36), 2e-2),
        (torch.float16, (1e-3, 1.0, 1e4), 2e-3),
    ],
)
def test_unit_rows_of_any_length_and_precision(dtype, scales, tolerance):
    rows = randn(5, 3).to(dtype)
    for scale in scales:
        found = functional.unit_rows(rows * scale).double()
        assert float((found.norm(dim=-1) - 1).abs().max()) < tolerance
        assert float((found - functional.unit_rows(rows).double()).abs().max()) < 2 * tolerance
    zero = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    found = functional.unit_rows(zero)
    assert torch.equal(found, torch.zeros_like(zero))
    (first,) = torch.autograd.grad(found.sum(), zero, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), zero)
    assert torch.equal(first, torch.ones_like(zero))
    assert torch.equal(second, torch.zeros_like(zero))


def test_derivatives_of_short_unit_rows():
    rows = randn(4, 3)
    assert twice(functional.unit_rows, rows)
    weights = randn(4, 3, name="weights")

    def slopes(value):
        value = value.clone().requires_grad_()
        (first,) = torch.autograd.grad((functional.unit_rows(value) * weights).sum(), value, create_graph=True)
        (second,) = torch.autograd.grad((first * weights).sum(), value)
        return first.detach(), second

    first, second = slopes(rows)
    short = slopes(rows * 1e-9)  # the slopes of a function of the direction alone
    torch.testing.assert_close(short[0] * 1e-9, first, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(short[1] * 1e-18, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n_rows", "dim"), [(3, 6), (6, 3), (4, 4), (1, 1)])
def test_ridge_solve(n_rows, dim):
    x, y = randn(2, n_rows, dim), randn(2, n_rows, 2, name="y")
    found = functional.ridge_solve(x, y, 0.7)
    for i in range(2):
        oracle = Ridge(0.7, fit_intercept=False, solver="svd").fit(x[i].numpy(), y[i].numpy()).coef_.reshape(2, dim).T
        assert np.abs(found[i].numpy() - oracle).max() < 1e-10
    penalty = torch.tensor(0.7, dtype=torch.float64)
    assert twice(functional.ridge_solve, x, y, penalty)


def test_ridge_solve_in_half_precision_rounds_its_weights_and_nothing_else():
    x, y = (torch.randn(2, 6, size, generator=torch.Generator().manual_seed(0)).bfloat16() for size in (4, 2))
    for rows, targets in ((x, y), (x[:, :3], y[:, :3])):
        expected = functional.ridge_solve(rows.float(), targets.float(), 0.5).bfloat16()
        assert torch.equal(functional.ridge_solve(rows, targets, 0.5), expected)


def test_ridge_solve_without_masked_rows_and_with_none():
    x, y = randn(2, 4, 6), randn(2, 4, 1, name="y")
    for dim in (6, 3):  # both ways to solve
        found = functional.ridge_solve(x[..., :dim], y, 0.3, MASK)
        for i in range(2):
            rows = MASK[i]
            expected = functional.ridge_solve(x[i, rows][:, :dim], y[i, rows], 0.3)
            assert float((found[i] - expected).abs().max()) < 1e-12
    nothing = functional.ridge_solve(x, y, 0.3, torch.zeros_like(MASK))
    assert torch.equal(nothing, torch.zeros_like(nothing))
    assert functional.ridge_solve(x[:, :0], y[:, :0], 0.3).abs().sum() == 0
    assert twice(lambda a, b: functional.ridge_solve(a, b, 0.3, MASK), x, y)
    duplicates = x[:, :1].expand(2, 4, 6)
    assert twice(lambda a: functional.ridge_solve(a, y, 0.3), duplicates)


def test_raw_features():
    images = randn(2, 3, 1, 4, 4)
    spec = TaskSpec("classification", (1, 4, 4), "image", n_way=2)
    assert torch.equal(functional.raw_features(images, spec), images.flatten(2))
    tokens = torch.tensor([[[1, 1, 2, 0], [0, 0, 0, 0], [9, 1, 0, 0]]])
    spec = TaskSpec("classification", (4,), "tokens", n_way=2, vocabulary=10)
    found = functional.raw_features(tokens, spec, buckets=8)
    expected = np.zeros((1, 3, 8), dtype=np.float32)
    expected[0, 0, [1, 2]] = np.array([2, 1]) / np.sqrt(5)
    expected[0, 2, 1] = 1  # 9 falls into the bucket of 1
    assert np.abs(found.numpy() - expected).max() < 1e-6


def test_gram_matrices_of_rows_of_any_scale_have_a_factor_once_rounding_is_added():
    rows = 1e4 + randn(2, 30, 4).float()
    for gram in (rows @ rows.mT, rows.mT @ rows):
        added = functional.rounding_of(gram)
        assert added.shape == (2, 1, 1)
        assert torch.allclose(added[:, 0, 0], 2 * 2**-23 * rows.square().sum((1, 2)), rtol=1e-3)
        identity = torch.eye(gram.shape[-1])
        assert int(torch.linalg.cholesky_ex(gram + 1e-3 * identity).info.min()) > 0
        assert int(torch.linalg.cholesky_ex(gram + (1e-3 + added) * identity).info.max()) == 0
