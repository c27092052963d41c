"""RAML: what is in the memory, what a query may find, what the passages change."""

import copy

import pytest
import torch
from test_contract import sentences

from metaicl.episode import Episode, Examples
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.retrieval.content import content_ids
from metaicl.learners.retrieval.exclusion import Exclusion
from metaicl.learners.retrieval.raml import RAML
from metaicl.learners.retrieval.retriever import Retriever
from metaicl.nets.backbones import BagOfWords
from metaicl.nets.text import WordTransformer
from metaicl.nets.text_features import TfIdf
from metaicl.objectives import query_loss
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.functions import Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.testing import parametrize_with_checks

TEXTS = sentences()
SWITCHES = {
    "frozen": {},
    "learned": {"retriever": "learned"},
    "random": {"retriever": "random"},
    "none": {"retriever": "none"},
    "alone, by the mean": {"residual": False, "fusion": "mean"},
    "passages of the support": {"support_passages": True, "heads": 2},
}


def build(**settings):
    torch.manual_seed(0)
    return RAML(TEXTS.spec, **{"k": 3, "encoder": BagOfWords(64, dim=16), "n_items": 30, **settings})


def draw(split="train", n_tasks: int = 4) -> Episode:
    return EpisodeStream(TEXTS, seed=1, split=split, n_shot=2, n_query=2, chunk_size=n_tasks)[0]


@parametrize_with_checks(
    {
        name: lambda spec, settings=settings: RAML(spec, k=2, n_items=48, **settings)
        for name, settings in SWITCHES.items()
    },
    {"tokens": TEXTS},
)
def test_every_switch_keeps_the_contract(check) -> None:
    check()


def test_the_memory_holds_meta_training_rows_once() -> None:
    learner = build(n_items=500)
    learner.prepare(TEXTS, seed=0)
    bank = learner.retriever.bank
    assert set(bank.class_ids.tolist()) == set(TEXTS.class_splits["train"].tolist())
    owned = torch.isin(TEXTS.source_classes, TEXTS.class_splits["train"]).nonzero().flatten()
    known = content_ids(TEXTS.rows(owned), TEXTS.spec)
    assert bool(torch.isin(bank.row_ids[:, 0], known).all())
    assert len(bank) == len(owned)


@pytest.mark.parametrize("mode", ["frozen", "learned", "random"])
def test_no_query_finds_its_own_classes_or_itself(mode: str) -> None:
    learner = build(retriever=mode, n_items=500)
    learner.prepare(TEXTS, seed=0)
    episode = draw(n_tasks=20)
    state = learner.adapt(episode.support)
    bank = learner.retriever.bank
    found = learner.retriever(episode.query.x, 3, classes=state.classes)
    own = TEXTS.source_classes[episode.support.ids]
    assert bool(found.real.all())
    assert not bool((bank.class_ids[found.index][..., None] == own[:, None, None]).any())
    without = Examples(episode.support.x, episode.support.y)  # no ids: the row itself is still known by its content
    found = learner.retriever(episode.query.x, len(bank), classes=learner.adapt(without).classes)
    itself = bank.row_ids[found.index][..., 0] == content_ids(episode.query.x, TEXTS.spec)[..., None]
    assert not bool((itself & found.real).any())
    assert bool((bank.class_ids[found.index][..., None] == own[:, None, None]).any())


def test_frozen_keys_find_the_nearest_texts() -> None:
    learner = build(n_items=500)
    learner.prepare(TEXTS, seed=0)
    query = draw("test").query
    found = learner.retriever(query.x, 3)
    tfidf = TfIdf(learner.retriever.bank.values["x"], TEXTS.spec.vocabulary)
    cosines = tfidf(query.x.flatten(0, 1)) @ tfidf(learner.retriever.bank.values["x"]).T
    expected = cosines.topk(3, -1).values
    torch.testing.assert_close(cosines.gather(-1, found.index.flatten(0, 1)), expected)
    rare = learner.retriever.importance[TEXTS.rows(torch.tensor([0]))[0, :3]]
    assert float(rare[1]) > float(rare[0])  # "cat" says more than "the"


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("backend", ["exact", "faiss-flat"])
def test_a_long_vocabulary_is_compared_by_all_words(n_rows: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 20_000, (1500, n_rows, 8), generator=generator)
    words[..., :3] = torch.randint(1, 60, (1500, n_rows, 3), generator=generator)  # many texts share a word or two
    words[:, :, 6:] = words[:, :, 6:] * torch.randint(0, 2, (1500, n_rows, 2), generator=generator)
    queries = torch.randint(1, 60, (1, 100, 8), generator=generator)
    spec = TaskSpec("classification", (8,), "tokens", n_way=2, vocabulary=20_000)
    retriever = Retriever(spec, mode="frozen", weighs=False, backend=backend)
    retriever.fill(words[:1400], {})
    retriever.grow(words[1400:], {})
    with torch.no_grad():
        found = retriever(queries, 5)
        tfidf = TfIdf(words[:1400].flatten(0, 1), 20_000)
        rows = torch.cat([tfidf(part.flatten(0, 1)).unflatten(0, (-1, n_rows)).mean(1) for part in words.split(100)])
        cosines = tfidf(queries[0]) @ torch.nn.functional.normalize(rows, dim=-1).T
    best = cosines.topk(5, -1).values
    score = retriever._search(queries, retriever.keys(queries[:, :, None]), 5, Exclusion()).score
    torch.testing.assert_close(score[0], cosines.gather(-1, found.index[0]), rtol=1e-4, atol=1e-5)
    assert float((score[0] >= best[:, -1:] - 1e-5).double().mean()) > 0.97
    assert retriever.bank.keys.shape == (1500, 1024)


