"""Deep kernels against scikit-learn's Gaussian processes."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from gradient_helpers import CLASSES, SINES, draw, masking_gap, seeded, worst_slope_error
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct
from torch import nn

from metaicl.collation import concatenate
from metaicl.episode import Examples
from metaicl.functional import learned_positive
from metaicl.learner import Learner
from metaicl.learners.metric.deep_kernel import KERNELS, DeepKernel, marginal_likelihood_loss
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.nets.backbones import MLP
from metaicl.objectives import query_loss
from metaicl.spec import TaskSpec


def make(spec: TaskSpec, kernel: str) -> Callable[[], Learner]:
    return lambda: DeepKernel(spec, encoder=MLP((spec.x_shape[0], 8, 6), activation=nn.Tanh), kernel=kernel)


def reference(learner: DeepKernel, x: torch.Tensor, y: np.ndarray) -> tuple[GaussianProcessRegressor, Callable]:
    """scikit-learn's process with the same hyperparameters, fitted to rows x (N, D), and what embeds its inputs."""

    def embed(rows: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            found = learner.encoder(rows).numpy() / 6**0.5
        length = np.sqrt(np.sum(found**2, axis=1, keepdims=True))
        return found / length if learner.kernel == "cosine" else found

    def learned(raw: torch.Tensor) -> float:
        return learned_positive(raw, learner.spec.kind).item()

    variance, noise = learned(learner.raw_variance), learned(learner.raw_noise)
    inner = RBF(learned(learner.raw_length)) if learner.kernel == "rbf" else DotProduct(sigma_0=1e-12)
    kernel = ConstantKernel(variance, "fixed") * inner
    process = GaussianProcessRegressor(kernel, alpha=noise**2, optimizer=None).fit(embed(x), y)
    return process, embed


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n_shot", [1, 3, 15])
def test_regression_equals_scikit_learn(kernel: str, n_shot: int) -> None:
    learner, episode = seeded(make(SINES.spec, kernel)), draw(SINES, n_shot=n_shot)
    found = learner(episode.support, episode.query.x)
    for task in range(3):
        process, embed = reference(learner, episode.support.x[task], episode.support.y[task, :, 0].numpy())
        mean, scale = process.predict(embed(episode.query.x[task]), return_std=True)
        variance = scale**2 + learned_positive(learner.raw_noise).item() ** 2
        assert np.abs(found.mean[task, :, 0].detach().numpy() - mean).max() <= 1e-10
        assert np.abs(found.variance[task, :, 0].detach().numpy() - variance).max() <= 1e-10


@pytest.mark.parametrize("kernel", KERNELS)
def test_classification_regresses_labels_of_plus_and_minus_one(kernel: str) -> None:
    learner, episode = seeded(make(CLASSES.spec, kernel)), draw(CLASSES)
    found = learner(episode.support, episode.query.x).logits
    for task in range(3):
        labels = 2 * np.eye(3)[episode.support.y[task].numpy()] - 1
        process, embed = reference(learner, episode.support.x[task], labels)
        means = torch.from_numpy(process.predict(embed(episode.query.x[task])))
        expected = (means * learner.log_temperature.exp()).log_softmax(-1)
        assert float((found[task] - expected).detach().abs().max()) <= 1e-10


@pytest.mark.parametrize("kernel", KERNELS)
def test_marginal_likelihood_equals_scikit_learn(kernel: str) -> None:
    for tasks in (SINES, CLASSES):
        learner, episode = seeded(make(tasks.spec, kernel)), draw(tasks)
        rows = concatenate(episode.support, episode.query)
        found = marginal_likelihood_loss(learner, episode)
        for task in range(3):
            y = rows.y[task].numpy() if tasks is SINES else 2 * np.eye(3)[rows.y[task].numpy()] - 1
            columns = [reference(learner, rows.x[task], column)[0].log_marginal_likelihood_value_ for column in y.T]
            assert abs(found[task].item() + sum(columns) / (rows.n_rows * len(columns))) <= 1e-10


@pytest.mark.parametrize("kernel", KERNELS)
def test_meta_gradients_equal_finite_differences(kernel: str) -> None:
    for tasks in (SINES, CLASSES):
        learner = seeded(make(tasks.spec, kernel))
        if kernel == "rbf":
            learner.encoder[2].bias.requires_grad_(False)  # a kernel of differences does not see it
        assert worst_slope_error(learner, draw(tasks)) <= 1e-5
        for name, value in learner.named_parameters():
            value.requires_grad_(name != "log_temperature" and not (kernel == "rbf" and name == "encoder.2.bias"))
        assert worst_slope_error(learner, draw(tasks), marginal_likelihood_loss) <= 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
def test_masked_rows_are_absent_and_repeated_ones_finite(kernel: str) -> None:
    for tasks in (SINES, CLASSES):
        learner, episode = seeded(make(tasks.spec, kernel)), draw(tasks)
        assert masking_gap(learner, episode, 2) < 1e-11
        padded = replace(episode, support=episode.support.pad(9), query=episode.query.pad(9))
        gap = marginal_likelihood_loss(learner, padded) - marginal_likelihood_loss(learner, episode)
        assert float(gap.detach().abs().max()) < 1e-12
        short = episode.to(dtype=torch.float32)
        same = replace(short, support=Examples(short.support.x[:, :1].expand_as(short.support.x), short.support.y))
        learner = learner.float()
        slopes = torch.autograd.grad(query_loss(learner, same).mean(), list(learner.parameters()), allow_unused=True)
        assert all(slope is None or bool(slope.isfinite().all()) for slope in slopes)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="kernel must be one of"):
        DeepKernel(SINES.spec, kernel="rbff")
    with pytest.raises(TypeError, match="marginal_likelihood_loss needs a DeepKernel; got ProtoNet"):
        marginal_likelihood_loss(ProtoNet(CLASSES.spec), draw(CLASSES))  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", KERNELS)
def test_features_of_a_large_common_offset_have_a_process(kernel: str) -> None:
    learner = DeepKernel(CLASSES.spec, encoder=nn.Identity(), kernel=kernel)
    episode = draw(CLASSES).to(None, torch.float32)
    support = replace(episode.support, x=episode.support.x + 1e4)
    assert bool(learner(support, episode.query.x + 1e4).logits.isfinite().all())


def test_wrong_encoders_and_noise_are_named() -> None:
    with pytest.raises(ValueError, match=r"an encoder must turn \(2, 4\) into \(2, D\); got \(2, 1, 4\)"):
        DeepKernel(CLASSES.spec, encoder=nn.Unflatten(1, (1, 4)))
    with pytest.raises(ValueError, match=r"noise must be a finite number > 0\.001"):
        DeepKernel(CLASSES.spec, noise=5e-4)


def test_a_shift_that_the_kernel_does_not_see_is_not_trained():
    spec = TaskSpec("regression", (2,), y_dim=1)
    for kernel, trained in (("rbf", False), ("linear", True)):
        learner = DeepKernel(spec, kernel=kernel)
        assert list(learner.encoder.modules())[-1].bias.requires_grad == trained
    own = nn.Sequential(nn.Linear(2, 3))
    assert DeepKernel(spec, encoder=own).encoder[0].bias.requires_grad
