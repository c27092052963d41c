"""Numbers of NumPy, such as those of `np.arange`, mean what Python's mean, in stored results too."""

import json
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from metaicl import MAML, GaussianClasses, ProtoNet, Sinusoid, TaskSpec, TrainConfig, compare, meta_train
from metaicl.checks import check_count, check_positive
from metaicl.description import describe
from metaicl.evaluation import evaluate
from metaicl.inner_loop.optimizers import SGD
from metaicl.task import derive_generator

FIVE, HALF = np.int64(5), np.float32(0.5)


def test_checks_give_numbers_of_python() -> None:
    assert type(check_count("n", np.uint8(3))) is int
    assert type(check_positive("x", HALF)) is float
    assert check_positive("x", np.int32(2)) == 2
    for wrong in (np.float64(3.0), np.bool_(True), np.array([3]), True, 3.0, "3", torch.tensor(3)):
        with pytest.raises(TypeError, match=r"n must be an int >= 1; got"):
            check_count("n", wrong)
    for wrong in (np.float32("nan"), np.float64(-1), np.bool_(True), "1", None):
        with pytest.raises(ValueError, match=r"x must be a finite number > 0; got"):
            check_positive("x", wrong)  # type: ignore[arg-type]


def test_training_settings() -> None:
    names = ("meta_batch_size", "n_query", "n_shot", "log_every", "checkpoint_every", "n_validation", "validate_every")
    numbers = {"steps": 10, "warmup_steps": 2, "seed": 3, **dict.fromkeys(names, 5)}
    rates = {"outer_lr": 0.5, "clip_norm": 0.5, "weight_decay": 0.5, "max_seconds": 0.5, "betas": (0.5, 0.25)}
    found = TrainConfig(
        **{name: np.int64(value) for name, value in numbers.items()},
        **{
            name: np.asarray(value, np.float32)[()] if name != "betas" else (HALF, 0.25)
            for name, value in rates.items()
        },
    )
    assert found == TrainConfig(**numbers, **rates)
    assert json.dumps(asdict(found)) == json.dumps(asdict(TrainConfig(**numbers, **rates)))
    assert TrainConfig(steps=10, n_shot=[np.int64(1), FIVE]).n_shot == (1, 5)


def test_specs() -> None:
    spec = TaskSpec("classification", (np.int64(2),), n_way=FIVE)
    assert spec == TaskSpec("classification", (2,), n_way=5)
    assert type(spec.n_way) is int
    assert json.dumps(spec.shapes)
    for wrong in (5.0, "5", True):
        with pytest.raises(TypeError, match=r"TaskSpec.n_way must be an int or None; got"):
            TaskSpec("classification", (2,), n_way=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"TaskSpec.y_dim must be an int or None; got 1.5 \(float\)"):
        TaskSpec("regression", (2,), y_dim=1.5)  # type: ignore[arg-type]


def test_learners_are_described_alike() -> None:
    spec = Sinusoid().spec
    ours, same = (
        describe(MAML(spec, inner_steps=steps, optimizer=SGD(rate, momentum=rate)), weights=False)
        for steps, rate in ((np.int64(2), HALF), (2, 0.5))
    )
    assert ours == same
    assert describe({"n": FIVE, "x": HALF, "b": np.bool_(True)}) == describe({"n": 5, "x": 0.5, "b": True})


def test_episodes() -> None:
    tasks = GaussianClasses(n_way=FIVE)
    assert type(tasks.spec.n_way) is int
    drawn = [
        tasks.sample(n, split="train", n_shot=s, n_query=s, generator=derive_generator(0)).fingerprint()
        for n, s in ((np.int64(3), np.int64(2)), (3, 2))
    ]
    assert drawn[0] == drawn[1]
    episode = tasks.sample(3, split="train", n_shot=1, n_query=1, generator=derive_generator(0))
    for index in (np.int64(-1), torch.tensor(2)):
        assert episode[index].fingerprint() == episode[2].fingerprint()  # type: ignore[index]


def test_stored_runs_are_found_again_by_either(tmp_path) -> None:
    tasks, kept = GaussianClasses(), {}
    for name, two in (("numpy", np.int64(2)), ("python", 2)):
        config = TrainConfig(steps=two, meta_batch_size=two, n_shot=two, n_query=two, n_validation=two)
        learner = MAML(tasks.spec, inner_steps=two)
        meta_train(learner, tasks, config, directory=tmp_path / "run", progress=False)
        found = evaluate(learner, tasks, n_shot=two, n_query=two, n_episodes=two)
        assert found.metrics["accuracy"].shape == (2,)
        factories = {"ProtoNet": ProtoNet, "MAML": partial(MAML, inner_steps=two)}
        options = {"seeds": two, "n_episodes": two, "shots": (two,), "progress": False, "references": False}
        report = compare(factories, tasks, train=config, directory=tmp_path / "comparison", **options)
        report.to_json(tmp_path / "report.json")
        kept[name] = (tmp_path / "report.json").read_text()
    assert kept["numpy"] == kept["python"]  # times too: nothing was run again


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"x_shape": (1.9,)}, TypeError, r"x_shape must be integers; got \(1.9,\)"),
        ({"x_shape": (True,)}, TypeError, "x_shape must be integers"),
        ({"ordered": "no"}, TypeError, "ordered must be True or False; got 'no'"),
        ({"x_kind": "tokens", "vocabulary": 0}, ValueError, "vocabulary must be an int >= 1; got 0"),
    ],
)
def test_a_spec_takes_nothing_for_a_number_that_is_none(fields: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TaskSpec(**{"kind": "classification", "x_shape": (2,), "n_way": 2, **fields})
