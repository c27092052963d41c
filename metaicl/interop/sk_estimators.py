"""Trained learners as scikit-learn estimators."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, check_X_y
from torch import Tensor
from torch.distributions import Distribution

from metaicl.episode import Examples
from metaicl.interop.sk_learner import to_numpy
from metaicl.learner import Learner
from metaicl.spec import Kind, TaskSpec


class _InContext(BaseEstimator):
    """What the two estimators share: rows to tensors, and the learner put into evaluation mode for the call."""

    learner: Learner

    def _adapt(self, X: Any, targets: Tensor) -> None:
        x = self._rows(X)
        self.n_features_in_ = x[0, 0].numel()
        with _evaluating(self.learner):
            self.state_ = self.learner.adapt(Examples(x, targets[None].to(x.device)))

    def _predict(self, X: Any) -> Distribution:
        check_is_fitted(self, "state_")
        _check_names(self, X, reset=False)
        x = self._rows(check_array(X, allow_nd=True))
        with _evaluating(self.learner):
            return self.learner.predict(self.state_, x)

    def _check_learner(self, kind: Kind) -> TaskSpec:
        if not isinstance(self.learner, Learner):
            raise TypeError(f"learner must be a metaicl Learner; got {type(self.learner).__name__}")
        if self.learner.spec.kind != kind:
            raise ValueError(
                f"{type(self).__name__} needs a learner of {kind} tasks; its spec says {self.learner.spec.kind}"
            )
        return self.learner.spec

    def _rows(self, X: np.ndarray) -> Tensor:
        """X (rows, features) or (rows, *x_shape) as one task (1, rows, *x_shape)."""
        spec = self.learner.spec
        expected, found = int(torch.Size(spec.x_shape).numel()), X.reshape(len(X), -1).shape[1]
        if found != expected:
            raise ValueError(
                f"X has {found} features, but {type(self).__name__} is expecting {expected} features as input: "
                f"the learner was trained on rows of shape {spec.x_shape}"
            )
        if spec.vocabulary is not None and not np.array_equal(X, np.round(X).clip(0, spec.vocabulary - 1)):
            raise ValueError(f"X must hold token ids, whole numbers in [0, {spec.vocabulary}), for this learner")
        parameter = next(self.learner.parameters(), torch.empty(0))
        dtype = torch.long if spec.x_kind == "tokens" else parameter.dtype
        rows = torch.as_tensor(np.ascontiguousarray(X)).to(parameter.device, dtype).reshape(1, len(X), *spec.x_shape)
        if not bool(rows.isfinite().all()):
            raise ValueError(f"X holds numbers that are too large for the learner's {dtype}; scale them")
        return rows


class InContextClassifier(ClassifierMixin, _InContext):
    """A trained learner as a scikit-learn classifier: `fit` adapts it to the data, no meta-training happens.

    The learner is left alone and may be shared. Rows should look like those it was trained on (scaling included).

    Args:
        learner: A trained learner of classification tasks. Data with fewer classes than its n_way is served by leaving
            the other outputs out.

    Attributes:
        classes_: The labels found by `fit`, sorted.
        n_features_in_: Features of a row.
        feature_names_in_: Names of the columns where `fit` was given a data frame; `predict` refuses other ones.
    """

    def __init__(self, learner: Learner) -> None:
        """Keep the learner, as scikit-learn's conventions ask; `fit` checks it."""
        self.learner = learner

    def fit(self, X: Any, y: Any) -> "InContextClassifier":
        """Adapt to labeled rows.

        Args:
            X: (rows, features) or (rows, *x_shape).
            y: Labels of any kind (rows,).

        Raises:
            ValueError: If there are more classes than the learner's n_way, or X does not fit its spec.
        """
        spec = self._check_learner("classification")
        _check_names(self, X, reset=True)
        X, y = check_X_y(X, y, allow_nd=True)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) > spec.output_size:
            raise ValueError(
                f"y holds {len(self.classes_)} classes; the learner tells at most n_way = {spec.output_size} apart"
            )
        self._adapt(X, torch.as_tensor(labels, dtype=torch.long))
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (rows, classes), columns as in `classes_`.

        Raises:
            FloatingPointError: If an answer is NaN or infinite.
        """
        logits: Tensor = self._predict(X).logits[0, :, : len(self.classes_)]  # type: ignore[attr-defined]  # Categorical
        _check_finite(logits)
        return logits.double().softmax(-1).cpu().numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest label of each row; see `predict_proba`."""
        likeliest = self.predict_proba(X).argmax(1)
        return self.classes_[likeliest]


class InContextRegressor(RegressorMixin, _InContext):
    """A trained learner as a scikit-learn regressor: `fit` adapts it to the data, no meta-training happens.

    The learner is left alone and may be shared. Rows and targets should look like those it was trained on.

    Args:
        learner: A trained learner of regression tasks.

    Attributes:
        n_features_in_: Features of a row.
        feature_names_in_: Names of the columns where `fit` was given a data frame; `predict` refuses other ones.
    """

    def __init__(self, learner: Learner) -> None:
        """Keep the learner, as scikit-learn's conventions ask; `fit` checks it."""
        self.learner = learner

    def fit(self, X: Any, y: Any) -> "InContextRegressor":
        """Adapt to rows with targets.

        Args:
            X: (rows, features) or (rows, *x_shape).
            y: Targets (rows,) or (rows, y_dim).

        Raises:
            ValueError: If y has another number of outputs than the learner, or X does not fit its spec.
        """
        spec = self._check_learner("regression")
        _check_names(self, X, reset=True)
        X, y = check_X_y(X, y, allow_nd=True, multi_output=True, y_numeric=True)
        targets = y.reshape(len(y), -1)
        if targets.shape[1] != spec.output_size:
            raise ValueError(f"y has {targets.shape[1]} outputs; the learner has y_dim = {spec.output_size}")
        self._vector = y.ndim == 1
        parameter = next(self.learner.parameters(), torch.empty(0))
        y = torch.as_tensor(targets).to(parameter.dtype)
        if not bool(y.isfinite().all()):
            raise ValueError(f"y holds numbers that are too large for the learner's {y.dtype}; scale them")
        self._adapt(X, y)
        return self

    def predict(self, X: Any, return_std: bool = False) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Means shaped like y in `fit`; with `return_std` also standard deviations.

        Raises:
            FloatingPointError: If a mean is NaN or infinite.
        """
        distribution = self._predict(X)
        _check_finite(distribution.mean)
        parts = [to_numpy(part[0]) for part in (distribution.mean, distribution.stddev)]
        mean, std = (part[:, 0] if self._vector else part for part in parts)
        return (mean, std) if return_std else mean


def _check_names(estimator: Any, X: Any, *, reset: bool) -> None:
    """Keep the names of the columns of a data frame, or compare them with those that were kept."""
    if hasattr(estimator, "_check_feature_names"):  # scikit-learn before 1.6
        estimator._check_feature_names(X, reset=reset)
        return
    from sklearn.utils.validation import validate_data

    validate_data(estimator, X, reset=reset, skip_check_array=True, ensure_2d=False)


def _check_finite(answer: Tensor) -> None:
    bad = int((~answer.isfinite()).sum())
    if bad:
        raise FloatingPointError(
            f"{bad} of {answer.numel()} numbers of the learner's answer are NaN or infinite. "
            "Are rows scaled like those it was trained on?"
        )


@contextmanager
def _evaluating(learner: Learner) -> Iterator[None]:
    modes = [(module, module.training) for module in learner.modules()]
    learner.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
