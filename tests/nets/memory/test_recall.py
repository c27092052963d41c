"""Memories as nets: their gradients against autograd, polynomial features against their kernel, Newton-Schulz."""

import math

import pytest
import torch

from metaicl.nets.memory.recall import PolynomialFeatures, factors, feature_count, orthogonalize, recall


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("hidden", [None, 6])
def test_gradients_of_a_token_are_those_of_autograd(hidden: int | None, norm: bool) -> None:
    torch.manual_seed(0)
    size, value = 4, 4 if norm else 3
    shapes = [(value, size)] if hidden is None else [(hidden, size), (value, hidden)]
    weights = tuple(torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    keys, values = torch.randn(2, 5, size, dtype=torch.float64), torch.randn(2, 5, value, dtype=torch.float64)
    found = factors(weights, keys, values, norm=norm)
    for t in range(5):
        loss = 0.5 * (recall(weights, keys[:, t : t + 1], norm=norm) - values[:, t : t + 1]).square().sum()
        for (d, a), expected in zip(found, torch.autograd.grad(loss, weights), strict=True):
            torch.testing.assert_close(d[:, t, :, None] * a[:, t, None, :], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_polynomial_features_have_the_taylor_kernel_of_the_exponential(degree: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 7, 5, dtype=torch.float64)
    product = (a * b).sum(-1)
    kernel = sum(product**i / math.factorial(i) for i in range(1, degree + 1))
    features = PolynomialFeatures(5, degree)
    phi = features(a)
    assert phi.shape[-1] == feature_count(5, degree)
    torch.testing.assert_close((phi * features(b)).sum(-1), kernel, rtol=1e-12, atol=1e-12)


def test_feature_counts() -> None:
    assert [feature_count(32, degree) for degree in (1, 2, 3)] == [32, 560, 6544]


def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_directions() -> None:
    torch.manual_seed(0)
    for shape in ((6, 4), (4, 6), (5, 5)):
        left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), dtype=torch.float64))
        right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), dtype=torch.float64))
        values = torch.linspace(0.2, 1.0, min(shape), dtype=torch.float64)
        out = orthogonalize(100 * left * values @ right.mT)
        inner = left.mT @ out @ right
        assert bool(((inner.diagonal() > 0.67) & (inner.diagonal() < 1.21)).all())
        torch.testing.assert_close(inner, inner.diagonal().diag(), rtol=0, atol=1e-10)
    assert torch.equal(orthogonalize(torch.zeros(2, 3)), torch.zeros(2, 3))
