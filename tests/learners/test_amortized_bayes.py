"""Amortized Bayes: its divergence, bound and mixture by hand, its meta-gradient, and what its draws depend on."""

import math

import pytest
import torch
from gradient_helpers import (
    CLASSES,
    IMAGES,
    SINES,
    draw,
    masking_gap,
    meta_gradient,
    pictures,
    seeded,
    worst_slope_error,
)
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from metaicl.episode import Examples
from metaicl.functional import inverse_learned_positive, learned_positive
from metaicl.learner import Regularizes
from metaicl.learners.gradient.amortized_bayes import AmortizedBayes, gaussian_kl, mixture, row_nll
from metaicl.learners.gradient.maml import MAML
from metaicl.metrics import calibration_counts
from metaicl.nets.backbones import MLP
from metaicl.nets.low_rank import LowRankLinear, low_rank_copy
from metaicl.objectives import query_loss
from metaicl.spec import TaskSpec


def smooth(tasks) -> nn.Module:
    return MLP((*tasks.spec.x_shape, 6, tasks.spec.output_size), activation=nn.Tanh)


def trained_like(tasks, **settings) -> AmortizedBayes:
    """A small learner whose inner loop moves its posterior visibly."""
    return seeded(lambda: AmortizedBayes(tasks.spec, net=smooth(tasks), inner_lr=0.05, **settings))


def normals(state, prior):
    """(posterior, prior) of each parameter as torch distributions."""
    names = [name for name in prior if not name.startswith("log_scale ")]
    return [
        tuple(Normal(at[name], at[f"log_scale {name}"].exp()) for at in (state.weights, prior)) for name in names
    ]  # fmt: skip


@pytest.mark.parametrize("tasks", [SINES, CLASSES], ids=["regression", "classification"])
def test_the_penalty_is_the_divergence_of_torch_per_support_row(tasks) -> None:
    learner, support = trained_like(tasks, kl_weight=0.3), draw(tasks).support
    state = learner.adapt(support)
    expected = sum(kl_divergence(q, p).flatten(1).sum(1) for q, p in normals(state, learner.prior()))
    assert float(expected.detach().min()) > 1e-3
    found = learner.penalty(state) * support.n_rows / 0.3
    assert float((found - expected).detach().abs().max()) < 1e-12 * max(1.0, float(expected.detach().max()))


def test_no_steps_answer_by_the_prior_at_no_divergence() -> None:
    learner, episode = trained_like(SINES, inner_steps=0), draw(SINES)
    state = learner.adapt(episode.support)
    assert float(learner.penalty(state).detach().abs().max()) == 0
    for name, value in learner.prior().items():
        assert torch.equal(state.weights[name], value.expand_as(state.weights[name]))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("tasks", [SINES, CLASSES], ids=["regression", "classification"])
def test_meta_gradient_equals_finite_differences(tasks, rank: int | None) -> None:
    learner, episode = trained_like(tasks, inner_steps=3, rank=rank), draw(tasks)

    def bound(learner, episode):
        """The training loss with the draws of eval mode."""
        return query_loss(learner, episode) + learner.penalty(learner.adapt(episode.support))

    assert worst_slope_error(learner, episode, bound) <= 1e-5


def test_one_step_equals_the_closed_form() -> None:
    """y = w x with one weight: gradients of the bound in mean and log scale, by hand, from the learner's own draws."""
    source = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 4, 1, generator=source, dtype=torch.float64) for _ in range(2))
    learner = seeded(
        lambda: AmortizedBayes(
            TaskSpec("regression", (1,), y_dim=1), net=nn.Linear(1, 1, bias=False), inner_steps=2, inner_lr=0.03,
            n_samples=3, prior_scale=0.4, kl_weight=0.7,
        )
    )  # fmt: skip
    prior, noise = learner.prior(), learner._noise("adapt", 3, 2, 3)["weight"].flatten(1)
    center, spread = prior["weight"].item(), prior["log_scale weight"].exp().item()
    kl_weight = 0.7 * learned_positive(learner.raw_scale).item() ** 2 / 4
    state = learner.adapt(Examples(x, y))
    for task in range(3):
        mean, scale = center, spread
        for eps in noise:
            w = mean + scale * eps
            slope = ((w * x[task] - y[task]) * x[task]).mean(0)  # of each draw, mean over rows
            d_mean = slope.mean() + kl_weight * (mean - center) / spread**2
            d_log_scale = (slope * eps * scale).mean() + kl_weight * (scale**2 / spread**2 - 1)
            mean, scale = float(mean - 0.03 * d_mean), scale * math.exp(-0.03 * float(d_log_scale))
        assert abs(state.weights["weight"][task].item() - mean) < 1e-12
        assert abs(state.weights["log_scale weight"][task].item() - math.log(scale)) < 1e-12


