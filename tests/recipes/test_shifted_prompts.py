"""The prompts unlike those of training that the recipe on linear functions reports."""

import json
from pathlib import Path

import pytest
import torch
from recipe_files import load

from metaicl.recipe import run
from metaicl.task import EpisodeStream
from metaicl.tasks import LinearRegression

RECIPE = load(Path(__file__).resolve().parents[2] / "recipes" / "garg_2022_linear.py")
FACTORS = {"/ 3": 1 / 3, "/ 2": 1 / 2, "x 2": 2.0, "x 3": 3.0}


def moments(name: str, dim: int = 4) -> tuple[float, float]:
    """Mean squares of an input and of a target over d."""
    tasks = LinearRegression(dim=dim, **{"noise": 0.0, **RECIPE.shifts(dim)[name]})
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=3, n_query=1, chunk_size=20_000)[0]
    return float(episode.support.x.square().mean()), float(episode.support.y.square().mean()) / dim


@pytest.mark.parametrize("name", FACTORS)
def test_inputs_and_targets_are_scaled(name: str) -> None:
    assert moments(f"inputs {name}") == pytest.approx((FACTORS[name] ** 2, FACTORS[name] ** 2), rel=0.05)
    assert moments(f"targets {name}") == pytest.approx((1, FACTORS[name] ** 2), rel=0.05)


def test_renormalized_noise_leaves_the_variance_of_targets() -> None:
    assert moments("noise") == pytest.approx((1, 1.25), rel=0.05)
    assert moments("noise, renormalized") == pytest.approx((1, 1), rel=0.05)
    change = RECIPE.shifts(4)["noise, renormalized"]
    assert change["noise"] == change["weight_scale"]  # as much noise for each weight as before


def test_every_prompt_is_stored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run(RECIPE.main, RECIPE.Config, ["--smoke", "--out", str(tmp_path)])
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    for text in ((tmp_path / "results.json").read_text(), *lines):
        found = json.loads(text)["reported"]["risk/d on other prompts"]
        assert set(found) == set(RECIPE.shifts(5))
        assert all(set(risks) == {"Transformer", "least squares"} for risks in found.values())
        assert found["as trained"]["least squares"] < 1e-6
        assert found["noise"]["Transformer"] > 0.1
