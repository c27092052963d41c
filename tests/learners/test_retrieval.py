"""The memory: what is excluded, what is found, and that it survives saving."""

import copy

import numpy as np
import pytest
import torch

from metaicl.learners.gradient.amortized_bayes import AmortizedBayes
from metaicl.learners.gradient.maml import MAML
from metaicl.learners.gradient.maml_plus_plus import MAMLPlusPlus
from metaicl.learners.incontext.neural_process import ConditionalNeuralProcess
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.retrieval.augmented import RetrievalAugmented
from metaicl.learners.retrieval.bank import MemoryBank
from metaicl.objectives import query_loss
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.functions import Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.tasks.rows import ArrayClasses


def filled_bank(n_groups: int, dim: int, *, backend: str = "exact", chunk: int = 7) -> MemoryBank:
    keys = torch.randn(n_groups, dim, generator=torch.Generator().manual_seed(0))
    bank = MemoryBank(backend=backend, chunk=chunk)
    none = torch.full((n_groups, 1), -1)
    bank.fill(keys=keys, x=keys[:, None], y=keys.new_zeros(n_groups, 1, 0), ids=none, classes=none[:, 0])
    return bank


@pytest.fixture(scope="module")
def finite_source() -> ArrayClasses:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30).repeat_interleave(8)
    centers = 3 * torch.randn(30, 4, generator=generator)
    x = centers[labels] + 0.1 * torch.randn(240, 4, generator=generator)
    splits = {"train": list(range(18)), "validation": list(range(18, 24)), "test": list(range(24, 30))}
    spec = TaskSpec("classification", (4,), n_way=3)
    return ArrayClasses(spec, x, labels=labels, class_splits=splits, class_names=list(range(30)))


@pytest.mark.parametrize("backend", ["exact", "faiss"])
def test_search_equals_sorting(backend: str) -> None:
    bank = filled_bank(50, 6, backend=backend)
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(4, 2, 6, generator=generator)
    forbidden = torch.rand(4, 1, 50, generator=generator) < 0.3
    index, found = bank.search(queries, 5, forbidden=forbidden)
    scores = (queries @ bank.keys.T).masked_fill(forbidden, -np.inf).numpy()
    expected = np.argsort(-scores, axis=-1, kind="stable")[..., :5]
    assert bool(found.all())
    np.testing.assert_array_equal(index.numpy(), expected)


@pytest.mark.parametrize("backend", ["exact", "faiss"])
def test_too_few_allowed_groups_are_marked(backend: str) -> None:
    bank = filled_bank(6, 3, backend=backend)
    forbidden = torch.ones(1, 6, dtype=torch.bool)
    forbidden[0, 2] = False
    index, found = bank.search(torch.randn(1, 3), 3, forbidden=forbidden)
    assert found.tolist() == [[True, False, False]]
    assert index[0, 0].item() == 2


def test_bad_searches_are_refused() -> None:
    with pytest.raises(ValueError, match="empty; call prepare"):
        MemoryBank().search(torch.randn(1, 3), 1, forbidden=torch.zeros(1, 0, dtype=torch.bool))
    bank = filled_bank(4, 3)
    with pytest.raises(ValueError, match="at most the bank's 4 groups; got 5"):
        bank.search(torch.randn(1, 3), 5, forbidden=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be an int >= 1; got 0"):
        bank.search(torch.randn(1, 3), 0, forbidden=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="backend must be one of"):
        MemoryBank(backend="exactt")


def test_the_memory_holds_meta_training_classes_only(finite_source: ArrayClasses) -> None:
    learner = RetrievalAugmented(finite_source.spec, learner=ProtoNet, n_groups=60)
    learner.prepare(finite_source, seed=0)
    classes = set(learner.bank.classes.tolist())
    assert classes <= set(range(18))
    assert len(classes) > 12
    rows = learner.bank.ids
    assert torch.equal(finite_source.source_classes[rows], learner.bank.classes[:, None].expand_as(rows))


def test_a_task_never_retrieves_its_own_classes(finite_source: ArrayClasses) -> None:
    learner = RetrievalAugmented(finite_source.spec, learner=ProtoNet, n_groups=60, k=5)
    learner.prepare(finite_source, seed=0)
    episode = EpisodeStream(finite_source, seed=1, split="train", n_shot=2, n_query=3, chunk_size=20)[0]
    forbidden = learner._forbidden(episode.support)
    own = (learner.bank.classes[None, :, None] == episode.latents["class_ids"][:, None]).any(-1)
    assert torch.equal(forbidden, own)
    assert own.any()
    # Without the exclusion the own class is the nearest one, so the retrieved rows would differ.
    state = learner.adapt(episode.support)
    learner.row_classes = torch.empty(0, dtype=torch.long)
    learner.bank.ids = torch.full_like(learner.bank.ids, -1)
    assert not torch.allclose(state.inner, learner.adapt(episode.support).inner)


def test_rows_are_excluded_where_classes_are_unknown(finite_source: ArrayClasses) -> None:
    learner = RetrievalAugmented(finite_source.spec, learner=ProtoNet, n_groups=60)
    learner.prepare(finite_source, seed=0)
    learner.row_classes = torch.empty(0, dtype=torch.long)
    support = EpisodeStream(finite_source, seed=1, split="train", n_shot=2, n_query=1, chunk_size=10)[0].support
    expected = (support.ids[:, :, None, None] == learner.bank.ids).any(1).any(-1)
    assert torch.equal(learner._forbidden(support), expected)
    assert expected.any()


def test_k_zero_is_the_wrapped_learner() -> None:
    tasks = GaussianClasses(dim=4)
    inner = ProtoNet(tasks.spec)
    learner = RetrievalAugmented(tasks.spec, learner=inner, k=0)
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=2, n_query=3, chunk_size=5)[0]
    assert torch.equal(learner(episode.support, episode.query.x).logits, inner(episode.support, episode.query.x).logits)


