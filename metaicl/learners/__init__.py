"""All bundled learners by name, for users; inside the package they are imported from their modules."""

from metaicl.learners.gradient.amortized_bayes import AmortizedBayes
from metaicl.learners.gradient.cavia import CAVIA
from metaicl.learners.gradient.es_maml import ESMAML
from metaicl.learners.gradient.imaml import IMAML
from metaicl.learners.gradient.maml import MAML
from metaicl.learners.gradient.maml_plus_plus import MAMLPlusPlus
from metaicl.learners.gradient.meta_curvature import MetaCurvature
from metaicl.learners.gradient.meta_sgd import MetaSGD
from metaicl.learners.gradient.proto_maml import ProtoMAML
from metaicl.learners.gradient.reptile import Reptile
from metaicl.learners.incontext.neural_process import ConditionalNeuralProcess
from metaicl.learners.incontext.transformer import CausalInContextTransformer, InContextTransformer
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.metric.ridge_head import RidgeHead
from metaicl.learners.reference.from_scratch import FromScratch
from metaicl.learners.reference.simple import Constant, Logistic, NearestNeighbors, Ridge
from metaicl.learners.retrieval.augmented import RetrievalAugmented

__all__ = [
    "CAVIA",
    "ESMAML",
    "IMAML",
    "MAML",
    "AmortizedBayes",
    "CausalInContextTransformer",
    "ConditionalNeuralProcess",
    "Constant",
    "FromScratch",
    "InContextTransformer",
    "Logistic",
    "MAMLPlusPlus",
    "MetaCurvature",
    "MetaSGD",
    "NearestNeighbors",
    "ProtoMAML",
    "ProtoNet",
    "Reptile",
    "RetrievalAugmented",
    "Ridge",
    "RidgeHead",
]
