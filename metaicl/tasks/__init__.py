"""All bundled task distributions by name, for users; inside the package they are imported from their modules."""

from metaicl.tasks.arrays import tasks_from_arrays, tasks_from_csv, tasks_from_dataframe
from metaicl.tasks.dictionary import DictionaryRegression
from metaicl.tasks.docstrings import Docstrings
from metaicl.tasks.dynamics import DynamicalSystem, InterleavedPairs
from metaicl.tasks.functions import Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.tasks.glyphs import Glyphs
from metaicl.tasks.images import ImageClasses
from metaicl.tasks.intents import CLINC150, Banking77
from metaicl.tasks.linear import LinearRegression
from metaicl.tasks.omniglot import Omniglot
from metaicl.tasks.recall import AssociativeRecall
from metaicl.tasks.tabular import TabularClasses, TabularRegression
from metaicl.tasks.text import TextClasses

__all__ = [
    "CLINC150",
    "AssociativeRecall",
    "Banking77",
    "DictionaryRegression",
    "Docstrings",
    "DynamicalSystem",
    "GaussianClasses",
    "Glyphs",
    "ImageClasses",
    "InterleavedPairs",
    "LinearRegression",
    "Omniglot",
    "Sinusoid",
    "TabularClasses",
    "TabularRegression",
    "TextClasses",
    "tasks_from_arrays",
    "tasks_from_csv",
    "tasks_from_dataframe",
]
