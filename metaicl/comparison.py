"""Training and judging several learners on the same episodes."""

import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from metaicl.checks import check_choice, check_count, check_device, check_seed
from metaicl.comparison_pool import run_jobs
from metaicl.comparison_runs import Options, Source, Trainer, Worker, entries_of, jobs_of, make_board
from metaicl.description import describe
from metaicl.files import lock_directory, remove_partial_files
from metaicl.learner import Learner
from metaicl.meta_training import meta_train
from metaicl.report import Report
from metaicl.results import Result, json_ready
from metaicl.task import EVAL_SEED, SPLITS, Split, TaskDistribution, check_distribution
from metaicl.train_config import TrainConfig
from metaicl.versions import package_version

Budget = TrainConfig | Mapping[Any, TrainConfig]


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
    prequential: bool | None = None,
    device: str | torch.device | None = None,
    directory: str | os.PathLike[str] | None = None,
    processes: int = 1,
    trainer: Trainer = meta_train,
    progress: bool = True,
) -> Report:
    """Train every learner on the same addressed episodes, judge all of them on the same others, and report.

    For a given seed all learners see the same training episodes, and their parameters are drawn from the same
    address. A learner that is not for the tasks (`NotServed`) is listed as not served, one that diverges as failed; the
    others go on. Any other error in building a learner is raised before anything is trained.

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
        prequential: Predict each query row from the support and all query rows before it; by default where
            `spec.ordered`. See `evaluate`.
        device: Where to train and evaluate; by default where the factory puts the learner.
        directory: Keeps each finished result, and the training checkpoints: the same call resumes there.
        processes: Runs at a time, each in a process of its own with its share of the threads; learners must then be
            classes or functions that can be sent there (no lambdas).
        trainer: Called like `meta_train`; `functools.partial(meta_train, objective=...)` changes the loss.
        progress: Show progress bars.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a name is unknown, a budget is missing, or `directory` holds results of another comparison.
    """
    directory = None if directory is None else Path(directory).absolute()  # the working directory may change meanwhile
    if not isinstance(tasks, Mapping):
        check_distribution(tasks)
        tasks = {type(tasks).__name__: tasks}
    if shots is not None and not isinstance(shots, Sequence):
        raise TypeError(f"shots must be a sequence of numbers of support rows; got {shots!r}")
    _check_names(learners, tasks)
    options = Options(
        train=_budgets(train, tasks, learners),
        seeds=_seed_list(seeds),
        n_episodes=check_count("n_episodes", n_episodes),
        split=check_choice("split", split, SPLITS),  # type: ignore[arg-type]  # it is one of SPLITS
        batch_size=check_count("batch_size", batch_size),
        device=None if device is None else check_device(device),
        prequential=prequential,
    )
    boards = [make_board(name, one, options, n_shot, n_query, shots or ()) for name, one in tasks.items()]
    entries = {board.name: entries_of(board, learners, references, baseline) for board in boards}
    jobs = [job for board in boards for entry in entries[board.name] for job in jobs_of(board, entry, options)]
    with nullcontext() if directory is None else _owned(directory):
        worker = Worker(options, trainer, directory, progress, None if directory is None else describe(trainer))
        results = run_jobs(worker, jobs, processes=check_count("processes", processes))
    return Report(
        _protocol(options, results, processes), {board.name: board.card(baseline) for board in boards}, results
    )


def _check_names(learners: Mapping[str, Source], tasks: Mapping[str, TaskDistribution]) -> None:
    if not isinstance(learners, Mapping) or not learners:
        raise TypeError(f"learners must be a mapping of names to factories or learners, not empty; got {learners!r}")
    for name in (*learners, *tasks):
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise TypeError(f"names of learners and tasks must be printable text of one line; got {name!r}")
    for name, source in learners.items():
        if not isinstance(source, Learner) and not callable(source):
            raise TypeError(f"learners[{name!r}] must be a factory spec -> Learner or a Learner; got {source!r}")
    for name, one in tasks.items():
        check_distribution(one, f"tasks[{name!r}]")
    if not tasks:
        raise ValueError("tasks must name at least one task distribution; got an empty mapping")


