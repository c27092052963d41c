"""Training by `torchrun` in one, two and three processes. Run as a script, this file is one of them."""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_bundled_training import FACTORIES, SERVED, SINES, make
from torch import Tensor, nn, optim
from torch.nn.parallel import DataParallel, DistributedDataParallel
from training_helpers import (
    Lines,
    assert_same_weights,
    killed_in_update,
    last_state,
    make_dropout,
    make_maml,
    make_normalized,
    make_ridge,
    small_config,
    weights_of,
    without_seconds,
)

from metaicl import distributed
from metaicl.episode import Episode
from metaicl.learner import Learner, Prepares
from metaicl.learners import Reptile
from metaicl.meta_step import MetaStep, accumulate
from metaicl.meta_training import TrainingRun, meta_train
from metaicl.objectives import query_loss
from metaicl.task import EpisodeStream, TaskDistribution, derive_seed
from metaicl.training import isolated_randomness, outer_loop, place, training_mode

STEPS, BATCH = 20, 5  # shares of 5, of 2 and 3, of 1 and 2 and 2
CHOICES = {"n_shot": 2, "n_query": 3, "seed": 0}
# They draw noise, which depends on the process: the reference divides meta-batches in the same way.
RANDOM = ("Reptile", "ESMAML", "AmortizedBayes", "AmortizedBayes on factors", "dropout")
Case = tuple[Callable[..., Learner], TaskDistribution]
# Processes cost seconds to start: every learner runs on one of the two distributions in turn.
SERVES = {name: [tasks for served, _, tasks in SERVED if served == name] for name in FACTORIES}
TURNS = {name: served[place % len(served)] for place, (name, served) in enumerate(SERVES.items())}
CASES: dict[str, Case] = {
    **{name: (factory, TURNS[name]) for name, factory in FACTORIES.items()},
    "Reptile on all rows": (partial(Reptile, inner_steps=2, batch_rows=100), SINES),  # only their order is drawn
    "dropout": (lambda spec: make_dropout(), Lines()),
}
OTHERS: dict[str, Case] = {
    f"{name} on the other tasks": (FACTORIES[name], tasks)
    for name, served in SERVES.items()
    for tasks in served
    if tasks is not TURNS[name]
}
KINDS = ("MAML", "Reptile on all rows", "ESMAML", "RidgeHead", "InContextTransformer", "RetrievalAugmented", "dropout")
SETS = {"CASES": CASES, "OTHERS": OTHERS, "FEW": {name: CASES[name] for name in KINDS}}
CONFIG = small_config(meta_batch_size=5)


class Recording(optim.Adam):
    """Adam that keeps the first meta-gradient it is given."""

    def __init__(self, learner: Learner) -> None:
        super().__init__(learner.parameters(), lr=0.01)
        self.first: dict[str, Tensor] = {}
        self.names = dict(learner.named_parameters())

    def step(self, closure: None = None) -> None:
        if not self.first:
            self.first = {name: value.grad.clone() for name, value in self.names.items() if value.grad is not None}
        super().step()


def ready(factory: Callable[..., Learner], tasks: TaskDistribution) -> Learner:
    learner = make(factory, tasks)
    if isinstance(learner, Prepares):
        learner.prepare(tasks, seed=0)
    return learner.double()


def trained(factory: Callable[..., Learner], tasks: TaskDistribution) -> dict[str, Any]:
    learner = ready(factory, tasks)
    optimizer = Recording(learner)
    losses = [
        step.loss for step in outer_loop(learner, tasks, optimizer, steps=STEPS, meta_batch_size=BATCH, **CHOICES)
    ]
    return {"gradient": optimizer.first, "weights": weights_of(learner), "losses": losses}


def trained_in_turn(factory: Callable[..., Learner], tasks: TaskDistribution, world: int) -> dict[str, Any]:
    """What `world` processes should find, by one process that does the work of each, written from the definition."""
    learner = ready(factory, tasks)
    step, optimizer = MetaStep(learner), Recording(learner)
    stream = EpisodeStream(tasks, split="train", chunk_size=BATCH, **CHOICES)
    losses = []
    for index in range(STEPS):
        episode, loss = place(stream[index], learner), torch.zeros((), dtype=torch.float64)
        for rank in range(world):
            share = episode[BATCH * rank // world : BATCH * (rank + 1) // world]
            seed = derive_seed(0, "learner", index, *([rank] if rank else []))
            with training_mode(learner), isolated_randomness(seed, torch.device("cpu")):
                found, gradients = accumulate(step, share)
            loss += found.mean() * len(share) / BATCH
            for name, value in gradients.items():
                own, weighted = step.parameters[name], value * len(share) / BATCH
                own.grad = weighted if own.grad is None else own.grad + weighted
        losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    return {"gradient": optimizer.first, "weights": weights_of(learner), "losses": losses}


def train(make_learner: Callable[[], Learner], **choices: Any) -> tuple[TrainingRun, dict[str, Tensor]]:
    learner = make_learner().double()
    run = meta_train(learner, Lines(), **{"config": CONFIG, "progress": False, **choices})
    return run, weights_of(learner)


def make_other_maml() -> Learner:
    learner = make_maml()
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(1.0)
    return learner


def message(kind: type[BaseException], attempt: Callable[[], object]) -> str:
    with pytest.raises(kind) as error:
        attempt()
    return str(error.value)


# ---- what each process does


def work(folder: Path, cases: dict[str, Case]) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"cases": {name: trained(*case) for name, case in cases.items()}}
    if distributed.n_processes() == 2 and cases is CASES:
        found |= {"runs": runs(folder), "refusals": refusals(), "buffers": train(make_normalized)[1]}
        found |= {"stopped": stopped_by_the_clock(), "signal": stopped_by_a_signal(folder / "signal")}
    return found


