"""Distributional signatures: the two signals against plain loops, the count that leaves the own classes out, leaks."""

import copy
from pathlib import Path

import pytest
import torch
from training_helpers import assert_resume_is_exact

from metaicl.episode import Examples
from metaicl.learners.metric.signatures import DistributionalSignatures
from metaicl.meta_step import MetaStep
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.tasks.text import TextClasses
from metaicl.train_config import TrainConfig

SPLITS = {"train": range(6), "validation": range(6, 9), "test": range(9, 12)}


def make_tasks(extra: str = "", max_tokens: int = 8) -> TextClasses:
    texts, labels = [], []
    for c in range(12):
        for i in range(5):
            texts.append(f"the word{c} the thing{i} of{c % 3}" + (f" {extra}" if c >= 6 else ""))
            labels.append(c)
    return TextClasses(texts, labels, n_way=3, max_tokens=max_tokens, vocabulary=97, class_splits=SPLITS)  # type: ignore[arg-type]


@pytest.fixture
def tasks() -> TextClasses:
    return make_tasks()


def make_learner(tasks: TextClasses, **options: object) -> DistributionalSignatures:
    torch.manual_seed(0)
    learner = DistributionalSignatures(tasks.spec, dim=7, hidden=3, **options).double()  # type: ignore[arg-type]
    learner.prepare(tasks, seed=0)
    return learner.eval()


def episode_of(tasks: TextClasses, split: str = "train"):
    return EpisodeStream(tasks, seed=1, split=split, n_shot=2, n_query=3, chunk_size=4)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["train", "test"])
def test_general_importance_against_a_loop(tasks: TextClasses, split: str) -> None:
    learner, episode = make_learner(tasks), episode_of(tasks, split)
    state = learner.adapt(episode.support)
    found = learner.general_importance(episode.query.x, state.classes)
    for b in range(4):
        own = set(episode.latents["class_ids"][b].tolist())
        counts: dict[int, int] = {}
        for row, c in enumerate(tasks.source_classes.tolist()):  # type: ignore[union-attr]  # they have classes
            if c in SPLITS["train"] and c not in own:
                for token in tasks.rows(torch.tensor(row)).tolist():
                    if token:
                        counts[token] = counts.get(token, 0) + 1
        total = sum(counts.values())
        for n, row in enumerate(episode.query.x[b].tolist()):
            for t, token in enumerate(row):
                if token:
                    expected = 1e-5 / (1e-5 + counts.get(token, 0) / total)
                    assert float(found[b, n, t]) == pytest.approx(expected, rel=1e-12)


def test_task_importance_attention_and_head_against_a_loop(tasks: TextClasses) -> None:
    learner, episode = make_learner(tasks), episode_of(tasks)
    state = learner.adapt(episode.support)
    answer = learner.predict(state, episode.query.x)
    e = learner.vectors
    for b in range(4):
        support, y = episode.support.x[b], episode.support.y[b]
        one_hot = torch.eye(3, dtype=torch.double)[y]
        means = torch.stack([e[row[row != 0]].mean(0) for row in support])
        w = torch.linalg.solve(means.mT @ means + torch.eye(7), means.mT @ one_hot)
        general = learner.general_importance(episode.query.x, state.classes)[b]

        def embed(tokens: torch.Tensor, s: torch.Tensor, w: torch.Tensor = w) -> torch.Tensor:
            words = tokens[tokens != 0]
            t = torch.stack([max(abs(e[word] @ w[:, c]) for c in range(3)) for word in words])
            signals = torch.stack([s[: len(words)], t], -1)[None]
            h = learner.read(signals, torch.ones(1, len(words), dtype=torch.bool))[0]
            return torch.softmax(learner.score(h)[:, 0], 0) @ e[words]

        own = learner.general_importance(episode.support.x, state.classes)[b]
        x = torch.stack([embed(row, s) for row, s in zip(support, own, strict=True)])
        head = x.mT @ torch.linalg.inv(x @ x.mT + 10**learner.log10_penalty * torch.eye(len(x))) @ one_hot
        logits = 10**learner.log10_scale * torch.stack(
            [embed(row, s) @ head for row, s in zip(episode.query.x[b], general, strict=True)]
        )
        assert torch.allclose(answer.logits[b], logits.log_softmax(-1), atol=1e-10)  # type: ignore[attr-defined]


def test_no_word_of_other_splits_is_counted() -> None:
    plain, with_canary = make_learner(make_tasks()), make_learner(make_tasks("canary"))
    assert torch.equal(plain.counts, with_canary.counts)
    assert plain.counts.sum() == 6 * 5 * 5
    assert plain.counts.shape == (6, 97)


def test_without_ids_or_counts_nothing_is_left_out(tasks: TextClasses) -> None:
    learner, episode = make_learner(tasks), episode_of(tasks)
    support = Examples(episode.support.x, episode.support.y)
    assert learner.adapt(support).classes.eq(-1).all()
    assert learner.adapt(episode.support).classes.sort(1).values.ge(0).all()
    fresh = DistributionalSignatures(tasks.spec, dim=7)
    assert fresh.general_importance(support.x, torch.full((4, 3), -1)).eq(1).all()


