"""The runs of a comparison: what is to be done for each (task distribution, learner, seed), and doing it."""

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from metaicl.checks import check_built_for, check_choice, check_count
from metaicl.description import describe
from metaicl.episode import Episode
from metaicl.evaluation import evaluate_shots
from metaicl.gallery import example_cards, example_episode, sketches
from metaicl.learner import Learner, Prepares
from metaicl.prequential import is_prequential
from metaicl.result_store import ResultStore
from metaicl.results import Result, Role, json_ready
from metaicl.spec import NotServed, TaskSpec
from metaicl.task import EVAL_SEED, EpisodeStream, Split, TaskDistribution, derive_seed
from metaicl.train_config import TrainConfig, first_episode
from metaicl.training import device_of, isolated_randomness

Source = Learner | Callable[[TaskSpec], Learner]
Trainer = Callable[..., Any]

_LinAlgError: type[Exception] = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]
_FAILURES = (ArithmeticError, _LinAlgError, torch.OutOfMemoryError, MemoryError)
_CURVE_POINTS = 400  # kept of a training curve


@dataclass(frozen=True, kw_only=True)
class Options:
    """The settings that all runs share; `train` holds the budget of each (task, learner) that has one."""

    train: Mapping[tuple[str, str | None], TrainConfig]
    seeds: tuple[int, ...]
    n_episodes: int
    split: Split
    batch_size: int
    device: torch.device | None
    prequential: bool | None = None

    def budget(self, task: str, learner: str) -> TrainConfig | None:
        """The learner's own budget on that task, or else the one of the task; None without any."""
        return self.train.get((task, learner), self.train.get((task, None)))


@dataclass(frozen=True, kw_only=True)
class Board:
    """One task distribution and how it is judged, with a few example tasks."""

    name: str
    tasks: TaskDistribution
    n_shot: int
    n_query: int
    shots: tuple[int, ...]
    example: Episode
    cards: list[dict[str, Any]]
    prequential: bool = False

    def card(self, baseline: str | None) -> dict[str, Any]:
        """What the report keeps of it, JSON-ready."""
        plain = {"distribution": type(self.tasks).__name__, "spec": dataclasses.asdict(self.tasks.spec)}
        plain |= {"n_shot": self.n_shot, "n_query": self.n_query, "shots": self.shots, "baseline": baseline}
        plain |= {"prequential": self.prequential}
        return json_ready(plain | {"examples": self.cards})


@dataclass(frozen=True)
class Entry:
    """A learner of the table: a factory, an instance that came trained, or a reference."""

    name: str
    source: Source
    role: Role

    @property
    def ready(self) -> bool:
        """It is judged as it came."""
        return self.role == "learner" and isinstance(self.source, Learner)

    def build(self, spec: TaskSpec, seed: int) -> Learner:
        """A learner of its own, its parameters drawn from the address (seed, "init").

        A copy of what the factory gives: a net that it holds would otherwise go on from one run to the next.

        Raises:
            TypeError: If the factory gives something else.
            NotServed: If the learner is not for such tasks, or came trained for others.
            ValueError: If the factory gives a learner for other tasks than it was asked for.
        """
        if isinstance(self.source, Learner):
            if self.ready:
                check_built_for(self.name, self.source.spec, spec)
            return self.source if self.ready else copy.deepcopy(self.source)
        with isolated_randomness(derive_seed(seed, "init"), torch.device("cpu")):
            learner = self.source(spec)
        if not isinstance(learner, Learner):
            raise TypeError(f"learners[{self.name!r}] must give a Learner for a spec; got {type(learner).__name__}")
        if learner.spec.shapes != spec.shapes:
            raise ValueError(f"learners[{self.name!r}] must give a learner for {spec}; got one for {learner.spec}")
        return copy.deepcopy(learner)


@dataclass(frozen=True)
class Job:
    """One run: a learner with one seed on one task distribution. `refusal` says why there is nothing to run."""

    board: Board
    entry: Entry
    seed: int | None
    config: TrainConfig | None = None
    refusal: str = ""