def _seed_list(seeds: int | Sequence[int]) -> tuple[int, ...]:
    found = tuple(map(check_seed, seeds if isinstance(seeds, Iterable) else range(check_count("seeds", seeds))))
    if not found or len(set(found)) != len(found):
        raise ValueError(f"seeds must be at least one number, each once; got {found}")
    return found


def _budgets(
    train: Budget | None, tasks: Mapping[str, TaskDistribution], learners: Mapping[str, Source]
) -> dict[tuple[str, str | None], TrainConfig]:
    """The budget of each (task, learner), with None for "every other learner"."""
    if train is None:
        return {}
    if isinstance(train, TrainConfig):
        return {(task, None): train for task in tasks}
    if not isinstance(train, Mapping):
        raise TypeError(f"train must be a TrainConfig or a mapping to them; got {type(train).__name__}")
    found: dict[tuple[str, str | None], TrainConfig] = {}
    for key, config in train.items():
        task, learner = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        task = check_choice("train: task", task, tasks)
        if learner is not None:
            learner = check_choice("train: learner", learner, [*learners, *tasks[task].references()])
        if not isinstance(config, TrainConfig):
            raise TypeError(f"train[{key!r}] must be a TrainConfig; got {type(config).__name__}")
        found[task, learner] = config
    return found


@contextmanager
def _owned(directory: Path) -> Iterator[None]:
    """Own the directory, without what a killed comparison left half-written; runs tidy their own folders."""
    if directory.is_file():
        raise NotADirectoryError(f"directory must be a directory or nothing yet; {directory} is a file")
    directory.mkdir(parents=True, exist_ok=True)
    with lock_directory(directory):
        for learner in directory.glob("*/*/"):
            remove_partial_files(learner)
        yield


def _protocol(options: Options, results: Sequence[Result], processes: int) -> dict[str, Any]:
    """How the comparison was made; what belongs to one task distribution stands on its card."""
    used = sorted({one.device for result in results for one in result.evaluations.values()})
    return json_ready(
        {
            "split": f"meta-{options.split}",
            "episodes": f"{options.n_episodes} per task distribution, address {EVAL_SEED}",
            "training_seeds": options.seeds,
            "training_budget": _budget_text(results),
            "interval": "95 %, crossed bootstrap over seeds and episodes",
            "batch_size": sorted({one.batch_size for result in results for one in result.evaluations.values()}),
            "device": [_device_name(name) for name in used],
            "threads": max(1, torch.get_num_threads() // processes),
            "runs_at_a_time": processes,
            "versions": {name: package_version(name) for name in ("metaicl", "torch", "numpy")}
            | {"python": platform.python_version()},
        }
    )


def _budget_text(results: Sequence[Result]) -> Any:
    """What all trained learners share, what those of a task distribution share, and what one has of its own."""
    budgets = {(result.task, result.learner): dict(result.budget) for result in results if result.budget}
    if not budgets:
        return "nothing was trained"
    everywhere = _common(list(budgets.values()))
    text: dict[str, Any] = {"for all": {name: everywhere[name] for name in _SHOWN if name in everywhere}}
    for task in dict.fromkeys(task for task, _ in budgets):
        here = _common([budget for (name, _), budget in budgets.items() if name == task])
        text[task] = {name: value for name, value in here.items() if name not in everywhere}
        for (name, learner), budget in budgets.items():
            if name == task:
                text[f"{task}, {learner}"] = {key: value for key, value in budget.items() if key not in here}
    return {name: values for name, values in text.items() if values}


def _common(budgets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, *others = budgets
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


_SHOWN = ("steps", "max_seconds", "meta_batch_size", "n_shot", "n_query", "optimizer", "outer_lr", "schedule")


def _device_name(name: str) -> str:
    return (
        f"{name} ({torch.cuda.get_device_name(name)})" if name.startswith("cuda") else f"{name} ({platform.machine()})"
    )
