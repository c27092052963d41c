"""All bundled learners by name, for users; inside the package they are imported from their modules."""

from metaicl.learners.gradient.maml import MAML
from metaicl.learners.incontext.neural_process import ConditionalNeuralProcess
from metaicl.learners.incontext.transformer import CausalInContextTransformer, InContextTransformer
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.metric.ridge_head import RidgeHead
from metaicl.learners.reference.from_scratch import FromScratch
from metaicl.learners.reference.simple import Constant, Logistic, NearestNeighbors, Ridge
from metaicl.learners.retrieval.augmented import RetrievalAugmented

__all__ = [
    "MAML",
    "CausalInContextTransformer",
    "ConditionalNeuralProcess",
    "Constant",
    "FromScratch",
    "InContextTransformer",
    "Logistic",
    "NearestNeighbors",
    "ProtoNet",
    "RetrievalAugmented",
    "Ridge",
    "RidgeHead",
]