def make_board(
    name: str,
    tasks: TaskDistribution,
    options: Options,
    n_shot: int | None,
    n_query: int | None,
    shots: Sequence[int],
) -> Board:
    """Settle the numbers of rows, by default those of training, and draw the example tasks."""
    configs = [config for (task, _), config in options.train.items() if task == name]
    if n_shot is None:
        ranges = [(c.n_shot, c.n_shot) if isinstance(c.n_shot, int) else c.n_shot for c in configs]
        n_shot = _agreed("n_shot", name, [high for _, high in ranges])
    n_query = _agreed("n_query", name, [config.n_query for config in configs]) if n_query is None else n_query
    counts = sorted({check_count("n_shot", n_shot), *(check_count("shots", k) for k in shots)})
    n_query = check_count("n_query", n_query)
    example = example_episode(tasks, shots=counts, n_shot=n_shot, n_query=n_query, split=options.split, seed=EVAL_SEED)
    cards = example_cards(tasks, example)
    return Board(
        name=name,
        tasks=tasks,
        n_shot=n_shot,
        n_query=n_query,
        shots=tuple(counts),
        example=example,
        cards=cards,
        prequential=is_prequential(options.prequential, tasks.spec),
    )


def entries_of(board: Board, learners: Mapping[str, Source], references: bool, baseline: str | None) -> list[Entry]:
    """The learners and then the references of a board; a reference whose name is taken gets a longer one."""
    entries = {name: Entry(name, source, "learner") for name, source in learners.items()}
    for name, reference in (board.tasks.references() if references else {}).items():
        while name in entries:
            name = f"{name} (reference)"
        entries[name] = Entry(name, reference, "reference")
    if baseline is not None:
        check_choice("baseline", baseline, entries)
    return list(entries.values())


def jobs_of(board: Board, entry: Entry, options: Options) -> list[Job]:
    """One job per seed, or a single one for a learner that draws nothing or cannot serve the tasks.

    Raises:
        ValueError: If a learner is to be trained and there is no budget for it.
        Exception: Any other than `NotServed` that the factory raises.
    """
    try:
        learner = entry.build(board.tasks.spec, options.seeds[0])
    except NotServed as error:
        return [Job(board, entry, None, refusal=str(error))]
    except Exception as error:
        error.add_note(f"raised by building {entry.name!r} for {board.name!r}; see metaicl.spec.NotServed")
        raise
    drawn = not isinstance(entry.source, Learner) and bool(learner.state_dict())
    if entry.ready or not (learner.traits.trainable or drawn):
        return [Job(board, entry, None)]
    config = options.budget(board.name, entry.name) if learner.traits.trainable else None
    if config is None and learner.traits.trainable:
        raise ValueError(
            f"{entry.name} is to be trained on {board.name!r}; give a budget, train=TrainConfig(steps=...)"
        )
    return [
        Job(board, entry, seed, None if config is None else dataclasses.replace(config, seed=seed))
        for seed in options.seeds
    ]


