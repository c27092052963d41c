"""Retrieval augmentation: ready-made banks, oracles, other precisions and long vocabularies."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from retrieval_helpers import OneAgainstTheRest, clustered_rows, find_all, mixture_learner, share_of_the_same_task
from torch import Tensor

from metaicl.episode import Examples
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.reference.simple import Ridge
from metaicl.learners.retrieval.augmented import RetrievalAugmented
from metaicl.learners.retrieval.bank import MemoryBank
from metaicl.learners.retrieval.content import content_ids
from metaicl.learners.retrieval.demonstrations import DemonstrationRetrieval
from metaicl.learners.retrieval.groups import asking_groups
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.tasks.mixture import TaskMixture
from metaicl.tasks.rows import ArrayClasses


@pytest.fixture(scope="module")
def finite_source() -> ArrayClasses:
    return clustered_rows()


def groups_of(tasks: ArrayClasses, split: Any, rows_per_item: int = 2) -> MemoryBank:
    """A ready-made bank of all rows of a split."""
    classes = tasks.class_splits[split]
    ids = torch.cat([(tasks.source_classes == c).nonzero().view(-1, rows_per_item) for c in classes])
    bank = MemoryBank()
    bank.add(torch.ones(len(ids), 1), {"x": tasks.rows(ids)}, rows=ids, classes=tasks.source_classes[ids[:, 0]])
    return bank


@pytest.mark.parametrize("settings", [{}, {"retriever": "frozen"}, {"retriever": "random"}, {"search": "learned"}])
def test_a_ready_made_bank_is_the_memory(finite_source: ArrayClasses, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    drawn = RetrievalAugmented(finite_source.spec, learner=ProtoNet, n_items=30, k=2, **settings)
    drawn.prepare(finite_source, seed=0)
    bank = copy.deepcopy(drawn.bank)
    torch.manual_seed(0)
    given = RetrievalAugmented(finite_source.spec, learner=ProtoNet, k=2, bank=bank, **settings)
    episode = EpisodeStream(finite_source, seed=1, split="train", n_shot=2, n_query=3, chunk_size=8)[0]
    given.prepare(finite_source, seed=5)
    assert len(given.bank) == 30
    for name in ("keys", "row_ids", "class_ids"):
        assert torch.equal(getattr(given.bank, name), getattr(bank, name))
    ours, theirs = (one(episode.support, episode.query.x).logits for one in (given, drawn))
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(given.sources.classes, drawn.sources.classes)
    bank.clear()  # it was copied
    assert len(given.bank) == 30
    fresh = RetrievalAugmented(finite_source.spec, learner=ProtoNet, k=2, **settings)
    fresh.load_state_dict(given.state_dict())
    assert torch.equal(fresh(episode.support, episode.query.x).logits, ours)


def test_rows_of_a_ready_made_bank_are_excluded_exactly(finite_source: ArrayClasses) -> None:
    bank = groups_of(finite_source, "train")
    learner = RetrievalAugmented(finite_source.spec, learner=ProtoNet, k=4, bank=bank)
    episode = EpisodeStream(finite_source, seed=1, split="train", n_shot=2, n_query=3, chunk_size=20)[0]
    own_rows = (episode.support.ids[:, :, None, None] == bank.row_ids).any(1).any(-1)
    assert torch.equal(find_all(learner, episode.support), ~own_rows)  # its source is not known yet
    state = learner.adapt(episode.support)
    asked = content_ids(episode.query.x, finite_source.spec)
    hits = (asked[:, :, None, None] == state.content[:, None]).any(-1)  # (B, Q, S)
    assert bool(hits.any())
    moved = state._replace(log_weights=state.log_weights.masked_fill(hits.any(1), 50.0))
    ours, theirs = (learner.predict(one, episode.query.x).logits for one in (state, moved))
    alone = hits.sum(1) == hits.shape[1]
    assert not bool(alone.any())
    only = hits.any(1).sum(1) == 1  # tasks with one such set: queries in it are answered as before
    task, query, _ = hits[only].nonzero(as_tuple=True)
    torch.testing.assert_close(ours[only][task, query], theirs[only][task, query])
    learner.prepare(finite_source, seed=0)
    own = (bank.class_ids[None, :, None] == episode.latents["class_ids"][:, None]).any(-1)
    assert torch.equal(find_all(learner, episode.support), ~own)


def test_a_wrong_bank_is_refused(finite_source: ArrayClasses) -> None:
    spec, bank = finite_source.spec, groups_of(finite_source, "train")
    build = partial(RetrievalAugmented, spec, learner=ProtoNet)
    with pytest.raises(TypeError, match="bank must be a MemoryBank or None; got dict"):
        build(bank={})
    with pytest.raises(ValueError, match="this one is empty"):
        build(bank=MemoryBank())
    for settings in ({"n_items": 3}, {"rows_per_item": 2}, {"k": 0}, {"retriever": "none"}):
        with pytest.raises(ValueError, match="has its own n_items and rows_per_item, and is of no use with k = 0"):
            build(bank=bank, **settings)
    with pytest.raises(ValueError, match=r"values 'x' \(M, R, 5\), .* got \(72, 2, 4\)"):
        RetrievalAugmented(GaussianClasses(dim=5).spec, learner=ProtoNet, bank=bank)
    with pytest.raises(ValueError, match=r"values 'y' \(M, R, 1\), .* got none"):
        RetrievalAugmented(TaskSpec("regression", (4,), y_dim=1), learner=Ridge, bank=bank)
    texts = TaskSpec("classification", (4,), "tokens", n_way=3, vocabulary=9)
    with pytest.raises(TypeError, match=r"must be token ids, long; got torch\.float32"):
        RetrievalAugmented(texts, learner=ProtoNet, bank=bank)
    words = MemoryBank()
    words.add(torch.ones(1, 1), {"x": torch.full((1, 2, 4), 9)})
    with pytest.raises(ValueError, match=r"in \[0, 9\); got 9 .. 9"):
        RetrievalAugmented(texts, learner=ProtoNet, bank=words)


def test_labels_that_are_not_the_classes_of_the_source() -> None:
    tasks = OneAgainstTheRest()
    learner = RetrievalAugmented(tasks.spec, learner=ProtoNet, k=3, n_items=80, retriever="frozen")
    learner.prepare(tasks, seed=0)
    episode = EpisodeStream(tasks, seed=1, split="train", n_shot=2, n_query=4, chunk_size=25)[0]
    support, x = episode.support, episode.query.x
    asking = asking_groups(support, tasks.spec)
    found = learner._find(support, learner.bank.keys.new_zeros(*support.y.shape, 0), asking, None)
    ids = learner.bank.row_ids[found.index].masked_fill(~found.real[..., None], -1).flatten(1)  # (B, any)
    own = tasks.source_classes[support.ids]
    assert int((ids >= 0).sum()) > 200
    assert not bool(((tasks.source_classes[ids][..., None] == own[:, None]) & (ids >= 0)[..., None]).any())
    among = (episode.query.ids[..., None] == ids[:, None]).any(-1)  # rest rows of classes that the support lacks
    assert int(among.sum()) > 5
    state = learner.adapt(support)
    held = (content_ids(x, tasks.spec)[:, :, None, None] == state.content[:, None]).any(-1).any(-1)
    assert torch.equal(held, among)


def test_an_oracle_finds_the_true_class_and_no_row_of_the_support(finite_source: ArrayClasses) -> None:
    bank = groups_of(finite_source, "test")
    learner = RetrievalAugmented(finite_source.spec, learner=ProtoNet, k=3, bank=bank, retriever="oracle")
    learner.prepare(finite_source, seed=0)
    episode = EpisodeStream(finite_source, seed=1, split="test", n_shot=1, n_query=2, chunk_size=20)[0]
    support = episode.support
    asking = asking_groups(support, finite_source.spec)
    found = learner._find(support, learner.bank.keys.new_zeros(*support.y.shape, 0), asking, None)
    classes = episode.latents["class_ids"][:, :, None]
    assert bool((bank.class_ids[found.index] == classes)[found.real].all())
    assert found.real.sum(-1).unique().tolist() == [3]  # four groups of two rows, one of which the support holds
    shown = bank.row_ids[found.index]
    assert not bool((shown[..., None] == support.ids[:, None, None, None]).any())
    answers = learner(support, episode.query.x)
    assert answers.probs.isfinite().all()
    # Without classes of meta-testing in the memory there is nothing to retrieve.
    drawn = RetrievalAugmented(finite_source.spec, learner=learner.learner, n_items=60, k=3, retriever="oracle")
    drawn.prepare(finite_source, seed=0)
    torch.testing.assert_close(drawn(support, episode.query.x).probs, learner.learner(support, episode.query.x).probs)
    train = EpisodeStream(finite_source, seed=1, split="train", n_shot=1, n_query=2, chunk_size=20)[0]
    assert bool((drawn.adapt(train.support).log_weights[:, 1:] > -torch.inf).any())


def test_an_oracle_function_says_what_belongs_together() -> None:
    tasks = TaskMixture(n_pool=20, cue_scale=0.7)
    oracle = mixture_learner(tasks, retriever="oracle", oracle=tasks.codes)
    assert share_of_the_same_task(oracle, tasks) > 0.95 > share_of_the_same_task(mixture_learner(tasks), tasks)
    with pytest.raises(ValueError, match=r"on regression needs oracle=\.\.\., a function"):
        mixture_learner(tasks, retriever="oracle")
    with pytest.raises(ValueError, match="an oracle goes with retriever 'oracle' alone"):
        mixture_learner(tasks, oracle=tasks.codes)
    fresh = GaussianClasses(dim=4)
    with pytest.raises(ValueError, match="needs a source that names classes"):
        RetrievalAugmented(fresh.spec, learner=ProtoNet, retriever="oracle").prepare(fresh, seed=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_query_is_kept_apart_in_every_precision(finite_source: ArrayClasses, dtype: torch.dtype) -> None:
    learner = DemonstrationRetrieval(
        finite_source.spec, learner=ProtoNet, k=2, n_items=40, rows_per_item=1, retriever="frozen"
    )
    learner.prepare(finite_source, seed=0)
    x = learner.retriever.bank.values["x"][:, 0][None].clone()
    itself = torch.arange(x.shape[1])[None, :, None]
    learner.to(dtype)
    with torch.no_grad():
        assert not bool((learner.retriever(x.to(dtype), 3).index == itself).any())
        learner.float()
        assert not bool((learner.retriever(x, 3).index == itself).any())  # as it was before
    spec = finite_source.spec
    rounded = x[0, :1].bfloat16()
    assert not torch.equal(content_ids(rounded, spec), content_ids(rounded.float(), spec))  # neighbors are no copies
    tasks = finite_source
    bank = groups_of(tasks, "train")
    wide = RetrievalAugmented(tasks.spec, learner=ProtoNet, k=2, bank=bank, retriever="frozen").to(dtype)
    names = wide.bank.values["content"]
    asked = content_ids(bank.values["x"].to(dtype), spec)
    assert bool((asked[..., None] == names[:, None]).any(-1).all())


def test_long_vocabularies_are_compared_word_by_word() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 6000, (1200, 2, 6), generator=generator)
    words[..., :2] = torch.randint(1, 40, (1200, 2, 2), generator=generator)  # so that many texts share a word
    spec = TaskSpec("classification", (6,), "tokens", n_way=3, vocabulary=6000)
    bank = MemoryBank()
    bank.add(torch.ones(len(words), 1), {"x": words})
    learner = RetrievalAugmented(spec, learner=ProtoNet, k=4, bank=bank, retriever="frozen")
    assert learner.bank.keys.shape == (1200, 1024)
    support = Examples(torch.randint(1, 40, (5, 6, 6), generator=generator), torch.arange(6).expand(5, 6) % 3)
    asking = asking_groups(support, spec)
    found = learner._find(support, torch.zeros(5, 6, 0), asking, None)

    def bag(rows: Tensor) -> Tensor:
        counts = torch.nn.functional.one_hot(rows, 6000).sum(-2).double()
        return torch.nn.functional.normalize(torch.nn.functional.normalize(counts, dim=-1).mean(-2), dim=-1)

    items = torch.cat([bag(part) for part in words.split(100)])
    asked = torch.stack([torch.stack([bag(support.x[b, support.y[b] == c]) for c in range(3)]) for b in range(5)])
    cosines = asked @ items.T
    step = 2**-12  # of the numbers compared, each of which is off by half of it: 12 words with weights of .3 or less
    torch.testing.assert_close(found.score.double(), cosines.gather(-1, found.index), rtol=0, atol=2 * step)
    assert torch.equal(found.score * 2**24, (found.score * 2**24).round())  # nothing was rounded since
    best = cosines.topk(4, -1).values
    assert float((found.score >= best[..., -1:] - 2 * step).float().mean()) > 0.95
