"""The heads that are compared on one encoder, by name."""

from collections.abc import Callable, Mapping
from functools import partial

from metaicl import Learner, TaskSpec
from metaicl.learners import (
    FEAT,
    Baseline,
    BaselinePlusPlus,
    DeepKernel,
    InductionNet,
    LaplacianShot,
    LogisticHead,
    MatchingNet,
    ProtoNet,
    RelationNet,
    RidgeHead,
    SimpleShot,
    SoftKMeansProtoNet,
    SVMHead,
)

HEADS: Mapping[str, Callable[[TaskSpec], Learner]] = {
    "ProtoNet": ProtoNet,
    "ProtoNet, cosine": partial(ProtoNet, distance="cosine"),
    "MatchingNet": MatchingNet,
    "MatchingNet, full context": partial(MatchingNet, full_context=True),
    "RelationNet": RelationNet,
    "InductionNet": InductionNet,
    "R2D2 (ridge)": RidgeHead,
    "SVMHead": SVMHead,
    "LogisticHead": LogisticHead,
    "DeepKernel": DeepKernel,
    "FEAT": FEAT,
    "Baseline": Baseline,
    "BaselinePlusPlus": BaselinePlusPlus,
    "SimpleShot": SimpleShot,
    "soft k-means (transductive)": SoftKMeansProtoNet,
    "LaplacianShot (transductive)": LaplacianShot,
}
