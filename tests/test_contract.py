"""Every bundled learner sits the public exam, on small families of both kinds. A new learner is one line."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from sklearn.linear_model import BayesianRidge, LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from metaicl.inner_loop.adaptive import Adam
from metaicl.inner_loop.rates import Rate
from metaicl.interop.sklearn import SklearnLearner
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
from metaicl.learners.incontext.sequence import InterleavedTransformer, LoopedTransformer
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
)
from metaicl.learners.reference.recursive import RecursiveLeastSquares
from metaicl.learners.reference.simple import Constant, Logistic, NearestNeighbors, Ridge
from metaicl.learners.retrieval.augmented import RetrievalAugmented
from metaicl.learners.retrieval.demonstrations import DemonstrationRetrieval
from metaicl.learners.retrieval.raml import RAML
from metaicl.nets.memory.layers import Mesa
from metaicl.tasks.arrays import tasks_from_arrays
from metaicl.tasks.functions import LinearRegression, Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.tasks.text import TextClasses
from metaicl.testing import parametrize_with_checks

retrieve = partial(RetrievalAugmented, n_items=24, rows_per_item=2, k=2)

LEARNERS = {
    "MAML": MAML,
    "FOMAML": partial(MAML, first_order=True, inner_steps=3),
    "ANIL": partial(MAML, adapt="head.*", inner_steps=2),
    "MAML by Adam": partial(MAML, optimizer=Adam(Rate(0.05, "tensor")), inner_steps=2, checkpoint=True),
    "MetaSGD": MetaSGD,
    "MetaCurvature": MetaCurvature,
    "KFO": partial(KFO, inner_steps=2),
    "IMAML": partial(IMAML, inner_steps=5),
    "MAMLPlusPlus": partial(MAMLPlusPlus, inner_steps=3),
    "CAVIA": CAVIA,
    "Reptile": Reptile,
    "ESMAML": partial(ESMAML, n_pairs=8),
    "AmortizedBayes": partial(AmortizedBayes, inner_steps=2),
    "RidgeHead": RidgeHead,
    "DeepKernel": DeepKernel,
    "InContextTransformer": partial(InContextTransformer, dim=32, depth=2),
    "CausalInContextTransformer": partial(CausalInContextTransformer, dim=32, depth=2),
    "LinearTransformer": partial(LinearTransformer, depth=2),
    "CausalLinearTransformer": partial(CausalLinearTransformer, depth=2, heads=2),
    "SoftmaxAttention": SoftmaxAttention,
    "InterleavedTransformer": partial(InterleavedTransformer, dim=32, depth=2),
    "LoopedTransformer": partial(LoopedTransformer, dim=32, loops=3, window=2),
    "MemoryLearner": partial(MemoryLearner, dim=32),
    "BareMemory": partial(BareMemory, memory=Mesa),
    "RecurrentLearner": partial(RecurrentLearner, dim=32),
    "ConditionalNeuralProcess": partial(ConditionalNeuralProcess, dim=32),
    "Retrieval(MAML)": partial(retrieve, learner=MAML),
    "Retrieval(CNP)": partial(retrieve, learner=partial(ConditionalNeuralProcess, dim=32), retriever="frozen"),
    "DemonstrationRetrieval": partial(
        DemonstrationRetrieval, learner=partial(ConditionalNeuralProcess, dim=32), k=2, n_items=24, rows_per_item=2
    ),
    "Constant": Constant,
    "NearestNeighbors": partial(NearestNeighbors, k=2),
    "Ridge": Ridge,
    "Logistic": Logistic,
    "FromScratch": partial(FromScratch, steps=10),
}

REGRESSORS = {
    "LoopedLinearAttention": LoopedLinearAttention,
    "sklearn ridge": partial(SklearnLearner, estimator=BayesianRidge()),
    "GradientDescent": partial(GradientDescent, steps=3, lr=0.1, momentum=0.5),
    "GradientDescentPlusPlus": partial(GradientDescentPlusPlus, steps=3, lr=0.1, gamma=[0.1, 0.2, 0.3]),
    "Averaging": Averaging,
    "LeastSquares": LeastSquares,
    "PreconditionedDescent": partial(PreconditionedDescent, steps=3, alpha=0.05, beta=0.2, penalty=0.1),
    "Lasso": partial(Lasso, penalty=0.05, steps=50),
    "RecursiveLeastSquares": partial(RecursiveLeastSquares, penalty=0.1),
    "KernelRegression": KernelRegression,
}
CLASSIFIERS = {
    "ProtoNet": ProtoNet,
    "SVMHead": SVMHead,
    "LogisticHead": LogisticHead,
    "Baseline": partial(Baseline, steps=20),
    "BaselinePlusPlus": partial(BaselinePlusPlus, steps=20),
    "SimpleShot": partial(SimpleShot, n_mean_rows=16),
    "ProtoNet by cosine": partial(ProtoNet, distance="cosine"),
    "ProtoMAML": partial(ProtoMAML, inner_steps=2),
    "MatchingNet": MatchingNet,
    "MatchingNet in full context": partial(MatchingNet, full_context=True),
    "RelationNet": RelationNet,
    "InductionNet": partial(InductionNet, n_slices=20),
    "FEAT": FEAT,
    "SoftKMeansProtoNet": SoftKMeansProtoNet,
    "LaplacianShot": partial(LaplacianShot, steps=5),
    "Retrieval(ProtoNet)": partial(retrieve, learner=ProtoNet),
    "RAML": partial(RAML, k=2, n_items=48, retriever="learned"),
    "sklearn logistic": partial(SklearnLearner, estimator=LogisticRegression()),
    "sklearn k-NN": partial(SklearnLearner, estimator=KNeighborsClassifier(1)),
}


def source_rows():
    """Classes of an array, whose episodes name the source row of every example."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24).repeat_interleave(8)
    centers = torch.randn(24, 4, generator=generator)
    x = centers[labels] + 0.3 * torch.randn(len(labels), 4, generator=generator)
    return tasks_from_arrays(x, labels, n_way=3)