def runs(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"whole": train(make_maml, directory=folder / "whole")}
    with killed_in_update(7):
        train(make_maml, directory=folder / "cut")
    found["resumed"] = train(make_other_maml, directory=folder / "cut")
    with killed_in_update(7):
        train(make_maml, directory=folder / "for one process")
    return found


def refusals() -> dict[str, str]:
    def loop(learner: nn.Module, **changes: Any) -> object:
        choices = {"steps": 1, "meta_batch_size": BATCH, **CHOICES, **changes}
        return next(outer_loop(learner, Lines(), optim.SGD(learner.parameters(), lr=0.1), **choices))  # type: ignore[arg-type]

    def poisoned(learner: Learner, episode: Episode) -> Tensor:
        losses = query_loss(learner, episode)
        return torch.cat([losses[:-1], losses[-1:] * (float("nan") if distributed.rank() else 1.0)])

    inside, other = make_ridge(), make_ridge()
    inside.encoder = DistributedDataParallel(inside.encoder)  # type: ignore[assignment]
    with torch.no_grad():
        other.encoder[0].bias.add_(distributed.rank())
    wrapped = DistributedDataParallel(make_ridge())
    return {
        "wrapped": message(TypeError, lambda: loop(wrapped)),
        "wrapped in meta_train": message(TypeError, lambda: meta_train(wrapped, Lines(), CONFIG)),  # type: ignore[arg-type]
        "wrapped in a step": message(TypeError, lambda: MetaStep(wrapped)),  # type: ignore[arg-type]
        "wrapped inside": message(TypeError, lambda: loop(inside)),
        "weights": message(RuntimeError, lambda: loop(other)),
        "seed": message(RuntimeError, lambda: loop(make_ridge(), seed=distributed.rank())),
        "batch": message(ValueError, lambda: loop(make_ridge(), meta_batch_size=1)),
        "nan": message(FloatingPointError, lambda: loop(make_ridge(), objective=poisoned)),
        "group": message(RuntimeError, lambda: distributed.start().__enter__()),
    }


def stopped_by_the_clock() -> tuple[int, dict[str, Tensor]]:
    """The clock of the second process runs a thousand times faster than that of the first."""
    config, learner = small_config(steps=1000, max_seconds=100, schedule="constant"), make_ridge()
    clock, speed = time.perf_counter, 1000 if distributed.rank() else 1
    with patch("metaicl.meta_training.time.perf_counter", lambda: speed * clock()):
        run = meta_train(learner, Lines(), config, progress=False)
    return run.steps_done, weights_of(learner)


def stopped_by_a_signal(directory: Path) -> tuple[str, dict[str, Tensor]]:
    """Only the second process gets one, in the middle of a step."""
    calls: list[None] = []

    def interrupted(learner: Learner, episode: Episode) -> Tensor:
        calls.append(None)
        if distributed.rank() == 1 and len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return query_loss(learner, episode)

    interrupted.__qualname__ = query_loss.__qualname__
    learner = make_ridge()
    config = small_config(validate_every=None, checkpoint_every=100)
    ended = message(
        SystemExit, lambda: meta_train(learner, Lines(), config, directory=directory, objective=interrupted)
    )
    return ended, weights_of(learner)


def main(folder: Path, cases: dict[str, Case]) -> None:
    with distributed.start():
        torch.save(work(folder, cases), folder / f"{distributed.rank()}.pt")


# ---- the tests


@cache
def launched(world: int, cases: str) -> tuple[Path, list[dict[str, Any]]]:
    """What every process of one launch found; one launch serves all tests."""
    here, folder = Path(__file__).resolve(), Path(mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here.parents[1]}", "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", here, folder, cases]
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (folder / "stderr").write_text(done.stderr)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@cache
def alone(name: str) -> dict[str, Any]:
    return trained(*{**CASES, **OTHERS}[name])


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, name: str) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values() if value.numel())
    for key, value in expected.items():
        if value.numel():
            assert float((found[key] - value).abs().max()) <= tolerance * scale, (name, key)


