"""scikit-learn both ways: its estimators as learners, our learners as its estimators."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier, StackingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression as SkLinear
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.linear_model import Ridge as SkRidge
from sklearn.metrics import accuracy_score
from sklearn.model_selection import LeaveOneOut, cross_val_predict, cross_val_score
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from metaicl.episode import Examples
from metaicl.exam.randomness import global_generators_used
from metaicl.interop.sklearn import InContextClassifier, InContextRegressor, SklearnLearner
from metaicl.learners.gradient.maml import MAML
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.objectives import query_loss
from metaicl.spec import NotServed, TaskSpec
from metaicl.task import derive_generator
from metaicl.tasks.functions import LinearRegression
from metaicl.tasks.gaussians import GaussianClasses

GAUSSIANS = GaussianClasses(n_way=3, dim=4, radius=3.0)
LINEAR = LinearRegression(dim=3, noise=0.1)
TWO_OUTPUTS = TaskSpec("regression", (2,), y_dim=2)


@pytest.fixture(autouse=True)
def _same_nets():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def draw(tasks, n_tasks=4, n_shot=5, n_query=6):
    return tasks.sample(n_tasks, split="test", n_shot=n_shot, n_query=n_query, generator=derive_generator("sklearn"))


def test_probabilities_are_the_estimators():
    learner, episode = SklearnLearner(GAUSSIANS.spec, LogisticRegression()), draw(GAUSSIANS)
    found = learner(episode.support, episode.query.x)
    assert found.batch_shape == (4, 18)
    for i in range(4):
        fitted = LogisticRegression().fit(episode.support.x[i].double().numpy(), episode.support.y[i].numpy())
        expected = fitted.predict_proba(episode.query.x[i].double().numpy())
        assert np.abs(found.probs[i].numpy() - expected).max() < 1e-5
    assert not list(learner.parameters())
    assert learner.traits.trainable is False


def test_probabilities_never_vanish():
    learner = SklearnLearner(GAUSSIANS.spec, KNeighborsClassifier(1))
    episode = draw(GAUSSIANS)
    probabilities = learner(episode.support, episode.query.x).probs
    assert float(probabilities.min()) == pytest.approx(1e-6, rel=1e-3)
    assert float(probabilities.sum(-1).sub(1).abs().max()) < 1e-6
    assert query_loss(learner, episode).isfinite().all()


def test_missing_classes_single_class_and_no_rows():
    learner, episode = SklearnLearner(GAUSSIANS.spec, GaussianNB()), draw(GAUSSIANS, n_tasks=3)
    mask = torch.stack([episode.support.y[0] != 1, episode.support.y[1] == 2, torch.zeros(15, dtype=torch.bool)])
    support = Examples(episode.support.x, episode.support.y, mask)
    without_one, only_two, nothing = learner(support, episode.query.x).probs
    rows = mask[0].numpy()
    expected = GaussianNB().fit(episode.support.x[0].double().numpy()[rows], episode.support.y[0].numpy()[rows])
    expected = expected.predict_proba(episode.query.x[0].double().numpy())
    assert np.abs(without_one[:, [0, 2]].numpy() - expected).max() < 1e-5
    assert float(without_one[:, 1].max()) < 2e-6
    assert float(only_two[:, 2].min()) > 0.99999
    assert float((nothing - 1 / 3).abs().max()) < 1e-6


@pytest.mark.parametrize(
    "estimator", [RandomForestClassifier(5), make_pipeline(StandardScaler(), RandomForestClassifier(5))]
)
def test_same_answer_twice_and_in_any_order(estimator):
    learner, episode = SklearnLearner(GAUSSIANS.spec, estimator), draw(GAUSSIANS)
    first = learner(episode.support, episode.query.x).probs
    assert torch.equal(first, learner(episode.support, episode.query.x).probs)
    shuffled = episode.support.rows(torch.randperm(15, generator=derive_generator("order")))
    assert torch.equal(first, learner(shuffled, episode.query.x).probs)


@pytest.mark.parametrize("n_shot", [4, 5])
def test_regression_scale_is_leave_one_out(n_shot):
    learner, episode = SklearnLearner(LINEAR.spec, SkRidge(0.1)), draw(LINEAR, n_shot=n_shot)
    found = learner(episode.support, episode.query.x)
    for i in range(4):
        x, y = episode.support.x[i].double().numpy(), episode.support.y[i, :, 0].double().numpy()
        fitted = SkRidge(0.1).fit(x, y).predict(episode.query.x[i].double().numpy())
        assert np.abs(found.mean[i, :, 0].numpy() - fitted).max() < 1e-5
        residuals = y - cross_val_predict(SkRidge(0.1), x, y, cv=LeaveOneOut())
        assert found.stddev[i, 0, 0].item() == pytest.approx(np.sqrt(np.mean(residuals**2)), rel=1e-5)


def test_regression_scale_floor_fixed_single_row_and_none():
    support = Examples(torch.randn(1, 8, 2, generator=derive_generator("x")), torch.zeros(1, 8, 2))
    learner = SklearnLearner(TWO_OUTPUTS, SkLinear())
    assert learner(support, support.x).stddev.unique().tolist() == pytest.approx([1e-3])
    assert SklearnLearner(TWO_OUTPUTS, SkLinear(), scale=0.5)(support, support.x).stddev.unique().tolist() == [0.5]
    assert learner(support.rows(slice(0, 1)), support.x).stddev.unique().tolist() == [1.0]
    prior = learner(support.rows(slice(0, 0)), support.x)
    assert (prior.mean.unique().tolist(), prior.stddev.unique().tolist()) == ([0.0], [1.0])
    assert prior.batch_shape == (1, 8)


def test_masked_rows_are_absent_and_images_are_flattened():
    spec = TaskSpec("classification", (1, 4, 4), "image", n_way=2)
    generator = derive_generator("images")
    x, y = torch.rand(2, 6, 1, 4, 4, generator=generator), torch.tensor([0, 1, 0, 1, 0, 1]).expand(2, 6)
    learner = SklearnLearner(spec, KNeighborsClassifier(3))
    mask = (torch.arange(6) < 4).expand(2, 6)
    masked = learner(Examples(x, y, mask), x)
    removed = learner(Examples(x[:, :4], y[:, :4]), x)
    assert torch.equal(masked.logits, removed.logits)
    double = learner(Examples(x.double(), y, mask), x.double())
    assert double.logits.dtype == torch.float64


def test_wrong_estimators():
    with pytest.raises(NotServed, match="must be a scikit-learn classifier for a classification spec; got Ridge"):
        SklearnLearner(GAUSSIANS.spec, SkRidge())
    with pytest.raises(TypeError, match="must be a scikit-learn regressor for a regression spec; got StandardScaler"):
        SklearnLearner(LINEAR.spec, StandardScaler())
    with pytest.raises(TypeError, match=r"RidgeClassifier has no predict_proba.*CalibratedClassifierCV"):
        SklearnLearner(GAUSSIANS.spec, RidgeClassifier())
    with pytest.raises(ValueError, match="scale must be a finite number > 0"):
        SklearnLearner(LINEAR.spec, SkRidge(), scale=-1)
    episode = draw(LINEAR)
    with pytest.raises(ValueError, match="n_neighbors") as caught:
        SklearnLearner(LINEAR.spec, KNeighborsRegressor(5)).adapt(episode.support)
    assert any("SklearnLearner(scale=...)" in note for note in caught.value.__notes__)
    assert any("in task 0, fitting KNeighborsRegressor on 5 support rows" in note for note in caught.value.__notes__)


def test_estimators_that_know_of_probabilities_when_fitted_are_served():
    stack = StackingClassifier([("trees", RandomForestClassifier(2)), ("bayes", GaussianNB())], cv=2)
    assert not hasattr(stack, "predict_proba")
    assert not global_generators_used(lambda: SklearnLearner(GAUSSIANS.spec, stack))
    learner = SklearnLearner(GAUSSIANS.spec, stack)
    episode = draw(GAUSSIANS)
    answer = learner(episode.support, episode.query.x)
    assert (answer.probs.argmax(-1) == episode.query.y).float().mean() > 0.6


# Learners as estimators


def data(n_way=3):
    episode = draw(GAUSSIANS, n_tasks=1, n_shot=10, n_query=20)
    keep, keep_query = (part.y[0] < n_way for part in (episode.support, episode.query))
    names = np.array(["a", "b", "c"])
    X, y = episode.support.x[0][keep].numpy(), names[episode.support.y[0][keep].numpy()]
    return X, y, episode.query.x[0][keep_query].numpy(), names[episode.query.y[0][keep_query].numpy()]


def test_classifier_answers_as_the_learner():
    learner = ProtoNet(GAUSSIANS.spec)
    X, y, X_new, y_new = data()
    model = InContextClassifier(learner).fit(X, y)
    assert model.classes_.tolist() == ["a", "b", "c"]
    assert model.n_features_in_ == 4
    labels = torch.from_numpy(np.searchsorted(["a", "b", "c"], y))[None]
    expected = learner(Examples(torch.from_numpy(X)[None], labels), torch.from_numpy(X_new)[None]).probs[0]
    assert np.abs(model.predict_proba(X_new) - expected.detach().numpy()).max() < 1e-6
    assert model.score(X_new, y_new) == accuracy_score(y_new, model.predict(X_new)) > 0.8


def test_fewer_classes_leave_outputs_out_and_more_are_refused():
    X, y, X_new, _ = data(n_way=2)
    model = InContextClassifier(MAML(GAUSSIANS.spec, inner_steps=5)).fit(X, y)
    probabilities = model.predict_proba(X_new)
    assert probabilities.shape == (len(X_new), 2)
    assert np.abs(probabilities.sum(1) - 1).max() < 1e-12
    assert set(model.predict(X_new)) <= {"a", "b"}
    with pytest.raises(ValueError, match="y holds 5 classes; the learner tells at most n_way = 3 apart"):
        model.fit(X[:5], np.arange(5))


def test_scikit_learn_conventions():
    learner = ProtoNet(GAUSSIANS.spec)
    model = InContextClassifier(learner)
    X, y, X_new, y_new = data()
    with pytest.raises(NotFittedError):
        model.predict(X)
    assert model.get_params() == {"learner": learner}
    twin = clone(model)
    assert twin.learner is not learner
    assert not hasattr(twin, "state_")
    assert np.array_equal(twin.fit(X, y).predict(X_new), model.fit(X, y).predict(X_new))
    other = ProtoNet(GAUSSIANS.spec)
    assert model.set_params(learner=other).learner is other
    assert learner.training  # put back after every call
    assert cross_val_score(InContextClassifier(learner), X, y, cv=3).mean() > 0.7
    piped = make_pipeline(StandardScaler(), InContextClassifier(learner)).fit(X, y)
    assert piped.score(X_new, y_new) > 0.7
    with pytest.raises(ValueError, match="X has 3 features, but InContextClassifier is expecting 4 features"):
        model.fit(X, y).predict(X_new[:, :3])
    with pytest.raises(ValueError, match="NaN"):
        model.fit(np.full_like(X, np.nan), y)
    with pytest.raises(ValueError, match="continuous"):
        model.fit(X, np.linspace(0, 1, len(X)))


def test_columns_of_a_data_frame_keep_their_names():
    X, y, X_new, _ = data()
    frame, new = (pd.DataFrame(part, columns=list("abcd")) for part in (X, X_new))
    learner = ProtoNet(GAUSSIANS.spec)
    model = InContextClassifier(learner).fit(frame, y)
    assert model.feature_names_in_.tolist() == list("abcd")
    assert np.array_equal(model.predict(new), InContextClassifier(learner).fit(X, y).predict(X_new))
    with pytest.raises(ValueError, match="feature names should match those that were passed during fit"):
        model.predict(new[list("dcba")])
    assert not hasattr(model.fit(X, y), "feature_names_in_")
    regressor = InContextRegressor(MAML(LINEAR.spec)).fit(frame.iloc[:, : LINEAR.spec.x_shape[0]], X[:, 0])
    with pytest.raises(ValueError, match="feature names should match"):
        regressor.predict(frame.iloc[:, : LINEAR.spec.x_shape[0]][::-1].rename(columns={"a": "z"}))


@pytest.mark.parametrize("wrong", [4.9, -1, 99])
def test_token_ids_are_whole_numbers_of_the_vocabulary(wrong):
    spec = TaskSpec("classification", (3,), "tokens", n_way=2, vocabulary=10)
    X, y = np.array([[1, 2, 0], [3, 9, 0], [1, 4, 5], [3, 3, 3]]), np.array([0, 1, 0, 1])
    model = InContextClassifier(ProtoNet(spec)).fit(X, y)
    assert np.array_equal(model.predict_proba(X), model.predict_proba(X.astype(float)))
    with pytest.raises(ValueError, match=r"X must hold token ids, whole numbers in \[0, 10\)"):
        model.predict(np.array([[1, wrong, 0]]))


def test_numbers_that_are_too_large_and_answers_that_are_not_finite():
    x, y = np.random.default_rng(0).normal(size=(30, 2)), np.array(list("abc") * 10)
    learner = ProtoNet(TaskSpec("classification", (2,), n_way=3))
    fitted = InContextClassifier(learner).fit(x, y)
    with pytest.raises(ValueError, match=r"X holds numbers that are too large for the learner's torch.float32"):
        fitted.predict(np.full((2, 2), 1e39))
    fitted = InContextClassifier(learner).fit(1e20 * x, y)
    with pytest.raises(FloatingPointError, match="of the learner's answer are NaN or infinite"):
        fitted.predict(1e20 * x)
    regressor = InContextRegressor(MAML(TaskSpec("regression", (2,), y_dim=1)))
    with pytest.raises(ValueError, match=r"y holds numbers that are too large"):
        regressor.fit(x, np.full(30, 1e39))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        regressor.fit(1e20 * x, x[:, 0]).predict(1e20 * x)


def test_images_of_any_shape():
    spec = TaskSpec("classification", (1, 16, 16), "image", n_way=2)
    X = np.random.default_rng(0).random((6, 1, 16, 16), dtype=np.float32)
    y = np.array([0, 1] * 3)
    flat = InContextClassifier(ProtoNet(spec)).fit(X.reshape(6, -1), y)
    assert np.array_equal(flat.predict_proba(X), flat.predict_proba(X.reshape(6, -1)))


def test_regressor_answers_as_the_learner():
    learner, episode = MAML(LINEAR.spec, inner_steps=3), draw(LINEAR, n_tasks=1)
    X, y, X_new = episode.support.x[0].numpy(), episode.support.y[0].numpy(), episode.query.x[0].numpy()
    expected = learner(episode.support, episode.query.x)
    column = InContextRegressor(learner).fit(X, y)
    vector = InContextRegressor(learner).fit(X, y[:, 0])
    assert column.predict(X_new).shape == (6, 1)
    mean, std = vector.predict(X_new, return_std=True)
    assert mean.shape == std.shape == (6,)
    assert np.abs(mean - expected.mean[0, :, 0].detach().numpy()).max() < 1e-6
    assert np.abs(std - expected.stddev[0, :, 0].detach().numpy()).max() < 1e-6
    with pytest.raises(NotFittedError):
        InContextRegressor(learner).predict(X)
    with pytest.raises(ValueError, match="y has 2 outputs; the learner has y_dim = 1"):
        vector.fit(X, np.zeros((5, 2)))


def test_estimators_refuse_the_wrong_learner():
    X, y, _, _ = data()
    with pytest.raises(ValueError, match="needs a learner of classification tasks; its spec says regression"):
        InContextClassifier(MAML(LINEAR.spec)).fit(X, y)
    with pytest.raises(TypeError, match="learner must be a metaicl Learner; got str"):
        InContextRegressor("MAML").fit(X, np.zeros(len(X)))
