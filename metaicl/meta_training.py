"""`meta_train`: the outer loop with validation, logs, checkpoints and exact resume."""

import contextlib
import copy
import os
import time
import warnings
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from metaicl.checkpoint import load_weights, save_learner
from metaicl.checks import check_built_for
from metaicl.description import describe
from metaicl.distributed import check_unwrapped, from_first, largest, n_processes, rank
from metaicl.interruption import Interruption
from metaicl.learner import FollowsTraining, Learner, Prepares
from metaicl.objectives import Objective, added_to_own, query_loss
from metaicl.run_directory import RunDirectory, open_run_directory
from metaicl.run_log import Row, RunLog
from metaicl.task import TaskDistribution, check_distribution, check_is_learner, derive_seed
from metaicl.train_config import TrainConfig, first_episode, make_optimizer
from metaicl.training import Step, device_of, isolated_randomness, outer_loop
from metaicl.validation import addressed_stream, validation_loss


@dataclass(frozen=True)
class TrainingRun:
    """What `meta_train` did.

    Args:
        history: The rows of the log: "step" (updates done), "loss", "grad_norm", "n_shot", "learning_rate",
            "seconds" (since the start) and, where validated, "validation_loss" (nats per row).
        seconds: Wall-clock time of all parts of the run.
        steps_done: Updates made.
        best_step: Updates after which the validation loss was lowest; None without validation.
        best_loss: That loss, in nats per row.
        directory: Where the run was written, if anywhere.
    """

    history: list[Row]
    seconds: float
    steps_done: int
    best_step: int | None = None
    best_loss: float | None = None
    directory: Path | None = None


def meta_train(
    learner: Learner,
    tasks: TaskDistribution,
    config: TrainConfig,
    *,
    directory: str | os.PathLike[str] | None = None,
    objective: Objective = query_loss,
    progress: bool = True,
    resume: bool = True,
) -> TrainingRun:
    """Train a learner in place, as `config` says.

    A learner that `Prepares` is prepared first. At the end the learner holds the weights that were best on fixed
    episodes of the validation split (`query_loss`), or the last ones with `select="last"` or without validation.
    One with nothing to train (`traits.trainable` False) is at most prepared, and nothing is written.

    With a `directory` the run writes `config.json`, `log.jsonl`, TensorBoard events where tensorboard is installed,
    checkpoints, and at the end `learner.ckpt` (see `load_learner_weights`). Called again after a kill, it continues
    and ends in the same weights, to the bit, on the same machine with the same number of threads. Ctrl-C and SIGTERM
    let the update end and write a checkpoint before KeyboardInterrupt or exit code 143; a second signal does not wait.

    Several processes (see `metaicl.distributed`) split meta-batches and validation tasks, stop together, and return
    the same; the first one writes. A run may be resumed by another number of them, with a warning.

    Args:
        learner: Built and seeded by the caller; moved to `config.device`.
        tasks: Training and validation tasks.
        config: All other choices.
        directory: Where to write and what to resume; None keeps everything in memory.
        objective: (learner, episode) -> loss of each task (B,). Learners with `meta_gradients` of their own are trained
            by these and by what `WithAuxiliary` adds.
        progress: Show a bar on stderr.
        resume: Continue a run in `directory`; False refuses to.

    Returns:
        The log and the outcome.

    Raises:
        TypeError: If an argument has the wrong type, or the learner is wrapped in DistributedDataParallel.
        ValueError: If the learner was built for other tasks, the tasks cannot give so many rows, the run in `directory`
            has another configuration, nothing can be trained, or the objective would replace the `meta_gradients` of
            the learner.
        FloatingPointError: If a loss, a gradient or a weight is NaN or infinite; the last checkpoint stands.
        CheckpointError: If the checkpoints cannot be used.
        OSError: If `directory` cannot be used.
    """
    path = None if directory is None else Path(directory).absolute()  # the working directory may change meanwhile
    check_unwrapped(learner)
    check_is_learner(learner)
    if not isinstance(config, TrainConfig):
        got = f"{type(learner).__name__} and {type(config).__name__}"
        raise TypeError(f"meta_train needs a Learner, a TaskDistribution and a TrainConfig; got {got}")
    check_distribution(tasks)
    check_built_for(type(learner).__name__, learner.spec, tasks.spec)
    added_to_own(learner, objective)  # an objective that would be ignored is named before anything is written
    if learner.traits.trainable:
        for split in ("train",) if config.validate_every is None else ("train", "validation"):
            addressed_stream(tasks, config, split).try_largest()  # and so is a split with too few classes or rows
    if config.device is not None:
        learner.to(config.device)
    with contextlib.ExitStack() as stack:
        store = None
        if path is not None and learner.traits.trainable and rank() == 0:
            described = _describe(learner, tasks, config, objective)
            store = stack.enter_context(open_run_directory(path, described, resume=resume))
        if isinstance(learner, Prepares):
            with isolated_randomness(derive_seed(config.seed, "prepare"), device_of(learner)):
                learner.prepare(tasks, seed=config.seed)
        if not learner.traits.trainable:
            return TrainingRun([], 0.0, 0)
        training = _Training(learner, tasks, config, objective, store)
        stack.callback(training.log.close)
        training.run(stack.enter_context(Interruption()), progress)
        return from_first(training.finish())