def test_rows_and_mixtures_equal_torch_distributions() -> None:
    source = torch.Generator().manual_seed(0)
    raw = torch.tensor([0.03, -0.05], dtype=torch.float64)
    outputs, y = (torch.randn(2, 4, 5, 2, generator=source, dtype=torch.float64) for _ in range(2))
    expected = -Independent(Normal(outputs, learned_positive(raw)), 1).log_prob(y)
    assert float((row_nll(outputs, y, raw) - expected).abs().max()) < 1e-12
    labels = torch.randint(0, 2, (2, 4, 5), generator=source)
    by_torch = -Categorical(logits=outputs).log_prob(labels)
    assert (
        float((row_nll(outputs.flatten(0, 1), labels.flatten(0, 1), None) - by_torch.flatten(0, 1)).abs().max()) < 1e-12
    )
    probs = mixture(outputs, None).probs
    assert float((probs - outputs.softmax(-1).mean(2)).abs().max()) < 1e-12
    target = y[:, :, 0]
    parts = Independent(Normal(outputs, learned_positive(raw).expand_as(outputs)), 1)
    both = MixtureSameFamily(Categorical(logits=torch.zeros(2, 4, 5).double()), parts).log_prob(target)
    assert float((mixture(outputs, raw).log_prob(target) - both).abs().max()) < 1e-12
    one = mixture(outputs[..., :1], raw[:1])
    by_hand = Normal(outputs[..., 0], learned_positive(raw[:1])).log_prob(target[..., :1]).logsumexp(-1) - math.log(5)
    assert one.event_shape == (1,)
    assert float((one.log_prob(target[..., :1]) - by_hand).abs().max()) < 1e-12
    assert float((one.mean[..., 0] - outputs[..., 0].mean(-1)).abs().max()) < 1e-12


def test_a_mixture_over_one_output_has_a_calibration() -> None:
    episode = draw(SINES)
    answer = trained_like(SINES)(episode.support, episode.query.x)
    assert calibration_counts(answer, episode.query, SINES.spec) is not None


def test_training_adds_the_penalty_to_the_loss_and_evaluation_does_not() -> None:
    learner, episode = trained_like(CLASSES), draw(CLASSES)
    assert isinstance(learner, Regularizes)
    assert not isinstance(MAML(CLASSES.spec), Regularizes)

    def loss(weight: float) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return query_loss(learner, episode).detach()

    plain = loss(1)
    answer = learner(episode.support, episode.query.x)
    assert float((plain + answer.log_prob(episode.query.y).mean(1)).detach().abs().max()) < 1e-12
    learner.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = learner.adapt(episode.support)
        nll = -learner.predict(state, episode.query.x).log_prob(episode.query.y).mean(1)
    assert float((loss(1) - nll - learner.penalty(state)).detach().abs().max()) < 1e-12
    assert float(learner.penalty(state).detach().min()) > 1e-5


def test_draws_differ_between_tasks_in_training_and_are_fixed_in_evaluation() -> None:
    task = draw(SINES)[0]
    twins = Examples(task.support.x.repeat(2, 1, 1), task.support.y.repeat(2, 1, 1))
    learner, x = trained_like(SINES), task.query.x.repeat(2, 1, 1)
    fixed = learner(twins, x).mean
    assert torch.equal(fixed[0], fixed[1])
    assert torch.equal(fixed, learner(twins, x).mean)
    other = trained_like(SINES)
    assert torch.equal(other(twins, x).mean, fixed)
    learner.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = learner(twins, x).mean
        torch.manual_seed(0)
        assert torch.equal(learner(twins, x).mean, first)
        assert not torch.equal(learner(twins, x).mean, first)
    assert not torch.equal(first[0], first[1])


def test_evidence_narrows_the_posterior() -> None:
    """A linear net with many rows and small noise: its weight's scale shrinks with every step."""
    source, scales = torch.Generator().manual_seed(0), []
    spec, settings = TaskSpec("regression", (1,), y_dim=1), {"prior_scale": 0.5, "n_samples": 20}
    x = torch.randn(2, 30, 1, generator=source, dtype=torch.float64)
    for steps in (1, 3, 9):
        learner = seeded(lambda steps=steps: AmortizedBayes(spec, net=nn.Linear(1, 1), inner_steps=steps, **settings))
        with torch.no_grad():
            learner.raw_scale.fill_(inverse_learned_positive(0.3))
        state = learner.adapt(Examples(x, 0.5 * x))
        scales.append(float(state.weights["log_scale weight"].detach().max()))
    assert scales[0] > scales[1] > scales[2]
    assert scales[2] < math.log(0.5)


