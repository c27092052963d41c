"""A Hugging Face encoder as text features: a tiny one with random weights, made here."""

import importlib
from pathlib import Path

import pytest
import torch

from metaicl.interop.hugging_face import sentence_features
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.task import EpisodeStream
from metaicl.tasks.text import TextClasses
from metaicl.tasks.text_features import EmbeddedTexts

transformers = pytest.importorskip("transformers", reason="the bench extra brings transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", "f", "one", "two", "three", "four"]


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # one made for another torch; transformers would trip over it
        for place in (transformers.utils, transformers.utils.import_utils):
            monkeypatch.setattr(place, "is_torchvision_available", lambda: False)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertModel(config), tokenizer


def test_features_are_means_over_real_tokens(parts) -> None:
    model, tokenizer = parts
    features = sentence_features(model, tokenizer, max_length=8)
    texts = ["a b one", "c"]
    together = features(texts)
    assert together.shape == (2, 8)
    assert not together.requires_grad
    for text, row in zip(texts, together, strict=True):
        alone = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert torch.allclose(row, alone.detach(), atol=1e-5)


def test_a_learner_on_a_hugging_face_encoder(parts) -> None:
    texts = [f"{letter} {number}" for letter in "abcdef" for number in ("one", "two", "three", "four")]
    splits = {"train": "ab", "validation": "cd", "test": "ef"}
    tasks = TextClasses(texts, [text[0] for text in texts], n_way=2, class_splits=splits)
    embedded = EmbeddedTexts(tasks, sentence_features(*parts))
    assert embedded.spec.x_shape == (8,)
    episode = EpisodeStream(embedded, seed=0, split="test", n_shot=1, n_query=2, chunk_size=3)[0]
    learner = ProtoNet(embedded.spec)
    assert learner(episode.support, episode.query.x).probs.shape == (3, 4, 2)


def test_only_models_are_taken(parts) -> None:
    with pytest.raises(TypeError, match=r"model must be a transformers.PreTrainedModel; got str"):
        sentence_features("bert-base-uncased", parts[1])
