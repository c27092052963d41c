import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_helpers import make_ridge

from metaicl.train_config import TrainConfig, make_optimizer, rate_factor


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("outer_lrr", 1.0, TypeError, "has no field 'outer_lrr'; did you mean 'outer_lr'"),
        ("zzz", 1.0, TypeError, r"has no field 'zzz'; it has \['steps'"),
        ("steps", 0, ValueError, "steps must be an int >= 1; got 0"),
        ("steps", 5.0, TypeError, "steps must be an int >= 1; got 5.0"),
        ("steps", True, TypeError, "steps must be an int"),
        ("meta_batch_size", "4", TypeError, "meta_batch_size must be an int"),
        ("micro_batch_size", 0, ValueError, "micro_batch_size must be an int"),
        ("n_shot", (3, 2), ValueError, "n_shot must be an int >= 3; got 2"),
        ("n_shot", (1, 2, 3), ValueError, "n_shot must be an int or a pair"),
        ("n_query", -1, ValueError, "n_query must be an int"),
        ("outer_lr", 0, ValueError, "outer_lr must be a finite number > 0; got 0"),
        ("outer_lr", math.nan, ValueError, "outer_lr must be a finite number > 0; got nan"),
        ("outer_lr", math.inf, ValueError, "outer_lr must be a finite number > 0; got inf"),
        ("optimizer", "adm", ValueError, "optimizer must be one of .* did you mean 'adam'"),
        ("weight_decay", -0.1, ValueError, "weight_decay must be"),
        ("betas", (0.9, 1.0), ValueError, r"betas must be a pair of numbers in \[0, 1\)"),
        ("betas", 0.9, ValueError, "betas must be a pair"),
        ("schedule", "cosin", ValueError, "did you mean 'cosine'"),
        ("warmup_steps", 10, ValueError, "warmup_steps must be below steps = 10; got 10"),
        ("clip_norm", 0.0, ValueError, "clip_norm must be"),
        ("seed", -1, ValueError, "seed must be"),
        ("seed", 2**70, ValueError, "seed must be in"),
        ("validate_every", 0, ValueError, "validate_every must be"),
        ("select", "first", ValueError, "select must be one of"),
        ("compile", "yes", TypeError, "compile must be True or False; got 'yes'"),
        ("autocast", "fp16", ValueError, "autocast must be one of"),
        ("device", "cuda:7", ValueError, r"device must be one of \['cpu'"),
        ("device", "gpu", ValueError, r"device must be one of \['cpu'"),
        ("workers", -1, ValueError, "workers must be"),
        ("max_seconds", -3, ValueError, "max_seconds must be"),
    ],
)
def test_bad_values_are_named(field: str, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**{"steps": 10, field: value})


def test_a_seed_of_numpy_is_kept_as_an_int() -> None:
    config = TrainConfig(steps=10, seed=np.int64(3))
    assert type(config.seed) is int
    assert config == TrainConfig(steps=10, seed=3)
    for wrong in (np.float64(3.0), np.bool_(True), np.int64(-1)):
        with pytest.raises((TypeError, ValueError), match="seed must be an int >= 0"):
            TrainConfig(steps=10, seed=wrong)


def test_copies_and_changes() -> None:
    config = TrainConfig(steps=10, n_shot=[1, 5], device="cpu")
    assert config.n_shot == (1, 5)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert replace(config, steps=20).steps == 20
    with pytest.raises(TypeError):
        TrainConfig(10)


def test_schedules() -> None:
    def factors(**choices: object) -> list[float]:
        config = TrainConfig(steps=6, **choices)
        return [rate_factor(config, step) for step in range(6)]

    assert factors() == [1.0] * 6
    assert factors(warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors(schedule="linear", warmup_steps=2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert factors(schedule="cosine") == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 6) for step in range(6)])


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_optimizers(name: str, kind: type) -> None:
    learner = make_ridge()
    learner.raw_scale.requires_grad_(False)
    optimizer, schedule = make_optimizer(
        learner, TrainConfig(steps=4, optimizer=name, weight_decay=0.1, warmup_steps=2, betas=(0.8, 0.9))
    )
    assert type(optimizer) is kind
    assert len(optimizer.param_groups[0]["params"]) == 2
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert optimizer.param_groups[0].get("betas") == (None if name == "sgd" else (0.8, 0.9))
    assert schedule.get_last_lr() == [0.5e-3]
