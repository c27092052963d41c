"""Several fingerprints in one table and one figure."""

from pathlib import Path

import pytest

from metaicl.analysis.fingerprint import fingerprint
from metaicl.analysis.fingerprint_overview import draw_fingerprints, fingerprint_table
from metaicl.learners.reference.linear import Averaging, LeastSquares
from metaicl.tasks.functions import LinearRegression

TASKS = LinearRegression(dim=2)


def test_table_and_figure(tmp_path: Path) -> None:
    references = {"average": Averaging(TASKS.spec), "ols": LeastSquares(TASKS.spec)}
    found = {
        name: fingerprint(learner, TASKS, n_shot=3, n_episodes=8, at=(), references=references, name=name)
        for name, learner in (("first", Averaging(TASKS.spec)), ("second", LeastSquares(TASKS.spec)))
    }
    lines = fingerprint_table(found).splitlines()
    assert lines[2].split()[:2] == ["first", "average"]
    assert lines[3].split()[:2] == ["second", "ols"]
    figure = draw_fingerprints(found, tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 5_000
    ticks = {label.get_text() for label in figure.get_axes()[0].get_xticklabels()}
    assert ticks == {"average", "ols"}
    other = fingerprint(Averaging(TASKS.spec), TASKS, n_shot=3, n_episodes=8, at=(), references=references, seed=1)
    with pytest.raises(ValueError, match="same episodes"):
        draw_fingerprints({**found, "other": other})
    with pytest.raises(ValueError, match="same episodes"):
        draw_fingerprints({})
