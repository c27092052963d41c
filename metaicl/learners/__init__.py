"""All bundled learners by name, for users; inside the package they are imported from their modules."""

from metaicl.learners.gradient.amortized_bayes import AmortizedBayes
from metaicl.learners.gradient.cavia import CAVIA
from metaicl.learners.gradient.es_maml import ESMAML
from metaicl.learners.gradient.imaml import IMAML
from metaicl.learners.gradient.kfo import KFO
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
from metaicl.learners.metric.baseline import Baseline, BaselinePlusPlus
from metaicl.learners.metric.deep_kernel import DeepKernel
from metaicl.learners.metric.feat import FEAT
from metaicl.learners.metric.induction import InductionNet
from metaicl.learners.metric.laplacian import LaplacianShot
from metaicl.learners.metric.logistic_head import LogisticHead
from metaicl.learners.metric.matching import MatchingNet
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.metric.relation import RelationNet
from metaicl.learners.metric.ridge_head import RidgeHead
from metaicl.learners.metric.rotation import RotationLabels
from metaicl.learners.metric.signatures import DistributionalSignatures
from metaicl.learners.metric.simple_shot import SimpleShot
from metaicl.learners.metric.soft_kmeans import SoftKMeansProtoNet
from metaicl.learners.metric.svm_head import SVMHead
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
from metaicl.learners.retrieval.channel import ChannelHead
from metaicl.learners.retrieval.demonstrations import DemonstrationRetrieval
from metaicl.learners.retrieval.explanations import ExplanationRetrieval
from metaicl.learners.retrieval.raml import RAML

__all__ = [
    "CAVIA",
    "ESMAML",
    "FEAT",
    "IMAML",
    "KFO",
    "MAML",
    "RAML",
    "AmortizedBayes",
    "Averaging",
    "BareMemory",
    "Baseline",
    "BaselinePlusPlus",
    "CausalInContextTransformer",
    "CausalLinearTransformer",
    "ChannelHead",
    "ConditionalNeuralProcess",
    "Constant",
    "DeepKernel",
    "DemonstrationRetrieval",
    "DistributionalSignatures",
    "ExplanationRetrieval",
    "FromScratch",
    "GradientDescent",
    "GradientDescentPlusPlus",
    "InContextTransformer",
    "InductionNet",
    "InterleavedTransformer",
    "KernelRegression",
    "LaplacianShot",
    "Lasso",
    "LeastSquares",
    "LinearTransformer",
    "Logistic",
    "LogisticHead",
    "LoopedLinearAttention",
    "LoopedTransformer",
    "MAMLPlusPlus",
    "MatchingNet",
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
    "RelationNet",
    "Reptile",
    "RetrievalAugmented",
    "Ridge",
    "RidgeHead",
    "RotationLabels",
    "SVMHead",
    "SequenceLearner",
    "SimpleShot",
    "SoftKMeansProtoNet",
    "SoftmaxAttention",
]
