"""What all metric heads share: masks, missing classes, coincident points, large episodes, inputs of every kind."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from gradient_helpers import CLASSES, SINES, draw, masking_gap, pictures, seeded, worst_slope_error
from metric_helpers import coincident, largest_tensor, many_classes, smooth
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metaicl.episode import Examples
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
from metaicl.learners.metric.simple_shot import SimpleShot
from metaicl.learners.metric.soft_kmeans import SoftKMeansProtoNet
from metaicl.learners.metric.svm_head import SVMHead
from metaicl.learners.reference.simple import NearestNeighbors
from metaicl.nets.backbones import Conv4
from metaicl.objectives import query_loss
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.gaussians import GaussianClasses

HEADS = {
    "MatchingNet": MatchingNet,
    "MatchingNet by distance": partial(MatchingNet, distance="euclidean"),
    "MatchingNet in full context": partial(MatchingNet, full_context=True),
    "RelationNet": partial(RelationNet, hidden=(12, 8)),
    "InductionNet": partial(InductionNet, n_slices=6),
    "FEAT": FEAT,
    "FEAT by cosine": partial(FEAT, distance="cosine"),
    "SoftKMeansProtoNet": partial(SoftKMeansProtoNet, steps=2),
    "LaplacianShot": partial(LaplacianShot, steps=4),
}
EACH = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
OTHERS = {
    "ProtoNet": ProtoNet,
    "RidgeHead": RidgeHead,
    "LogisticHead": LogisticHead,
    "SVMHead": SVMHead,
    "DeepKernel": DeepKernel,
    "Baseline": partial(Baseline, steps=5),
    "BaselinePlusPlus": partial(BaselinePlusPlus, steps=5),
    "SimpleShot": partial(SimpleShot, features="L2N"),
}
BY_MEANS = pytest.mark.parametrize(
    "name", ["ProtoNet", "SimpleShot", *(name for name in HEADS if not name.startswith("MatchingNet"))]
)
EVERY = pytest.mark.parametrize("head", (HEADS | OTHERS).values(), ids=HEADS | OTHERS)


@EACH
def test_masked_rows_are_absent(head) -> None:
    learner = seeded(lambda: head(CLASSES.spec, encoder=smooth()))
    assert masking_gap(learner, draw(CLASSES), 4) < 1e-12


@EACH
def test_meta_gradient_equals_finite_differences(head) -> None:
    learner = seeded(lambda: head(CLASSES.spec, encoder=smooth()))
    assert worst_slope_error(learner, draw(CLASSES)) <= 1e-5


@EACH
def test_a_class_without_a_row_has_finite_answers_and_gradients(head) -> None:
    learner, episode = seeded(lambda: head(CLASSES.spec, encoder=smooth())), draw(CLASSES)
    for gone in (episode.support.y == 1, episode.support.y >= 0):  # a class, and all of them
        support = Examples(episode.support.x, episode.support.y, ~gone)
        log_prob = learner(support, episode.query.x).log_prob(episode.query.y)
        assert bool(torch.isfinite(log_prob).all())
        parameters = [p for p in learner.parameters() if p.requires_grad]
        found = torch.autograd.grad(log_prob.sum(), parameters, allow_unused=True)
        assert all(bool(torch.isfinite(g).all()) for g in found if g is not None)


@BY_MEANS
def test_a_class_that_no_row_shows_takes_nothing_from_the_others(name: str) -> None:
    """Its probability is 1e-30 and a constant; the others are those of a learner that never heard of it."""
    head = (HEADS | OTHERS)[name]
    learner, episode = seeded(lambda: head(CLASSES.spec, encoder=smooth())), draw(CLASSES)
    fewer = seeded(lambda: head(CLASSES.spec.with_n_way(2), encoder=smooth()))
    fewer.load_state_dict(learner.state_dict())
    support = Examples(episode.support.x, episode.support.y, episode.support.y < 2)
    found, expected = (one(support, episode.query.x).logits.log_softmax(-1) for one in (learner, fewer))
    assert float((found[..., :2] - expected).detach().abs().max()) < 1e-12
    assert float((found[..., 2] / math.log(10) + 30).detach().abs().max()) < 1e-9
    parameters = [p for p in learner.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(found[..., 2].sum(), parameters, allow_unused=True, retain_graph=True)
    assert max(float(slope.abs().max()) for slope in slopes if slope is not None) < 1e-12
    slopes = torch.autograd.grad(found[..., 0].sum(), parameters, allow_unused=True)
    assert max(float(slope.abs().max()) for slope in slopes if slope is not None) > 1e-3
    assert all(bool(slope.isfinite().all()) for slope in slopes if slope is not None)


@EACH
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_derivatives_at_coincident_points_are_finite(head, value: float) -> None:
    spec = TaskSpec("classification", (4,), n_way=3)
    for encoder in (nn.Identity, smooth):
        found = coincident(seeded(lambda: head(spec, encoder=encoder())), value=value)  # noqa: B023
        assert len(found) > 2
        assert all(bool(torch.isfinite(leaf).all()) for leaf in found)


@EACH
def test_a_thousand_classes_need_no_numbers_for_class_query_and_feature(head) -> None:
    n_way, n_query, dim = 1000, 300, 16
    spec, support, queries = many_classes(n_way, dim=dim, n_query=n_query)
    learner = seeded(lambda: head(spec, encoder=nn.Identity())).float()
    with torch.no_grad(), largest_tensor() as found:
        answer = learner(support, queries)
    assert answer.probs.shape == (1, n_query, n_way)
    matrices = max(2 * n_way * n_way, n_way * 6 * dim)  # rows x classes; for InductionNet classes x slices x features
    chunk = 2**22 if isinstance(learner, (RelationNet, InductionNet)) else 0
    assert found[0] <= max(matrices, chunk)
    assert found[0] < n_query * n_way * dim


@EACH
def test_serves_images_tokens_and_vectors(head) -> None:
    images = pictures()
    learner = seeded(
        lambda: head(TaskSpec("classification", (1, 8, 8), "image", n_way=3), encoder=Conv4(1, channels=8))
    )
    assert learner(images.support, images.query.x).probs.shape == (2, 6, 3)
    spec = TaskSpec("classification", (5,), "tokens", n_way=3, vocabulary=20)
    tokens = torch.randint(0, 20, (2, 6, 5), generator=torch.Generator().manual_seed(0))
    answer = head(spec)(Examples(tokens, torch.arange(3).repeat(2).expand(2, -1)), tokens)
    assert answer.probs.shape == (2, 6, 3)
    assert head(CLASSES.spec)(draw(CLASSES).to(dtype=torch.float32).support, torch.zeros(3, 2, 4)).probs.shape == (
        3,
        2,
        3,
    )


@EACH
def test_a_fresh_learner_is_not_saturated(head) -> None:
    """At 20 ways its loss is near or below that of guessing, log 20 = 3.0 nats."""
    tasks = GaussianClasses(n_way=20, dim=16)
    episode = EpisodeStream(tasks, seed=0, split="train", n_shot=1, n_query=5, chunk_size=10)[0]
    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            loss = query_loss(head(tasks.spec).eval(), episode).mean()
        assert float(loss.detach()) < 3.3


@EACH
def test_regression_is_refused_and_says_who_serves_it(head) -> None:
    with pytest.raises(ValueError, match="serves classification, not regression; use RidgeHead instead"):
        head(SINES.spec)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(MatchingNet, distance="euclidian"), "did you mean 'euclidean'"),
        (partial(MatchingNet, temperature=0.0), "temperature must be a finite number > 0; got 0.0"),
        (partial(MatchingNet, full_context=True, reading_steps=0), "reading_steps must be an int >= 1; got 0"),
        (partial(RelationNet, hidden=()), "at least one layer"),
        (partial(RelationNet, hidden=(0,)), "hidden must be an int >= 1; got 0"),
        (partial(InductionNet, steps=0), "steps must be an int >= 1; got 0"),
        (partial(InductionNet, n_slices=0), "n_slices must be an int >= 1; got 0"),
        (partial(SoftKMeansProtoNet, steps=-1), "steps must be an int >= 0; got -1"),
        (partial(LaplacianShot, k=0), "k must be an int >= 1; got 0"),
        (partial(LaplacianShot, steps=-1), "steps must be an int >= 0; got -1"),
        (partial(LaplacianShot, strength=-1.0), "strength must be a finite number > 0; got -1.0"),
    ],
)
def test_wrong_settings_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(CLASSES.spec)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("RelationNet", "SoftKMeansProtoNet") else [pytest.mark.slow])
        for name in HEADS
    ],
)
def test_a_little_training_beats_the_nearest_neighbor(name: str) -> None:
    """Five shots of Gaussian classes: the nearest of all rows is right in .71, the nearest class mean in .836."""
    tasks = GaussianClasses(n_way=5, dim=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learner = (RelationNet if name == "RelationNet" else HEADS[name])(
            tasks.spec
        )  # with as many units as by default
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    stream = EpisodeStream(tasks, seed=0, split="train", n_shot=5, n_query=5, chunk_size=16)
    for index in range(200):
        optimizer.zero_grad()
        query_loss(learner, stream[index]).mean().backward()
        optimizer.step()
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=5, n_query=5, chunk_size=400)[0]
    with torch.no_grad():
        found, nearest = (
            (one.eval()(episode.support, episode.query.x).probs.argmax(-1) == episode.query.y).float().mean()
            for one in (learner, NearestNeighbors(tasks.spec, k=1))
        )
    assert float(found) > float(nearest) + 0.02


@EVERY
def test_copies_and_other_layouts_in_memory_give_the_same_answer(head) -> None:
    learner, episode = seeded(lambda: head(CLASSES.spec, encoder=smooth())), draw(CLASSES)
    support, x = episode.support, episode.query.x
    expected = learner(support, x).logits.detach()
    loaded = head(CLASSES.spec, encoder=smooth()).double().eval()
    loaded.load_state_dict(learner.state_dict())
    copies = (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner)), loaded)
    assert all(torch.equal(one(support, x).logits, expected) for one in copies)
    state = copy.deepcopy(tree_map(Tensor.detach, learner.adapt(support)))
    assert torch.equal(learner.predict(state, x).logits, expected)
    turned = [leaf.transpose(0, 1).contiguous().transpose(0, 1) for leaf in (support.x, support.y, x)]
    assert not turned[0].is_contiguous()
    again = learner(Examples(turned[0], turned[1]), turned[2]).logits.detach()
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-12)


@EVERY
def test_half_precision_and_empty_parts_are_served(head) -> None:
    learner, episode = seeded(lambda: head(CLASSES.spec, encoder=smooth())).bfloat16(), draw(CLASSES)
    episode = episode.to(dtype=torch.bfloat16)
    support, x = episode.support, episode.query.x
    assert learner(support, x[:, :0]).logits.shape == (3, 0, 3)
    answers = [learner(support, x), learner(support.rows(slice(0)), x)]
    assert all(bool(answer.probs.isfinite().all()) for answer in answers)
    slopes = torch.autograd.grad(
        answers[0].log_prob(episode.query.y).sum(), list(learner.parameters()), allow_unused=True
    )
    assert all(bool(slope.isfinite().all()) for slope in slopes if slope is not None)


@EACH
def test_an_encoder_that_is_no_module_is_named(head) -> None:
    with pytest.raises(TypeError, match=r"encoder or net of \w+ must be a module; .*FrozenFeatures"):
        head(CLASSES.spec, encoder=torch.tanh)


@pytest.mark.parametrize("head", [MatchingNet, SoftKMeansProtoNet, RidgeHead])
def test_building_a_learner_leaves_the_statistics_of_a_pretrained_encoder_alone(head) -> None:
    encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    encoder[1].eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    head(CLASSES.spec, encoder=encoder)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert [module.training for module in encoder.modules()] == [True, True, False, True]
