"""scikit-learn estimators as learners, and learners as scikit-learn estimators."""

try:  # the estimators inherit from scikit-learn's classes, so it is needed here and not at the first call
    from metaicl.interop.sk_estimators import InContextClassifier, InContextRegressor
    from metaicl.interop.sk_learner import SklearnLearner
except ModuleNotFoundError as error:
    raise ImportError('scikit-learn is needed: pip install "metaicl[sklearn]"') from error

__all__ = ["InContextClassifier", "InContextRegressor", "SklearnLearner"]
