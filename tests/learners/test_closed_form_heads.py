"""Ridge, support vector and logistic heads: their solutions against numpy and scikit-learn, their meta-gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gradient_helpers import CLASSES, SINES, draw, masking_gap, seeded, worst_slope_error
from metric_helpers import uneven
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

from metaicl.collation import concatenate
from metaicl.convex.support_vectors import support_vector_weights
from metaicl.episode import Examples
from metaicl.functional import learned_positive
from metaicl.learners.metric.logistic_head import LogisticHead
from metaicl.learners.metric.ridge_head import RidgeHead, RowState, SumState
from metaicl.learners.metric.svm_head import SVMHead
from metaicl.nets.backbones import MLP
from metaicl.objectives import query_loss


def smooth(n_in: int = 4, dim: int = 6) -> nn.Module:
    return MLP((n_in, 8, dim), activation=nn.Tanh)


def features(learner, x: torch.Tensor) -> np.ndarray:
    """One task's embedded rows (N, D), divided by sqrt(D)."""
    with torch.no_grad():
        embedded = learner.encoder(x[0])
    return (embedded / embedded.shape[-1] ** 0.5).numpy()


@pytest.mark.parametrize("n_shot", [2, 5])  # rows below and above D + 1
def test_ridge_head_classifies_as_scikit_learn(n_shot: int) -> None:
    learner, episode = seeded(lambda: RidgeHead(CLASSES.spec, encoder=smooth())), draw(CLASSES, n_shot=n_shot)
    task = episode[0]
    x, queries = (
        np.pad(features(learner, part.x), ((0, 0), (0, 1)), constant_values=1) for part in (task.support, task.query)
    )
    targets = np.eye(3)[task.support.y[0].numpy()] - 1 / 3
    penalty = learned_positive(learner.raw_penalty, "classification").item()
    model = Ridge(alpha=penalty, fit_intercept=False, tol=1e-14).fit(x, targets)
    expected = torch.from_numpy(model.predict(queries)) * learner.log_temperature.exp().item()
    found = learner(task.support, task.query.x).logits[0]
    assert float((found - expected.log_softmax(-1)).detach().abs().max()) <= 1e-10
    assert isinstance(learner.adapt(task.support), RowState if n_shot == 2 else SumState)


@pytest.mark.parametrize("n_shot", [3, 12])
def test_ridge_head_regresses_as_the_bayesian_posterior(n_shot: int) -> None:
    """Prior N(0, s^2 / penalty) on the weights and noise of variance s^2, by the formulas with an inverse."""
    learner, episode = seeded(lambda: RidgeHead(SINES.spec, encoder=smooth(1))), draw(SINES, n_shot=n_shot)
    task = episode[0]
    x, queries = (
        np.pad(features(learner, part.x), ((0, 0), (0, 1)), constant_values=1) for part in (task.support, task.query)
    )
    penalty, noise = learned_positive(learner.raw_penalty).item(), learned_positive(learner.raw_noise)[0].item()
    covariance = np.linalg.inv(x.T @ x / noise**2 + penalty / noise**2 * np.eye(7))
    mean = queries @ covariance @ x.T @ task.support.y[0].numpy() / noise**2
    variance = noise**2 + np.einsum("qd,de,qe->q", queries, covariance, queries)
    found = learner(task.support, task.query.x)
    assert np.abs(found.mean[0].detach().numpy() - mean).max() <= 1e-10
    assert np.abs(found.stddev[0, :, 0].detach().numpy() ** 2 - variance).max() <= 1e-10


