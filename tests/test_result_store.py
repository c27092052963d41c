import json

import pytest

from metaicl.result_store import ResultStore
from metaicl.results import Result

FAILED = Result(task="t", learner="a/../b", seed=1, status="failed", reason="NaN")


def test_what_is_saved_is_loaded(tmp_path):
    store = ResultStore(tmp_path / "run")
    assert store.load("t", "a/../b", 1, {"steps": 3}) is None
    store.save(FAILED, {"steps": 3})
    assert store.load("t", "a/../b", 1, {"steps": 3}) == FAILED
    assert store.load("t", "a/../b", 2, {"steps": 3}) is None
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_names_that_look_alike_are_kept_apart(tmp_path):
    store = ResultStore(tmp_path)
    folders = {store.run_directory("t", name, 0) for name in ("a b", "a-b", "a/b", "A b", "", "é", "..")}
    assert len(folders) == 7
    assert all(len(folder.relative_to(tmp_path).parts) == 3 and ".." not in folder.parts for folder in folders)


def test_other_settings_are_named(tmp_path):
    store = ResultStore(tmp_path)
    store.save(FAILED, {"steps": 3, "shots": (1, 2)})
    with pytest.raises(ValueError, match="steps was 3, is 4; lr was None, is 1"):
        store.load("t", "a/../b", 1, {"steps": 4, "shots": [1, 2], "lr": 1})


def test_a_changed_digit_is_damage(tmp_path):
    store = ResultStore(tmp_path)
    store.save(FAILED, {"lr": 0.125})
    file = next(tmp_path.rglob("seed-1.json"))
    file.write_text(file.read_text().replace("NaN", "NaM"))
    with pytest.raises(ValueError, match=r"seed-1\.json is damaged; .*checksum"):
        store.load("t", "a/../b", 1, {"lr": 0.125})
    plain = json.loads(file.read_text().replace("NaM", "NaN"))
    del plain["sha256"]
    file.write_text(json.dumps(plain))  # as it was written before there were checksums
    assert store.load("t", "a/../b", 1, {"lr": 0.125}) == FAILED


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {}, "result": {}}', "\x00"])
def test_damaged_files_are_named(tmp_path, text):
    store = ResultStore(tmp_path)
    store.save(FAILED, {})
    next(tmp_path.rglob("seed-1.json")).write_text(text)
    with pytest.raises(ValueError, match=r"seed-1\.json is damaged"):
        store.load("t", "a/../b", 1, {})
