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
from metaicl.learners.incontext.linear_transformer import CausalLinearTransformer, LinearTransformer
from metaicl.learners.incontext.looped_linear import LoopedLinearAttention
from metaicl.learners.incontext.memory import BareMemory, MemoryLearner
from metaicl.learners.incontext.neural_process import ConditionalNeuralProcess
from metaicl.learners.incontext.recurrent import RecurrentLearner
from metaicl.learners.incontext.sequence import InterleavedTransformer, LoopedTransformer, SequenceLearner
from metaicl.learners.incontext.softmax_attention import SoftmaxAttention
from metaicl.learners.incontext.transformer import CausalInContextTransformer, InContextTransformer
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.metric.ridge_head import RidgeHead
from metaicl.learners.reference.from_scratch import FromScratch
from metaicl.learners.reference.kernel import KernelRegression
from metaicl.learners.reference.lasso import Lasso
from metaicl.learners.reference.linear import (
    Averaging,
    GradientDescent,
    GradientDescentPlusPlus,
    LeastSquares,
    PreconditionedDescent,
    Procrustes,
)
from metaicl.learners.reference.recursive import RecursiveLeastSquares
from metaicl.learners.reference.simple import Constant, Logistic, NearestNeighbors, Ridge
from metaicl.learners.retrieval.augmented import RetrievalAugmented

__all__ = [
    "CAVIA",
    "ESMAML",
    "IMAML",
    "MAML",
    "AmortizedBayes",
    "Averaging",
    "BareMemory",
    "CausalInContextTransformer",
    "CausalLinearTransformer",
    "ConditionalNeuralProcess",
    "Constant",
    "FromScratch",
    "GradientDescent",
    "GradientDescentPlusPlus",
    "InContextTransformer",
    "InterleavedTransformer",
    "KernelRegression",
    "Lasso",
    "LeastSquares",
    "LinearTransformer",
    "Logistic",
    "LoopedLinearAttention",
    "LoopedTransformer",
    "MAMLPlusPlus",
    "MemoryLearner",
    "MetaCurvature",
    "MetaSGD",
    "NearestNeighbors",
    "PreconditionedDescent",
    "Procrustes",
    "ProtoMAML",
    "ProtoNet",
    "RecurrentLearner",
    "RecursiveLeastSquares",
    "Reptile",
    "RetrievalAugmented",
    "Ridge",
    "RidgeHead",
    "SequenceLearner",
    "SoftmaxAttention",
]
