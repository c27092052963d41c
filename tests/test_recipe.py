"""Recipes' command line, criteria and verdicts."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest

from metaicl.recipe import (
    Criterion,
    RecipeConfig,
    RecipeResult,
    best_gain_criterion,
    gain_criterion,
    option,
    parse,
    ratio_criterion,
    run,
)
from metaicl.versions import package_version, versions


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    SMOKE: ClassVar = {"steps": 2, "names": ("a",)}
    PAPER: ClassVar = {"steps": 1000}

    steps: int = option(100, "updates")
    rate: float = option(0.5, "a rate")
    names: tuple[str, ...] = option((), "some names")
    fast: bool = option(True, "a switch")


def make(config: Config) -> RecipeResult:
    """A recipe whose value is its number of steps."""
    return RecipeResult("toy", "many steps", config, [Criterion("steps", config.steps, ">=", 50, ci=(1.0, math.inf))])


def test_options_come_from_the_fields() -> None:
    found = parse(Config, ["--steps", "7", "--rate", "1e-3", "--names", "x", "y", "--no-fast", "--out", "somewhere"])
    assert found == Config(steps=7, rate=1e-3, names=("x", "y"), fast=False, out=Path("somewhere"))


def test_smoke_values_yield_to_what_was_said() -> None:
    assert parse(Config, ["--smoke"]) == Config(smoke=True, steps=2, names=("a",))
    assert parse(Config, ["--smoke", "--steps", "9"]).steps == 9


def test_a_smoke_run_keeps_its_comparison_apart() -> None:
    full, smoke = (parse(Config, [*arguments, "--out", "same"]).comparison for arguments in ([], ["--smoke"]))
    assert (full, smoke) == (Path("same/comparison"), Path("same/comparison-smoke"))


def test_the_published_scale_is_an_option_where_there_is_one() -> None:
    assert parse(Config, ["--paper"]) == Config(paper=True, steps=1000)
    assert parse(Config, ["--paper", "--steps", "9"]).steps == 9
    for config, arguments in ((RecipeConfig, ["--paper"]), (Config, ["--paper", "--smoke"])):
        with pytest.raises(SystemExit) as error:
            parse(config, arguments)
        assert error.value.code == 2


def test_unknown_options_are_refused() -> None:
    with pytest.raises(SystemExit) as error:
        parse(Config, ["--stepz", "1"])
    assert error.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "verdict"), [([], "held"), (["--steps", "49"], "missed"), (["--smoke"], "smoke")]
)
def test_results_are_written_with_their_verdict(arguments, verdict: str, tmp_path: Path, capsys) -> None:
    for _ in range(2):
        run(make, Config, [*arguments, "--out", str(tmp_path)])
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["verdict"] == verdict
    assert written["criteria"][0]["ci"] == [1.0, None]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    assert f"verdict: {verdict} (0 seconds)" in capsys.readouterr().out


def test_time_and_what_is_only_reported_are_stored_in_both_files(tmp_path: Path) -> None:
    def slow(config: Config) -> RecipeResult:
        time.sleep(0.3)
        reported = {"other tasks": {"ours": 1.5}}
        return RecipeResult("toy", "it waits", config, [Criterion("steps", 1.0, ">=", 0.0)], reported=reported)

    slow.__module__ = __name__
    run(slow, Config, ["--out", str(tmp_path)])
    for text in ((tmp_path / "results.json").read_text(), (tmp_path / "results.jsonl").read_text()):
        stored = json.loads(text)
        assert stored["reported"] == {"other tasks": {"ours": 1.5}}
        assert stored["seconds"] >= 0.3
    result = RecipeResult("toy", "it waits", Config(), [])
    assert str(replace(result, seconds=750.0)).endswith("verdict: held (12.5 minutes)")
    assert str(replace(result, seconds=59.0)).endswith("verdict: held (59 seconds)")
    assert str(result).endswith("verdict: held")


def test_numbers_of_numpy_and_what_json_lacks_are_stored(tmp_path: Path) -> None:
    def measured(config: Config) -> RecipeResult:
        criteria = [
            Criterion("mean", np.mean([1.0, 2.0]), ">", 0.0, ci=(np.float64(1.0), np.float64(2.0)), reference=math.nan),
            Criterion("single", np.float32(0.5), "<=", 1.0),  # type: ignore[arg-type]
        ]
        return RecipeResult("toy", "x", config, criteria, reported={"a": np.float32(1.5), "b": [np.int64(3), math.nan]})

    measured.__module__ = __name__
    run(measured, Config, ["--out", str(tmp_path)])
    text = (tmp_path / "results.json").read_text()
    stored = json.loads(text)
    assert "NaN" not in text
    assert [one["held"] for one in stored["criteria"]] == [True, True]
    assert [one["value"] for one in stored["criteria"]] == [1.5, 0.5]
    assert stored["criteria"][0]["reference"] is None
    assert stored["reported"] == {"a": 1.5, "b": [3, None]}


def test_a_smoke_run_leaves_a_result_that_decided_alone(tmp_path: Path) -> None:
    for arguments in (["--smoke"], [], ["--smoke"]):
        run(make, Config, [*arguments, "--out", str(tmp_path)])
    found = {file: json.loads((tmp_path / file).read_text()) for file in ("results.json", "results-smoke.json")}
    assert [one["verdict"] for one in found.values()] == ["held", "smoke"]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("value", "comparison", "held"),
    [(1.0, ">=", True), (1.0, ">", False), (1.0, "<=", True), (0.9, ">=", False), (1.1, "<=", False)],
)
def test_bounds(value: float, comparison, held: bool) -> None:
    assert Criterion("x", value, comparison, 1.0).held == held
    assert not Criterion("x", math.nan, comparison, 1.0).held


def test_interruption_exits_with_130(tmp_path: Path) -> None:
    def interrupted(config: Config) -> RecipeResult:
        raise KeyboardInterrupt

    interrupted.__module__ = __name__
    with pytest.raises(SystemExit) as error:
        run(interrupted, Config, ["--out", str(tmp_path)])
    assert error.value.code == 130
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("asked", [(), ("--data", "here")])
def test_data_that_nobody_named_are_asked_for_by_their_flags(asked: tuple[str, ...], tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class OnData(RecipeConfig):
        data: str = option("", "folder")
        download: bool = option(False, "fetch them")

    def missing(config: OnData) -> RecipeResult:
        raise FileNotFoundError("Letters need letters.npz")

    with pytest.raises(FileNotFoundError if asked else SystemExit, match=r"letters\.npz") as error:
        run(missing, OnData, ["--out", str(tmp_path), *asked])
    assert ("--data FOLDER, or --download" in str(error.value)) == (not asked)


def test_a_ratio_of_what_both_share_has_a_narrow_interval() -> None:
    """Episodes that are hard for both say nothing about the ratio; an exact multiple leaves no doubt at all."""
    generator = np.random.default_rng(0)
    hard = generator.exponential(size=(1, 300))
    exact = ratio_criterion("error", np.repeat(0.3 * hard, 3, 0), hard, "<=", 0.5)
    assert exact.value == pytest.approx(0.3)
    assert exact.ci == pytest.approx((0.3, 0.3))
    noisy = ratio_criterion("error", 0.3 * hard + 0.01 * generator.normal(size=(3, 300)), hard, "<=", 0.5)
    assert noisy.ci is not None
    assert 0.29 < noisy.ci[0] < 0.3 < noisy.ci[1] < 0.31


def test_a_gain_is_judged_by_the_lower_end_of_its_paired_interval() -> None:
    generator = np.random.default_rng(0)
    hard = generator.normal(size=(3, 200))  # how hard an episode is, which is the same for both
    small = gain_criterion("accuracy", hard + 0.01 + 0.02 * generator.normal(size=(3, 200)), hard)
    assert small.held
    assert small.name == "accuracy, lower end"
    assert small.ci is not None
    assert small.value == small.ci[0] > 0
    assert not gain_criterion("accuracy", hard + 0.05 * generator.normal(size=(3, 200)), hard).held
    assert not gain_criterion("accuracy", generator.normal(size=(3, 200)) + 0.01, hard).held  # not paired


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_the_best_of_six_that_are_no_better_is_found_above_in_at_most_one_study_of_twenty(n_seeds: int) -> None:
    """Picking the best by its values and judging it by its own interval claims something twice as often."""
    generator, n_studies, hits, naive, found = np.random.default_rng(0), 100, 0, 0, 0
    drift = 0.003 if n_seeds > 1 else 0.0  # one seed is one trained learner: what it has drawn is its own
    for _ in range(n_studies):
        floor = generator.normal(0.75, 0.09, size=(1, 200))
        noise = generator.normal(0, drift, size=(6, n_seeds, 1)) + generator.normal(0, 0.05, size=(6, n_seeds, 200))
        values = {str(i): floor + one for i, one in enumerate(noise)}
        hits += best_gain_criterion("gain", values, floor)[1].held
        naive += gain_criterion("gain", max(values.values(), key=np.mean), floor).held
        name, better = best_gain_criterion("gain", values | {"2": values["2"] + 0.05}, floor)
        found += name == "2" and better.held
    assert hits / n_studies <= 0.05
    assert naive > hits
    assert found / n_studies >= 0.9


def test_the_best_gain_names_who_is_judged_and_among_how_many() -> None:
    floor = np.random.default_rng(0).normal(size=(1, 50))
    values = {"first": floor + 0.1, "second": floor + 0.3}
    name, criterion = best_gain_criterion("above", values, floor)
    assert name == "second"
    assert criterion.name == "second above, lower end for the best of 2"
    assert criterion.value == pytest.approx(0.3)
    assert criterion.ci == pytest.approx((0.3, 0.3))


def test_options_may_be_optional_or_one_of_some_and_help_may_hold_a_percent_sign(capsys) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Own(RecipeConfig):
        width: "int | None" = option(None, "a share in %")
        way: Literal["up", "down"] = option("up", "where to")
        sizes: tuple[Literal[1, 2], ...] = option((1,), "of which")

    assert parse(Own, ["--width", "3", "--way", "down"]) == Own(width=3, way="down")
    assert parse(Own, ["--sizes", "2", "1"]) == Own(sizes=(2, 1))
    assert parse(Own, []) == Own()
    for arguments, said in ((["--help"], "a share in % (default: None)"), (["--way", "left"], "invalid choice")):
        with pytest.raises(SystemExit):
            parse(Own, arguments)
        assert said in "".join(capsys.readouterr())


def test_what_a_terminal_cannot_show_costs_no_result(tmp_path: Path) -> None:
    script = "from test_recipe import *\ndef main(config): return replace(make(config), claim='R\u00b2')\n"
    script += f"main.__module__ = 'test_recipe'; run(main, Config, ['--out', {str(tmp_path)!r}])"
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=ascii_only, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("R?\n")
    assert json.loads((tmp_path / "results.json").read_text())["claim"] == "R\u00b2"


def test_the_commit_is_that_of_metaicl(monkeypatch) -> None:
    """Not that of a repository around an installed copy."""

    def git(command, **_) -> subprocess.CompletedProcess:
        if "ls-files" in command:
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0, stdout="abc123")

    monkeypatch.setattr(subprocess, "run", git)
    assert versions()["commit"] == "unknown"
    assert package_version("surely-not-there") == "not installed"
