"""The marginal against explicit sums, its gradients, and answers that are taken out."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Cauchy, Independent, Normal

from metaicl.functional import categorical, gaussian
from metaicl.mixtures import marginal, rearranged

B, Q, S, C = 2, 3, 4, 5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("weights_shape", [(B, Q, S), (B, 1, S), (S,)])
def test_classes_are_mixed_as_probabilities(weights_shape: tuple[int, ...]) -> None:
    logits, log_weights = draw(B, Q, S, C), torch.log_softmax(draw(*weights_shape, seed=1), -1)
    found = marginal(categorical(logits), log_weights)
    assert found.batch_shape == (B, Q)
    expected = torch.zeros(B, Q, C, dtype=torch.float64)
    weights = log_weights.exp().expand(B, Q, S)
    for s in range(S):
        expected += weights[:, :, s, None] * torch.softmax(logits[:, :, s], -1)
    torch.testing.assert_close(found.probs, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("y_dim", [1, 3])
@pytest.mark.parametrize("weights_shape", [(B, Q, S), (B, 1, S)])
def test_gaussians_are_mixed_as_densities(y_dim: int, weights_shape: tuple[int, ...]) -> None:
    mean, scale = draw(B, Q, S, y_dim), 0.3 + draw(B, Q, S, y_dim, seed=1).exp()
    log_weights = torch.log_softmax(draw(*weights_shape, seed=2), -1)
    found = marginal(gaussian(mean, scale), log_weights)
    assert found.batch_shape == (B, Q)
    y, weights = draw(B, Q, y_dim, seed=3), log_weights.exp().expand(B, Q, S)
    density, first, second, below = (torch.zeros(B, Q, y_dim, dtype=torch.float64) for _ in range(4))
    joint = torch.zeros(B, Q, dtype=torch.float64)
    for s in range(S):
        m, d, w = mean[:, :, s], scale[:, :, s], weights[:, :, s, None]
        density = torch.exp(-0.5 * ((y - m) / d) ** 2) / (d * math.sqrt(2 * math.pi))
        joint += weights[:, :, s] * density.prod(-1)
        first, second = first + w * m, second + w * (m**2 + d**2)
        below = below + w * 0.5 * (1 + torch.erf((y - m) / (d * math.sqrt(2))))
    torch.testing.assert_close(found.log_prob(y).exp(), joint, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.mean, first, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.variance, second - first**2, rtol=1e-10, atol=1e-12)
    if y_dim == 1:
        assert isinstance(found, Independent)
        torch.testing.assert_close(found.base_dist.cdf(y), below, rtol=1e-12, atol=1e-14)


def test_answers_that_are_mixtures_themselves_stay_exact() -> None:
    inner = marginal(gaussian(draw(B, Q, S, 2, 2), torch.ones(1)), torch.log_softmax(draw(B, Q, S, 2, seed=1), -1))
    log_weights = torch.log_softmax(draw(B, Q, S, seed=2), -1)
    y = draw(B, Q, 2, seed=3)
    expected = (log_weights.exp() * inner.log_prob(y[:, :, None].expand(B, Q, S, 2)).exp()).sum(-1)
    torch.testing.assert_close(marginal(inner, log_weights).log_prob(y).exp(), expected, rtol=1e-12, atol=1e-14)


def test_gradients_reach_weights_and_answers() -> None:
    labels, y = torch.tensor([[0, 1, 4], [2, 2, 3]]), draw(B, Q, 2, seed=5)
    scores, logits = draw(B, Q, S, seed=1).requires_grad_(), draw(B, Q, S, C).requires_grad_()
    mean, raw = draw(B, Q, S, 2).requires_grad_(), draw(B, Q, S, 2, seed=2).requires_grad_()

    def of_classes(scores: Tensor, logits: Tensor) -> Tensor:
        return marginal(categorical(logits), torch.log_softmax(scores, -1)).log_prob(labels)

    def of_targets(scores: Tensor, mean: Tensor, raw: Tensor) -> Tensor:
        return marginal(gaussian(mean, raw.exp()), torch.log_softmax(scores, -1)).log_prob(y)

    def of_one_output(scores: Tensor, mean: Tensor, raw: Tensor) -> Tensor:
        answers = gaussian(mean[..., :1], raw[..., :1].exp())
        return marginal(answers, torch.log_softmax(scores, -1)).log_prob(y[..., :1])

    assert torch.autograd.gradcheck(of_classes, (scores, logits))
    assert torch.autograd.gradcheck(of_targets, (scores, mean, raw))
    assert torch.autograd.gradcheck(of_one_output, (scores, mean, raw))
    assert torch.autograd.gradgradcheck(of_classes, (scores, logits))
    assert torch.autograd.gradgradcheck(of_one_output, (scores, mean, raw))


@pytest.mark.parametrize("y_dim", [0, 1, 2])
def test_a_weight_of_zero_takes_the_answer_out(y_dim: int) -> None:
    raw = draw(B, Q, S, y_dim or C).requires_grad_()
    scores = draw(B, Q, S, seed=1).requires_grad_()
    absent = torch.tensor([False, True, False, True])
    log_weights = torch.log_softmax(scores.masked_fill(absent, -math.inf), -1)
    y = draw(B, Q, y_dim, seed=3) if y_dim else torch.ones(B, Q, dtype=torch.long)

    def answers(raw: Tensor):
        return gaussian(raw, torch.ones((), dtype=torch.float64)) if y_dim else categorical(raw)

    found = marginal(answers(raw), log_weights).log_prob(y)
    expected = marginal(answers(raw[:, :, ~absent]), torch.log_softmax(scores[..., ~absent], -1)).log_prob(y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    found.sum().backward()
    assert raw.grad is not None
    assert scores.grad is not None
    assert bool(raw.grad.isfinite().all())
    assert bool(scores.grad.isfinite().all())
    assert not bool(raw.grad[:, :, absent].any())
    assert not bool(scores.grad[..., absent].any())


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch shape \(2, 3, 4\) of the answers; got \(2, 3\)"):
        marginal(Independent(Normal(draw(B, Q, S, 1), 1.0), 1), draw(B, Q))


@pytest.mark.parametrize("y_dim", [0, 1, 2])
def test_rearranged_answers_are_the_same_answers(y_dim: int) -> None:
    raw, weights = draw(B * S, Q, 3, y_dim or C), torch.log_softmax(draw(B * S, Q, 3, seed=1), -1)
    plain = gaussian(raw[:, :, 0], torch.ones((), dtype=torch.float64)) if y_dim else categorical(raw[:, :, 0])
    y = draw(B * S, Q, y_dim, seed=2) if y_dim else torch.ones(B * S, Q, dtype=torch.long)
    mixed = marginal(gaussian(raw, raw.exp()) if y_dim else categorical(raw), weights)

    def arrange(value: Tensor) -> Tensor:
        return value.unflatten(0, (B, S)).movedim(1, 2)

    for answers in (plain, mixed):
        found = rearranged(answers, arrange)
        assert found.batch_shape == (B, Q, S)
        torch.testing.assert_close(found.log_prob(arrange(y)), arrange(answers.log_prob(y)), rtol=1e-12, atol=1e-14)
    with pytest.raises(TypeError, match="answers must be categorical, Gaussian or mixtures of these; got Cauchy"):
        rearranged(Independent(Cauchy(raw, 1.0), 1), arrange)
