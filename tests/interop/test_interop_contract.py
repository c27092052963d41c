"""Learners of other libraries sit the same exam as ours, and stand beside ours in a comparison."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

from metaicl.comparison import compare
from metaicl.episode import Examples
from metaicl.interop.higher import HigherMAML
from metaicl.interop.learn2learn import L2LGBML, L2LMAML, L2LMetaSGD, TasksetDistribution, import_learn2learn
from metaicl.interop.sklearn import SklearnLearner
from metaicl.learners.gradient.maml import MAML
from metaicl.objectives import squared_error
from metaicl.spec import TaskSpec
from metaicl.task import SPLITS, derive_generator
from metaicl.tasks.functions import LinearRegression, Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.testing import check_tasks, parametrize_with_checks
from metaicl.train_config import TrainConfig

LEARNERS = {
    "L2LMAML": L2LMAML,
    "L2LMetaSGD": L2LMetaSGD,
    "L2LGBML": partial(L2LGBML, inner_steps=2),
    "HigherMAML": partial(HigherMAML, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01)),
}


@parametrize_with_checks(LEARNERS, {"sinusoid": Sinusoid(), "gaussians": GaussianClasses(n_way=3, dim=4)})
def test_adapters_keep_the_contract(check: Callable[[], None]) -> None:
    check()


@parametrize_with_checks(
    {"Logistic": partial(SklearnLearner, estimator=LogisticRegression())},
    {"gaussians": GaussianClasses(n_way=3, dim=4)},
)
def test_scikit_learn_classifier_keeps_the_contract(check: Callable[[], None]) -> None:
    check()


@parametrize_with_checks({"Ridge": partial(SklearnLearner, estimator=Ridge())}, {"linear": LinearRegression(dim=3)})
def test_scikit_learn_regressor_keeps_the_contract(check: Callable[[], None]) -> None:
    check()


def test_side_by_side_with_ours():
    """Trained on the same episodes from the same weights, MAML by three engines ends in the same place."""
    settings = {"inner_lr": 0.01, "inner_steps": 1}
    sgd = partial(torch.optim.SGD, lr=0.01)
    learners = {
        "MAML": partial(MAML, **settings),
        "L2LMAML": partial(L2LMAML, **settings),
        "HigherMAML": partial(HigherMAML, optimizer=sgd),
    }
    train = TrainConfig(steps=3, meta_batch_size=4, n_shot=5, n_query=5, validate_every=None)
    learners["Ridge"] = partial(SklearnLearner, estimator=Ridge())
    report = compare(learners, Sinusoid(), train=train, n_episodes=8, seeds=1, references=False, progress=False)
    assert [result.status for result in report.results] == ["finished"] * 4
    assert report.results[3].seed is None  # there was nothing to train
    ours, *others = ([*result.history["loss"], *result.evaluations[5].metrics["nll"]] for result in report.results[:3])
    assert ours[0] > 1  # losses to speak of
    for other in others:
        assert other == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize("learner", LEARNERS)
def test_inference_mode_changes_nothing(learner):
    made = LEARNERS[learner](Sinusoid().spec)
    episode = Sinusoid().sample(2, split="test", n_shot=3, n_query=3, generator=derive_generator("inference"))
    with torch.inference_mode():
        inside = squared_error(
            made, Sinusoid().sample(2, split="test", n_shot=3, n_query=3, generator=derive_generator("inference"))
        )
    assert torch.equal(inside.clone(), squared_error(made, episode))


class Counting(nn.Module):
    """Writes into a buffer that it answers by."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.mean += x.mean(0)
        return self.head(x - self.mean.clone())


@pytest.mark.parametrize("learner", LEARNERS)
def test_buffers_are_left_alone(learner: str) -> None:
    made = LEARNERS[learner](Sinusoid().spec, net=Counting())
    x = torch.randn(2, 5, 1)
    state = made.adapt(Examples(x, x))
    answers = [made.predict(state, x).mean for _ in range(2)]
    assert made.net.mean.tolist() == [0]
    assert torch.equal(*answers)
    alone = made.predict(made.adapt(Examples(x[1:], x[1:])), x[1:]).mean
    assert torch.equal(alone[0], answers[0][1])  # the task before it left nothing behind


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_parameter_that_is_a_buffer_too_is_refused(learner: str) -> None:
    net = Counting()
    net.register_buffer("again", net.head.weight)
    with pytest.raises(ValueError, match=r"buffers that are parameters too .* take MAML. Got \['again'\]"):
        LEARNERS[learner](Sinusoid().spec, net=net)


@pytest.mark.parametrize("learner", LEARNERS)
def test_targets_and_labels_are_checked(learner: str) -> None:
    x = torch.randn(2, 5, 1)
    with pytest.raises(ValueError, match=r"targets of 5 rows must be \(5, 1\).*got \(5,\)"):
        LEARNERS[learner](Sinusoid().spec).adapt(Examples(x, x[..., 0]))
    with pytest.raises(ValueError, match=r"must hold labels in \[0, n_way=2\); got \[-100\]"):
        LEARNERS[learner](TaskSpec("classification", (1,), n_way=2)).adapt(Examples(x, torch.full((2, 5), -100)))


def test_tasksets_sit_the_exam_of_task_distributions():
    l2l = import_learn2learn()

    def taskset(split, n_classes):
        generator = derive_generator("taskset", split)
        labels = torch.arange(n_classes).repeat_interleave(20)
        x = 3 * torch.randn(n_classes, 4, generator=generator)[labels] + torch.randn(
            len(labels), 4, generator=generator
        )
        data = l2l.data.MetaDataset(torch.utils.data.TensorDataset(x, labels))
        steps = l2l.data.transforms
        return l2l.data.Taskset(data, [steps.NWays(data, 3), steps.KShots(data, 16), steps.LoadData(data)])

    tasks = TasksetDistribution(
        {split: taskset(split, 12) for split in SPLITS}, TaskSpec("classification", (4,), n_way=3)
    )
    check_tasks(tasks)
