"""What is fitted on texts reads meta-training classes only; texts as vectors keep the episodes."""

import pytest
import scipy.sparse
import torch

from metaicl.checks import check_episode
from metaicl.task import SPLITS, EpisodeStream, Split
from metaicl.tasks.text import TextClasses
from metaicl.tasks.text_features import EmbeddedTexts, fit_tfidf, fit_word_vectors, training_documents

SPLIT: dict[Split, list[int]] = {"train": [0, 1, 2], "validation": [3, 4], "test": [5, 6]}


def make_tasks(canary: str = "") -> TextClasses:
    texts, labels = [], []
    for c in range(7):
        for i in range(6):
            texts.append(f"word{c} common thing{i} w{c}x{i} w{c}x{(i + 1) % 6}" + (f" {canary}" if c >= 3 else ""))
            labels.append(c)
    return TextClasses(texts, labels, n_way=2, class_splits=SPLIT, vocabulary=1009, max_tokens=8)


def test_only_meta_training_rows_are_read() -> None:
    tasks = make_tasks()
    assert torch.equal(training_documents(tasks), tasks.rows(torch.arange(18)))


@pytest.mark.parametrize("fit", [fit_tfidf, lambda t: fit_word_vectors(t, dim=5, random=4), fit_word_vectors])
def test_a_canary_of_other_classes_leaves_no_trace(fit) -> None:
    plain, with_canary = fit(make_tasks()), fit(make_tasks("canary canary2 canary3"))
    assert plain.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, with_canary.state_dict()[name]), name


def test_parts_of_word_vectors() -> None:
    tasks = make_tasks()
    bag = fit_word_vectors(tasks, dim=6, random=18)
    vectors = 10 * bag.vectors.weight.detach()
    seen = torch.unique(training_documents(tasks))[1:]
    squares = vectors[seen].square()
    assert float(squares[:, :6].sum(1).mean()) == pytest.approx(12, rel=1e-4)
    assert float(squares[:, 6:].sum(1).mean()) == pytest.approx(12, rel=0.15)
    unseen = torch.ones(1009, dtype=torch.bool)
    unseen[seen] = False
    assert not vectors[unseen, :6].any()
    assert vectors[unseen, 6:].any(1).all()
    with_idf = fit_word_vectors(tasks, dim=6, smoothing=None)
    expected = fit_tfidf(tasks).idf.log()
    assert torch.allclose(10 * with_idf.log_importance.weight.detach()[:, 0], expected, atol=1e-5)


def test_embedded_texts_keep_the_episodes() -> None:
    tasks = make_tasks()
    calls = []

    def lengths(texts: list[str]) -> list[list[float]]:
        calls.append(len(texts))
        return [[float(len(text)), float(sum(map(ord, text)))] for text in texts]

    embedded = EmbeddedTexts(tasks, lengths, batch_size=16)
    assert calls == [16, 16, 10]
    for split in SPLITS:
        ours, theirs = (
            EpisodeStream(one, seed=0, split=split, n_shot=2, n_query=3, chunk_size=4)[0] for one in (embedded, tasks)
        )
        check_episode(ours, embedded.spec)
        assert torch.equal(ours.support.ids, theirs.support.ids)  # type: ignore[arg-type]
        assert torch.equal(ours.query.y, theirs.query.y)
        text = tasks.describe(theirs.query.ids[1, 2][None])[0]  # type: ignore[index]
        assert ours.query.x[1, 2].tolist() == lengths([text])[0]


def test_bad_functions_are_named() -> None:
    tasks = make_tasks()
    with pytest.raises(ValueError, match=r"function must give \(texts, D\) with texts = 42; got \(3,\)"):
        EmbeddedTexts(tasks, lambda texts: torch.zeros(3))
    with pytest.raises(ValueError, match="finite features; 42 of 42 texts have NaN or Inf"):
        EmbeddedTexts(tasks, lambda texts: torch.full((len(texts), 2), torch.nan))
    with pytest.raises(ValueError, match=r"one D for all texts; got \[2, 16\]"):
        EmbeddedTexts(tasks, lambda texts: torch.ones(len(texts), 16 if len(texts) == 16 else 2), batch_size=16)
    wrong = {
        "dense numbers; got NoneType": lambda texts: None,
        r"dense numbers; got cs._\w+": lambda texts: scipy.sparse.csr_matrix((len(texts), 2)),
        "dense real numbers; got torch.sparse_coo": lambda texts: torch.ones(len(texts), 2).to_sparse(),
        "dense real numbers; got torch.strided, torch.complex64": lambda texts: torch.ones(len(texts), 2) * 1j,
    }
    for message, function in wrong.items():
        with pytest.raises(ValueError, match=message):
            EmbeddedTexts(tasks, function)


def test_unknown_words_of_a_fitted_vocabulary_weigh_nothing() -> None:
    texts = [f"word{c} thing{i}" + (f" only{c} new{i}" if c >= 3 else "") for c in range(7) for i in range(6)]
    labels = [c for c in range(7) for _ in range(6)]
    tasks = TextClasses(texts, labels, n_way=2, class_splits=SPLIT, max_tokens=4, words="fitted")
    assert tasks.unknown == 1
    held_out = tasks.rows(torch.tensor([18, 24]))  # of two classes: "thing0" is known, the others are not
    assert (held_out == 1).sum(1).tolist() == [3, 3]
    known = held_out.masked_fill(held_out == 1, 0)
    encoders = [fit_tfidf(tasks)] + [fit_word_vectors(tasks, dim=5, random=4, smoothing=s) for s in (1e-3, None)]
    for encoder in encoders:
        torch.testing.assert_close(encoder(held_out), encoder(known))
        assert not bool(encoder(torch.ones(1, 4, dtype=torch.long)).any())
        assert bool(encoder(known).any())
        assert all(bool(value.isfinite().all()) for value in encoder.state_dict().values())
    hashed = make_tasks()
    assert hashed.unknown is None
    assert float(fit_tfidf(hashed).idf[1]) > 1  # there it is the id of any word


def test_texts_of_one_word_have_no_company() -> None:
    tasks = TextClasses(
        [f"w{i} x" for i in range(42)], [i // 6 for i in range(42)], n_way=2, class_splits=SPLIT, max_tokens=1
    )
    assert not bool(fit_word_vectors(tasks, dim=5).vectors.weight.any())
