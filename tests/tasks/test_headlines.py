"""HuffPost: published rows and class split, both layouts, and the TF-IDF floor."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
import torch

from metaicl.checks import check_episode
from metaicl.evaluation import evaluate
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.task import SPLITS
from metaicl.tasks import published
from metaicl.tasks.headlines import HuffPost, read_headlines
from metaicl.tasks.text_features import fit_tfidf


@pytest.fixture(scope="module")
def tasks(shared_data: Path) -> HuffPost:
    return HuffPost(folder=shared_data, vocabulary=8192)


def test_rows_and_splits_are_the_published_ones(tasks: HuffPost) -> None:
    assert len(tasks.texts) == 36_900 - 194
    assert tasks.dropped == {"within_class": 194, "across_classes": 0}
    assert [tasks.class_splits[split].tolist() for split in SPLITS] == [
        list(range(20)), list(range(20, 25)), list(range(25, 41)),
    ]  # fmt: skip
    tokens = tasks.rows(torch.arange(len(tasks.texts)))
    assert int((tokens != 0).sum(1).max()) == 30
    check_episode(
        tasks.sample(20, split="test", n_shot=5, n_query=15, generator=torch.Generator().manual_seed(0)), tasks.spec
    )


@pytest.mark.slow
@pytest.mark.parametrize(("n_shot", "published"), [(1, 0.256), (5, 0.345)])
def test_tfidf_floor(tasks: HuffPost, n_shot: int, published: float) -> None:
    floor = ProtoNet(tasks.spec, encoder=fit_tfidf(tasks), learn_temperature=False)
    found = evaluate(floor, tasks, n_episodes=200, n_shot=n_shot, n_query=15).metrics["accuracy"].mean()
    assert abs(found - published) < 0.02


def test_the_original_layout_and_download(
    tasks: HuffPost, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gzip.open(shared_data / "huffpost.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    original = tmp_path / "original" / "huffpost.json"

    def fetch(url: str, *, checksum: str, folder: Path) -> Path:
        assert url.endswith("/dea17d573a5eb4f31b3366ba1fe88b1beb865c50/data/huffpost.json")
        assert len(bytes.fromhex(checksum)) == hashlib.sha256().digest_size
        folder.mkdir()
        lines = [json.dumps({"raw": row["text"], "label": row["label"]}) + "\n" for row in rows]
        (folder / "huffpost.json").write_text("".join(lines), encoding="utf-8")
        return folder / "huffpost.json"

    with pytest.raises(FileNotFoundError, match=r"originals huffpost.json, in .*download=True \(3.2 MB\)"):
        HuffPost(folder=original.parent)
    monkeypatch.setattr(published, "download", fetch)
    assert HuffPost(folder=original.parent, download=True, vocabulary=8192).texts == tasks.texts
    original.write_text('{"raw": "one headline", "label": 3}\n')
    with pytest.raises(ValueError, match="HuffPost must have 36900 rows of 41 classes; got 1 of 1"):
        HuffPost(folder=original.parent)


def test_lines_of_both_layouts() -> None:
    lines = ['{"text": "a b", "label": 4, "name": "X"}', '{"raw": "c", "label": "5"}']
    assert read_headlines(lines) == (["a b", "c"], [4, 5])


@pytest.mark.parametrize("name", ["huffpost.jsonl.gz", "huffpost.json"])
def test_damaged_files_are_named(name: str, shared_data: Path, tmp_path: Path) -> None:
    whole = (shared_data / "huffpost.jsonl.gz").read_bytes()
    damaged = [
        whole[:1000],
        b"a page of a proxy",
        b'{"label": 1}\n',
        b"[1]\n",
        b"\xff\xfe",
        b'{"text": null, "label": 1}\n',
    ]
    for content in damaged if name.endswith(".gz") else damaged[1:]:
        packed = content if content in damaged[:2] or name.endswith(".json") else gzip.compress(content)
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(OSError, match=f"{name} is damaged, or no file of HuffPost"):
            HuffPost(folder=tmp_path)
