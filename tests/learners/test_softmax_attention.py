"""Softmax attention as a learner: a kernel smoother with a learned similarity."""

import torch

from metaicl.episode import Examples
from metaicl.learners.incontext.softmax_attention import SoftmaxAttention
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.dictionary import DictionaryRegression

SPEC = TaskSpec("regression", (3,), y_dim=2)


def test_answers_are_weighted_means_of_labels() -> None:
    learner = SoftmaxAttention(SPEC).double()
    with torch.no_grad():
        learner.query_key.copy_(torch.randn(3, 3))
    x, y, q = (torch.randn(2, n, d, dtype=torch.float64) for n, d in ((5, 3), (5, 2), (4, 3)))
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    found, similarity = learner(Examples(x, y, mask), q).mean, learner.query_key.detach()
    for task in range(2):
        for query in range(4):
            scores = [float(q[task, query] @ similarity @ x[task, i]) for i in range(5) if mask[task, i]]
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
            assert torch.allclose(found[task, query], weights @ y[task, mask[task]], atol=1e-12)


def test_it_starts_from_the_mean_label() -> None:
    x, y = torch.randn(1, 4, 3), torch.randn(1, 4, 2)
    assert torch.allclose(SoftmaxAttention(SPEC)(Examples(x, y), x).mean, y.mean(1, keepdim=True).expand(1, 4, 2))


def test_an_empty_support_answers_zero_or_equal_chances() -> None:
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    x = torch.randn(1, 2, 3)
    assert (SoftmaxAttention(SPEC)(Examples(x, torch.randn(1, 2, 2), nothing), x).mean == 0).all()
    classes = TaskSpec("classification", (3,), n_way=4)
    answer = SoftmaxAttention(classes)(Examples(x, torch.ones(1, 2, dtype=torch.long), nothing), x)
    assert torch.allclose(answer.probs, torch.full((1, 2, 4), 0.25))


def test_votes_are_class_probabilities() -> None:
    classes = TaskSpec("classification", (3,), n_way=3)
    y = torch.tensor([[0, 0, 0, 1]])
    answer = SoftmaxAttention(classes)(Examples(torch.randn(1, 4, 3), y), torch.randn(1, 2, 3))
    assert torch.allclose(answer.probs, torch.tensor([0.75, 0.25, 0.0]).expand(1, 2, 3), atol=1e-5)
    assert bool(answer.log_prob(torch.tensor([[2, 2]])).isfinite().all())


def test_a_sharp_similarity_is_the_best_learner_on_a_dictionary() -> None:
    tasks = DictionaryRegression(n_features=4)
    learner = SoftmaxAttention(tasks.spec)
    with torch.no_grad():
        learner.query_key.copy_(50 * torch.eye(4))
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=12, n_query=6)[0]
    seen = (episode.query.x @ episode.support.x.mT).amax(-1) > 0
    found, best = (one(episode.support, episode.query.x).mean[seen] for one in (learner, tasks.references()["Bayes"]))
    assert torch.allclose(found, episode.query.y[seen], atol=1e-5)
    assert torch.allclose(best, episode.query.y[seen], atol=1e-5)
