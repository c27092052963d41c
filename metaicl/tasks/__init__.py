"""All bundled task distributions by name, for users; inside the package they are imported from their modules."""

from metaicl.tasks.arrays import tasks_from_arrays, tasks_from_csv, tasks_from_dataframe
from metaicl.tasks.dictionary import DictionaryRegression
from metaicl.tasks.docstrings import Docstrings
from metaicl.tasks.dynamics import DynamicalSystem, InterleavedPairs
from metaicl.tasks.explanations import ExplanationWorld
from metaicl.tasks.functions import Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.tasks.glyphs import Glyphs
from metaicl.tasks.headlines import HuffPost
from metaicl.tasks.images import ImageClasses
from metaicl.tasks.intents import CLINC150, Banking77
from metaicl.tasks.linear import LinearRegression
from metaicl.tasks.mixture import TaskMixture
from metaicl.tasks.mnist import MNIST
from metaicl.tasks.omniglot import Omniglot
from metaicl.tasks.recall import AssociativeRecall
from metaicl.tasks.tabular import TabularClasses, TabularRegression
from metaicl.tasks.text import TextClasses
from metaicl.tasks.text_features import EmbeddedTexts

__all__ = [
    "CLINC150",
    "MNIST",
    "AssociativeRecall",
    "Banking77",
    "DictionaryRegression",
    "Docstrings",
    "DynamicalSystem",
    "EmbeddedTexts",
    "ExplanationWorld",
    "GaussianClasses",
    "Glyphs",
    "HuffPost",
    "ImageClasses",
    "InterleavedPairs",
    "LinearRegression",
    "Omniglot",
    "Sinusoid",
    "TabularClasses",
    "TabularRegression",
    "TaskMixture",
    "TextClasses",
    "tasks_from_arrays",
    "tasks_from_csv",
    "tasks_from_dataframe",
]