@pytest.mark.parametrize(("tasks", "n_in"), [(CLASSES, 4), (SINES, 1)])
def test_ridge_head_updated_row_by_row_equals_all_at_once(tasks, n_in: int) -> None:
    """Across the change from rows to sums, with masked rows."""
    learner, episode = seeded(lambda: RidgeHead(tasks.spec, encoder=smooth(n_in))), draw(tasks, n_shot=4)
    support = episode.support
    real = torch.ones_like(support.real)
    real[1, 1] = False
    support = Examples(support.x, support.y, real)
    more = draw(tasks, n_shot=2, n_query=8).query
    everything = concatenate(support, more)
    state = learner.adapt(everything.rows(slice(1)))
    for row in range(1, everything.n_rows):
        state = learner.update(state, everything.rows(slice(row, row + 1)))
    whole = learner.adapt(everything)
    assert isinstance(state, SumState)
    assert isinstance(whole, SumState)
    assert state.gram.shape == whole.gram.shape
    found, expected = (
        learner.predict(one, episode.query.x).mean if tasks is SINES else learner.predict(one, episode.query.x).logits
        for one in (state, whole)
    )
    assert float((found - expected).detach().abs().max()) <= 1e-10


def test_logistic_head_equals_scikit_learn() -> None:
    learner, episode = seeded(lambda: LogisticHead(CLASSES.spec, encoder=smooth())), draw(CLASSES)
    task = episode[0]
    x, queries = (
        np.pad(features(learner, part.x), ((0, 0), (0, 1)), constant_values=1) for part in (task.support, task.query)
    )
    model = LogisticRegression(
        C=1 / learned_positive(learner.raw_penalty, "classification").item(),
        fit_intercept=False,
        tol=1e-14,
        solver="newton-cholesky",
        max_iter=500,
    ).fit(x, task.support.y[0].numpy())
    expected = torch.from_numpy(queries @ model.coef_.T) * learner.log_temperature.exp().item()
    found = learner(task.support, task.query.x).logits[0]
    assert float((found - expected.log_softmax(-1)).detach().abs().max()) <= 1e-10


def test_svm_head_scores_with_the_machine_of_its_features() -> None:
    learner, episode = seeded(lambda: SVMHead(CLASSES.spec, encoder=smooth(), slack_penalty=3.0)), uneven()
    for task in range(3):
        keep, x = episode.support.real[task], episode.support.x[task]
        with torch.no_grad():
            rows, queries = learner.encoder(x[keep]) / 6**0.5, learner.encoder(episode.query.x[task]) / 6**0.5
        weights = support_vector_weights(rows[None], episode.support.y[task, keep][None], 3, slack_penalty=3.0)[0]
        expected = (queries @ weights * learner.log_temperature.exp()).log_softmax(-1)
        found = learner(episode.support, episode.query.x).logits[task]
        assert float((found - expected).detach().abs().max()) <= 1e-10


HEADS = {
    "svm": lambda: SVMHead(CLASSES.spec, encoder=smooth(), slack_penalty=2.0),
    "hard svm": lambda: SVMHead(CLASSES.spec, encoder=smooth(dim=20), slack_penalty=1e3),
    "logistic": lambda: LogisticHead(CLASSES.spec, encoder=smooth()),
    "ridge": lambda: RidgeHead(CLASSES.spec, encoder=smooth()),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("n_shot", [1, 4])
def test_meta_gradient_equals_finite_differences(name: str, n_shot: int) -> None:
    assert worst_slope_error(seeded(HEADS[name]), draw(CLASSES, n_shot=n_shot)) <= 1e-5


@pytest.mark.parametrize("name", HEADS)
def test_masked_rows_are_absent(name: str) -> None:
    assert masking_gap(seeded(HEADS[name]), draw(CLASSES), 4) < 1e-8


@pytest.mark.parametrize("name", HEADS)
def test_repeated_and_contradictory_rows_are_finite_in_float32(name: str) -> None:
    learner, episode = seeded(HEADS[name]).float(), draw(CLASSES).to(dtype=torch.float32)
    x = episode.support.x.clone()
    x[:, 1:] = x[:, :1]
    for scale in (1.0, 1e4):
        same = replace(episode, support=Examples(scale * x, episode.support.y))
        loss = query_loss(learner, same).mean()
        slopes = torch.autograd.grad(loss, list(learner.parameters()))
        assert bool(loss.isfinite())
        assert all(bool(slope.isfinite().all()) for slope in slopes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SVMHead(CLASSES.spec, slack_penalty=0), "slack_penalty must be a finite number > 0; got 0"),
        (lambda: SVMHead(CLASSES.spec, temperature=-1), "temperature must be a finite number > 0; got -1"),
        (lambda: RidgeHead(SINES.spec, temperature=0), "temperature must be a finite number > 0; got 0"),
        (lambda: LogisticHead(CLASSES.spec, penalty=0), "penalty must be a finite number > 0; got 0"),
        (lambda: SVMHead(SINES.spec), "SVMHead serves classification, not regression; use RidgeHead instead"),
        (lambda: LogisticHead(SINES.spec), "LogisticHead serves classification, not regression; use RidgeHead instead"),
    ],
)
def test_wrong_settings_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("n_shot", [2, 5])  # rows below and above D + 1
def test_ridge_head_serves_features_of_a_large_common_offset(n_shot: int) -> None:
    learner, episode = (
        RidgeHead(CLASSES.spec, encoder=nn.Identity()),
        draw(CLASSES, n_shot=n_shot).to(None, torch.float32),
    )
    support = replace(episode.support, x=episode.support.x + 1e4)
    assert bool(learner(support, episode.query.x + 1e4).logits.isfinite().all())


