"""How to train: every choice of `meta_train` that is not the learner or the tasks."""

import difflib
import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import optim
from torch.optim.lr_scheduler import LambdaLR

from metaicl.checks import (
    check_choice,
    check_count,
    check_device,
    check_positive,
    check_seed,
    check_shots,
    is_finite_number,
)
from metaicl.learner import Learner
from metaicl.meta_step import AUTOCAST, trainable_parameters
from metaicl.task import EpisodeStream, TaskDistribution

_OPTIMIZERS = {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD}
_SCHEDULES = ("constant", "cosine", "linear")
_COUNTS = {  # and the least that each can be
    "steps": 1, "meta_batch_size": 1, "micro_batch_size": 1, "n_query": 1, "validate_every": 1, "n_validation": 1,
    "checkpoint_every": 1, "log_every": 1, "warmup_steps": 0, "workers": 0,
}  # fmt: skip
_OPTIONAL = ("micro_batch_size", "validate_every")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The choices of a training run, checked when it is made.

    Args:
        steps: Updates in the whole run.
        meta_batch_size: B, tasks per update.
        micro_batch_size: Tasks in memory at a time; None takes the whole meta-batch.
        n_shot: Support rows per class (per task in regression); a pair (low, high) draws one value per update.
        n_query: Query rows, likewise.
        outer_lr: Learning rate of the outer loop, the highest one where a schedule changes it.
        optimizer: "adam", "adamw" or "sgd" (without momentum).
        betas: Decays of Adam's and AdamW's running means of gradients and of their squares, in [0, 1).
        weight_decay: As the optimizer defines it.
        schedule: "constant", or "cosine" or "linear" down to zero at `steps`.
        warmup_steps: Updates over which the rate rises linearly at first.
        clip_norm: Largest Euclidean norm of the meta-gradient; None does not clip.
        seed: Of training episodes, preparation and the learner's own randomness.
        validate_every: Updates between validations; None never validates.
        n_validation: Tasks of the validation split, always the same ones.
        select: "best" leaves the learner with the weights that were best in validation, "last" with the last ones.
        checkpoint_every: Updates between checkpoints.
        log_every: Updates between rows of the log.
        compile: Try one compiled graph for the whole meta-step.
        autocast: None or "bf16".
        device: Where to train; None means where the learner is.
        workers: Processes that sample ahead.
        max_seconds: Budget of wall-clock time, over all resumed parts and validation included; None is no limit.

    Raises:
        TypeError: If a field is unknown or has the wrong type.
        ValueError: If a value is out of range; the message names the field.
    """

    steps: int
    meta_batch_size: int = 25
    micro_batch_size: int | None = None
    n_shot: int | tuple[int, int] = 5
    n_query: int = 15
    outer_lr: float = 1e-3
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    clip_norm: float | None = None
    seed: int = 0
    validate_every: int | None = 500
    n_validation: int = 100
    select: Literal["best", "last"] = "best"
    checkpoint_every: int = 500
    log_every: int = 10
    compile: bool = False
    autocast: Literal["bf16"] | None = None
    device: str | None = None
    workers: int = 0
    max_seconds: float | None = None

    def __new__(cls, **values: Any) -> "TrainConfig":
        """Name the closest field when one is misspelt; dataclasses would only refuse it."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; it has {known}"
                raise TypeError(f"TrainConfig has no field {name!r}{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every field."""
        for name, minimum in _COUNTS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                self._keep(name, check_count(name, value, minimum))
        ends = check_shots(self.n_shot)
        self._keep("n_shot", ends if isinstance(self.n_shot, (tuple, list)) else ends[0])
        self._check_optimization()
        check_choice("select", self.select, ("best", "last"))
        if not isinstance(self.compile, bool):
            raise TypeError(f"compile must be True or False; got {self.compile!r}")
        if self.autocast is not None:
            check_choice("autocast", self.autocast, AUTOCAST)
        if self.device is not None:
            self._keep("device", str(check_device(self.device)))
        if self.max_seconds is not None:
            self._keep("max_seconds", check_positive("max_seconds", self.max_seconds))

    def loop_options(self) -> dict[str, Any]:
        """The arguments of `outer_loop` that are fields of this configuration, apart from `steps` and `device`."""
        names = ("meta_batch_size", "micro_batch_size", "n_shot", "n_query", "seed", "clip_norm")
        return {name: getattr(self, name) for name in (*names, "compile", "autocast", "workers")}

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_optimization(self) -> None:
        self._keep("seed", check_seed(self.seed))
        self._keep("outer_lr", check_positive("outer_lr", self.outer_lr))
        check_choice("optimizer", self.optimizer, _OPTIMIZERS)
        if not (isinstance(self.betas, (tuple, list)) and len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)):
            raise ValueError(f"betas must be a pair of numbers in [0, 1); got {self.betas!r}")
        self._keep("betas", tuple(map(float, self.betas)))
        check_choice("schedule", self.schedule, _SCHEDULES)
        if self.weight_decay != 0:
            if not is_finite_number(self.weight_decay) or self.weight_decay < 0:
                raise ValueError(f"weight_decay must be a finite number >= 0; got {self.weight_decay!r}")
            self._keep("weight_decay", float(self.weight_decay))
        if self.clip_norm is not None:
            self._keep("clip_norm", check_positive("clip_norm", self.clip_norm))
        if self.warmup_steps >= self.steps and self.warmup_steps > 0:
            raise ValueError(f"warmup_steps must be below steps = {self.steps}; got {self.warmup_steps}")


def make_optimizer(learner: Learner, config: TrainConfig) -> tuple[optim.Optimizer, LambdaLR]:
    """The optimizer over the learner's trainable parameters and the schedule of its rate."""
    parameters = list(trainable_parameters(learner).values())
    fused = all(parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point() for parameter in parameters)
    make = _OPTIMIZERS[config.optimizer]
    betas = {} if config.optimizer == "sgd" else {"betas": config.betas}
    optimizer = make(parameters, lr=config.outer_lr, weight_decay=config.weight_decay, fused=fused or None, **betas)
    return optimizer, LambdaLR(optimizer, lambda step: rate_factor(config, step))


def rate_factor(config: TrainConfig, step: int) -> float:
    """What `outer_lr` is multiplied by in update `step` (from 0)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = min((step - config.warmup_steps) / (config.steps - config.warmup_steps), 1.0)
    return 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def first_episode(tasks: TaskDistribution, config: TrainConfig) -> str:
    """The fingerprint of the first meta-batch, which stands for the training data."""
    stream = EpisodeStream(
        tasks,
        seed=config.seed,
        split="train",
        n_shot=config.n_shot,
        n_query=config.n_query,
        chunk_size=config.meta_batch_size,
    )
    return stream[0].fingerprint()
