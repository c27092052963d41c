"""Text features without a download: formulas against plain loops, and frozen functions as encoders."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from metaicl.learners.metric.protonet import ProtoNet
from metaicl.nets.backbones import BagOfWords
from metaicl.nets.text_features import (
    FrozenFeatures,
    TfIdf,
    cooccurrence_vectors,
    document_frequencies,
    inverse_document_frequencies,
    smooth_inverse_frequencies,
)
from metaicl.spec import TaskSpec

DOCUMENTS = torch.tensor([[1, 2, 2, 0], [2, 3, 0, 0], [5, 3, 1, 2], [5, 1, 3, 3]], dtype=torch.int32)
VOCABULARY = 7


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch):
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def test_frequencies_by_hand() -> None:
    assert document_frequencies(DOCUMENTS, VOCABULARY).tolist() == [0, 3, 3, 3, 0, 2, 0]
    idf = inverse_document_frequencies(DOCUMENTS, VOCABULARY)
    assert idf[1:].tolist() == pytest.approx([math.log(5 / (1 + n)) + 1 for n in (3, 3, 3, 0, 2, 0)])
    sif = smooth_inverse_frequencies(DOCUMENTS, VOCABULARY, smoothing=0.1)
    assert sif[1:].tolist() == pytest.approx([0.1 / (0.1 + n / 11) for n in (3, 3, 3, 0, 2, 0)])


def test_tfidf_by_hand() -> None:
    encoder = TfIdf(DOCUMENTS, VOCABULARY)
    found = encoder(torch.tensor([[2, 2, 5, 0], [0, 0, 0, 0]]))
    expected = np.array([0, 0, 2 * (math.log(5 / 4) + 1), 0, 0, math.log(5 / 3) + 1, 0])
    np.testing.assert_allclose(found[0].numpy(), expected / np.linalg.norm(expected), rtol=1e-10)
    assert not found[1].any()
    assert not list(encoder.parameters())


def positive_information(documents: torch.Tensor, smoothing: float) -> np.ndarray:
    counts = np.zeros((VOCABULARY, VOCABULARY))
    for row in documents.tolist():
        for i, one in enumerate(row):
            for j, other in enumerate(row):
                if i != j and one and other and one != other:
                    counts[one, other] += 1
    context = counts.sum(0) ** smoothing / (counts.sum(0) ** smoothing).sum()
    found = np.zeros_like(counts)
    for i in range(VOCABULARY):
        for j in range(VOCABULARY):
            if counts[i, j]:
                joint, share = counts[i, j] / counts.sum(), counts[i].sum() / counts.sum()
                found[i, j] = max(0.0, math.log(joint / (share * context[j])))
    return found


@pytest.mark.parametrize("smoothing", [0.75, 1.0])
def test_cooccurrence_vectors_are_the_leading_factors(smoothing: float) -> None:
    information = positive_information(DOCUMENTS, smoothing)
    left, values, _ = np.linalg.svd(information)
    for dim in (1, 2):
        found = cooccurrence_vectors(DOCUMENTS, VOCABULARY, dim=dim, smoothing=smoothing).numpy()
        expected = left[:, :dim] * np.sqrt(values[:dim])
        expected *= np.sqrt(4 * dim / np.square(expected).sum())  # four tokens were seen
        np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-8)
    assert not found[[0, 4, 6]].any()


def test_more_places_than_tokens_are_zero() -> None:
    wide = cooccurrence_vectors(DOCUMENTS, 100, dim=50)
    assert wide.shape == (100, 50)
    assert bool(wide.isfinite().all())
    assert not wide[:, 10:].any()
    with pytest.raises(ValueError, match="dim must be below the 7 token ids; got 7"):
        cooccurrence_vectors(DOCUMENTS, VOCABULARY, dim=7)


def test_company_brings_words_together_that_never_meet() -> None:
    generator = torch.Generator().manual_seed(0)
    topic = torch.arange(400) % 2
    words = torch.randint(1, 21, (400, 5), generator=generator) + 20 * topic[:, None]
    documents = words.clone()
    vectors = cooccurrence_vectors(documents, 41, dim=2)
    mean = [vectors[1:21].mean(0), vectors[21:41].mean(0)]
    nearest = torch.stack([(vectors[1:] - one).norm(dim=1) for one in mean]).argmin(0)
    assert nearest.tolist() == [0] * 20 + [1] * 20


def test_a_bag_starts_from_given_vectors() -> None:
    vectors, importance = torch.randn(VOCABULARY, 3), torch.rand(VOCABULARY) + 0.1
    bag = BagOfWords(VOCABULARY, vectors=vectors, importance=importance)
    weighted = vectors[[2, 5]] * importance[[2, 5], None]
    expected = weighted.sum(0) / importance[[2, 5]].norm()
    assert torch.allclose(bag(torch.tensor([[2, 5, 0]]))[0], expected, atol=1e-9)


def test_any_function_is_an_encoder() -> None:
    encoder = FrozenFeatures(lambda x: x.numpy() ** 2, 4)
    learner = ProtoNet(TaskSpec("classification", (4,), n_way=2), encoder=encoder)
    assert encoder(torch.full((2, 4), 3.0)).eq(9).all()
    assert [name for name, _ in learner.named_parameters()] == ["similarity.log_temperature"]


def test_a_frozen_module_stays_outside_but_moves_along() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    encoder = FrozenFeatures(net, 3)
    encoder.train()
    x = torch.randn(5, 4)
    assert torch.equal(encoder(x), encoder(x))
    assert not encoder(x).requires_grad
    assert not encoder.state_dict()
    encoder.float()
    assert encoder(x.float()).dtype == torch.float
    assert copy.deepcopy(encoder)(x.float()).shape == (5, 3)


def test_wrong_functions_are_named() -> None:
    with pytest.raises(TypeError, match="function must be callable"):
        FrozenFeatures("bert", 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must give \(rows, D\) = \(2, 3\); got \(2, 4\)"):
        FrozenFeatures(lambda x: x, 3)(torch.zeros(2, 4))