@dataclass(frozen=True)
class Worker:
    """Does the jobs one after another; with a directory each finished one is kept and done only once.

    `described` is what the trainer was before the first job: it may change with every call.
    """

    options: Options
    trainer: Trainer
    directory: str | os.PathLike[str] | None
    progress: bool
    described: Any = None

    def run(self, job: Job) -> Result:
        """Train, judge, and say what came of it."""
        known = {"task": job.board.name, "learner": job.entry.name, "role": job.entry.role, "seed": job.seed}
        if job.refusal:
            return Result(**known, status="not served", reason=job.refusal)
        learner = job.entry.build(job.board.tasks.spec, job.seed or 0)
        store = None if self.directory is None else ResultStore(self.directory)
        settings = {} if store is None else self._settings(job, learner)
        stored = None if store is None else store.load(job.board.name, job.entry.name, job.seed, settings)
        if stored is not None:
            return stored
        try:
            result = Result(**known, **self._train(job, learner, store), **self._judge(job, learner))
        except Exception as error:
            if isinstance(error, _FAILURES) or "DefaultCPUAllocator" in str(error):  # as CPUs say that memory is short
                return Result(**known, status="failed", reason=f"{type(error).__name__}: {error}")
            # A fault of the program, not of the training, ends the comparison.
            kept = "give a directory to keep finished runs" if store is None else "finished runs are kept"
            error.add_note(f"raised by {job.entry.name!r} on {job.board.name!r}, seed {job.seed}; {kept}")
            raise
        if store is not None:
            store.save(result, settings)
        return result

    def _train(self, job: Job, learner: Learner, store: ResultStore | None) -> dict[str, Any]:
        if job.entry.ready:
            return {}
        if self.options.device is not None:
            learner.to(self.options.device)
        if job.config is None:
            if isinstance(learner, Prepares):
                seed = job.seed or 0
                with isolated_randomness(derive_seed(seed, "prepare"), device_of(learner)):
                    learner.prepare(job.board.tasks, seed=seed)
            return {}
        directory = None if store is None else store.run_directory(job.board.name, job.entry.name, job.seed)
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        run = self.trainer(learner, job.board.tasks, job.config, directory=directory, progress=self.progress)
        rows = run.history[:: -(-len(run.history) // _CURVE_POINTS) or 1]
        names = ("step", "seconds", "loss")
        history = {name: [row.get(name) for row in rows] for name in names}
        budget = {name: value for name, value in dataclasses.asdict(job.config).items() if name != "seed"}
        return json_ready({"train_seconds": run.seconds, "steps": run.steps_done, "budget": budget, "history": history})

    def _judge(self, job: Job, learner: Learner) -> dict[str, Any]:
        board = job.board
        evaluations = evaluate_shots(
            learner,
            board.tasks,
            shots=board.shots,
            n_query=board.n_query,
            n_episodes=self.options.n_episodes,
            split=self.options.split,
            batch_size=self.options.batch_size,
            device=self.options.device,
            name=job.entry.name,
            prequential=board.prequential,
        )
        return {"evaluations": evaluations, "sketches": sketches(learner, board.example, board.cards)}

    def _settings(self, job: Job, learner: Learner) -> dict[str, Any]:
        board, options = job.board, self.options
        # Named only where it is so: results stored without the name answered all queries from the support alone.
        in_order = {"prequential": True} if board.prequential else {}
        return {
            "train": None if job.config is None else dataclasses.asdict(job.config),
            "learner": describe(learner),
            **self._training(job, learner),
            "n_episodes": options.n_episodes,
            "split": options.split,
            "shots": board.shots,
            "n_shot": board.n_shot,
            "n_query": board.n_query,
            "example tasks": board.example.fingerprint(),
            **in_order,
        }

    def _training(self, job: Job, learner: Learner) -> dict[str, Any]:
        """What trains the learner and on what, which the first episode stands for; nothing where nothing does."""
        if job.config is not None:
            return {"trainer": self.described, "first training episode": first_episode(job.board.tasks, job.config)}
        if job.entry.ready or not isinstance(learner, Prepares):
            return {}
        board = job.board
        stream = EpisodeStream(
            board.tasks, seed=job.seed or 0, split="train", n_shot=board.n_shot, n_query=board.n_query, chunk_size=1
        )
        try:
            return {"first training episode": stream[0].fingerprint()}
        except ValueError:  # training rows that are too few for an episode of the test can be prepared from
            return {}


def _agreed(name: str, task: str, values: Sequence[int]) -> int:
    if len(set(values)) != 1:
        found = f"the budgets say {sorted(set(values))}" if values else "there is no budget to take it from"
        raise ValueError(f"{name} must be given for {task!r}: {found}, and all learners sit the same test")
    return values[0]
