"""Contrastive pre-training: the loss written out, tags that fit, and a retriever that gets better without labels."""

import math
from functools import partial

import pytest
import torch
from test_contract import sentences
from torch._subclasses.fake_tensor import FakeTensorMode

from metaicl.episode import Episode, Examples
from metaicl.functional import unit_rows
from metaicl.learners.incontext.neural_process import ConditionalNeuralProcess
from metaicl.learners.retrieval.contrastive import contrastive_loss, pretrain_codes, tagged_pairs
from metaicl.learners.retrieval.demonstrations import DemonstrationRetrieval
from metaicl.learners.retrieval.retriever import Retriever
from metaicl.task import EpisodeStream
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.tasks.mixture import TaskMixture


def test_the_loss_is_cross_entropy_against_pairs_of_other_tags() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (unit_rows(torch.randn(5, 3, generator=generator, dtype=torch.float64)) for _ in range(2))
    tags = torch.tensor([0, 1, 2, 1, 3])
    expected = 0.0
    for i in range(5):
        others = [j for j in range(5) if j == i or tags[j] != tags[i]]
        for one, many in ((queries, keys), (keys, queries)):
            scores = [float(one[i] @ many[j]) / 0.2 for j in others]
            expected += math.log(sum(map(math.exp, scores))) - float(one[i] @ many[i]) / 0.2
    assert float(contrastive_loss(queries, keys, tags, temperature=0.2)) == pytest.approx(expected / 10, rel=1e-12)


def test_the_gradient_is_finite_and_right() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    tags = torch.tensor([0, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda a, b: contrastive_loss(unit_rows(a), unit_rows(b), tags), rows)


def test_partners_share_their_tag() -> None:
    texts = sentences()
    episode = EpisodeStream(texts, seed=0, split="train", n_shot=1, n_query=1, chunk_size=6)[0]
    first, second, tags = tagged_pairs(episode, texts.source_classes)
    assert first.shape == second.shape == (12, 6)
    assert not torch.equal(episode.support.ids, episode.query.ids)
    assert torch.equal(first[:, [0, 1]], second[:, [0, 1]])  # "the cat" of "the cat runs now" and "the cat eats now"
    assert set(tags.tolist()) <= set(texts.class_splits["train"].tolist())
    fresh = EpisodeStream(GaussianClasses(n_way=3, dim=2), seed=0, split="train", n_shot=1, n_query=1, chunk_size=6)[0]
    assert tagged_pairs(fresh, None)[2].tolist() == list(range(18))
    mixture = EpisodeStream(TaskMixture(), seed=0, split="train", n_shot=1, n_query=1, chunk_size=6)[0]
    first, second, tags = tagged_pairs(mixture, None)
    assert torch.equal(first, mixture.support.x[:, 0])
    assert torch.equal(second, mixture.query.x[:, 0])
    assert tags.tolist() == list(range(6))


def test_pairs_stay_on_the_device_of_their_episode() -> None:
    # Tensors without values that know their device: an operation that mixes two devices is an error.
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, y = torch.randn(4, 3, 2, device="meta"), torch.zeros(4, 3, dtype=torch.long, device="meta")
        labeled = Examples(x, y, None, y)
        numbers = Examples(x[:, :1], torch.randn(4, 1, 1, device="meta"))
        for rows, classes in ((labeled, torch.zeros(10, dtype=torch.long)), (labeled, None), (numbers, None)):
            first, second, tags = tagged_pairs(Episode(rows, rows), classes)
            assert {value.device.type for value in (first, second, tags)} == {"meta"}
            for anywhere in (tags, torch.zeros(len(first), dtype=torch.long)):
                loss = contrastive_loss(first.flatten(1), second.flatten(1), anywhere)
                assert loss.device.type == "meta"


def hits(learner: DemonstrationRetrieval, tasks: TaskMixture) -> float:
    """Share of retrieved demonstrations that are of the query's own latent task."""
    episode = EpisodeStream(tasks, seed=1, split="test", n_shot=1, n_query=4, chunk_size=40)[0]
    found = learner.retriever(episode.query.x, 2).index
    shown = tasks.codes(learner.retriever.bank.values["x"][:, 0]).argmax(-1)
    return float((shown[found] == episode.latents["task_ids"][..., None]).float().mean())


def test_pretraining_finds_what_fixed_keys_overlook() -> None:
    tasks = TaskMixture(n_pool=30, cue_scale=0.7)
    build = partial(
        DemonstrationRetrieval, tasks.spec, learner=partial(ConditionalNeuralProcess, dim=8), k=2, n_items=240
    )
    scores = {}
    for name, settings in {"frozen": {"retriever": "frozen"}, "pre-trained": {"pretraining_steps": 150}}.items():
        torch.manual_seed(0)
        learner = build(**settings)
        learner.prepare(tasks, seed=0)
        scores[name] = hits(learner, tasks)
    assert learner.pretraining_losses[-1] < 0.5 * learner.pretraining_losses[0]
    assert all(value.grad is None for value in learner.parameters())
    assert scores["pre-trained"] > scores["frozen"] + 0.3


def test_nothing_to_train_is_refused() -> None:
    tasks = TaskMixture()
    with pytest.raises(ValueError, match="mode 'learned'; got 'frozen'"):
        pretrain_codes(Retriever(tasks.spec, mode="frozen"), tasks, steps=1, seed=0)
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        contrastive_loss(torch.eye(2), torch.eye(2), torch.arange(2), temperature=0.0)