@pytest.mark.parametrize("n_shot", [2, 5])
def test_ridge_head_names_labels_out_of_range_and_does_not_read_those_of_masked_rows(n_shot: int) -> None:
    learner, support = seeded(lambda: RidgeHead(CLASSES.spec, encoder=smooth())), draw(CLASSES, n_shot=n_shot).support
    state, wrong = learner.adapt(support), support.y.clone()
    wrong[:, :2] = torch.tensor([-100, 3])
    for call in (learner.adapt, lambda rows: learner.update(state, rows)):
        with pytest.raises(
            ValueError,
            match=r"^examples.y must hold labels in \[0, n_way=3\); got \[-100, 3\], the first at task 0, row 0; mark",
        ):
            call(Examples(support.x, wrong))
        real = (wrong >= 0) & (wrong < 3)
        found, expected = (call(Examples(support.x, y, real)).weights for y in (wrong, wrong.clamp(0, 2)))
        assert torch.equal(found, expected)


class Named(nn.Identity):
    """Its output is in a dictionary, as of models elsewhere."""

    def forward(self, x):
        return {"features": x}


@pytest.mark.parametrize("head", [RidgeHead, SVMHead, LogisticHead])
def test_encoders_are_checked_when_a_head_is_built(head) -> None:
    for wrong, name in ((nn.LSTM(4, 3), "tuple"), (Named(), "dict")):
        with pytest.raises(TypeError, match=rf"an encoder must give a tensor \(rows, D\); got {name}\. Wrap it"):
            head(CLASSES.spec, encoder=wrong)
    with pytest.raises(ValueError, match=r"an encoder must turn \(2, 4\) into \(2, D\); got \(2, 1, 4\)"):
        head(CLASSES.spec, encoder=nn.Unflatten(1, (1, 4)))
    with pytest.raises(ValueError, match=r"must turn \(2, 4\) into \(2, D\); got the error: mat1 and mat2"):
        head(CLASSES.spec, encoder=nn.Linear(7, 3))
    with pytest.raises(TypeError, match=f"encoder or net of {head.__name__} must be a module; .*FrozenFeatures"):
        head(CLASSES.spec, encoder=torch.tanh)
    with pytest.raises(TypeError, match=r"must be a module; .*call it: Identity\(\)"):
        head(CLASSES.spec, encoder=nn.Identity)


@pytest.mark.parametrize("head", [RidgeHead, LogisticHead])
def test_a_penalty_below_the_floor_is_named(head) -> None:
    with pytest.raises(ValueError, match=r"penalty must be a finite number > 0\.001"):
        head(CLASSES.spec, penalty=1e-4)
