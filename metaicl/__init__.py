"""Learners that learn to learn, trained and compared on the same episodes."""

from metaicl.comparison import compare
from metaicl.episode import Episode, Examples
from metaicl.evaluation import evaluate
from metaicl.learner import Learner, Traits
from metaicl.learners import (
    MAML,
    ConditionalNeuralProcess,
    InContextTransformer,
    ProtoNet,
    RetrievalAugmented,
    RidgeHead,
)
from metaicl.meta_training import meta_train
from metaicl.report import Report
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream, TaskDistribution
from metaicl.tasks import (
    Docstrings,
    GaussianClasses,
    Glyphs,
    ImageClasses,
    Omniglot,
    Sinusoid,
    TextClasses,
    tasks_from_arrays,
    tasks_from_csv,
)
from metaicl.testing import check_learner, check_tasks
from metaicl.train_config import TrainConfig
from metaicl.training import outer_loop

__all__ = [
    "MAML",
    "ConditionalNeuralProcess",
    "Docstrings",
    "Episode",
    "EpisodeStream",
    "Examples",
    "GaussianClasses",
    "Glyphs",
    "ImageClasses",
    "InContextTransformer",
    "Learner",
    "Omniglot",
    "ProtoNet",
    "Report",
    "RetrievalAugmented",
    "RidgeHead",
    "Sinusoid",
    "TaskDistribution",
    "TaskSpec",
    "TextClasses",
    "TrainConfig",
    "Traits",
    "check_learner",
    "check_tasks",
    "compare",
    "evaluate",
    "meta_train",
    "outer_loop",
    "tasks_from_arrays",
    "tasks_from_csv",
]
