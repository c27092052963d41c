"""The channel head: it is the smoothed unigram model, learns its background, and keeps the contract."""

import math

import pytest
import torch
from test_contract import sentences

from metaicl.episode import Examples
from metaicl.learners.retrieval.channel import ChannelHead
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.functions import Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.testing import parametrize_with_checks

TEXTS = sentences()


@parametrize_with_checks({"ChannelHead": ChannelHead}, {"tokens": TEXTS})
def test_the_channel_keeps_the_contract(check) -> None:
    check()


def test_it_is_the_smoothed_unigram_model() -> None:
    spec = TaskSpec("classification", (3,), "tokens", n_way=2, vocabulary=5)
    learner = ChannelHead(spec, smoothing=2.0).double()
    with torch.no_grad():
        learner.background.copy_(torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1]).log())
        learner.log_weight.weight[3] = math.log(0.5) / 10
    support = Examples(torch.tensor([[[1, 1, 2], [3, 0, 0], [4, 4, 4]]]), torch.tensor([[0, 1, 1]]))
    query = torch.tensor([[[1, 3, 0], [4, 0, 0]]])
    counts = {0: [0, 2, 1, 0, 0], 1: [0, 0, 0, 1, 3]}
    background = [0.1, 0.4, 0.2, 0.2, 0.1]
    expected = []
    for words in ([1, 3], [4]):
        joint = []
        for label in (0, 1):
            total = sum(counts[label])
            logs = [
                math.log((counts[label][w] + 2 * background[w]) / (total + 2)) * (0.5 if w == 3 else 1) for w in words
            ]
            joint.append(math.exp(sum(logs)))
        expected.append([value / sum(joint) for value in joint])
    found = learner(support, query).probs
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_the_background_is_counted_on_meta_training_texts() -> None:
    learner = ChannelHead(TEXTS.spec)
    learner.prepare(TEXTS, seed=0)
    owned = torch.isin(TEXTS.source_classes, TEXTS.class_splits["train"]).nonzero().flatten()
    words = TEXTS.rows(owned).flatten()
    counts = torch.bincount(words[words != 0], minlength=64) + 1.0
    torch.testing.assert_close(torch.softmax(learner.background, 0), counts / counts.sum())


def test_more_rows_are_added_exactly() -> None:
    episode = EpisodeStream(TEXTS, seed=0, split="train", n_shot=3, n_query=2, chunk_size=4)[0]
    learner = ChannelHead(TEXTS.spec)
    state = learner.update(learner.adapt(episode.support.rows(slice(0, 2))), episode.support.rows(slice(2, None)))
    whole = learner.adapt(episode.support)
    assert torch.equal(state.counts, whole.counts)
    assert torch.equal(state.total, whole.total)


def test_other_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="ChannelHead reads tokens; got vector"):
        ChannelHead(GaussianClasses().spec)
    with pytest.raises(ValueError, match="serves classification, not regression"):
        ChannelHead(Sinusoid().spec)
