"""Rows that are read in many contexts and embedded once: the same answers and slopes, for fewer rows."""

from functools import partial

import pytest
import torch
from torch import nn

from metaicl.embedding_losses import NearestNeighborScore, ProtoTriplet, WithAuxiliary
from metaicl.learners.metric.feat import FEAT
from metaicl.learners.metric.matching import MatchingNet
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.metric.ridge_head import RidgeHead
from metaicl.learners.metric.soft_kmeans import SoftKMeansProtoNet
from metaicl.learners.retrieval.augmented import RetrievalAugmented
from metaicl.learners.retrieval.demonstrations import DemonstrationRetrieval
from metaicl.nets.backbones import MLP, Conv4
from metaicl.objectives import query_loss
from metaicl.reading import Reading
from metaicl.task import TaskDistribution, derive_generator
from metaicl.tasks.images import ImageClasses
from metaicl.tasks.mixture import TaskMixture

WRAPPERS = {
    "demonstrations": partial(DemonstrationRetrieval, k=3, n_items=30, rows_per_item=2),
    "augmented": partial(RetrievalAugmented, k=2, n_items=30),
    "nothing retrieved": partial(RetrievalAugmented, retriever="none"),
}
ONE = WithAuxiliary(ProtoTriplet())


def images() -> ImageClasses:
    pixels = torch.rand(15, 6, 10, 10, generator=torch.Generator().manual_seed(0))
    return ImageClasses(pixels.flatten(0, 1).double(), torch.arange(15).repeat_interleave(6), n_way=2)


def loss_and_slopes(learner, tasks: TaskDistribution) -> list[torch.Tensor]:
    episode = tasks.sample(3, split="train", n_shot=2, n_query=2, generator=derive_generator(0)).to(dtype=torch.float64)
    losses = query_loss(learner, episode)
    parameters = [value for value in learner.parameters() if value.requires_grad]
    slopes = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
    return [losses, *(slope for slope in slopes if slope is not None)]


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("inner", [ProtoNet, MatchingNet, FEAT, RidgeHead])
def test_embedding_once_changes_no_answer_and_no_slope(wrapper, inner, monkeypatch):
    torch.manual_seed(0)
    tasks = TaskMixture(n_pool=6) if inner is RidgeHead else images()
    encoder = MLP((tasks.spec.x_shape[0], 8)) if inner is RidgeHead else Conv4(channels=4)
    learner = wrapper(tasks.spec, learner=inner(tasks.spec, encoder=encoder)).double()
    learner.prepare(tasks, seed=0)
    found = loss_and_slopes(learner, tasks)
    monkeypatch.setattr(Reading, "of", lambda learner: Reading(learner, None))
    for once, often in zip(found, loss_and_slopes(learner, tasks), strict=True):
        torch.testing.assert_close(once, often, rtol=1e-10, atol=1e-12)


def test_an_encoder_reads_each_row_once():
    tasks, counts = images(), []
    encoder = nn.Flatten()
    encoder.register_forward_hook(lambda _module, inputs, _output: counts.append(len(inputs[0])))
    learner = DemonstrationRetrieval(tasks.spec, learner=ProtoNet(tasks.spec, encoder=encoder), n_items=9)
    learner.prepare(tasks, seed=0)
    counts.clear()
    loss_and_slopes(learner, tasks)
    support = query = 3 * 2 * 2  # each with 5 demonstrations of 4 rows, and alone: 12 * 6 contexts of 8 rows
    assert support + query < sum(counts) <= support + query + len(learner.retriever.bank) * 4
    learner, both = ProtoNet(tasks.spec, encoder=encoder), WithAuxiliary(NearestNeighborScore(), 0.5, ONE)
    counts.clear()
    episode = tasks.sample(3, split="train", n_shot=2, n_query=2, generator=derive_generator(0))
    found = both(learner, episode)
    assert sum(counts) == support + query
    expected = ONE.auxiliary(learner, episode) + 0.5 * NearestNeighborScore()(learner, episode)
    torch.testing.assert_close(found, query_loss(learner, episode) + expected, rtol=1e-6, atol=0)


def test_a_learner_that_compares_queries_is_shown_them_as_they_are():
    spec = images().spec
    assert Reading.of(SoftKMeansProtoNet(spec)).embed is None