def test_masked_rows_are_absent() -> None:
    assert masking_gap(trained_like(SINES), draw(SINES), 2) < 1e-12
    assert masking_gap(trained_like(CLASSES), draw(CLASSES), 4) < 1e-12


def test_a_meta_batch_is_a_loop_over_tasks() -> None:
    learner, episode = trained_like(CLASSES, inner_steps=2), draw(CLASSES)
    together, alone = meta_gradient(learner, episode), [meta_gradient(learner, one) for one in episode]
    for name, value in together.items():
        mean = torch.stack([one[name] for one in alone]).mean(0)
        assert float((mean - value).abs().max()) <= 1e-12 * max(1.0, float(value.abs().max()))


def test_low_rank_factors_carry_the_posterior_and_the_net_is_left_alone() -> None:
    net = smooth(CLASSES)
    before = [name for name, _ in net.named_parameters()]
    learner = seeded(lambda: AmortizedBayes(CLASSES.spec, net=net, rank=2, inner_steps=2))
    assert [name for name, _ in net.named_parameters()] == before
    assert learner.adapted == {"0.down", "0.up", "2.down", "2.up"}
    episode = draw(CLASSES)
    weights = learner.adapt(episode.support).weights
    assert weights["0.up"].shape == (3, 6, 2)
    assert weights["log_scale 2.down"].shape == (3, 2, 6)
    gradients = meta_gradient(learner, episode)
    assert min(float(value.abs().max()) for value in gradients.values()) > 0
    assert "net.0.base.weight" in gradients


def test_a_low_rank_copy_starts_as_the_net_and_adds_the_product() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    net = nn.Linear(4, 3)
    copied, names = low_rank_copy(net, rank=2)
    assert isinstance(copied, LowRankLinear)
    assert names == ["down", "up"]
    assert torch.equal(copied(x), net(x))
    with torch.no_grad():
        copied.up.fill_(0.5)
    expected = x @ (net.weight + copied.up @ copied.down).T + net.bias
    assert float((copied(x) - expected).detach().abs().max()) < 1e-6


def test_a_layer_under_two_names_stays_one_in_a_low_rank_copy() -> None:
    layer = nn.Linear(4, 4)
    copied, names = low_rank_copy(nn.Sequential(layer, nn.Tanh(), layer, nn.Sequential(layer)), rank=2)
    assert copied[0] is copied[2] is copied[3][0]
    assert isinstance(copied[0], LowRankLinear)
    assert names == ["0.down", "0.up"]


def test_images_have_posteriors_too() -> None:
    learner, episode = seeded(lambda: AmortizedBayes(IMAGES, rank=1, inner_steps=1)), pictures()
    assert learner.adapted == {"head.down", "head.up"}
    assert query_loss(learner, episode).isfinite().all()


def test_the_divergence_of_equals_is_zero() -> None:
    prior = {"w": torch.randn(3), "log_scale w": torch.randn(3)}
    assert float(gaussian_kl(prior, prior)) == 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"inner_lr": 0}, ValueError, "inner_lr must be a finite number > 0; got 0"),
        ({"inner_steps": -1}, ValueError, "inner_steps must be an int >= 0; got -1"),
        ({"n_samples": 0}, ValueError, "n_samples must be an int >= 1; got 0"),
        ({"n_predictions": 1.0}, TypeError, "n_predictions must be an int >= 1; got 1.0"),
        ({"prior_scale": 0}, ValueError, "prior_scale must be a finite number > 0; got 0"),
        ({"kl_weight": -1}, ValueError, "kl_weight must be a finite number > 0; got -1"),
        ({"rank": 0}, ValueError, "rank must be an int >= 1; got 0"),
        ({"rank": 1, "net": nn.Conv1d(1, 1, 1)}, ValueError, "needs a net with nn.Linear layers; Conv1d has none"),
        ({"adapt": "haed.*"}, ValueError, r"'haed\.\*' matches no parameter"),
        ({"net": nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))}, ValueError, "cannot use running statistics"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(settings, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AmortizedBayes(SINES.spec, **settings)
