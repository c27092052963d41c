import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from training_helpers import (
    MAKERS,
    Banked,
    Lines,
    Ridge,
    assert_resume_is_exact,
    assert_same_weights,
    killed_in_update,
    last_state,
    make_banked,
    make_dropout,
    make_maml,
    make_ridge,
    small_config,
    weights_of,
    without_seconds,
)

from metaicl import meta_training
from metaicl.checkpoint import CheckpointError, load_learner_weights
from metaicl.episode import Episode
from metaicl.learner import Learner, Traits
from metaicl.learners.gradient.maml import MAML
from metaicl.learners.gradient.maml_plus_plus import MAMLPlusPlus
from metaicl.meta_training import meta_train
from metaicl.objectives import query_loss, squared_error
from metaicl.task import EVAL_SEED, EpisodeStream
from metaicl.tasks.arrays import tasks_from_arrays
from metaicl.train_config import TrainConfig
from metaicl.training import outer_loop

CONFIG = small_config()


def train(learner: Learner, config: TrainConfig = CONFIG, **choices: object):
    return meta_train(learner, Lines(), config, **{"progress": False, **choices})


def validation_loss(learner: Learner) -> float:
    stream = EpisodeStream(Lines(), seed=EVAL_SEED, split="validation", n_shot=CONFIG.n_shot, n_query=CONFIG.n_query)
    losses = [query_loss(learner.eval(), episode) for episode in stream.batches(0, CONFIG.n_validation, batch_size=3)]
    return float(torch.cat(losses).detach().mean())


@pytest.mark.parametrize("name", MAKERS)
def test_resume_is_exact(name: str, tmp_path: Path) -> None:
    assert_resume_is_exact(MAKERS[name], Lines(), CONFIG, tmp_path, cuts=(1, 6, 11))


def test_resume_is_exact_with_workers_and_sgd(tmp_path: Path) -> None:
    assert_resume_is_exact(make_ridge, Lines(), small_config(workers=1, optimizer="sgd", steps=5), tmp_path, cuts=(4,))


@pytest.mark.parametrize("name", ["maml", "dropout"])
def test_resume_is_exact_compiled(name: str, tmp_path: Path) -> None:
    config = small_config(compile=True, n_shot=3, micro_batch_size=None, steps=6)
    assert_resume_is_exact(MAKERS[name], Lines(), config, tmp_path, cuts=(4,))


def test_equals_the_outer_loop() -> None:
    learner, other = make_ridge(), make_ridge()
    run = train(learner, TrainConfig(steps=7, meta_batch_size=4, outer_lr=0.01, log_every=1, validate_every=None))
    optimizer = torch.optim.Adam(other.parameters(), lr=0.01, fused=True)
    losses = [step.loss for step in outer_loop(other, Lines(), optimizer, steps=7, meta_batch_size=4)]
    assert [row["loss"] for row in run.history] == losses
    assert (run.steps_done, run.best_step, run.best_loss, run.directory) == (7, None, None, None)
    assert_same_weights(weights_of(learner), weights_of(other))


