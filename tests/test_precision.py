"""Half, single and double precision: what is drawn and how it is judged do not depend on them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaicl import EpisodeStream, GaussianClasses, Learner, ProtoNet, Sinusoid, TrainConfig, evaluate, meta_train
from metaicl.episode import Episode, Examples
from metaicl.functional import categorical, gaussian
from metaicl.learner import Traits
from metaicl.learners import FEAT, RAML, DistributionalSignatures, MatchingNet, RelationNet, RidgeHead
from metaicl.nets.text import BiLSTM
from metaicl.spec import TaskSpec
from metaicl.task import TaskDistribution
from metaicl.tasks import LinearRegression

HALF = [torch.bfloat16, torch.float16]


class Constant(Learner[None]):
    """Answers 1000, or two classes of probabilities .25 and .75, in the precision of its first parameter."""

    traits = Traits()

    def __init__(self, spec: TaskSpec, dtype: torch.dtype, updates: bool = False) -> None:
        super().__init__(spec)
        self.start = nn.Parameter(torch.zeros((), dtype=dtype))
        if updates:
            self.update = lambda state, examples: None

    def adapt(self, support: Examples) -> None:
        return None

    def predict(self, state: None, x: Tensor) -> Any:
        if self.spec.kind == "regression":
            return gaussian(self.start.expand(*x.shape[:2], 1) + 1000, self.start + 1)
        odds = torch.tensor([0.25, 0.75]).log().to(self.start.dtype)
        return categorical(odds.expand(*x.shape[:2], 2) + self.start)


class Far(TaskDistribution):
    """Targets of 1001.7, which half precision has no number for."""

    def __init__(self, ordered: bool = False) -> None:
        self.spec = TaskSpec("regression", (1,), y_dim=1, ordered=ordered)

    def sample(self, n_tasks: int, *, n_shot: int, n_query: int, **_: Any) -> Episode:
        parts = [Examples(torch.zeros(n_tasks, n, 1), torch.full((n_tasks, n, 1), 1001.7)) for n in (n_shot, n_query)]
        return Episode(*parts)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("way", ["at once", "one pass", "row by row", "anew"])
def test_a_learner_in_half_precision_is_judged_by_the_targets_themselves(dtype: torch.dtype, way: str) -> None:
    tasks = Far(ordered=way != "at once")
    learner = Constant(tasks.spec, dtype, updates=way == "row by row")
    if way == "one pass":
        learner.predict_prefixes = lambda examples: learner.predict(None, examples.x)
    options: dict[str, Any] = {"n_shot": 2, "n_query": 3, "n_episodes": 2}
    found = evaluate(learner, tasks, **options)
    expected = evaluate(Constant(tasks.spec, torch.float32), tasks, **options)
    assert found.mean("mse") == pytest.approx(1.7**2, rel=1e-4)
    assert found.mean("nll") == pytest.approx(expected.mean("nll"), rel=1e-6)
    assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize("dtype", HALF)
def test_shares_of_three_rows_are_not_rounded(dtype: torch.dtype) -> None:
    tasks = GaussianClasses(n_way=2, dim=2)
    found = evaluate(Constant(tasks.spec, dtype), tasks, n_shot=1, n_query=3, n_episodes=5)
    assert found.metrics["accuracy"].tolist() == [0.5] * 5
    assert found.mean("nll") == pytest.approx(-0.5 * torch.tensor([0.25, 0.75]).log().sum().item(), rel=2e-3)


@pytest.mark.parametrize("tasks", [GaussianClasses(n_way=3, dim=4), LinearRegression(dim=2), Sinusoid(noise=0.1)])
def test_an_address_names_the_same_episode_under_any_default_dtype(tasks: TaskDistribution) -> None:
    def draw() -> str:
        stream = EpisodeStream(tasks, seed=0, split="train", n_shot=(1, 3), n_query=1, chunk_size=2)
        stream.try_largest()
        return stream[0].fingerprint()

    expected = draw()
    torch.set_default_dtype(torch.float64)
    try:
        assert draw() == expected
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_run_does_not_go_on_in_another_precision(tmp_path: Any) -> None:
    tasks = GaussianClasses(n_way=3, dim=4)
    options: dict[str, Any] = {"validate_every": None, "meta_batch_size": 2, "n_shot": 1, "n_query": 2}
    meta_train(ProtoNet(tasks.spec), tasks, TrainConfig(steps=2, **options), directory=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"another configuration(.|\n)*torch\.float64"):
        meta_train(
            ProtoNet(tasks.spec).double(), tasks, TrainConfig(steps=4, **options), directory=tmp_path, progress=False
        )


def with_bilstm(spec: TaskSpec) -> ProtoNet:
    return ProtoNet(spec, encoder=BiLSTM(50, dim=8, hidden=4))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "kind",
    [FEAT, RelationNet, RidgeHead, MatchingNet, DistributionalSignatures, partial(RAML, k=0), with_bilstm],
)
def test_a_padded_row_of_text_has_an_answer_in_half_precision(
    kind: Callable[[TaskSpec], Learner], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    spec = TaskSpec("classification", (4,), x_kind="tokens", n_way=3, vocabulary=50)
    support = Examples(torch.randint(1, 50, (1, 4, 4)), torch.tensor([[0, 1, 0, 1]]))  # nothing of the third class
    learner, x = kind(spec).eval(), torch.randint(1, 50, (1, 5, 4))
    expected = learner(support, x).probs.detach()
    learner = learner.to(dtype)
    found = learner(support.pad(5), x).probs.detach().float()
    assert bool(found.isfinite().all())
    assert float((found - expected).abs().max()) < 0.1


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("n_shot", [2, 80])  # by rows and by sums
def test_a_regression_head_solves_in_half_precision(n_shot: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tasks = Sinusoid()
    episode = EpisodeStream(tasks, seed=0, split="train", n_shot=n_shot, n_query=3, chunk_size=2)[0]
    learner = RidgeHead(tasks.spec)
    expected = learner(episode.support, episode.query.x).mean.detach()
    episode = episode.to(dtype=dtype)
    found = learner.to(dtype)(episode.support, episode.query.x).mean.detach()
    assert float((found - expected).abs().max()) < 0.2
