import builtins
import json

import pytest

from metaicl.comparison import compare
from metaicl.learners.reference.simple import Constant, NearestNeighbors
from metaicl.report import FORMAT, Report
from metaicl.tasks.gaussians import GaussianClasses


@pytest.fixture(scope="module")
def report():
    learners = {"constant": Constant, 'near, "est"': NearestNeighbors}
    return compare(learners, GaussianClasses(dim=2), n_shot=2, n_query=3, n_episodes=10, shots=(1,), progress=False)


def test_json_keeps_everything(report, tmp_path):
    report.to_json(tmp_path / "r.json")
    again = Report.from_json(tmp_path / "r.json")
    assert str(again) == str(report)
    assert [result.to_dict() for result in again.results] == [result.to_dict() for result in report.results]
    again.to_json(tmp_path / "s.json")
    assert (tmp_path / "s.json").read_bytes() == (tmp_path / "r.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "s.json"]


def test_a_stored_report_on_other_episodes_is_refused(report, tmp_path):
    report.to_json(tmp_path / "r.json")
    plain = json.loads((tmp_path / "r.json").read_text())
    plain["results"][0]["evaluations"]["2"]["fingerprint"] = "0" * 64
    (tmp_path / "r.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match="same episodes"):
        Report.from_json(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "got None"), ('{"format": "metaicl-report-0"}', f"of format '{FORMAT}'")],
)
def test_what_is_no_report_is_refused(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Report.from_json(tmp_path / "r.json")


def test_csv_and_data_frame_hold_the_same_lines(report, tmp_path):
    report.to_csv(tmp_path / "r.csv")
    pandas = pytest.importorskip("pandas")
    frame, read = report.to_dataframe(), pandas.read_csv(tmp_path / "r.csv")
    assert len(frame) == 3 * 2 * 3 * 10  # learners, shots, metrics, episodes
    assert list(frame.columns) == ["task", "learner", "role", "seed", "shots", "episode", "metric", "value"]
    assert read["value"].tolist() == frame["value"].tolist()
    assert set(read["learner"]) == {"constant", 'near, "est"', "Bayes"}
    chosen = frame[(frame.learner == "constant") & (frame.metric == "nll") & (frame.shots == 2)]
    assert chosen["value"].tolist() == report.values("GaussianClasses", "constant", "nll")[0].tolist()


def test_without_pandas_the_command_is_named(report, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "metaicl\[dataframe\]"'):
        report.to_dataframe()


def test_printing_shows_tables_and_repr_is_short(report):
    assert "GAUSSIANCLASSES" in str(report)
    assert repr(report) == "Report(1 task distributions, 3 results)"


def test_the_page_is_the_same_after_json(report, tmp_path):
    report.to_html(tmp_path / "a.html")
    report.to_json(tmp_path / "r.json")
    Report.from_json(tmp_path / "r.json").to_html(tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@pytest.mark.parametrize("missing", ["protocol", "tasks", "results"])
def test_a_report_without_a_part_is_no_report(report, tmp_path, missing):
    report.to_json(tmp_path / "r.json")
    plain = json.loads((tmp_path / "r.json").read_text())
    del plain[missing]
    (tmp_path / "r.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=f"r.json is no whole report: KeyError: '{missing}'"):
        Report.from_json(tmp_path / "r.json")


def test_a_place_that_cannot_be_written_is_an_error(report, tmp_path):
    with pytest.raises(OSError, match="cannot write"):
        report.to_json(tmp_path / "missing" / "r.json")
