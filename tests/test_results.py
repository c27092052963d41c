import json
import math

import numpy as np
import pytest
import torch

from metaicl.evaluation import evaluate
from metaicl.learners.reference.simple import Constant
from metaicl.results import Result, json_ready
from metaicl.tasks.gaussians import GaussianClasses

TASKS = GaussianClasses(dim=2)


@pytest.fixture(scope="module")
def result():
    found = evaluate(Constant(TASKS.spec), TASKS, n_shot=1, n_query=2, n_episodes=10)
    history = {"step": [1, 2], "loss": [0.1 + 0.2, None], "seconds": [0.5, 1.0]}
    sketches = ({"right": 1, "rows": 2},)
    return Result(task="t", learner="a", seed=3, evaluations={1: found}, history=history, sketches=sketches)


def test_a_result_survives_json_exactly(result):
    again = Result.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    assert again.to_dict() == result.to_dict()
    assert again.evaluations[1].metrics["nll"].tolist() == result.evaluations[1].metrics["nll"].tolist()
    assert again.evaluations[1].calibration == result.evaluations[1].calibration


@pytest.mark.parametrize("spoil", [{"evaluations": None}, {"unknown": 1}, {"sketches": 3}])
def test_what_is_no_result_is_refused(result, spoil):
    with pytest.raises(ValueError, match="no stored result"):
        Result.from_dict({**result.to_dict(), **spoil})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"status": "finished"}, "evaluations exactly when it is finished"),
        ({"status": "failed"}, "reason exactly when it is not finished"),
        ({"status": "done"}, "status must be one of"),
        ({"status": "failed", "reason": "NaN", "role": "oracle"}, "role must be one of"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Result(task="t", learner="a", **fields)


def test_json_has_no_nan_and_no_objects():
    found = json_ready({1: (math.nan, math.inf, 1.5, True, None, TASKS.__class__)})
    assert found == {"1": [None, None, 1.5, True, None, str(GaussianClasses)]}


def test_arrays_and_tensors_are_numbers_in_json():
    found = json_ready({"curve": np.array([1.5, np.nan]), "value": torch.tensor(2.5), "counts": (np.arange(2),)})
    assert found == {"curve": [1.5, None], "value": 2.5, "counts": [[0, 1]]}
