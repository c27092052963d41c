"""Retrieval augmentation: what is excluded, what the answer is, what the switches do, and saving."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from retrieval_helpers import clustered_rows, find_all, mixture_learner, share_of_the_same_task
from training_helpers import assert_resume_is_exact

from metaicl.episode import Episode, Examples
from metaicl.learner import Learner
from metaicl.learners.gradient.amortized_bayes import AmortizedBayes
from metaicl.learners.gradient.es_maml import ESMAML
from metaicl.learners.gradient.maml import MAML
from metaicl.learners.gradient.maml_plus_plus import MAMLPlusPlus
from metaicl.learners.gradient.reptile import Reptile
from metaicl.learners.incontext.neural_process import ConditionalNeuralProcess
from metaicl.learners.metric.baseline import Baseline, BaselinePlusPlus
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.metric.ridge_head import RidgeHead
from metaicl.learners.metric.simple_shot import SimpleShot
from metaicl.learners.reference.simple import Ridge
from metaicl.learners.retrieval.augmented import RetrievalAugmented
from metaicl.learners.retrieval.demonstrations import DemonstrationRetrieval
from metaicl.learners.retrieval.groups import asking_groups
from metaicl.learners.retrieval.raml import RAML
from metaicl.meta_training import meta_train
from metaicl.objectives import query_loss
from metaicl.reading import Reading
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.functions import Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.tasks.mixture import TaskMixture
from metaicl.tasks.rows import ArrayClasses
from metaicl.train_config import TrainConfig


@pytest.fixture(scope="module")
def finite_source() -> ArrayClasses:
    return clustered_rows()


def test_the_memory_holds_meta_training_classes_only(finite_source: ArrayClasses) -> None:
    learner = RetrievalAugmented(finite_source.spec, learner=ProtoNet, n_items=60)
    learner.prepare(finite_source, seed=0)
    classes = set(learner.bank.class_ids.tolist())
    assert classes <= set(range(18))
    assert len(classes) > 12
    rows = learner.bank.row_ids
    assert torch.equal(finite_source.source_classes[rows], learner.bank.class_ids[:, None].expand_as(rows))


def test_a_task_never_retrieves_its_own_classes(finite_source: ArrayClasses) -> None:
    learner = RetrievalAugmented(finite_source.spec, learner=ProtoNet, n_items=60, k=5)
    learner.prepare(finite_source, seed=0)
    episode = EpisodeStream(finite_source, seed=1, split="train", n_shot=2, n_query=3, chunk_size=20)[0]
    own = (learner.bank.class_ids[None, :, None] == episode.latents["class_ids"][:, None]).any(-1)  # (B, M)
    found = find_all(learner, episode.support)
    assert torch.equal(found, ~own)
    assert own.any()
    # Without the exclusion the own class is the nearest one, so the retrieved rows would differ.
    logits = learner(episode.support, episode.query.x).logits
    learner.sources.classes = torch.empty(0, dtype=torch.long)
    learner.bank.row_ids = torch.full_like(learner.bank.row_ids, -1)
    assert not torch.allclose(logits, learner(episode.support, episode.query.x).logits)


def test_rows_are_excluded_where_classes_are_unknown(finite_source: ArrayClasses) -> None:
    learner = RetrievalAugmented(finite_source.spec, learner=ProtoNet, n_items=60)
    learner.prepare(finite_source, seed=0)
    learner.sources.classes = torch.empty(0, dtype=torch.long)
    support = EpisodeStream(finite_source, seed=1, split="train", n_shot=2, n_query=1, chunk_size=10)[0].support
    expected = (support.ids[:, :, None, None] == learner.bank.row_ids).any(1).any(-1)
    assert torch.equal(find_all(learner, support), ~expected)
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
    learner = RetrievalAugmented(tasks.spec, learner=inner, n_items=16)
    learner.prepare(tasks, seed=0)
    torch.nn.init.constant_(learner.nothing, 1e4)
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=4, n_query=3, chunk_size=5)[0]
    ours = learner(episode.support, episode.query.x).log_prob(episode.query.y)
    theirs = inner(episode.support, episode.query.x).log_prob(episode.query.y)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_marginal_is_the_weighted_sum() -> None:
    tasks = Sinusoid()
    inner = ConditionalNeuralProcess(tasks.spec, dim=8).double()
    learner = RetrievalAugmented(tasks.spec, learner=inner, n_items=16, k=2).double()
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
    learner = RetrievalAugmented(tasks.spec, learner=ProtoNet, n_items=40)
    learner.prepare(tasks, seed=0)
    episode = EpisodeStream(tasks, seed=0, split="train", n_shot=1, n_query=3, chunk_size=5)[0]
    (-learner(episode.support, episode.query.x).log_prob(episode.query.y).mean()).backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in learner.similarity.parameters())


def test_state_dict_carries_the_memory() -> None:
    tasks = GaussianClasses(dim=4)
    learner = RetrievalAugmented(tasks.spec, learner=MAML, n_items=20)
    fresh = copy.deepcopy(learner)
    learner.prepare(tasks, seed=3)
    fresh.load_state_dict(learner.state_dict())
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=1, n_query=3, chunk_size=5)[0]
    assert torch.equal(fresh(episode.support, episode.query.x).logits, learner(episode.support, episode.query.x).logits)


def test_wrong_constructions_are_refused() -> None:
    spec = GaussianClasses(dim=4).spec
    with pytest.raises(ValueError, match="same spec"):
        RetrievalAugmented(spec, learner=ProtoNet(GaussianClasses(dim=5).spec))
    with pytest.raises(ValueError, match=r"weight must be in \(0, 1\)"):
        RetrievalAugmented(spec, learner=ProtoNet, weight=1.0)
    with pytest.raises(ValueError, match="did you mean 'frozen'"):
        RetrievalAugmented(spec, learner=ProtoNet, retriever="frosen")
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
    learner = RetrievalAugmented(tasks.spec, learner=AmortizedBayes(tasks.spec), k=2, n_items=20)
    learner.prepare(tasks, seed=0)
    state = learner.adapt(episode.support)
    assert torch.allclose(learner.penalty(state), learner.learner.penalty(state.inner).view(3, 3).mean(1))
    assert torch.equal(RetrievalAugmented(tasks.spec, learner=MAML(tasks.spec), k=2).penalty(state), torch.zeros(3))


@pytest.mark.parametrize("retriever", ["learned", "frozen", "random"])
def test_a_fixed_weight_is_shared_among_what_is_retrieved(retriever: str) -> None:
    tasks = GaussianClasses(dim=4)
    learner = RetrievalAugmented(tasks.spec, learner=ProtoNet, n_items=20, k=2, retriever=retriever, weight=0.3)
    learner.prepare(tasks, seed=0)
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=2, n_query=3, chunk_size=5)[0]
    weights = learner.adapt(episode.support).log_weights.exp()
    torch.testing.assert_close(weights[:, 0], torch.full((5,), 0.7))
    torch.testing.assert_close(weights[:, 1:].sum(1), torch.full((5,), 0.3))
    if retriever == "random":
        torch.testing.assert_close(weights[:, 1], weights[:, 2])
    (-learner(episode.support, episode.query.x).log_prob(episode.query.y).mean()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in learner.parameters())
    learner.bank.class_ids = torch.zeros_like(learner.bank.class_ids)
    learner.sources.classes = torch.zeros(1, dtype=torch.long)
    own = Examples(episode.support.x, episode.support.y, None, torch.zeros_like(episode.support.y))
    assert learner.adapt(own).log_weights[:, 0].eq(0).all()  # nothing is allowed, so nothing weighs


def test_random_retrieval_says_nothing_about_the_rows_but_is_repeatable() -> None:
    tasks = GaussianClasses(dim=4)
    learner = RetrievalAugmented(tasks.spec, learner=ProtoNet, n_items=400, k=1, retriever="random")
    learner.prepare(tasks, seed=0)
    support = EpisodeStream(tasks, seed=0, split="test", n_shot=2, n_query=1, chunk_size=200)[0].support
    asking = asking_groups(support, tasks.spec)
    keys = learner.search_keys(support.x[:, None], support.x[:, None, :, :0], asking)
    assert torch.equal(keys, learner.search_keys(support.x[:, None].flip(2), support.x[:, None, :, :0], asking.flip(2)))
    found = learner.bank.search(keys, 1).index.flatten()
    centers = learner.bank.values["x"].mean(1)
    asked = (asking.float() @ support.x).flatten(0, 1) / 2
    distance = (centers[found] - asked).norm(dim=1).mean()
    typical = torch.cdist(asked, centers).mean()
    assert abs(float(distance / typical) - 1) < 0.05
    assert len(found.unique()) > 200


def test_no_retriever_is_the_wrapped_learner() -> None:
    tasks = GaussianClasses(dim=4)
    inner = ProtoNet(tasks.spec)
    learner = RetrievalAugmented(tasks.spec, learner=inner, retriever="none")
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=2, n_query=3, chunk_size=5)[0]
    assert torch.equal(learner(episode.support, episode.query.x).logits, inner(episode.support, episode.query.x).logits)


def test_random_keys_of_texts_are_evenly_spread_unit_vectors() -> None:
    spec = TaskSpec("classification", (5,), "tokens", n_way=2, vocabulary=50)
    x = torch.randint(1, 50, (400, 2, 5), generator=torch.Generator().manual_seed(0))
    learner = RetrievalAugmented(spec, learner=ProtoNet, retriever="random", k=1)
    keys = learner.search_keys(x, learner.bank.keys.new_zeros(400, 2, 0), torch.ones(400, 2, dtype=torch.bool))
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(400))
    cosines = (keys @ keys.T)[~torch.eye(400, dtype=torch.bool)]
    assert abs(float(cosines.mean())) < 0.01
    assert abs(float(cosines.std()) * keys.shape[1] ** 0.5 - 1) < 0.05  # of directions drawn uniformly


@pytest.mark.parametrize("build", [Baseline, BaselinePlusPlus, SimpleShot, Reptile, ESMAML])
def test_a_training_rule_is_not_dropped_in_silence(build: Callable[[TaskSpec], Learner[Any]]) -> None:
    spec = GaussianClasses(dim=4).spec
    for wrapper in (RetrievalAugmented, DemonstrationRetrieval):
        for learner in (build, build(spec)):
            with pytest.raises(TypeError, match=f"{build.__name__} is trained by its own meta_gradients"):
                wrapper(spec, learner=learner)


def test_what_is_no_learner_is_refused() -> None:
    spec = GaussianClasses(dim=4).spec
    for wrapper in (RetrievalAugmented, DemonstrationRetrieval):
        with pytest.raises(TypeError, match="learner must be a learner or a factory spec -> learner; got 3"):
            wrapper(spec, learner=3)
        with pytest.raises(TypeError, match="the factory gave None"):
            wrapper(spec, learner=lambda spec: None)
    with pytest.raises(ValueError, match="an encoder goes with retriever 'learned' alone; got one for 'frozen'"):
        RetrievalAugmented(spec, learner=ProtoNet, retriever="frozen", encoder=torch.nn.Linear(4, 2))


def test_a_closed_form_reader_has_no_training_term() -> None:
    tasks = TaskMixture(n_pool=12)
    episode = EpisodeStream(tasks, seed=0, split="train", n_shot=1, n_query=2, chunk_size=3)[0]
    for wrapper in (RetrievalAugmented, DemonstrationRetrieval):
        learner = wrapper(tasks.spec, learner=partial(Ridge, penalty=0.1), k=2, n_items=12, rows_per_item=2)
        learner.prepare(tasks, seed=0)
        assert torch.equal(query_loss(learner.train(), episode), query_loss(learner.eval(), episode))


def test_a_learned_search_comes_to_find_what_helps() -> None:
    tasks = TaskMixture(n_pool=20, cue_scale=0.7)
    fixed = share_of_the_same_task(mixture_learner(tasks), tasks)
    learner = mixture_learner(tasks, search="learned")
    before = share_of_the_same_task(learner, tasks)
    config = TrainConfig(
        steps=60, meta_batch_size=8, n_shot=1, n_query=8, outer_lr=1e-2, schedule="cosine", validate_every=None
    )
    meta_train(learner, tasks, config, progress=False)
    assert share_of_the_same_task(learner, tasks) > max(before, fixed) + 0.2


def test_keys_of_a_learned_search_are_made_anew_in_turns() -> None:
    learner = mixture_learner(TaskMixture(n_pool=12), n_items=10, search="learned", n_refreshes=2)

    def fresh() -> list[bool]:
        x, y = learner.bank.values["x"], learner.bank.values["y"]
        code = learner._code(x, y, torch.ones(x.shape[:2], dtype=torch.bool))
        return torch.isclose(learner.bank.keys, code, atol=1e-6).all(1).tolist()

    def train() -> None:
        with torch.no_grad():
            for value in learner.similarity.parameters():
                value.add_(torch.randn_like(value))

    assert all(fresh())
    train()
    assert not any(fresh())
    for fraction, new in ((0.1, [0, 1]), (0.14, [0, 1]), (0.3, range(6)), (0.55, range(10))):
        learner.at(fraction)
        assert [item for item, is_new in enumerate(fresh()) if is_new] == list(new)
    train()
    learner.at(0.6)  # the second turn goes on where the first one ended
    assert [item for item, is_new in enumerate(fresh()) if is_new] == [1]
    learner.at(0.0)  # another training run
    assert all(fresh())
    train()
    learner.refresh_keys()
    assert all(fresh())


def test_a_killed_run_with_a_learned_search_goes_on_exactly(tmp_path: Path) -> None:
    tasks = TaskMixture(n_pool=12)

    def make() -> RetrievalAugmented:
        torch.manual_seed(0)
        return RetrievalAugmented(tasks.spec, learner=RidgeHead, n_items=12, k=2, search="learned", n_refreshes=3)

    config = TrainConfig(
        steps=6, meta_batch_size=2, n_shot=1, n_query=4, validate_every=3, n_validation=2, checkpoint_every=2
    )
    assert_resume_is_exact(make, tasks, config, tmp_path, cuts=(3,))


def test_a_learned_search_needs_a_learned_similarity() -> None:
    spec = GaussianClasses(dim=4).spec
    for retriever in ("frozen", "random", "none"):
        with pytest.raises(
            ValueError, match=f"search 'learned' goes with retriever 'learned' alone; got '{retriever}'"
        ):
            RetrievalAugmented(spec, learner=ProtoNet, retriever=retriever, search="learned")
    with pytest.raises(ValueError, match="search must be one of"):
        RetrievalAugmented(spec, learner=ProtoNet, search="best")


def test_a_source_gives_all_its_rows_and_names_the_setting_where_they_are_too_few() -> None:
    spec = TaskSpec("classification", (4,), n_way=2)
    splits = {"train": [0, 1, 2], "validation": [3, 4], "test": [5, 6]}
    tasks = ArrayClasses(
        spec, torch.randn(21, 4), labels=torch.arange(21) // 3, class_splits=splits, class_names=range(7)
    )
    for wrapper in (RetrievalAugmented, DemonstrationRetrieval):
        with pytest.raises(ValueError, match=r"rows_per_item = 4 needs .* has 3\. .*; lower rows_per_item"):
            wrapper(spec, learner=ProtoNet, k=1, n_items=3, rows_per_item=4).prepare(tasks, seed=0)
    whole = RetrievalAugmented(spec, learner=ProtoNet, k=1, n_items=3, rows_per_item=3)  # no row is left for a query
    whole.prepare(tasks, seed=0)
    assert sorted(whole.bank.row_ids.sort(1).values.tolist()) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert torch.equal(whole.bank.row_ids[:, 0] // 3, whole.bank.class_ids)
    learner = DemonstrationRetrieval(spec, learner=ProtoNet, k=1, n_items=3, rows_per_item=2)
    learner.prepare(tasks, seed=0)
    assert len(learner.retriever.bank) == 3


@pytest.mark.parametrize(
    "build",
    [
        partial(RetrievalAugmented, learner=ProtoNet),
        partial(RetrievalAugmented, learner=ProtoNet, search="learned"),
        partial(DemonstrationRetrieval, learner=ProtoNet),
        partial(RAML, retriever="learned", support_passages=True),
    ],
)
def test_small_memories_no_queries_and_no_tasks(build: Callable[..., Any], finite_source: ArrayClasses) -> None:
    learner = build(finite_source.spec, k=5, n_items=6)  # own classes excluded, fewer than k are left
    episode = EpisodeStream(finite_source, seed=0, split="train", n_shot=1, n_query=2, chunk_size=4)[0]
    with pytest.raises(ValueError, match="memory bank is empty"):
        learner(episode.support, episode.query.x)
    learner.prepare(finite_source, seed=0)
    query_loss(learner, episode).mean().backward()
    assert all(bool(value.grad.isfinite().all()) for value in learner.parameters() if value.grad is not None)
    assert learner(episode.support, episode.query.x[:, :0]).probs.shape == (4, 0, 3)
    assert learner(episode[:0].support, episode[:0].query.x).probs.shape == (0, 6, 3)


def test_masked_rows_are_no_content_of_a_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = GaussianClasses(dim=4)
    sample = tasks.sample

    def padded(*args: Any, **options: Any) -> Episode:
        episode = sample(*args, **options)
        return Episode(episode.support.pad(episode.support.n_rows + 1), episode.query)

    monkeypatch.setattr(tasks, "sample", padded)
    with pytest.raises(ValueError, match="supports of real rows in split 'train'; these tasks mask some"):
        RetrievalAugmented(tasks.spec, learner=ProtoNet).prepare(tasks, seed=0)


@pytest.mark.parametrize("retriever", ["learned", "frozen", "random"])
def test_a_float32_state_runs_in_a_float64_learner(retriever: str) -> None:
    tasks = GaussianClasses(dim=4)
    learner = RetrievalAugmented(tasks.spec, learner=ProtoNet, n_items=20, k=2, retriever=retriever)
    fresh = copy.deepcopy(learner).double()
    learner.prepare(tasks, seed=3)
    fresh.load_state_dict(learner.state_dict())
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=1, n_query=3, chunk_size=5)[0]
    wide = episode.to(dtype=torch.float64)
    found = fresh(wide.support, wide.query.x).logits
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), learner(episode.support, episode.query.x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("retriever", ["learned", "frozen", "random"])
@pytest.mark.parametrize("weight", [None, 0.5])
def test_a_class_without_a_support_row_gets_none(retriever: str, weight: float | None) -> None:
    tasks = GaussianClasses(n_way=3, dim=4)
    learner = RetrievalAugmented(tasks.spec, learner=ProtoNet, n_items=20, k=2, retriever=retriever, weight=weight)
    learner.prepare(tasks, seed=0)
    support = Examples(torch.randn(1, 4, 4), torch.tensor([[0, 1, 2, 2]]), torch.tensor([[True, True, False, False]]))
    augmented, log_weights, _ = learner._retrieve(Reading(learner.learner, None), support)
    assert not bool((augmented.real & (augmented.y == 2)).any())
    assert (augmented.real & (augmented.y == 1)).sum(1).tolist() == [1, 3, 3]
    assert bool(log_weights.isfinite().all())
    _, nothing, content = learner._retrieve(
        Reading(learner.learner, None), Examples(support.x[:, :0], support.y[:, :0])
    )
    assert nothing.exp().tolist() == [[1.0, 0.0, 0.0]]
    assert int(content.max()) == -1
    tasks = Sinusoid()
    learner = RetrievalAugmented(tasks.spec, learner=Ridge, n_items=20, k=2, retriever=retriever, weight=weight)
    learner.prepare(tasks, seed=0)
    empty = Examples(torch.zeros(1, 0, 1), torch.zeros(1, 0, 1))
    assert learner._retrieve(Reading(learner.learner, None), empty)[1].exp().tolist() == [[1.0, 0.0, 0.0]]