def test_retrieving_nothing_with_certainty_is_the_wrapped_learner() -> None:
    tasks = Sinusoid()
    inner = ConditionalNeuralProcess(tasks.spec, dim=8)
    learner = RetrievalAugmented(tasks.spec, learner=inner, n_groups=16)
    learner.prepare(tasks, seed=0)
    torch.nn.init.constant_(learner.nothing, 1e4)
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=4, n_query=3, chunk_size=5)[0]
    ours = learner(episode.support, episode.query.x).log_prob(episode.query.y)
    theirs = inner(episode.support, episode.query.x).log_prob(episode.query.y)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_marginal_is_the_weighted_sum() -> None:
    tasks = Sinusoid()
    inner = ConditionalNeuralProcess(tasks.spec, dim=8).double()
    learner = RetrievalAugmented(tasks.spec, learner=inner, n_groups=16, k=2).double()
    learner.prepare(tasks, seed=0)
    learner.bank.double()
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=4, n_query=3, chunk_size=2)[0].to(dtype=torch.float64)
    state = learner.adapt(episode.support)
    probability = learner.predict(state, episode.query.x).log_prob(episode.query.y).exp()
    expected = torch.zeros_like(probability)
    for j in range(3):
        part = inner.predict(state.inner[j::3], episode.query.x)
        expected += state.log_weights[:, j : j + 1].exp() * part.log_prob(episode.query.y).exp()
    torch.testing.assert_close(probability, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state.log_weights.exp().sum(1), torch.ones(2, dtype=torch.float64))


def test_the_similarity_is_trained_through_the_marginal() -> None:
    tasks = GaussianClasses(dim=4)
    learner = RetrievalAugmented(tasks.spec, learner=ProtoNet, n_groups=40)
    learner.prepare(tasks, seed=0)
    episode = EpisodeStream(tasks, seed=0, split="train", n_shot=1, n_query=3, chunk_size=5)[0]
    (-learner(episode.support, episode.query.x).log_prob(episode.query.y).mean()).backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in learner.similarity.parameters())


def test_state_dict_carries_the_memory() -> None:
    tasks = GaussianClasses(dim=4)
    learner = RetrievalAugmented(tasks.spec, learner=MAML, n_groups=20)
    fresh = copy.deepcopy(learner)
    learner.prepare(tasks, seed=3)
    fresh.load_state_dict(learner.state_dict())
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=1, n_query=3, chunk_size=5)[0]
    assert torch.equal(fresh(episode.support, episode.query.x).logits, learner(episode.support, episode.query.x).logits)


def test_wrong_constructions_are_refused() -> None:
    spec = GaussianClasses(dim=4).spec
    with pytest.raises(ValueError, match="same spec"):
        RetrievalAugmented(spec, learner=ProtoNet(GaussianClasses(dim=5).spec))
    with pytest.raises(ValueError, match="k must be an int >= 0; got -1"):
        RetrievalAugmented(spec, learner=ProtoNet, k=-1)
    with pytest.raises(ValueError, match="serves classification, not regression; use RidgeHead"):
        RetrievalAugmented(Sinusoid().spec, learner=ProtoNet)


def test_training_terms_of_the_wrapped_learner_are_kept() -> None:
    tasks = GaussianClasses(dim=4)
    episode = EpisodeStream(tasks, seed=0, split="train", n_shot=2, n_query=2, chunk_size=3)[0]
    for wrapped in (AmortizedBayes(tasks.spec, inner_steps=1), MAMLPlusPlus(tasks.spec, inner_steps=2)):
        learner = RetrievalAugmented(tasks.spec, learner=wrapped, k=0)
        for mode in (True, False):
            learner.train(mode)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                expected = query_loss(wrapped, episode)
                torch.manual_seed(0)
                assert torch.equal(query_loss(learner, episode), expected)
    learner = RetrievalAugmented(tasks.spec, learner=AmortizedBayes(tasks.spec), k=2, n_groups=20)
    learner.prepare(tasks, seed=0)
    state = learner.adapt(episode.support)
    assert torch.allclose(learner.penalty(state), learner.learner.penalty(state.inner).view(3, 3).mean(1))
    assert torch.equal(RetrievalAugmented(tasks.spec, learner=MAML(tasks.spec), k=2).penalty(state), torch.zeros(3))
