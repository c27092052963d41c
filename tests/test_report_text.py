from dataclasses import replace

import numpy as np
import pytest

from metaicl.comparison import compare
from metaicl.learners.reference.simple import Constant, Logistic, NearestNeighbors
from metaicl.number_text import interval_text, memory_text, number, seconds_text
from metaicl.report import Report
from metaicl.report_text import cells, columns, describe_task, protocol_lines, render_text, summary_sentence
from metaicl.spec import NotServed
from metaicl.statistics import Interval
from metaicl.tasks.functions import Sinusoid
from metaicl.tasks.gaussians import GaussianClasses


def refuses(spec):
    raise NotServed("not mine")


@pytest.fixture(scope="module")
def report():
    learners = {"constant": Constant, "neighbors": NearestNeighbors, "refuses": refuses}
    tasks = {"easy": GaussianClasses(dim=2, radius=5.0), "waves": Sinusoid()}
    return compare(learners, tasks, n_shot=2, n_query=3, n_episodes=60, progress=False)


def test_every_line_has_a_cell_for_every_column(report):
    for task in report.tasks:
        titles = columns(report, task)
        assert {len(cells(report, task, row)) for row in report.rows(task)} == {len(titles)}


def test_the_text_has_a_table_per_distribution_and_the_protocol(report):
    text = render_text(report)
    assert "EASY  5-way, per class 2 shot and 3 query rows of vector 2; 60 episodes, fingerprint " in text
    assert "WAVES  regression, per task 2 shot" in text
    assert "split: meta-test" in text
    assert "refuses: not served: not mine" in text
    assert "Bayes (reference)" in text
    assert "±" not in text


def test_tables_are_aligned(report):
    lines = render_text(report).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("  learner"))
    place = lines[start].index("nll")
    assert all(line[place - 2 : place] == "  " for line in lines[start + 2 : start + 5])


def test_the_summary_claims_no_more_than_the_data(report):
    assert "neighbors has the best accuracy" in summary_sentence(report, "easy")
    assert "ahead of every other learner" in summary_sentence(report, "easy")
    twins = {"a": Logistic, "b": Logistic}
    tied = compare(twins, {"easy": GaussianClasses(dim=2)}, n_shot=1, n_query=2, n_episodes=30, progress=False)
    assert "do not separate it from b (" in summary_sentence(tied, "easy")
    alone = compare({"a": Constant}, {"easy": GaussianClasses()}, n_shot=1, n_query=2, n_episodes=5, progress=False)
    assert summary_sentence(alone, "easy").endswith("].")
    nobody = compare({"a": refuses}, {"easy": GaussianClasses()}, n_shot=1, n_query=2, n_episodes=5, progress=False)
    assert summary_sentence(nobody, "easy") == "On easy, no learner finished."
    assert "a" in str(nobody)


def test_a_best_mean_over_other_seeds_is_not_called_ahead(report):
    name = "neighbors"
    found = next(one for one in report.results if one.learner == name and one.task == "easy")
    levels = {("a", 0): 0.6, ("a", 1): 0.6, ("a", 2): 0.95, ("b", 0): 0.7, ("b", 1): 0.7}
    results = tuple(
        replace(found, learner=name, seed=seed, evaluations=_at(found, v)) for (name, seed), v in levels.items()
    )
    uneven = Report(report.protocol, {"easy": report.tasks["easy"]}, results)
    sentence = summary_sentence(uneven, "easy")
    assert "a has the best accuracy, 0.71" in sentence
    assert "it is behind b on the seeds that both finished" in sentence
    assert "ahead" not in sentence


def _at(found, level):
    noise = np.random.default_rng(0).uniform(-0.02, 0.02, 60)
    return {
        shots: replace(one, metrics={**one.metrics, "accuracy": level + noise})
        for shots, one in found.evaluations.items()
    }


def test_nothing_finished_is_said(report):
    found = compare(
        {"a": refuses}, GaussianClasses(), n_shot=1, n_query=2, n_episodes=5, references=False, progress=False
    )
    assert "nothing finished" in describe_task(found, "GaussianClasses")
    assert "not served" in str(found)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.0000"), (0.12345, "0.1235"), (1234.5, "1234.5"), (1e-5, "1.00e-05"), (2e7, "2.00e+07")]
)
def test_numbers(value, text):
    assert number(value) == text


def test_no_interval_is_pretended():
    assert interval_text(Interval(0.5, None, None, None, 1, 1)) == "0.5000 [n/a]"
    assert interval_text(Interval(0.5, -0.25, 1.0, 0.1, 2, 2), signed=True) == "+0.5000 [-0.2500, +1.0000]"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.0, "0 ns"),
        (2e-9, "2 ns"),
        (1.5e-6, "1.5 µs"),
        (0.25, "250 ms"),
        (12.0, "12 s"),
        (3600.4, "3600 s"),
    ],
)
def test_seconds(seconds, text):
    assert seconds_text(seconds) == text


def test_protocol_lines_are_plain():
    lines = protocol_lines({"training_budget": {"steps": 3, "left": None}, "seeds": [1, 2], "nothing": None})
    assert lines == [("training budget", "steps 3"), ("seeds", "1, 2"), ("nothing", "-")]


@pytest.mark.parametrize(
    ("size", "text"), [(None, "-"), (1000, "below 1 MiB"), (2**20, "1 MiB"), (5 * 2**30, "5120 MiB")]
)
def test_memory_has_whole_units(size: int | None, text: str) -> None:
    assert memory_text(size) == text
