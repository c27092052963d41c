"""Every bundled learner under training: exact resume, and one compiled graph for the whole meta-step."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_helpers import assert_resume_is_exact

from metaicl.episode import Episode
from metaicl.inner_loop.adaptive import Adam
from metaicl.inner_loop.rates import Rate
from metaicl.inner_loop.solvers import ConjugateGradient
from metaicl.learner import Learner, Prepares
from metaicl.learners import (
    CAVIA,
    ESMAML,
    FEAT,
    IMAML,
    KFO,
    MAML,
    AmortizedBayes,
    Baseline,
    BaselinePlusPlus,
    CausalInContextTransformer,
    ConditionalNeuralProcess,
    DeepKernel,
    InContextTransformer,
    InductionNet,
    LaplacianShot,
    LogisticHead,
    MAMLPlusPlus,
    MatchingNet,
    MetaCurvature,
    MetaSGD,
    ProtoMAML,
    ProtoNet,
    RelationNet,
    Reptile,
    RetrievalAugmented,
    RidgeHead,
    SimpleShot,
    SoftKMeansProtoNet,
    SVMHead,
)
from metaicl.meta_step import MetaStep
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream, TaskDistribution, derive_seed
from metaicl.tasks.functions import Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.train_config import TrainConfig

SINES, GAUSSIANS = Sinusoid(), GaussianClasses(n_way=3, dim=4)
FACTORIES: dict[str, Callable[[TaskSpec], Learner]] = {
    "MAML": partial(MAML, inner_steps=2),
    "FOMAML": partial(MAML, first_order=True),
    "MAML by Adam": partial(MAML, optimizer=Adam(Rate(0.05, "tensor"), eps=1e-2), inner_steps=2, checkpoint=True),
    "MetaSGD": MetaSGD,
    "MetaCurvature": MetaCurvature,
    "KFO": partial(KFO, inner_steps=2),
    "IMAML": partial(IMAML, inner_steps=3, solver=ConjugateGradient(2), tolerance=(0.1, 0.01)),
    "MAMLPlusPlus": partial(MAMLPlusPlus, inner_steps=2, multi_step_until=0.5),
    "CAVIA": CAVIA,
    "ProtoMAML": partial(ProtoMAML, inner_steps=2),
    "Reptile": partial(Reptile, inner_steps=2, batch_rows=3),
    "ESMAML": partial(ESMAML, n_pairs=3),
    "AmortizedBayes": partial(AmortizedBayes, inner_steps=2),
    "AmortizedBayes on factors": partial(AmortizedBayes, inner_steps=1, rank=2),
    "RidgeHead": RidgeHead,
    "SVMHead": SVMHead,
    "LogisticHead": LogisticHead,
    "DeepKernel": DeepKernel,
    "Baseline": partial(Baseline, steps=5),
    "BaselinePlusPlus": partial(BaselinePlusPlus, steps=5),
    "SimpleShot": partial(SimpleShot, n_mean_rows=12),
    "ProtoNet": ProtoNet,
    "MatchingNet": MatchingNet,
    "MatchingNet in full context": partial(MatchingNet, encoder=nn.Identity(), full_context=True, reading_steps=2),
    "RelationNet": RelationNet,
    "InductionNet": partial(InductionNet, n_slices=10),
    "FEAT": FEAT,
    "SoftKMeansProtoNet": SoftKMeansProtoNet,
    "LaplacianShot": partial(LaplacianShot, steps=3),
    "InContextTransformer": partial(InContextTransformer, dim=16, depth=2),
    "CausalInContextTransformer": partial(CausalInContextTransformer, dim=16, depth=2),
    "ConditionalNeuralProcess": partial(ConditionalNeuralProcess, dim=16),
    "RetrievalAugmented": partial(RetrievalAugmented, learner=RidgeHead, n_items=30),
}
SERVED = [
    (name, factory, tasks)
    for name, factory in FACTORIES.items()
    for tasks in (SINES, GAUSSIANS)
    if tasks.spec.kind in getattr(factory, "func", factory).traits.kinds
]
PAIRS = [pytest.param(factory, tasks, id=f"{name}-{type(tasks).__name__}") for name, factory, tasks in SERVED]

HEAVY = ("AmortizedBayes", "AmortizedBayes on factors", "MatchingNet in full context", "LaplacianShot")  # to compile


def compiled_pair(name: str, factory: Callable[[TaskSpec], Learner], tasks: TaskDistribution):
    """Every learner is compiled on one kind of task in the quick suite; the other kind and the heavy ones are slow."""
    kinds = getattr(factory, "func", factory).traits.kinds
    slow = name in HEAVY or (tasks is SINES and "classification" in kinds)
    return pytest.param(factory, tasks, id=f"{name}-{type(tasks).__name__}", marks=[pytest.mark.slow] if slow else [])


COMPILED = [  # own meta-gradients are no graph
    compiled_pair(name, factory, tasks)
    for name, factory, tasks in SERVED
    if not hasattr(getattr(factory, "func", factory), "meta_gradients")
]


def make(factory: Callable[[TaskSpec], Learner], tasks: TaskDistribution) -> Learner:
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed("bundled"))
        return factory(tasks.spec)


@pytest.mark.parametrize(("factory", "tasks"), PAIRS)
def test_resume_is_exact_at_three_cuts(factory, tasks: TaskDistribution, tmp_path: Path) -> None:
    config = TrainConfig(
        steps=8, meta_batch_size=4, n_shot=(2, 3), n_query=3, validate_every=3, n_validation=4, checkpoint_every=2,
        log_every=1, schedule="cosine", clip_norm=1.0,
    )  # fmt: skip
    assert_resume_is_exact(lambda: make(factory, tasks), tasks, config, tmp_path, cuts=(1, 4, 7))


@pytest.mark.parametrize(("factory", "tasks"), COMPILED)
def test_the_meta_step_is_one_graph_and_equals_the_eager_one(factory, tasks: TaskDistribution) -> None:
    learner = make(factory, tasks)
    if isinstance(learner, Prepares):
        learner.prepare(tasks, seed=0)
    episode = EpisodeStream(tasks, seed=0, split="train", n_shot=2, n_query=3, chunk_size=3)[0]
    expected = same_draws(MetaStep(learner), episode)
    torch.compiler.reset()
    compiled = MetaStep(learner, compile=True)
    found = same_draws(compiled, episode)
    assert compiled.is_compiled
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= 1e-5 * scale, name


def same_draws(step: MetaStep, episode: Episode) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed("draws"))
        return step(episode)[1]
