"""Demonstration retrieval: the marginal, what is excluded, what an oracle buys, and a memory that grows."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution

from metaicl.episode import Episode, Examples
from metaicl.evaluation import evaluate
from metaicl.learner import Learner
from metaicl.learners.gradient.amortized_bayes import AmortizedBayes
from metaicl.learners.gradient.maml_plus_plus import MAMLPlusPlus
from metaicl.learners.incontext.neural_process import ConditionalNeuralProcess
from metaicl.learners.incontext.transformer import InContextTransformer
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.metric.ridge_head import RidgeHead
from metaicl.learners.reference.linear import LeastSquares
from metaicl.learners.reference.simple import Ridge
from metaicl.learners.retrieval.augmented import RetrievalAugmented
from metaicl.learners.retrieval.content import content_ids
from metaicl.learners.retrieval.demonstrations import DemonstrationRetrieval
from metaicl.objectives import query_loss
from metaicl.reading import Reading
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.arrays import tasks_from_arrays
from metaicl.tasks.mixture import TaskMixture
from metaicl.tasks.rows import ArrayClasses
from metaicl.testing import parametrize_with_checks

POOL = TaskMixture(n_pool=12)
reader = partial(ConditionalNeuralProcess, dim=8)
SWITCHES = {
    "learned": {},
    "frozen": {"retriever": "frozen"},
    "random": {"retriever": "random"},
    "oracle": {"retriever": "oracle", "oracle": POOL.codes},
    "pre-trained": {"pretraining_steps": 2},
}


def build(tasks: TaskMixture = POOL, **settings) -> DemonstrationRetrieval:
    torch.manual_seed(0)
    settings = {"learner": reader, "k": 3, "n_items": 40, "rows_per_item": 2, **settings}
    learner = DemonstrationRetrieval(tasks.spec, **settings)
    learner.prepare(tasks, seed=0)
    return learner


def draw(tasks: TaskMixture = POOL, split="train", n_tasks: int = 3) -> Episode:
    return EpisodeStream(tasks, seed=1, split=split, n_shot=1, n_query=4, chunk_size=n_tasks)[0]


@parametrize_with_checks(
    {
        name: partial(
            DemonstrationRetrieval, learner=partial(InContextTransformer, dim=16, depth=1), k=2, n_items=24,
            rows_per_item=2, **settings,
        )
        for name, settings in SWITCHES.items()
    },
    {"mixture": POOL},
)  # fmt: skip
def test_every_switch_keeps_the_contract(check) -> None:
    check()


@pytest.mark.parametrize("name", SWITCHES)
def test_the_answer_is_the_marginal_written_out(name: str) -> None:
    learner, episode = build(**SWITCHES[name]).double(), draw().to(dtype=torch.float64)
    x, y = episode.query.x, episode.query.y
    found = learner(episode.support, x).log_prob(y).exp()
    retrieved = learner.retriever(x, 3)
    values = learner.retriever.bank.values
    for b in range(3):
        for q in range(4):
            scores = torch.cat([learner.nothing[None], retrieved.score[b, q]])
            weights = torch.softmax(scores, 0)
            own, asked = episode.support[b], x[b : b + 1, q : q + 1]
            total = weights[0] * learner.learner(own, asked).log_prob(y[b : b + 1, q : q + 1]).exp()
            for j, item in enumerate(retrieved.index[b, q].tolist()):
                rows = [torch.cat([mine, values[n][item][None]], 1) for n, mine in (("x", own.x), ("y", own.y))]
                answer = learner.learner(Examples(*rows), asked)
                total = total + weights[j + 1] * answer.log_prob(y[b : b + 1, q : q + 1]).exp()
            torch.testing.assert_close(found[b, q], total[0, 0], rtol=1e-9, atol=1e-12)


def test_k_zero_is_the_reader() -> None:
    learner, episode = build(retriever="none"), draw()
    ours, theirs = learner(episode.support, episode.query.x), learner.learner(episode.support, episode.query.x)
    assert torch.equal(ours.mean, theirs.mean)
    assert not hasattr(learner, "retriever")


def test_a_query_never_finds_itself() -> None:
    learner = build(n_items=30)
    x = learner.retriever.bank.values["x"][:6, :1].transpose(0, 1)  # rows of the memory itself
    found = learner.retriever(x, 30)
    assert found.real.sum(-1).tolist() == [[29] * 6]
    for q in range(6):
        assert q not in found.index[0, q][found.real[0, q]].tolist()


def test_the_memory_is_of_meta_training_tasks() -> None:
    tasks = TaskMixture(n_pool=30, held_out="tasks")
    learner = build(tasks, n_items=200)
    seen = tasks.codes(learner.retriever.bank.values["x"]).argmax(-1).unique()
    assert bool(torch.isin(seen, tasks.task_splits["train"]).all())


def test_the_right_demonstrations_make_the_task_known() -> None:
    tasks = TaskMixture(n_pool=20, noise=0.01, cue_noise=1e-3)
    exact = partial(Ridge, penalty=1e-6)
    settings = {"n_shot": 1, "n_query": 4, "n_episodes": 60}
    scores = {}
    for mode in ("none", "random", "oracle"):
        oracle = tasks.codes if mode == "oracle" else None
        learner = build(tasks, learner=exact, retriever=mode, oracle=oracle, n_items=200, rows_per_item=6)
        if learner.k:
            torch.nn.init.constant_(learner.nothing, -100.0)
        scores[mode] = evaluate(learner, tasks, **settings).mean("mse")
    assert scores["oracle"] < 0.1 * min(scores["none"], scores["random"])


def test_a_memory_that_grows_knows_new_tasks_without_training() -> None:
    tasks = TaskMixture(n_pool=30, held_out="tasks", noise=0.01, cue_noise=1e-3)
    learner = build(
        tasks, learner=partial(Ridge, penalty=1e-6), retriever="oracle", oracle=tasks.codes, rows_per_item=4
    )
    torch.nn.init.constant_(learner.nothing, -100.0)
    weights = copy.deepcopy(dict(learner.named_parameters()))
    settings = {"n_shot": 1, "n_query": 4, "n_episodes": 60}
    before = evaluate(learner, tasks, **settings).mean("mse")
    size = len(learner.retriever.bank)
    learner.remember(EpisodeStream(tasks, seed=5, split="test", n_shot=8, n_query=1, chunk_size=60)[0].support)
    assert len(learner.retriever.bank) == size + 120
    assert evaluate(learner, tasks, **settings).mean("mse") < 0.1 * before
    assert all(torch.equal(value, weights[name]) for name, value in learner.named_parameters())


def test_a_reader_that_answers_by_a_mixture_is_mixed_exactly() -> None:
    episode = draw().to(dtype=torch.float64)
    inner = build(learner=partial(RetrievalAugmented, learner=reader, n_items=8, k=2), k=1).double().eval()
    x, y = episode.query.x, episode.query.y
    found = inner.retriever(x, 1)
    weights = torch.cat([inner.nothing.expand_as(found.score), found.score], -1).softmax(-1)
    contexts = inner._contexts(Reading.of(inner.learner), episode.support, found.index, found.real)  # axis (B Q S)
    parts = inner.learner(contexts, x.flatten(0, 1).repeat_interleave(2, 0)[:, None])
    each = parts.log_prob(y.flatten(0, 1).repeat_interleave(2, 0)[:, None]).exp().view(3, 4, 2)
    torch.testing.assert_close(inner(episode.support, x).log_prob(y).exp(), (weights * each).sum(-1))


@pytest.mark.parametrize("k", [0, 2])
def test_training_terms_of_the_reader_are_kept(k: int) -> None:
    episode = draw()
    staged = MAMLPlusPlus(POOL.spec, inner_steps=2)
    learner = build(learner=staged, k=k)
    stages = learner.adapt_stages(episode.support)
    weights = [weight for weight, _ in staged.adapt_stages(episode.support)]
    assert [weight for weight, _ in stages] == weights
    losses = []
    for stage, (_, state) in enumerate(stages):
        # A reader that stops after that step: the demonstrations are read by the same stage as the support.
        short = copy.copy(learner)
        short._modules = {**learner._modules, "learner": _Stopped(staged, stage)}
        expected = -short(episode.support, episode.query.x).log_prob(episode.query.y).mean(1)
        losses.append(-learner.predict(state, episode.query.x).log_prob(episode.query.y).mean(1))
        torch.testing.assert_close(losses[-1], expected)
    total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    torch.testing.assert_close(query_loss(learner.train(), episode), total)
    torch.testing.assert_close(query_loss(learner.eval(), episode), losses[-1])
    regularized = AmortizedBayes(POOL.spec, inner_steps=1)
    learner = build(learner=regularized, k=k).eval()
    own = regularized.penalty(regularized.adapt(episode.support))
    assert torch.equal(learner.penalty(learner.adapt(episode.support)), own)
    assert float(own.detach().min()) > 0
    assert torch.equal(build(k=k).penalty(learner.adapt(episode.support)), torch.zeros(3))


class _Stopped(Learner[Any]):
    """A learner that answers after one of its stages."""

    def __init__(self, learner: MAMLPlusPlus, stage: int) -> None:
        super().__init__(learner.spec)
        self.learner, self.stage = learner, stage

    def adapt(self, support: Examples) -> Any:
        return self.learner.adapt_stages(support)[self.stage][1]

    def predict(self, state: Any, x: Tensor) -> Distribution:
        return self.learner.predict(state, x)


def test_gradients_reach_the_retriever_and_the_reader() -> None:
    learner = build()
    query_loss(learner, draw()).mean().backward()
    silent = [name for name, value in learner.named_parameters() if value.grad is None or not bool(value.grad.any())]
    assert not silent


def test_state_dict_carries_the_memory() -> None:
    learner, episode = build(), draw()
    fresh = DemonstrationRetrieval(POOL.spec, learner=reader, k=3, n_items=40, rows_per_item=2)
    fresh.load_state_dict(learner.state_dict())
    answers = [one(episode.support, episode.query.x).log_prob(episode.query.y) for one in (learner, fresh)]
    assert torch.equal(*answers)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="an oracle goes with retriever 'oracle' alone"):
        build(retriever="oracle")
    with pytest.raises(ValueError, match="retriever must be one of"):
        build(retriever="best")
    with pytest.raises(ValueError, match="same spec"):
        build(learner=LeastSquares(TaskMixture(dim=5).spec))
    learner = build()
    with pytest.raises(ValueError, match="groups of rows_per_item = 2; got 1 rows"):
        learner.remember(draw().support)
    with pytest.raises(ValueError, match="a learner with a memory"):
        build(retriever="none").remember(draw().query)


@pytest.mark.parametrize("retriever", ["frozen", "random", "none"])
def test_switches_without_effect_are_refused(retriever: str) -> None:
    for settings in ({"encoder": torch.nn.Linear(4, 2)}, {"pretraining_steps": 5}):
        with pytest.raises(ValueError, match=f"go with retriever 'learned' alone; got '{retriever}'"):
            build(retriever=retriever, **settings)
    with pytest.raises(ValueError, match="an oracle goes with retriever 'oracle' alone"):
        build(retriever=retriever, oracle=POOL.codes)
    with pytest.raises(ValueError, match="backend must be one of"):
        build(retriever=retriever, backend="nope")


@pytest.mark.parametrize("name", ["learned", "frozen", "oracle"])
def test_a_float32_state_runs_in_a_float64_learner(name: str) -> None:
    learner, episode = build(**SWITCHES[name]), draw()
    fresh = DemonstrationRetrieval(
        POOL.spec, learner=reader, k=3, n_items=40, rows_per_item=2, **SWITCHES[name]
    ).double()  # fmt: skip
    fresh.load_state_dict(learner.state_dict())
    wide = episode.to(dtype=torch.float64)
    found = fresh(wide.support, wide.query.x).log_prob(wide.query.y)
    assert found.dtype == torch.float64
    expected = learner(episode.support, episode.query.x).log_prob(episode.query.y)
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def test_rows_of_new_classes_are_found_at_once() -> None:
    labels = torch.arange(24).repeat_interleave(8)
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(24, 4, generator=generator)[labels] + 0.1 * torch.randn(len(labels), 4, generator=generator)
    splits = {"train": list(range(16)), "validation": list(range(16, 20)), "test": list(range(20, 24))}
    spec = TaskSpec("classification", (4,), n_way=3)
    tasks = ArrayClasses(spec, x, labels=labels, class_splits=splits, class_names=list(range(24)))
    learner = DemonstrationRetrieval(spec, learner=ProtoNet, k=2, n_items=32, rows_per_item=1, retriever="frozen")
    learner.prepare(tasks, seed=0)
    size = len(learner.retriever.bank)
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=3, n_query=2, chunk_size=1)[0]
    learner.remember(episode.support)
    found = learner.retriever(episode.query.x, 2, classes=learner.adapt(episode.support).classes)
    assert bool((found.real & (found.index >= size)).all())
    # Tasks of meta-training are still kept from rows of their own classes.
    train = EpisodeStream(tasks, seed=0, split="train", n_shot=3, n_query=2, chunk_size=20)[0]
    found = learner.retriever(train.query.x, 2, classes=learner.adapt(train.support).classes)
    own = train.latents["class_ids"][:, None, None, :]
    assert not bool((learner.retriever.bank.class_ids[found.index][..., None] == own).any())


def test_items_of_several_classes_are_kept_from_each_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12).repeat_interleave(8)
    x = torch.randn(len(labels), 3, generator=generator)
    tasks = tasks_from_arrays(x, labels, n_way=2)
    learner = DemonstrationRetrieval(tasks.spec, learner=ProtoNet, k=4, n_items=64, rows_per_item=2, retriever="frozen")
    learner.prepare(tasks, seed=0)
    episode = EpisodeStream(tasks, seed=1, split="train", n_shot=4, n_query=2, chunk_size=8)[0]
    size = len(learner.retriever.bank)
    learner.remember(episode.support)  # rows are in random order: pairs are of one or of two classes
    held = tasks.source_classes[episode.support.ids].view(-1, 2)
    assert int((held[:, 0] != held[:, 1]).sum()) > 10
    assert torch.equal(learner.retriever.bank.class_ids[size:], held)
    classes = learner.adapt(episode.support).classes
    found = learner.retriever(episode.query.x, 4, classes=classes)
    shown = learner.retriever.bank.class_ids[found.index][found.real]
    assert len(shown) > 100
    task = torch.arange(8)[:, None, None].expand_as(found.index)[found.real]
    assert not bool((shown[..., None] == classes[task][:, None]).any())


@pytest.mark.parametrize(("filled", "cast"), [(torch.bfloat16, torch.float16), (torch.float16, torch.float32)])
def test_no_query_finds_its_own_row_in_another_half_precision(filled: Any, cast: Any) -> None:
    """A memory that was filled in one half precision names its rows as they were drawn, in any other too."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 3, generator=generator), torch.randn(60, generator=generator)
    tasks = tasks_from_arrays(x, y, groups=torch.arange(60) // 6, standardize=False)
    learner = DemonstrationRetrieval(
        tasks.spec, learner=RidgeHead, k=3, n_items=20, rows_per_item=1, retriever="frozen"
    ).to(filled)
    learner.prepare(tasks, seed=0)
    stored = learner.retriever.bank
    assert stored.values["x"].dtype == filled
    for row in x:
        ids = content_ids(row.to(cast), tasks.spec)
        held = (stored.values["x"][:, 0].float() == row.to(filled).float()).all(-1)
        assert bool((stored.row_ids[held] == ids).any(-1).all())
