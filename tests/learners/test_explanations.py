"""Retrieval of explanations: the contract, what each retriever finds, and what reaches the answer."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_helpers import assert_resume_is_exact

from metaicl.episode import Episode
from metaicl.functional import unit_rows
from metaicl.learners.retrieval.explanations import ExplanationRetrieval, PlaceBag
from metaicl.meta_step import MetaStep
from metaicl.nets.counting import CountingReader
from metaicl.objectives import query_loss
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.explanations import ExplanationWorld
from metaicl.testing import check_learner
from metaicl.train_config import TrainConfig

WORLD = ExplanationWorld(n_tasks=6, points_per_task=10, n_validation=60, n_test=120)


def build(tasks: ExplanationWorld = WORLD, **options: Any) -> ExplanationRetrieval:
    torch.manual_seed(0)
    learner = ExplanationRetrieval(tasks.spec, **{"dim": 16, "depth": 2, "n_sets": 2, **options})
    learner.prepare(tasks, seed=0)
    return learner.eval()


def draw(split: Any = "train", tasks: ExplanationWorld = WORLD) -> Episode:
    return EpisodeStream(tasks, seed=0, split=split, n_shot=1, n_query=6, chunk_size=2)[0]


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "options",
    [
        {"retriever": "learned"},
        {"retriever": "oracle", "conditioning": "mean"},
        pytest.param({"retriever": "none"}, marks=slow),
        pytest.param({"retriever": "random", "conditioning": "mean"}, marks=slow),
        pytest.param({"retriever": "frozen", "set_size": 3}, marks=slow),
    ],
    ids=str,
)
def test_it_keeps_the_contract(options: dict[str, Any]) -> None:
    expected = {}
    if options["retriever"] == "oracle":
        expected["learns"] = "an oracle needs tasks that show an index; the easy tasks of the exam have none"
    check_learner(
        lambda spec: ExplanationRetrieval(spec, dim=16, n_sets=2, **options), WORLD, expected_failures=expected
    )


def test_the_answer_is_the_marginal_over_sets() -> None:
    learner, x = build(retriever="frozen", set_size=2, n_sets=3).double(), draw().query.x
    explanations, _, scores = learner.retrieve(x)
    assert explanations.shape == (2, 12, 3, 2, 5)
    weights = scores.softmax(-1)
    by_hand = torch.zeros(2, 12, 2, dtype=torch.float64)
    for task in range(2):
        for query in range(12):
            for j in range(3):
                features = learner.reader(x[task, query, None], explanations[task, query, None, j : j + 1])
                by_hand[task, query] += weights[task, query, j] * learner.head(features)[0, 0].softmax(-1)
    answer = learner.predict(x.new_zeros(2, 0), x)
    assert torch.allclose(answer.probs, by_hand, rtol=1e-9, atol=1e-12)


def test_mean_conditioning_averages_features_of_single_explanations() -> None:
    learner, x = build(retriever="oracle", conditioning="mean", set_size=3, n_sets=1).double(), draw().query.x
    explanations, real, _ = learner.retrieve(x)
    assert bool(real.all())
    rows, said = x.flatten(0, 1), explanations.flatten(0, 1)[:, 0]
    features = torch.stack([learner.reader(rows, said[:, None, i : i + 1])[:, 0] for i in range(3)]).mean(0)
    expected = learner.head(features).softmax(-1).unflatten(0, (2, 12))
    answer = learner.predict(x.new_zeros(2, 0), x)
    assert torch.allclose(answer.probs, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("retriever", ["frozen", "learned", "oracle", "random"])
def test_a_query_never_finds_itself_and_scores_are_those_of_the_keys(retriever: str) -> None:
    learner, x = build(retriever=retriever, n_sets=3, set_size=3), WORLD.training_points().x[None]
    index, _, _ = learner.bank.search(learner.keys(x, "query"), 1)
    own = torch.arange(x.shape[1])
    if retriever in ("frozen", "learned"):
        assert torch.equal(index[0, :, 0], own)  # without exclusion it would
    explanations, real, scores = learner.retrieve(x)
    # The world has one explanation per index, ten rows each: nine rows are left for a row of training.
    same = (explanations[..., 0] == x[..., None, None, 0]) & real
    assert int(same.sum((2, 3)).max()) <= 9
    if retriever == "oracle":
        assert bool(same.all())
    elif retriever == "random":
        assert float(same.double().mean()) == pytest.approx(9 / 59, abs=0.06)
    if retriever in ("oracle", "random"):
        assert float(scores.abs().max()) == 0
    else:
        assert bool((scores[..., :-1] >= scores[..., 1:]).all())


def test_a_fresh_point_of_the_oracle_is_told_its_own_task() -> None:
    learner, episode = build(retriever="oracle"), draw("test")
    explanations, real, _ = learner.retrieve(episode.query.x)
    assert bool(real.all())
    assert torch.equal(explanations[:, :, 0, 0, 1:], episode.latents["integers"])


def test_an_oracle_with_fewer_points_than_places_masks_the_rest() -> None:
    learner = build(retriever="oracle", n_sets=6, set_size=2)
    explanations, real, _ = learner.retrieve(draw().query.x)
    assert bool((real.sum((2, 3)) == 9).all())
    assert int(explanations[~real].abs().max()) == 0
    expected = learner.predict(torch.zeros(2, 0), draw().query.x)
    few = build(retriever="oracle", n_sets=5, set_size=2)
    few.load_state_dict(learner.state_dict())  # the sixth set has no point and must not count
    found = few.predict(torch.zeros(2, 0), draw().query.x)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)


def test_an_oracle_needs_a_visible_index_and_a_fitting_length() -> None:
    hidden = ExplanationWorld(n_tasks=6, n_validation=60, n_test=60, index_visible=False)
    with pytest.raises(ValueError, match="these tasks hide it"):
        build(hidden, retriever="oracle")
    with pytest.raises(ValueError, match="explanation_length must be that of the tasks, 5"):
        build(explanation_length=4)


def test_keys_start_as_bags_of_tokens_and_learn_which_place_counts() -> None:
    bag, x = PlaceBag(WORLD.spec, learned=True), WORLD.training_points().x
    by_hand = []
    for row in x.tolist():
        times = Counter(row)
        by_hand.append(sum(math.log(1 + times[token]) * bag.vectors[token] for token in times))
    assert torch.allclose(bag(x), unit_rows(torch.stack(by_hand)), atol=1e-6)
    assert bag.log_weights is not None
    with torch.no_grad():
        bag.log_weights[0] = 1.0
    similarity = (bag(x) @ bag(x).T).detach()
    same = x[:, None, 0] == x[None, :, 0]
    assert float(similarity[same].min()) > 0.9 > float(similarity[~same].max())


def test_the_retriever_opens_after_a_share_of_training_and_its_keys_follow() -> None:
    learner, episode = build(retriever="learned", frozen_until=0.5, n_refreshes=4), draw()
    weights = learner.place_bag.log_weights
    assert weights is not None

    def gradient() -> Tensor | None:
        loss = query_loss(learner, episode).mean()
        return torch.autograd.grad(loss, [weights], allow_unused=True, materialize_grads=True)[0]

    for fraction, is_open in ((0.0, False), (0.49, False), (0.5, True), (0.9, True)):
        learner.at(fraction)
        found = gradient()
        assert found is not None
        assert bool(found.any()) == is_open
    before = learner.bank.keys.clone()
    with torch.no_grad():
        weights[0] = 0.3
    learner.at(0.95)
    assert torch.equal(learner.bank.keys, before)  # the last quarter began before the weights moved
    learner.at(0.0)
    assert not torch.equal(learner.bank.keys, before)
    assert torch.allclose(learner.bank.keys, learner.keys(learner.bank.values["x"], "memory"))


def test_gradient_of_a_learned_retriever_by_finite_differences() -> None:
    learner, episode = build(retriever="learned").double(), draw()
    weights = learner.place_bag.log_weights
    assert weights is not None
    gradient = torch.autograd.grad(query_loss(learner, episode).mean(), [weights, learner.log_sharpness])
    for value, slope in zip((weights, learner.log_sharpness), gradient, strict=True):
        flat = value.detach().view(-1)
        for place in range(0, len(flat), 4):
            losses = []
            for step in (1e-6, -2e-6):
                flat[place] += step
                with torch.no_grad():
                    losses.append(float(query_loss(learner, episode).mean()))
            flat[place] += 1e-6
            expected = float(slope.reshape(-1)[place])
            assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_the_reader_counts() -> None:
    torch.manual_seed(0)
    reader = CountingReader(200, 20, 5, dim=64, depth=1, heads=1)
    x = torch.randint(50, 200, (3, 20))
    for row, number in enumerate((0, 4, 9)):
        x[row, 5 : 5 + number] = 7
    asking = reader._embed(torch.full((3, 1), 7))
    found = reader._count(asking, x[:, 2:20]).detach()
    assert torch.allclose(found[2] - found[0], 9 / 4 * (found[1] - found[0]), atol=0.15)
    assert float((found[1] - found[0]).norm()) > 1


def test_the_reader_treats_sets_apart_and_padding_as_absent() -> None:
    torch.manual_seed(0)
    reader = CountingReader(200, 20, 5, dim=16, depth=2).double()
    x, said = torch.randint(1, 200, (4, 20)), torch.randint(1, 200, (4, 3, 2, 5))
    together = reader(x, said)
    alone = torch.cat([reader(x, said[:, j : j + 1]) for j in range(3)], 1)
    assert torch.allclose(together, alone, atol=1e-12)
    flipped = reader(x, said.flip(2))
    assert torch.allclose(together, flipped, atol=1e-12)  # the explanations of a set have no order
    padded = torch.cat([said, torch.zeros(4, 3, 2, 5, dtype=torch.long)], 2)
    assert torch.allclose(together, reader(x, padded), atol=1e-12)
    empty = reader(x, said[:, :1, :0])
    assert torch.allclose(empty, reader(x, torch.zeros(4, 1, 2, 5, dtype=torch.long)), atol=1e-12)


def test_a_step_moves_what_is_learned() -> None:
    learner = build(retriever="learned").train()
    _, gradients = MetaStep(learner)(draw())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert bool(gradients["place_bag.log_weights"].any())
    assert "log_sharpness" not in MetaStep(build(retriever="frozen"))(draw())[1]


def test_a_killed_run_goes_on_exactly(tmp_path: Path) -> None:
    def make() -> ExplanationRetrieval:
        torch.manual_seed(0)
        return ExplanationRetrieval(WORLD.spec, dim=8, depth=1, n_sets=2, n_refreshes=3)

    config = TrainConfig(
        steps=6, meta_batch_size=1, n_shot=1, n_query=4, validate_every=3, n_validation=2, checkpoint_every=2
    )
    assert_resume_is_exact(make, WORLD, config, tmp_path, cuts=(3,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retriever": "optimal"}, "retriever"),
        ({"conditioning": "sum"}, "conditioning"),
        ({"frozen_until": 2.0}, "frozen_until must be in"),
        ({"dim": 30}, "heads must divide dim"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExplanationRetrieval(WORLD.spec, **options)


def test_inputs_and_labels_that_the_reader_cannot_read_are_refused() -> None:
    single = TaskSpec("classification", (1,), "tokens", n_way=2, vocabulary=9)
    for retriever in ("none", "frozen"):
        with pytest.raises(ValueError, match=r"inputs of at least 2 tokens; got x_shape=\(1,\)"):
            ExplanationRetrieval(single, retriever=retriever)
    many = TaskSpec("classification", (6,), "tokens", n_way=9, vocabulary=9)
    with pytest.raises(ValueError, match="vocabulary must be at least 10; got 9"):
        ExplanationRetrieval(many)
    assert ExplanationRetrieval(many, retriever="none").retriever == "none"  # it reads no explanations
    with pytest.raises(ValueError, match="serves classification, not regression; use RetrievalAugmented instead"):
        ExplanationRetrieval(TaskSpec("regression", (3,), y_dim=1))


def test_explanations_beyond_the_vocabulary_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    points = WORLD.training_points()
    beyond = points._replace(explanations=points.explanations + 10_001)
    monkeypatch.setattr(WORLD, "training_points", lambda: beyond)
    with pytest.raises(ValueError, match="explanations must hold tokens below the vocabulary, 10001; got"):
        build()


@pytest.mark.parametrize("retriever", ["learned", "oracle"])
def test_a_float32_state_runs_in_a_float64_learner(retriever: str) -> None:
    learner, x = build(retriever=retriever), draw().query.x
    fresh = ExplanationRetrieval(WORLD.spec, dim=16, depth=2, n_sets=2, retriever=retriever).double().eval()
    fresh.load_state_dict(learner.state_dict())
    found = fresh.predict(torch.zeros(2, 0), x).logits
    assert found.dtype == fresh.bank.keys.dtype == torch.float64
    expected = learner.predict(torch.zeros(2, 0), x).logits
    assert torch.allclose(found.float(), expected, atol=1e-4)
