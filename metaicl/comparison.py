"""Training and judging several learners on the same episodes."""

import copy
import dataclasses
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from metaicl.checks import check_choice, check_count, check_seed
from metaicl.episode import Episode
from metaicl.evaluation import evaluate_shots
from metaicl.files import lock_directory
from metaicl.gallery import example_cards, example_episode, sketches
from metaicl.learner import Learner, Prepares
from metaicl.report import Report
from metaicl.result_store import ResultStore
from metaicl.results import Result, Role, json_ready
from metaicl.task import EVAL_SEED, SPLITS, Split, TaskDistribution, derive_seed
from metaicl.train_config import TrainConfig
from metaicl.training import isolated_randomness

Source = Learner | Callable[[Any], Learner]
Trainer = Callable[..., Any]
Budget = TrainConfig | Mapping[Any, TrainConfig]

_FAILURES = (ArithmeticError, torch.linalg.LinAlgError, torch.OutOfMemoryError)
_CURVE_POINTS = 400  # of a training curve that are kept


def compare(
    learners: Mapping[str, Source],
    tasks: TaskDistribution | Mapping[str, TaskDistribution],
    *,
    train: Budget | None = None,
    n_episodes: int = 600,
    seeds: int | Sequence[int] = 3,
    n_shot: int | None = None,
    n_query: int | None = None,
    shots: Sequence[int] | None = None,
    references: bool = True,
    baseline: str | None = None,
    split: Split = "test",
    batch_size: int = 50,
    device: str | torch.device | None = None,
    directory: str | os.PathLike[str] | None = None,
    trainer: Trainer | None = None,
    progress: bool = True,
) -> Report:
    """Train every learner on the same addressed episodes, judge all of them on the same others, and report.

    For a given seed all learners see the same training episodes, and their parameters are drawn from the same
    address. A learner that refuses the tasks is listed as not served, one that diverges as failed; the others go on.

    Args:
        learners: Names and factories `spec -> Learner` (a Learner class is one). An instance is taken as trained:
            it is evaluated once, as it is.
        tasks: One distribution, or several by name.
        train: The budget: one for all, or by task name or (task name, learner name). Its seed is replaced.
        n_episodes: E, test episodes.
        seeds: Training seeds 0 .. S - 1, or the seeds themselves.
        n_shot: Support rows per class or per task at test; by default as in training, the highest of a range.
        n_query: Query rows, likewise.
        shots: More numbers of shots for the per-shot curves, on the same tasks with nested supports.
        references: Judge `tasks.references()` too.
        baseline: What differences are taken to; by default the learner with the best mean.
        split: Which tasks to judge on.
        batch_size: Tasks evaluated together.
        device: Where to train and evaluate; by default where the factory puts the learner.
        directory: Keeps each finished result, and the training checkpoints: the same call resumes there.
        trainer: Called like `metaicl.meta_training.meta_train`, which is the default.
        progress: Show progress bars.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a name is unknown, a budget is missing, or `directory` holds results of another comparison.
    """
    options = _Options(_seed_list(seeds), train, n_episodes, check_choice("split", split, SPLITS), batch_size, device)
    check_count("n_episodes", n_episodes)
    _check_learners(learners, baseline)
    by_name = tasks if isinstance(tasks, Mapping) else {_task_name(tasks): tasks}
    _check_budget(train, by_name, learners)
    boards = [_board(name, one, options, (n_shot, n_query, shots or ())) for name, one in by_name.items()]
    entries = {board.name: _entries(board, learners, references) for board in boards}
    _check_baseline(baseline, [entry for found in entries.values() for entry in found])
    jobs = [job for board in boards for entry in entries[board.name] for job in _jobs(board, entry, options)]
    work = _Work(options, trainer or _meta_train(), directory, progress)
    with nullcontext() if directory is None else lock_directory(_made(directory)):
        bar = tqdm(jobs, disable=not progress, unit="run", desc="compare")
        results = tuple(work.run(job) for job in bar)
    return Report(_protocol(options, results), {board.name: board.card(baseline) for board in boards}, results)