def images():
    """Classes of small images."""
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(12).repeat(6)
    centers = torch.rand(12, 1, 16, 16, generator=generator)
    x = (centers[labels] + 0.1 * torch.rand(len(labels), 1, 16, 16, generator=generator)) / 1.1
    return tasks_from_arrays(x.numpy(), labels, n_way=2)


def sentences():
    """Classes of short sentences."""
    nouns = ["cat", "dog", "bird", "fish", "horse", "cow", "sheep", "goat", "frog", "toad", "snake", "newt"]
    verbs = ["runs", "sleeps", "eats", "waits", "jumps", "looks"]
    texts = [f"the {noun} {verb} now" for noun in nouns for verb in verbs]
    return TextClasses(texts, np.repeat(nouns, len(verbs)), n_way=2, max_tokens=6, vocabulary=64)


TASKS = {
    "sinusoid": Sinusoid(),
    "linear": LinearRegression(dim=3, noise=0.1),
    "gaussians": GaussianClasses(n_way=3, dim=4),
    "arrays": source_rows(),
}
EXPECTED = {
    "Constant-gaussians": {"support_used": "balanced labels have the same frequencies in every task"},
    "Constant-arrays": {"support_used": "balanced labels have the same frequencies in every task"},
}

REFERENCES = {name: tasks.references() for name, tasks in TASKS.items()}


@parametrize_with_checks(LEARNERS, TASKS, expected_failures=EXPECTED)
def test_bundled_learner_keeps_the_contract(check: Callable[[], None]) -> None:
    check()


@parametrize_with_checks(CLASSIFIERS, {name: TASKS[name] for name in ("gaussians", "arrays")})
def test_bundled_classifier_keeps_the_contract(check: Callable[[], None]) -> None:
    check()


@parametrize_with_checks(REGRESSORS, {name: TASKS[name] for name in ("sinusoid", "linear")})
def test_bundled_regressor_keeps_the_contract(check: Callable[[], None]) -> None:
    check()


@parametrize_with_checks(
    {name: LEARNERS[name] for name in LEARNERS if name not in ("ANIL", "Ridge", "Constant")}
    | {"DistributionalSignatures": DistributionalSignatures},
    {"tokens": sentences()},
)
def test_bundled_learner_keeps_the_contract_on_tokens(check: Callable[[], None]) -> None:
    check()


@parametrize_with_checks(
    {name: LEARNERS[name] for name in ("MAML", "CAVIA", "RidgeHead", "CausalInContextTransformer", "Logistic")},
    {"images": images()},
)
def test_bundled_learner_keeps_the_contract_on_images(check: Callable[[], None]) -> None:
    check()


@parametrize_with_checks(
    {"Retrieval(oracle)": partial(retrieve, learner=ProtoNet, retriever="oracle")}, {"arrays": TASKS["arrays"]}
)
def test_oracle_keeps_the_contract_where_rows_have_classes(check: Callable[[], None]) -> None:
    check()


@parametrize_with_checks(
    {f"{name} {which}": learner for name, found in REFERENCES.items() for which, learner in found.items()}, TASKS
)
def test_bayes_reference_keeps_the_contract(check: Callable[[], None]) -> None:
    check()