SLOW = [pytest.param(world, "OTHERS", marks=pytest.mark.slow) for world in (1, 2, 3)]
SLOW += [pytest.param(world, "CASES", marks=pytest.mark.slow) for world in (1, 3)]


@pytest.mark.parametrize(("world", "cases"), [(2, "CASES"), (3, "FEW"), *SLOW])
def test_any_number_of_processes_is_one_training(world: int, cases: str) -> None:
    _, processes = launched(world, cases)
    for name, case in SETS[cases].items():
        random = name.removesuffix(" on the other tasks") in RANDOM
        expected = trained_in_turn(*case, world) if random and world > 1 else alone(name)
        for process in processes:
            found = process["cases"][name]
            assert_near(found["gradient"], expected["gradient"], 1e-12, name)
            assert_near(found["weights"], expected["weights"], 1e-9, name)
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-9), name
            assert_same_weights(found["weights"], processes[0]["cases"][name]["weights"])


def test_processes_draw_different_noise() -> None:
    found, one = launched(2, "CASES")[1][0]["cases"]["dropout"], alone("dropout")
    assert abs(found["losses"][0] - one["losses"][0]) > 1e-6


def test_runs_and_resumed_runs_equal_those_of_one_process(tmp_path: Path) -> None:
    folder, processes = launched(2, "CASES")
    run, weights = train(make_maml, directory=tmp_path)
    for process in processes:
        for found, found_weights in process["runs"].values():
            assert_near(found_weights, weights, 1e-9, "weights")
            assert found == process["runs"]["whole"][0] or found.directory == folder / "cut"
            assert (found.best_step, found.steps_done) == (run.best_step, run.steps_done)
            for row, expected in zip(without_seconds(found), without_seconds(run), strict=True):
                assert row == pytest.approx(expected, rel=1e-9)
    assert processes[0]["runs"]["whole"][0] == processes[1]["runs"]["whole"][0]
    names = {file.name for file in tmp_path.iterdir() if file.name != "tensorboard"}
    assert {file.name for file in (folder / "whole").iterdir() if file.name != "tensorboard"} == names


def test_one_process_goes_on_where_two_stopped() -> None:
    folder, _ = launched(2, "CASES")
    with pytest.warns(RuntimeWarning, match="made with processes 2 and goes on with 1"):
        _, weights = train(make_maml, directory=folder / "for one process")
    assert_near(weights, train(make_maml)[1], 1e-9, "weights")


def test_buffers_agree() -> None:
    first, second = (process["buffers"] for process in launched(2, "CASES")[1])
    assert_same_weights(first, second)
    assert not torch.equal(first["encoder.1.running_mean"], torch.zeros(4))


def test_all_processes_stop_together() -> None:
    folder, (first, second) = launched(2, "CASES")
    assert first["stopped"][0] == second["stopped"][0] < 1000
    assert_same_weights(first["stopped"][1], second["stopped"][1])
    assert (first["signal"][0], second["signal"][0]) == ("143", "143")
    assert_same_weights(first["signal"][1], second["signal"][1])
    assert (folder / "stderr").read_text().count("| 0/12 [") == 1  # this run alone shows a bar, by its first process
    assert 1 <= last_state(folder / "signal")["step"] < 12


def test_what_is_refused() -> None:
    for process in launched(2, "CASES")[1]:
        found = process["refusals"]
        for name in ("wrapped", "wrapped in meta_train", "wrapped in a step", "wrapped inside"):
            assert "got a DistributedDataParallel" in found[name]
            assert "launch the script with torchrun" in found[name]
        assert "they differ in encoder.0.bias. Seed torch" in found["weights"]
        assert "they differ in the first episode." in found["seed"]
        assert found["batch"] == "meta_batch_size must give each of 2 processes a task; got 1"
        assert found["nan"].startswith("the loss of task 4 is nan at step 0")
        assert "in a group already" in found["group"]


def test_a_wrapped_learner_is_refused_by_one_process_too() -> None:
    with pytest.raises(TypeError, match="got a DataParallel"):
        MetaStep(DataParallel(make_ridge()))  # type: ignore[arg-type]


def test_without_a_launch_nothing_happens() -> None:
    with distributed.start():
        assert (distributed.n_processes(), distributed.rank(), distributed.share(7)) == (1, 0, range(7))


def test_a_launch_without_a_group_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    learner = make_ridge()
    with pytest.warns(RuntimeWarning, match=r"join them by `with metaicl.distributed.start\(\):`"):
        next(outer_loop(learner, Lines(), optim.SGD(learner.parameters(), lr=0.1), steps=1, **CHOICES))


def test_the_shares_are_even_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for world in (1, 2, 3, 7):
        monkeypatch.setattr(distributed, "n_processes", lambda world=world: world)
        for n_tasks in range(20):
            shares = []
            for rank in range(world):
                monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
                shares.append(distributed.share(n_tasks))
            assert [task for share in shares for task in share] == list(range(n_tasks))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), SETS[sys.argv[2]])
