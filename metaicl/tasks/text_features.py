"""Features fitted on the texts of meta-training classes, and on nothing else; and texts as vectors computed once."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metaicl.checks import check_count
from metaicl.nets.backbones import BagOfWords
from metaicl.nets.text_features import (
    TfIdf,
    cooccurrence_vectors,
    inverse_document_frequencies,
    smooth_inverse_frequencies,
)
from metaicl.spec import TaskSpec
from metaicl.task import Split
from metaicl.tasks.classes import ClassEpisodes
from metaicl.tasks.text import TextClasses

TextFunction = Callable[[list[str]], Any]
"""Texts to features (texts, D): a tensor, an array, or a list of rows. `SentenceTransformer.encode` is one."""


def training_documents(tasks: ClassEpisodes) -> Tensor:
    """Inputs (rows, *x_shape) of all source rows of meta-training classes: what may be fitted on."""
    assert tasks.source_classes is not None  # every ClassEpisodes has them
    owned = torch.isin(tasks.source_classes, tasks.class_splits["train"])
    return tasks.rows(owned.nonzero().flatten())


def fit_tfidf(tasks: TextClasses) -> TfIdf:
    """TF-IDF with document frequencies of meta-training texts.

    Words that a fitted vocabulary does not know weigh nothing: they share an id, and two texts that hold different
    unknown words have nothing in common.
    """
    features = TfIdf(training_documents(tasks), _vocabulary(tasks.spec))
    if tasks.unknown is not None:
        features.idf[tasks.unknown] = 0.0
    return features


def fit_word_vectors(
    tasks: TextClasses, *, dim: int = 100, random: int = 0, smoothing: float | None = 1e-3
) -> BagOfWords:
    """A bag of words that starts from the co-occurrence vectors of meta-training texts.

    Classes that share no words with one another still share the company their words keep. Words that meta-training
    texts lack start at the origin; `random` places of random numbers beside the others tell them apart, which
    helps where texts of a class repeat each other's words. Words that a fitted vocabulary does not know share an id
    and start without weight.

    Args:
        tasks: Texts by class; those of meta-training classes are read.
        dim: Places of the co-occurrence vectors; see `cooccurrence_vectors`.
        random: Places of random numbers, from a fixed seed; both parts of a word are about equally long.
            D = dim + random.
        smoothing: Importances start as in `smooth_inverse_frequencies`; None takes inverse document frequencies.
    """
    documents, vocabulary = training_documents(tasks), _vocabulary(tasks.spec)
    vectors = cooccurrence_vectors(documents, vocabulary, dim=dim)
    if check_count("random", random, minimum=0):
        drawn = torch.randn(vocabulary, random, generator=torch.Generator().manual_seed(0), dtype=vectors.dtype)
        half = (dim + random) / 2
        vectors = torch.cat([vectors * (half / dim) ** 0.5, drawn * (half / random) ** 0.5], 1)
    if smoothing is None:
        importance = inverse_document_frequencies(documents, vocabulary)
    else:
        importance = smooth_inverse_frequencies(documents, vocabulary, smoothing=smoothing)
    if tasks.unknown is not None:
        importance[tasks.unknown] = 0.0
        vectors[tasks.unknown] = 0.0
    return BagOfWords(vocabulary, importance=importance, vectors=vectors)


class EmbeddedTexts(ClassEpisodes):
    """The episodes of text tasks with features in place of tokens; an address gives the same rows as in `tasks`.

    Every text is embedded once. A pretrained encoder plugs in here: `EmbeddedTexts(tasks, model.encode)`.

    Args:
        tasks: Texts by class.
        function: Texts to features (texts, D); what it was trained on is for the caller to know.
        batch_size: Texts per call.

    Attributes:
        features: float (rows, D).

    Raises:
        ValueError: If the function does not give one finite row of numbers for each text.
    """

    def __init__(self, tasks: TextClasses, function: TextFunction, *, batch_size: int = 256) -> None:
        """Embed all texts."""
        batch_size = check_count("batch_size", batch_size)
        parts = [
            _features(function, tasks.texts[start : start + batch_size])
            for start in range(0, len(tasks.texts), batch_size)
        ]
        widths = sorted({part.shape[1] for part in parts})
        if len(widths) > 1:
            raise ValueError(f"function must give one D for all texts; got {widths}")
        self.features = torch.cat(parts)
        spec = replace(tasks.spec, x_shape=(self.features.shape[1],), x_kind="vector", vocabulary=None)
        splits: dict[Split, list[int]] = {split: ids.tolist() for split, ids in tasks.class_splits.items()}
        assert tasks.source_classes is not None  # every ClassEpisodes has them
        super().__init__(spec, labels=tasks.source_classes, class_splits=splits, class_names=tasks.class_names)

    def rows(self, ids: Tensor) -> Tensor:
        """Features (..., D) of the source rows `ids` (...,)."""
        return self.features[ids]


def _features(function: TextFunction, texts: Sequence[str]) -> Tensor:
    with torch.no_grad():
        given = function(list(texts))
    try:
        found = torch.as_tensor(given).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"function must give (texts, D) dense numbers; got {type(given).__name__}") from error
    if found.layout != torch.strided or found.is_complex():
        raise ValueError(f"function must give dense real numbers; got {found.layout}, {found.dtype}")
    if found.ndim != 2 or found.shape[0] != len(texts):
        raise ValueError(f"function must give (texts, D) with texts = {len(texts)}; got {tuple(found.shape)}")
    found = found.to(torch.get_default_dtype())
    bad = int((~torch.isfinite(found).all(1)).sum())
    if bad:
        raise ValueError(f"function must give finite features; {bad} of {len(texts)} texts have NaN or Inf")
    return found


def _vocabulary(spec: TaskSpec) -> int:
    assert spec.vocabulary is not None  # TaskSpec holds it for tokens
    return spec.vocabulary
