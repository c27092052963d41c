import numpy as np
import pytest

from metaicl.evaluation import Evaluation
from metaicl.findings import Findings
from metaicl.metrics import Calibration
from metaicl.report_text import summary_sentence
from metaicl.results import Result

CARD = {"spec": {"kind": "regression"}, "n_shot": 2, "n_query": 3, "baseline": None, "examples": []}


def evaluation(values, *, kind="regression", fingerprint="f", rows=10):
    metric = "mse" if kind == "regression" else "accuracy"
    values = np.asarray(values, dtype=np.float64)
    return Evaluation(
        learner="x",
        kind=kind,
        metrics={metric: values, "nll": 2 * values},
        calibration=Calibration("coverage", (0.5,), (0.25,), (rows,)),
        fingerprint=fingerprint,
        n_shot=2,
        n_query=3,
        split="test",
        seed=0,
        batch_size=50,
        adapt_seconds=1.0,
        predict_seconds=0.5,
        parameters=7,
        state_bytes=4,
        peak_memory_bytes=None,
        device="cpu",
        transductive=False,
    )


def result(learner, seed, values, *, role="learner", **options):
    train_seconds = None if seed is None else 10.0 * (seed + 1)
    found = {2: evaluation(values, **options)}
    return Result(task="t", learner=learner, role=role, seed=seed, evaluations=found, train_seconds=train_seconds)


def failed(learner, seed):
    return Result(task="t", learner=learner, seed=seed, status="failed", reason="NaN")


def findings(*results, **card):
    return Findings({}, {"t": {**CARD, **card}}, results)


GOOD, BAD = [1.0, 2.0, 3.0], [2.0, 4.0, 6.0]


def test_values_are_seeds_by_episodes():
    found = findings(result("a", 0, GOOD), result("a", 1, BAD))
    assert found.values("t", "a").tolist() == [GOOD, BAD]
    assert found.values("t", "a", "nll").mean() == 6.0
    assert found.interval("t", "a").mean == 3.0


def test_other_episodes_are_refused():
    with pytest.raises(ValueError, match="same episodes to be compared; got a on f, b on g"):
        findings(result("a", 0, GOOD), result("b", 0, BAD, fingerprint="g"))


def test_a_result_without_its_card_is_refused():
    with pytest.raises(ValueError, match=r"none for \['t'\]"):
        Findings({}, {}, (result("a", 0, GOOD),))


def test_differences_are_computed_once_for_tables_plots_and_sentences(monkeypatch):
    found = findings(result("a", 0, GOOD), result("b", 0, BAD), result("c", 0, BAD))
    found.rows("t")
    everything, all_nll = found.differences("t"), found.differences("t", metric="nll")
    assert all_nll["a", "b"].mean == 2 * everything["a", "b"].mean == -4.0
    monkeypatch.setattr("metaicl.findings.family_intervals", None)  # it would take seconds for 30 learners
    assert found.differences("t") == everything
    assert found.differences("t", baseline="a")["b", "a"] == found.rows("t")[1].difference
    assert "a has the best mse" in summary_sentence(found, "t")


def test_only_common_seeds_are_paired():
    found = findings(result("a", 0, GOOD), result("a", 1, BAD), failed("b", 0), result("b", 1, GOOD))
    gap = found.differences("t", baseline="b")["a", "b"]
    assert (gap.mean, gap.n_seeds) == (2.0, 1)


def test_learners_without_a_common_seed_have_no_difference():
    found = findings(result("a", 0, GOOD), result("b", 1, BAD), result("c", 0, GOOD), result("c", 1, GOOD))
    assert list(found.differences("t")) == [("a", "c"), ("b", "c")]
    assert "too few seeds or episodes to compare it with" in summary_sentence(
        findings(result("a", 0, GOOD), result("b", 1, BAD)), "t"
    )


def test_all_pairs_or_those_with_the_baseline():
    found = findings(result("a", 0, GOOD), result("b", 0, BAD), result("c", 0, GOOD))
    assert list(found.differences("t")) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert list(found.differences("t", baseline="b")) == [("a", "b"), ("c", "b")]


def test_the_baseline_is_the_best_learner_unless_declared():
    results = (result("a", 0, BAD), result("b", 0, GOOD), result("r", None, [0.0] * 3, role="reference"))
    assert findings(*results).baseline("t") == "b"
    assert findings(*results, baseline="a").baseline("t") == "a"
    assert findings(failed("a", 0), *results[1:], baseline="a").baseline("t") == "b"
    assert findings(results[2]).best("t") == "r"
    assert findings(failed("a", 0)).best("t") is None


def test_accuracy_is_better_when_higher_and_regret_is_positive_when_worse():
    options = {"kind": "classification"}
    reference = result("r", None, [0.9, 0.9, 0.9], role="reference", **options)
    low, high = result("low", 0, [0.1, 0.2, 0.3], **options), result("high", 0, [0.7, 0.8, 0.9], **options)
    found = findings(low, high, reference, spec={"kind": "classification"})
    assert found.best("t") == "high"
    assert found.regret("t", "low").mean == pytest.approx(0.7)
    assert found.regret("t", "low", "nll").mean == pytest.approx(-1.4)
    assert found.regret("t", "r") is None


def test_a_row_says_what_failed_and_averages_the_rest():
    row = findings(result("a", 0, GOOD), failed("a", 1), result("a", 2, BAD)).rows("t")[0]
    assert (row.status, row.seeds, row.train_seconds, row.note) == ("finished", (0, 2), 20.0, "failed (seed 1): NaN")
    assert row.calibration == Calibration("coverage", (0.5,), (0.25,), (20,))
    assert row.seeds_text == "2"


def test_a_learner_that_never_finished_has_a_row_without_numbers():
    row = findings(failed("a", 0)).rows("t")[0]
    assert (row.status, row.metrics, row.seeds_text) == ("failed", None, "-")


def test_rows_are_computed_once_and_cannot_be_spoiled():
    found = findings(result("a", 0, GOOD))
    found.rows("t").clear()
    assert len(found.rows("t")) == 1


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda f: f.rows("T"), "task must be one of"),
        (lambda f: f.values("t", "b"), "learner must be one of"),
        (lambda f: f.values("t", "a", "accuracy"), "metric must be one of"),
        (lambda f: f.values("t", "a", shots=5), r"not evaluated at 5 shots on 't'; there is \[2\]"),
        (lambda f: f.differences("t", baseline="b"), "baseline must be one of"),
    ],
)
def test_unknown_names_are_named(ask, message):
    with pytest.raises(ValueError, match=message):
        ask(findings(result("a", 0, GOOD)))


def test_the_best_of_equal_learners_is_seldom_ahead_of_any():
    rng, names, false_claims = np.random.default_rng(0), "abcdefgh", 0
    for _ in range(60):
        values = rng.standard_normal((len(names), 40)) + 5
        found = findings(*(result(name, 0, one) for name, one in zip(names, values, strict=True)))
        false_claims += any(row.difference is not None and row.difference.p < 0.05 for row in found.rows("t"))
    assert false_claims <= 5  # of 60; 3 are expected at most, and 10 and more where only seven pairs count
