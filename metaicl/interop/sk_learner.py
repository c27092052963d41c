"""Any scikit-learn estimator as a reference learner."""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from torch import Tensor
from torch.distributions import Distribution

from metaicl.checks import check_positive
from metaicl.episode import Examples
from metaicl.functional import categorical, gaussian
from metaicl.learner import Learner, Traits
from metaicl.spec import Kind, NotServed, TaskSpec

_FLOOR = 1e-6  # smallest probability of a class: an estimator's 0 would cost an infinite loss
_MIN_SCALE = 1e-3
_FOLDS = 5


@dataclass(frozen=True)
class FittedTask:
    """A task's estimator.

    Args:
        estimator: Fitted, or None where there was nothing to fit: no row at all, or only one class.
        classes: Labels of the support.
        scale: Standard deviation of each output (y_dim,), in regression.
    """

    estimator: Any
    classes: np.ndarray | None = None
    scale: np.ndarray | None = None


class SklearnLearner(Learner[list[FittedTask]]):
    """Any scikit-learn estimator, fitted anew on the support of each task: a reference that never learned to learn.

    It is a Python loop over tasks on the CPU, and its state is a list of fitted estimators instead of tensors. Images
    and tokens are flattened; rows are sorted before fitting, so that the order of the support does not matter, and
    every `random_state` left at None becomes 0, so that asking twice gives the same answer.

    Classification answers with `predict_proba`, clipped to at least 1e-6 per class and normalized; classes that the
    support does not show get that floor. Regression answers with a Gaussian around `predict`, whose scale is the
    root mean square of cross-validated residuals on the support (leave-one-out up to 5 rows, else 5 interleaved
    folds), at least 1e-3; a single row says nothing about errors, its scale is 1. A task without rows is answered by
    the uniform distribution, or the standard normal.

    Args:
        spec: The tasks.
        estimator: A classifier with `predict_proba`, or a regressor; never fitted itself.
        scale: A fixed standard deviation for regression, which saves the cross-validation.

    Raises:
        TypeError: If the estimator is neither a classifier with `predict_proba` nor a regressor.
        NotServed: If it is a classifier and the tasks are regression, or the other way round.
        ValueError: If `scale` is no positive number.
    """

    traits: ClassVar[Traits] = Traits(trainable=False)

    def __init__(self, spec: TaskSpec, estimator: Any, *, scale: float | None = None) -> None:
        """Check that the estimator fits the spec, and fix its random states."""
        super().__init__(spec)
        served = {"classification": is_classifier(estimator), "regression": is_regressor(estimator)}
        name = type(estimator).__name__
        if not served[spec.kind]:
            raise (NotServed if any(served.values()) else TypeError)(
                f"estimator must be a scikit-learn {_noun(spec.kind)} for a {spec.kind} spec; got {name}"
            )
        self.scale = None if scale is None else check_positive("scale", scale)
        self.estimator: Any = clone(estimator)
        unset = [
            name for name, value in self.estimator.get_params().items() if _is_random_state(name) and value is None
        ]
        self.estimator.set_params(**dict.fromkeys(unset, 0))
        if spec.kind == "classification" and not _gives_probabilities(self.estimator):
            raise TypeError(f"{name} has no predict_proba; wrap it in sklearn.calibration.CalibratedClassifierCV")

    def adapt(self, support: Examples) -> list[FittedTask]:
        """Fit one clone of the estimator per task."""
        fitted = []
        for i in range(support.n_tasks):
            real = support.real[i]
            x, y = _matrix(support.x[i][real]), to_numpy(support.y[i][real])
            order = np.lexsort([*x.T[::-1], *np.atleast_2d(y.T)[::-1]])  # by y, then by x
            try:
                fitted.append(self._fit(x[order], y[order]))
            except ValueError as error:
                error.add_note(f"in task {i}, fitting {type(self.estimator).__name__} on {len(x)} support rows")
                raise
        return fitted

    def predict(self, state: list[FittedTask], x: Tensor) -> Distribution:
        """Ask each task's estimator."""
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        answers = [self._answer(task, _matrix(rows)) for task, rows in zip(state, x, strict=True)]
        first, second = (
            torch.as_tensor(np.stack(part), dtype=dtype, device=x.device) for part in zip(*answers, strict=True)
        )
        return categorical(first) if self.spec.kind == "classification" else gaussian(first, second)

    def _fit(self, x: np.ndarray, y: np.ndarray) -> FittedTask:
        if self.spec.kind == "classification":
            classes = np.unique(y)
            return FittedTask(self._fresh().fit(x, y) if len(classes) > 1 else None, classes)
        y_dim = y.shape[1]
        if not len(x):
            return FittedTask(None, scale=np.ones(y_dim))
        targets = y[:, 0] if y_dim == 1 else y  # most regressors want one output as a vector
        return FittedTask(self._fresh().fit(x, targets), scale=self._residual_scale(x, targets, y_dim))

    def _residual_scale(self, x: np.ndarray, y: np.ndarray, y_dim: int) -> np.ndarray:
        if self.scale is not None or len(x) < 2:
            return np.full(y_dim, 1.0 if self.scale is None else self.scale)
        folds = PredefinedSplit(np.arange(len(x)) % _FOLDS)
        try:
            residuals = y - cross_val_predict(self._fresh(), x, y, cv=folds)
        except ValueError as error:
            error.add_note(
                "the scale is estimated by fitting on fewer rows; give SklearnLearner(scale=...) to avoid it"
            )
            raise
        return np.sqrt(np.square(residuals.reshape(len(x), y_dim)).mean(0)).clip(min=_MIN_SCALE)

    def _fresh(self) -> Any:
        return clone(self.estimator)

    def _answer(self, task: FittedTask, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits (Q, C) twice, or mean and scale (Q, y_dim)."""
        n_outputs = self.spec.output_size
        if self.spec.kind == "regression":
            assert task.scale is not None
            mean = np.zeros((len(x), n_outputs)) if task.estimator is None else task.estimator.predict(x)
            return np.reshape(mean, (len(x), n_outputs)), np.tile(task.scale, (len(x), 1))
        assert task.classes is not None
        probabilities = np.zeros((len(x), n_outputs))
        if task.estimator is not None:
            probabilities[:, task.estimator.classes_.astype(int)] = task.estimator.predict_proba(x)
        elif len(task.classes):
            probabilities[:, int(task.classes[0])] = 1.0
        logits = np.log(probabilities.clip(min=_FLOOR))
        return logits, logits


def _gives_probabilities(estimator: Any) -> bool:
    """Whether there is a `predict_proba`, which some estimators, such as `StackingClassifier`, know when fitted."""
    if hasattr(estimator, "predict_proba"):
        return True
    probe: Any = clone(estimator)
    labels = np.arange(20) % 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fit that is for this question alone
        try:
            probe.fit(labels[:, None] + np.arange(20)[:, None] / 100, labels)
        except (ValueError, TypeError):  # it asks for other rows
            return False
    return hasattr(probe, "predict_proba")


def _noun(kind: Kind) -> str:
    return "classifier" if kind == "classification" else "regressor"


def _is_random_state(name: str) -> bool:
    return name == "random_state" or name.endswith("__random_state")


def to_numpy(values: Tensor) -> np.ndarray:
    """The values on the CPU, floating ones in double precision."""
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()


def _matrix(rows: Tensor) -> np.ndarray:
    return to_numpy(rows.flatten(1))