class _Training:
    """A run between two checkpoints: everything that has to survive a kill, and what is made from it."""

    def __init__(
        self,
        learner: Learner,
        tasks: TaskDistribution,
        config: TrainConfig,
        objective: Objective,
        store: RunDirectory | None,
    ) -> None:
        self.learner, self.tasks, self.config, self.objective, self.store = learner, tasks, config, objective, store
        self.optimizer, self.scheduler = make_optimizer(learner, config)
        self.step = 0
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None  # of the scheduled validations, the same in a longer run
        self.last: dict[str, Any] | None = None  # after the last step, where no validation is scheduled
        self.saved = -1
        loaded = from_first(None if store is None else store.load())
        if loaded is not None:
            self._restore(*loaded)
        self.log = RunLog(None if store is None else store.path, kept=self.step)

    def run(self, interruption: Interruption, progress: bool) -> None:
        """Train until the steps or the seconds are used up."""
        if self.saved < 0:
            self.save()  # a run killed before its first checkpoint starts again from these weights
        began = time.perf_counter() - self.seconds
        hidden = not progress or rank() > 0
        bar = tqdm(total=self.config.steps, initial=self.step, disable=hidden, unit="step", dynamic_ncols=True)
        with bar, contextlib.closing(self._updates()) as updates:
            for step in updates:
                self.step = step.index + 1
                self.seconds = time.perf_counter() - began
                self._after(step)
                bar.update()
                if self._logged(self.step):
                    bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
                clock_and_signal = (time.perf_counter() - began, interruption.pending or 0)
                self.seconds, pending = largest(clock_and_signal, device_of(self.learner))  # all stop at the same step
                if self.step % self.config.checkpoint_every == 0 or pending:
                    self.save()
                if pending:
                    interruption.pending = int(pending)
                    interruption.raise_pending()
                if self._out_of_time():
                    break
        self.save()

    def finish(self) -> TrainingRun:
        """Put the selected weights into the learner and say what happened."""
        config, path = self.config, None if self.store is None else self.store.path
        if self.last is None and self.step == config.steps and self._extra(self.step):  # a finished run, once more
            self.last = self._validated()
        found = [one for one in (self.best, self.last) if one is not None]
        best = min(found, key=lambda one: one["loss"], default=None)
        if best is not None and config.select == "best":
            load_weights(self.learner, best["learner"], source="the best weights")
        if path is not None:
            save_learner(self.learner, path / "learner.ckpt")
        best_step, best_loss = (None, None) if best is None else (best["step"], best["loss"])
        return TrainingRun(list(self.log.rows), self.seconds, self.step, best_step, best_loss, path)

    def save(self) -> None:
        """Write a checkpoint of this moment, once."""
        if self.store is None or self.saved == self.step:
            return
        for name, value in self.learner.named_parameters():
            if value.requires_grad and not bool(value.isfinite().all()):  # a frozen one may be a mask of -inf
                raise FloatingPointError(
                    f"after step {self.step} the weights of {name} are NaN or infinite; no checkpoint is made"
                )
        content = {
            "step": self.step,
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "seconds": self.seconds,
            "num_threads": torch.get_num_threads(),
            "processes": n_processes(),
            "torch": str(torch.__version__),
        }
        self.log.sync()
        self.store.save(self.step, content, self.best)
        self.saved = self.step

    def _restore(self, content: dict[str, Any], best: dict[str, Any] | None) -> None:
        source = f"the checkpoint in {'the first process' if self.store is None else self.store.path}"
        load_weights(self.learner, content["learner"], source=source)
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        self.step, self.seconds, self.best, self.saved = content["step"], content["seconds"], best, content["step"]
        here = {"num_threads": torch.get_num_threads(), "processes": n_processes(), "torch": str(torch.__version__)}
        for name, value in here.items():
            earlier = content.get(name, 1)  # runs of one process did not name their number at first
            if earlier != value:
                text = f"the run was made with {name} {earlier} and goes on with {value}; its last bits may differ"
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _updates(self) -> Generator[Step, None, None]:
        if self.step >= self.config.steps or self._out_of_time():
            return _nothing()
        return outer_loop(
            self.learner,
            self.tasks,
            self.optimizer,
            steps=self.config.steps,
            objective=self.objective,
            start=self.step,
            scheduler=self.scheduler,
            **self.config.loop_options(),
        )

    def _after(self, step: Step) -> None:
        row: Row = {"step": self.step, "loss": step.loss, "grad_norm": step.grad_norm, "n_shot": step.n_shot}
        row |= {"learning_rate": step.learning_rate, "seconds": self.seconds}
        every, extra = self.config.validate_every, self._extra(self.step)
        if extra or (every is not None and self.step % every == 0):
            found = self._validated()
            row["validation_loss"] = found["loss"]
            if extra:
                self.last = found
            elif self.best is None or found["loss"] < self.best["loss"]:
                self.best = found
        if "validation_loss" in row or self._logged(self.step):
            self.log.append(row)

    def _extra(self, step: int) -> bool:
        """Whether `step` is the last one, and validated for that alone."""
        every = self.config.validate_every
        return every is not None and step == self.config.steps and step % every != 0

    def _validated(self) -> dict[str, Any]:
        loss = validation_loss(self.learner, self.tasks, self.config, step=self.step)
        return {"step": self.step, "loss": loss, "learner": copy.deepcopy(self.learner.state_dict())}

    def _logged(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.config.steps

    def _out_of_time(self) -> bool:
        return self.config.max_seconds is not None and self.seconds >= self.config.max_seconds


def _describe(learner: Learner, tasks: TaskDistribution, config: TrainConfig, objective: Objective) -> dict[str, Any]:
    """What must not change between the parts of a run; the first episode stands for the data."""
    name = getattr(objective, "__qualname__", None)
    anneals = any(isinstance(module, FollowsTraining) for module in learner.modules())
    return {
        **asdict(config),
        **({"anneals": True} if anneals else {}),
        "learner": type(learner).__name__,
        "learner_settings": describe(learner, weights=False),  # the weights are those of the checkpoint
        "objective": type(objective).__name__ if name is None else name,
        "objective_settings": describe(objective) if name is None else None,
        "first_episode": first_episode(tasks, config),
    }


def _nothing() -> Generator[Step, None, None]:
    yield from ()
