"""Every recipe in smoke size: a recipe without a test cannot exist."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_files import load

from metaicl.recipe import run

RECIPES = sorted(Path(__file__).resolve().parents[2].joinpath("recipes").glob("*.py"))
NEEDS_DATA = (
    "omniglot",
    "raml_text",
    "few_shot_headlines",
    "few_shot_intents",
    "federated_reconnaissance",
    "susana_losses",
    "omniglot_heads",
    "omniglot_gradient",
    "benchmark_metric_retrieval",
)
NEEDS_JAX = ("benchmark_gradient", "benchmark_in_context")  # its threads forbid other tests of the process to fork


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_and_writes_its_results(path: Path, tmp_path: Path, request, capsys) -> None:
    data = ["--data", str(request.getfixturevalue("shared_data"))] if path.stem in NEEDS_DATA else []
    options = ["--smoke", "--out", str(tmp_path), "--seed", "3", *data]
    if path.stem in NEEDS_JAX:
        print(subprocess.run([sys.executable, path, *options], check=True, capture_output=True, text=True).stdout)
    else:
        module = load(path)
        run(module.main, module.Config, options)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"recipe", "claim", "config", "versions", "criteria", "reported", "seconds", "verdict"}
    assert results["seconds"] >= 0
    assert results["recipe"] == path.stem
    assert results["verdict"] == "smoke"
    assert results["config"]["seed"] == 3
    assert results["criteria"]
    for criterion in results["criteria"]:
        assert set(criterion) == {"name", "value", "ci", "reference", "bound", "held"}
    assert results["claim"] in capsys.readouterr().out


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_explains_itself(path: Path, capsys) -> None:
    module = load(path)
    with pytest.raises(SystemExit):
        run(module.main, module.Config, ["--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--smoke", "--out", "--seed"))
    assert module.__doc__.splitlines()[0][:40] in text