def test_it_starts_as_a_prototypical_network() -> None:
    learner, episode = build(), draw()
    learner.prepare(TEXTS, seed=0)
    proto = ProtoNet(TEXTS.spec, encoder=learner.encoder)
    found, expected = (one(episode.support, episode.query.x).logits for one in (learner, proto))
    torch.testing.assert_close(found, expected)
    alone = build(residual=False)
    alone.prepare(TEXTS, seed=0)
    assert not torch.allclose(alone(episode.support, episode.query.x).logits, expected, atol=0.05)


def test_passages_are_read_and_k_zero_reads_none() -> None:
    episode = draw("test")
    answers = {}
    for name, settings in {
        "some": {},
        "random": {"retriever": "random"},
        "none": {"retriever": "none"},
        "0": {"k": 0},
    }.items():
        learner = build(residual=False, **settings)
        learner.prepare(TEXTS, seed=0)
        answers[name] = learner(episode.support, episode.query.x).logits
    assert torch.equal(answers["none"], answers["0"])
    assert not torch.allclose(answers["some"], answers["none"], atol=1e-3)
    assert not torch.allclose(answers["some"], answers["random"], atol=1e-3)


def test_an_encoder_with_context_shows_its_states() -> None:
    learner = build(encoder=WordTransformer(64, dim=16, depth=1), residual=False)
    learner.prepare(TEXTS, seed=0)
    states, seen = learner._states(draw().query.x)
    assert states.shape == (4, 4, 6, 16)
    assert torch.equal(seen, draw().query.x != 0)
    query_loss(learner, draw()).mean().backward()
    assert all(float(value.grad.abs().sum()) > 0 for value in learner.encoder.blocks.parameters())


def test_the_ranking_of_passages_is_trained_end_to_end() -> None:
    learner = build(retriever="learned", residual=False)
    learner.prepare(TEXTS, seed=0)
    query_loss(learner, draw()).mean().backward()
    assert all(float(value.grad.abs().sum()) > 0 for value in learner.retriever.parameters())


def test_state_dict_carries_the_memory() -> None:
    learner = build(residual=False)
    fresh = copy.deepcopy(learner)
    learner.prepare(TEXTS, seed=3)
    fresh.load_state_dict(learner.state_dict())
    episode = draw()
    answers = [one(episode.support, episode.query.x).logits for one in (learner, fresh)]
    assert torch.equal(*answers)


def test_passages_of_another_corpus_are_the_memory() -> None:
    passages = torch.randint(1, 64, (40, *TEXTS.spec.x_shape), generator=torch.Generator().manual_seed(0))
    learner = build(n_items=None, passages=passages)
    fresh = copy.deepcopy(learner)
    learner.prepare(TEXTS, seed=0)
    episode = draw(split="test")
    assert torch.equal(learner.retriever.bank.values["x"], passages)
    assert torch.equal(*(one(episode.support, episode.query.x).logits for one in (learner, fresh)))
    copies = passages[:8].reshape(2, 4, -1)
    state = learner.adapt(episode.support[:2])
    found, _, real = learner._passages(copies, state.classes)
    assert bool(real.all())
    assert not (found == copies[:, :, None]).all(-1).any()


def test_wrong_constructions_are_refused() -> None:
    row = torch.ones(1, *TEXTS.spec.x_shape, dtype=torch.long)
    for passages, error, match in (
        (row.float(), TypeError, "passages must be a tensor, token ids, long; got torch.float32"),
        (row[:0], ValueError, "passages must be .* M >= 1; got"),
        (row[:, 1:], ValueError, "passages must be "),
        (row * 99, ValueError, r"token ids of passages must be in \[0, 64\); got 99 .. 99"),
    ):
        with pytest.raises(error, match=match):
            RAML(TEXTS.spec, passages=passages)
    for settings in ({"n_items": 4}, {"k": 0}):
        with pytest.raises(ValueError, match="passages are a memory of their own size"):
            RAML(TEXTS.spec, passages=row, **settings)
    with pytest.raises(ValueError, match="serves classification, not regression; use RetrievalAugmented"):
        RAML(Sinusoid().spec)
    with pytest.raises(ValueError, match="retriever must be one of"):
        RAML(TEXTS.spec, retriever="oracle")
    with pytest.raises(ValueError, match="fusion must be one of"):
        RAML(GaussianClasses().spec, fusion="max")
    with pytest.raises(ValueError, match="backend must be one of"):
        RAML(TEXTS.spec, k=0, backend="nope")
    with pytest.raises(ValueError, match="n_candidates must be an int >= 1; got 0"):
        RAML(TEXTS.spec, retriever="none", n_candidates=0)


@pytest.mark.parametrize("mode", ["frozen", "learned", "random"])
def test_a_float32_state_runs_in_a_float64_learner(mode: str) -> None:
    tasks = GaussianClasses(dim=4)
    learner = RAML(tasks.spec, k=2, n_items=20, retriever=mode)
    fresh = copy.deepcopy(learner).double()
    learner.prepare(tasks, seed=0)
    fresh.load_state_dict(learner.state_dict())
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=1, n_query=2, chunk_size=3)[0]
    wide = episode.to(dtype=torch.float64)
    found = fresh(wide.support, wide.query.x).logits
    assert found.dtype == fresh.retriever.bank.values["x"].dtype == torch.float64
    torch.testing.assert_close(found.float(), learner(episode.support, episode.query.x).logits, rtol=1e-4, atol=1e-4)