def test_tasks_without_source_rows_are_drawn_from(tasks: TextClasses, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_learner(tasks)
    monkeypatch.setattr(tasks, "source_classes", None)
    drawn = make_learner(tasks)
    assert drawn.counts.shape == (1, 97)
    assert drawn.counts.sum() == 256 * 3 * 2 * 5
    assert torch.equal(drawn.counts[0] > 0, whole.counts.sum(0) > 0)
    assert drawn.adapt(episode_of(make_tasks()).support).classes.eq(-1).all()


def test_saved_counts_come_back(tasks: TextClasses) -> None:
    learner, episode = make_learner(tasks), episode_of(tasks)
    other = DistributionalSignatures(tasks.spec, dim=7, hidden=3).double().eval()
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    ours = learner(episode.support, episode.query.x).logits  # type: ignore[attr-defined]
    assert torch.equal(ours, other(episode.support, episode.query.x).logits)  # type: ignore[attr-defined]


def test_given_vectors_are_scaled_and_kept_from_training(tasks: TextClasses) -> None:
    vectors = torch.randn(97, 5) * 40
    vectors[3] = 0
    learner = DistributionalSignatures(tasks.spec, vectors=vectors)
    lengths = learner.vectors.norm(dim=1)
    assert float(lengths.square().sum()) == pytest.approx(96, rel=1e-5)
    assert lengths[3] == 0
    assert not [name for name, _ in learner.named_parameters() if "vectors" in name]


def test_bad_arguments_are_named(tasks: TextClasses) -> None:
    with pytest.raises(ValueError, match="needs token inputs; got x_kind 'vector'"):
        DistributionalSignatures(GaussianClasses(n_way=3, dim=4).spec)
    with pytest.raises(ValueError, match="use RidgeHead instead"):
        DistributionalSignatures(TaskSpec("regression", (4,), "tokens", y_dim=1, vocabulary=9))
    with pytest.raises(ValueError, match=r"vectors must be \(vocabulary = 97, D\); got \(3, 4\)"):
        DistributionalSignatures(tasks.spec, vectors=torch.zeros(3, 4))


def test_resume_is_exact_at_three_cuts(tasks: TextClasses, tmp_path: Path) -> None:
    config = TrainConfig(
        steps=8, meta_batch_size=4, n_shot=(1, 2), n_query=2, validate_every=3, n_validation=4, checkpoint_every=2,
        log_every=1, schedule="cosine", clip_norm=1.0,
    )  # fmt: skip

    def make() -> DistributionalSignatures:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return DistributionalSignatures(tasks.spec, dim=7, hidden=3)

    assert_resume_is_exact(make, tasks, config, tmp_path, cuts=(1, 4, 7))


@pytest.mark.slow
def test_the_meta_step_is_one_graph_and_equals_the_eager_one() -> None:
    tasks = make_tasks(max_tokens=4)  # every token is a step of the graph; three would make all texts of a class alike
    learner = make_learner(tasks, dropout=0.0).train()
    expected = MetaStep(learner)(episode_of(tasks))[1]
    torch.compiler.reset()
    compiled = MetaStep(learner, compile=True)
    found = compiled(episode_of(tasks))[1]
    assert compiled.is_compiled
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= 1e-10, name


def test_loading_keeps_the_precision_of_the_learner(tasks: TextClasses) -> None:
    saved = make_learner(tasks).float().state_dict()
    wide = DistributionalSignatures(tasks.spec, dim=7, hidden=3).double()
    wide.load_state_dict(saved)
    assert {value.dtype for value in wide.state_dict().values() if value.is_floating_point()} == {torch.float64}
    assert torch.equal(wide.counts, saved["counts"].double())


def test_word_vectors_must_be_finite(tasks: TextClasses) -> None:
    vectors = torch.ones(97, 3)
    vectors[4, 1] = torch.nan
    with pytest.raises(ValueError, match="vectors must be finite; got NaN or Inf for 1 words"):
        DistributionalSignatures(tasks.spec, vectors=vectors)


def test_a_support_without_rows_says_nothing(tasks: TextClasses) -> None:
    learner, episode = make_learner(tasks), episode_of(tasks)
    absent = torch.zeros_like(episode.support.real)
    with torch.no_grad():
        masked = learner(Examples(episode.support.x, episode.support.y, absent), episode.query.x)
        empty = learner(Examples(episode.support.x[:, :0], episode.support.y[:, :0]), episode.query.x)
    assert torch.equal(empty.probs, masked.probs)
    assert float((empty.probs - 1 / 3).abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_word_vectors_of_any_precision_are_taken(tasks: TextClasses, dtype: torch.dtype) -> None:
    vectors = torch.randn(tasks.spec.vocabulary or 0, 5).to(dtype)
    learner, episode = DistributionalSignatures(tasks.spec, vectors=vectors), episode_of(tasks)
    assert learner(episode.support, episode.query.x).logits.dtype == torch.float32