def test_history_and_files(tmp_path: Path) -> None:
    learner = make_ridge()
    run = train(learner, directory=tmp_path / "run")
    assert [row["step"] for row in run.history] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in run.history if "validation_loss" in row] == [4, 8, 12]
    assert [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == run.history
    assert json.loads((tmp_path / "run" / "config.json").read_text())["objective"] == "query_loss"
    assert {file.name for file in (tmp_path / "run").glob("step-*")} == {"step-000000009.ckpt", "step-000000012.ckpt"}
    assert run.seconds >= run.history[-1]["seconds"] > 0
    other = Ridge(Lines.spec)
    load_learner_weights(other, tmp_path / "run" / "learner.ckpt")
    assert_same_weights(weights_of(other), weights_of(learner))


def test_the_best_weights_are_selected(tmp_path: Path) -> None:
    config = small_config(
        outer_lr=2.0, schedule="constant", clip_norm=None, steps=13, validate_every=2
    )  # too high a rate
    best, last = make_ridge(), make_ridge()
    run = train(best, config, directory=tmp_path)
    train(last, replace(config, select="last"))
    losses = {row["step"]: row["validation_loss"] for row in run.history if "validation_loss" in row}
    assert sorted(losses) == [2, 4, 6, 8, 10, 12, 13]
    assert run.best_loss == min(losses.values()) == losses[run.best_step]
    assert run.best_step < 13
    assert validation_loss(best) == pytest.approx(run.best_loss, abs=1e-6)
    assert validation_loss(last) == pytest.approx(losses[13], abs=1e-6)


def test_a_longer_run_forgets_the_validation_at_the_end_of_the_shorter_one(tmp_path: Path) -> None:
    def loss(*_: Any, step: int) -> float:
        return {4: 3.0, 6: 1.0, 8: 2.0, 9: 4.0}[step]

    longer = small_config(schedule="constant", steps=9, validate_every=4)
    straight, extended, again = make_ridge(), make_ridge(), make_ridge()
    with patch.object(meta_training, "validation_loss", loss):
        expected = train(straight, longer)
        assert train(make_ridge(), replace(longer, steps=6), directory=tmp_path).best_step == 6
        assert train(again, replace(longer, steps=6), directory=tmp_path).best_step == 6  # finished, once more
        found = train(extended, longer, directory=tmp_path)
    assert (found.best_step, found.best_loss) == (expected.best_step, expected.best_loss) == (8, 2.0)
    assert_same_weights(weights_of(extended), weights_of(straight))
    with pytest.raises(ValueError, match=r"steps must be at least 9, which the run in .* has made already; got 8"):
        train(make_ridge(), replace(longer, steps=8), directory=tmp_path)
    assert train(make_ridge(), longer, directory=tmp_path).steps_done == 9


def test_a_directory_changes_nothing(tmp_path: Path) -> None:
    learner, other = make_dropout(), make_dropout()
    run = train(learner)
    assert without_seconds(train(other, directory=tmp_path)) == without_seconds(run)
    assert_same_weights(weights_of(other), weights_of(learner))


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    learner, other = make_ridge(), make_maml()
    run = train(learner, directory=tmp_path)
    with patch("metaicl.meta_training.outer_loop", None):
        other = Ridge(Lines.spec)
        assert train(other, directory=tmp_path) == run
    assert_same_weights(weights_of(other), weights_of(learner))


def test_more_steps_continue_a_run(tmp_path: Path) -> None:
    config = small_config(schedule="constant", warmup_steps=0)
    learner, whole = make_ridge(), make_ridge()
    train(learner, config, directory=tmp_path)
    run = train(make_ridge(), replace(config, steps=20), directory=tmp_path)
    train(whole, replace(config, steps=20), directory=tmp_path.parent / "whole")
    assert run.steps_done == 20
    assert last_state(tmp_path)["step"] == 20
    for name, value in last_state(tmp_path)["learner"].items():
        assert torch.equal(value, last_state(tmp_path.parent / "whole")["learner"][name])


def test_a_learner_that_anneals_is_not_continued_to_another_end(tmp_path: Path) -> None:
    """Its settings go by the share of the training that is done, so the updates made so far would be others."""
    config = small_config(schedule="constant", warmup_steps=0)
    train(MAMLPlusPlus(Lines.spec), config, directory=tmp_path)
    with pytest.raises(ValueError, match=r"another configuration(.|\n)*steps: saved(.|\n)*does not anneal"):
        train(MAMLPlusPlus(Lines.spec), replace(config, steps=20), directory=tmp_path)


def test_what_cannot_train_is_named() -> None:
    with pytest.raises(TypeError, match=r"objective must be a function .* got 'mse'"):
        train(make_ridge(), objective="mse")
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch.inference_mode\(\) is on"):
        train(make_ridge())


def test_a_damaged_newest_checkpoint_costs_only_time(tmp_path: Path) -> None:
    whole, learner = make_dropout(), make_dropout()
    train(whole)
    with killed_in_update(10):
        train(make_dropout(), directory=tmp_path)
    newest = max(tmp_path.glob("step-*.ckpt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(RuntimeWarning, match="resuming from step-000000006.ckpt"):
        train(learner, directory=tmp_path)
    assert_same_weights(weights_of(learner), weights_of(whole))


def test_what_changed_is_shown(tmp_path: Path) -> None:
    train(make_ridge(), directory=tmp_path)
    with pytest.raises(ValueError, match=r"outer_lr: saved 0\.02, here 0\.1"):
        train(make_ridge(), replace(CONFIG, outer_lr=0.1), directory=tmp_path)
    with pytest.raises(ValueError, match="learner: saved 'Ridge', here 'TinyMAML'"):
        train(make_maml(), directory=tmp_path)
    with pytest.raises(ValueError, match="objective: saved 'query_loss', here 'squared_error'"):
        train(make_ridge(), directory=tmp_path, objective=squared_error)
    with pytest.raises(ValueError, match="first_episode: saved"):
        meta_train(
            make_ridge(), Lines(lambda episode: episode.query.y.mul_(2)), CONFIG, directory=tmp_path, progress=False
        )
    wider = make_ridge()
    wider.raw_scale = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"raw_scale: saved \(\), here \(2,\)"):
        train(wider, directory=tmp_path)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(make_ridge(), directory=tmp_path, resume=False)


@pytest.mark.parametrize(
    ("first", "change", "message"),
    [
        ({"inner_lr": 0.001}, {"inner_lr": 0.5}, r"learner_settings\.\S*lr\.value: saved 0\.001, here 0\.5"),
        ({"inner_steps": 1}, {"inner_steps": 5}, r"inner_steps: saved 1, here 5"),
        ({"adapt": "head.*"}, {}, r"attributes\.adapted: saved \['head"),
        ({"first_order": True}, {}, r"first_order: saved True, here False"),
    ],
)
def test_other_settings_of_the_learner_are_no_resume(
    tmp_path: Path, first: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    config = small_config(steps=2, schedule="constant", warmup_steps=0)
    train(MAML(Lines.spec, **first), config, directory=tmp_path)
    with pytest.raises(ValueError, match=message):
        train(MAML(Lines.spec, **change), replace(config, steps=4), directory=tmp_path)
    learner = MAML(Lines.spec, **first)  # other weights are no other settings: those of the checkpoint are taken
    assert train(learner, replace(config, steps=4), directory=tmp_path).steps_done == 4
    assert train(learner, replace(config, steps=6), directory=tmp_path).steps_done == 6


def test_other_arguments_of_an_objective_are_no_resume(tmp_path: Path) -> None:
    def powered(learner: Learner, episode: Episode, *, power: float) -> Tensor:
        return query_loss(learner, episode) ** power

    train(make_ridge(), directory=tmp_path, objective=partial(powered, power=1.0))
    train(make_ridge(), directory=tmp_path, objective=partial(powered, power=1.0))
    with pytest.raises(ValueError, match=r"objective_settings\.power: saved 1\.0, here 2\.0"):
        train(make_ridge(), directory=tmp_path, objective=partial(powered, power=2.0))


def test_another_number_of_threads_is_said(tmp_path: Path) -> None:
    with killed_in_update(5):
        train(make_ridge(), directory=tmp_path)
    with (
        patch("torch.get_num_threads", lambda: 3),
        pytest.warns(RuntimeWarning, match="made with num_threads 1 and goes on with 3"),
    ):
        train(make_ridge(), directory=tmp_path)


def test_preparation_happens_first_and_comes_back(tmp_path: Path) -> None:
    expected, learner, loaded = make_banked(), make_banked(), Banked(Lines.spec)
    expected.prepare(Lines(), seed=CONFIG.seed)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    train(learner, directory=tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(learner.bank, expected.bank)
    load_learner_weights(loaded, tmp_path / "learner.ckpt")
    assert torch.equal(loaded.bank, expected.bank)


def test_what_cannot_be_trained_is_only_prepared(tmp_path: Path) -> None:
    class Reference(Banked):
        traits = Traits(kinds=("regression",), trainable=False)

    learner = Reference(Lines.spec)
    before = weights_of(learner)
    run = train(learner, directory=tmp_path / "run")
    assert (run.history, run.steps_done, run.seconds) == ([], 0, 0.0)
    assert learner.bank.shape == (6, 2)
    assert_same_weights({**weights_of(learner), "bank": before["bank"]}, before)
    assert not (tmp_path / "run").exists()


def test_the_budget_of_seconds(tmp_path: Path) -> None:
    def slow(learner: Learner, episode: Episode) -> Tensor:
        time.sleep(0.02)
        return query_loss(learner, episode)

    config = small_config(steps=1000, max_seconds=0.3, schedule="constant", warmup_steps=0)
    run = train(make_ridge(), config, directory=tmp_path, objective=slow)
    assert 0.3 <= run.seconds < 3
    assert 1 <= run.steps_done <= 15
    assert train(make_ridge(), config, directory=tmp_path, objective=slow) == run
    longer = train(make_ridge(), replace(config, max_seconds=run.seconds + 0.2), directory=tmp_path, objective=slow)
    assert longer.steps_done > run.steps_done
    assert longer.history[: len(run.history)] == run.history


@pytest.mark.parametrize(("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(number: int, end: type[BaseException], tmp_path: Path) -> None:
    calls = []

    def interrupted(learner: Learner, episode: Episode) -> Tensor:
        calls.append(None)
        if len(calls) == 9:  # in the first half of the meta-batch of step 4
            os.kill(os.getpid(), number)
        return query_loss(learner, episode)

    interrupted.__qualname__ = query_loss.__qualname__
    before, whole, learner = signal.getsignal(number), make_dropout(), make_dropout()
    with pytest.raises(end, match=r"143|^$"):
        train(make_dropout(), directory=tmp_path, objective=interrupted)
    assert signal.getsignal(number) is before
    assert last_state(tmp_path)["step"] == 5
    train(whole)
    train(learner, directory=tmp_path)
    assert_same_weights(weights_of(learner), weights_of(whole))


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    calls = []

    def poisoned(learner: Learner, episode: Episode) -> Tensor:
        calls.append(None)
        return query_loss(learner, episode) * (math.nan if len(calls) == 16 else 1.0)

    poisoned.__qualname__ = query_loss.__qualname__
    with pytest.raises(FloatingPointError, match="the loss of task 3 is nan at step 7"):
        train(make_ridge(), directory=tmp_path, objective=poisoned)
    assert last_state(tmp_path)["step"] == 6
    whole, learner = make_ridge(), make_ridge()
    train(whole)
    train(learner, directory=tmp_path)
    assert_same_weights(weights_of(learner), weights_of(whole))


def test_a_validation_loss_that_is_not_finite_is_an_error() -> None:
    class Blind(Ridge):
        def predict(self, state: Tensor, x: Tensor):
            return super().predict(state if self.training else state * math.nan, x)

    with pytest.raises(FloatingPointError, match="validation loss after step 4 is nan"):
        train(Blind(Lines.spec))


def test_a_frozen_mask_of_infinities_is_saved_like_any_other_number(tmp_path: Path) -> None:
    def masked() -> Ridge:
        learner = make_ridge()
        learner.mask = torch.nn.Parameter(torch.full((3, 3), -math.inf).triu(1), requires_grad=False)
        return learner

    whole, learner = masked(), masked()
    train(whole)
    with killed_in_update(7):
        train(masked(), directory=tmp_path)
    train(learner, directory=tmp_path)
    assert_same_weights(weights_of(learner), weights_of(whole))


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    config = small_config(
        outer_lr=1e38,
        weight_decay=100.0,
        optimizer="sgd",
        clip_norm=None,
        checkpoint_every=1,
        warmup_steps=0,
        validate_every=None,
    )
    with pytest.raises(FloatingPointError):
        train(make_ridge(), config, directory=tmp_path)
    assert all(bool(value.isfinite().all()) for value in last_state(tmp_path)["learner"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "group 5 of split 'validation' has 6"),
        ({"n_shot": (1, 9), "validate_every": None}, r"n_shot \+ n_query = 11 rows per task; group 0 of split 'train'"),
    ],
)
def test_a_split_with_too_few_rows_is_named_before_anything_is_done(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    groups = torch.tensor([0, 1, 2, 3, 4, 6, 7]).repeat_interleave(10).tolist() + [5] * 6
    x = torch.randn(len(groups), 2)
    owned = {"train": [0, 1, 2, 3, 4], "validation": [5], "test": [6, 7]}
    tasks = tasks_from_arrays(x, x.sum(1), groups=groups, group_splits=owned)
    config = small_config(**{"n_shot": 5, "n_query": 2, **change})
    with pytest.raises(ValueError, match=message):
        meta_train(make_ridge(), tasks, config, directory=tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="needs a Learner, a TaskDistribution and a TrainConfig; got Ridge and dict"):
        meta_train(make_ridge(), Lines(), {"steps": 3})
    with pytest.raises(TypeError, match=r"got the class itself: Ridge\(tasks.spec\) makes one"):
        meta_train(type(make_ridge()), Lines(), CONFIG, progress=False)
    with pytest.raises(TypeError, match="tasks must be a TaskDistribution"):
        meta_train(make_ridge(), [1, 2], CONFIG, progress=False)
    with pytest.raises(ValueError, match="nothing to train"):
        train(make_ridge().requires_grad_(False))


def test_progress_goes_to_stderr_or_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    train(make_ridge())
    assert capfd.readouterr() == ("", "")
    train(make_ridge(), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "12/12" in err


_SCRIPT = """
import sys, time, torch
torch.set_num_threads(1)
from training_helpers import Lines, make_dropout, small_config
from metaicl import meta_training
from metaicl.meta_training import meta_train
from metaicl.objectives import query_loss
def slow(learner, episode):
    time.sleep(0.01)
    return query_loss(learner, episode)
slow.__qualname__ = "query_loss"
meta_train(make_dropout(), Lines(), small_config(steps=120), directory=sys.argv[1], objective=slow, progress=False)
"""


def test_a_killed_process_resumes_to_the_bit(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", _SCRIPT, str(tmp_path / "run")], env=environment)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("step-00000000[6-9].ckpt")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 6 <= last_state(tmp_path / "run")["step"] < 120
    config = small_config(steps=120)
    learner, whole = make_dropout(), make_dropout()
    run = train(learner, config, directory=tmp_path / "run")
    assert without_seconds(train(whole, config)) == without_seconds(run)
    assert_same_weights(weights_of(learner), weights_of(whole))


class Wanders(Lines):
    """Changes the working directory once it is sampled from."""

    def sample(self, *arguments: Any, **options: Any) -> Episode:
        os.chdir("..")
        return super().sample(*arguments, **options)


def test_a_run_stays_in_its_directory_when_the_working_directory_changes(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    meta_train(make_ridge(), Wanders(), CONFIG, directory="run", progress=False)
    assert [path.parent.name for path in tmp_path.rglob("learner.ckpt")] == ["run"]
    assert (tmp_path / "a" / "b" / "run" / "learner.ckpt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
