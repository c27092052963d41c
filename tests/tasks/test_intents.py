"""CLINC150 and Banking77: published rows, published splits, published layout, and the TF-IDF floor."""

import csv
import gzip
import hashlib
import json
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from metaicl.checks import check_episode
from metaicl.task import SPLITS, EpisodeStream
from metaicl.tasks.intents import CLINC150, Banking77, read_banking, read_clinc, read_prepared
from metaicl.tasks.published import Published
from metaicl.tasks.text import TextClasses

PUBLISHED = {"train": "train", "validation": "valid", "test": "test"}


def read_jsonl(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def clinc(shared_data: Path) -> CLINC150:
    return CLINC150(folder=shared_data)


@pytest.mark.parametrize(("loader", "key"), [(CLINC150, "clinc150"), (Banking77, "banking77")])
def test_class_splits_are_the_published_ones(loader: type[CLINC150], key: str, shared_data: Path) -> None:
    published = json.loads((shared_data / "intent_fewshot_splits.json").read_text())[key]
    assert sorted(published) == sorted(loader._splits)
    names = sorted({row["label"] for row in read_jsonl(shared_data / f"{key}.jsonl.gz")} - {"oos"})
    for number, parts in published.items():
        for letter, part in zip("rvt", ("train", "valid", "test"), strict=True):
            letters = loader._splits[number]
            assert [name for name, owner in zip(names, letters, strict=True) if owner == letter] == sorted(parts[part])


def test_clinc_has_the_published_rows(clinc: CLINC150, shared_data: Path) -> None:
    assert len(clinc.texts) == 22_500 - 62 - 9
    assert clinc.dropped == {"within_class": 62, "across_classes": 9}
    assert [len(clinc.class_splits[split]) for split in SPLITS] == [50, 50, 50]
    published = json.loads((shared_data / "intent_fewshot_splits.json").read_text())["clinc150"]["01"]
    for split in SPLITS:
        assert {clinc.class_names[i] for i in clinc.class_splits[split].tolist()} == set(published[PUBLISHED[split]])
    episode = clinc.sample(50, split="test", n_shot=5, n_query=15, generator=torch.Generator().manual_seed(0))
    check_episode(episode, clinc.spec)


def test_banking_has_the_published_rows(shared_data: Path) -> None:
    tasks = Banking77(folder=shared_data, split="03", n_way=10, max_tokens=64, words="fitted")
    assert len(tasks.texts) + sum(tasks.dropped.values()) == 13_083
    assert [len(tasks.class_splits[split]) for split in SPLITS] == [25, 25, 27]
    episode = tasks.sample(20, split="validation", n_shot=1, n_query=15, generator=torch.Generator().manual_seed(0))
    check_episode(episode, tasks.spec)


def test_the_original_layouts_give_the_same_rows(clinc: CLINC150, shared_data: Path, tmp_path: Path) -> None:
    write_clinc(shared_data, tmp_path / "data_full.json")
    assert CLINC150(folder=tmp_path).texts == clinc.texts
    rows = read_jsonl(shared_data / "banking77.jsonl.gz")
    for part in ("train", "test"):
        with open(tmp_path / f"{part}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "category"])
            writer.writerows((row["text"] + "\n", row["label"]) for row in rows if row["split"] == part)
    assert Banking77(folder=tmp_path).texts == Banking77(folder=shared_data).texts


def write_clinc(shared_data: Path, path: Path) -> None:
    parts: dict[str, list[list[str]]] = {}
    for row in read_jsonl(shared_data / "clinc150.jsonl.gz"):
        parts.setdefault(row["split"], []).append([row["text"], row["label"]])
    path.write_text(json.dumps(parts), encoding="utf-8")


def test_small_files_of_each_layout(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"train": [["play  it ", "music"]], "oos_train": [["hm", "oos"]]}')
    (tmp_path / "b.csv").write_text('text,category\n"Hello, ""you""",greet\nbye,leave\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "x y", "label": "a", "split": "train"}\n{"text": "z", "label": "oos"}\n')
    assert read_clinc(tmp_path / "a.json") == (["play  it"], ["music"])
    assert read_banking(tmp_path / "b.csv") == (['Hello, "you"', "bye"], ["greet", "leave"])
    assert read_prepared(tmp_path / "c.jsonl.gz") == (["x y"], ["a"])


def served_by(url: str, checksum: str) -> Published:
    return replace(CLINC150._source, originals={"data_full.json": (url, checksum)})


def test_download_verifies_keeps_and_reuses(
    clinc: CLINC150, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    write_clinc(shared_data, served / "data_full.json")
    checksum = hashlib.sha256((served / "data_full.json").read_bytes()).hexdigest()
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(served))) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/data_full.json"
        monkeypatch.setenv("METAICL_DATA", str(tmp_path / "cache"))
        monkeypatch.setattr(CLINC150, "_source", served_by(url, "0" * 64))
        with pytest.raises(FileNotFoundError, match="with download=True"):
            CLINC150()
        with pytest.raises(OSError, match="must have the sha256 0000"):
            CLINC150(download=True)
        monkeypatch.setattr(CLINC150, "_source", served_by(url, checksum))
        assert CLINC150(download=True).texts == clinc.texts
        server.shutdown()
    assert CLINC150().texts == clinc.texts


def test_bad_files_and_options_are_named(tmp_path: Path, shared_data: Path) -> None:
    with pytest.raises(ValueError, match=r"split must be one of .*'05'.*; got '06'"):
        CLINC150(folder=shared_data, split="06")
    with pytest.raises(FileNotFoundError, match=r"or the originals train.csv, test.csv, in .*download=True"):
        Banking77(folder=tmp_path)
    (tmp_path / "data_full.json").write_text('{"train": [["play it", "music"]]}')
    with pytest.raises(ValueError, match="CLINC150 must have 22500 rows of 150 classes; got 1 of 1"):
        CLINC150(folder=tmp_path)


def tfidf_accuracy(tasks: TextClasses, n_shot: int, n_episodes: int = 300) -> float:
    """Percent right of the nearest class mean (cosine) of TF-IDF vectors; idf from meta-train rows alone."""
    tokens = tasks.rows(torch.arange(len(tasks.texts)))
    assert tasks.source_classes is not None
    train = torch.isin(tasks.source_classes, tasks.class_splits["train"])
    vocabulary = tasks.spec.vocabulary or 0
    seen = (count_words(tokens[train], vocabulary) > 0).sum(0)
    idf = ((1 + train.sum()) / (1 + seen)).log() + 1
    stream = EpisodeStream(tasks, seed=0, split="test", n_shot=n_shot, n_query=15, chunk_size=25)
    right = []
    for episode in stream.batches(0, n_episodes, batch_size=25):
        support = normalize(count_words(episode.support.x, vocabulary) * idf, dim=-1)
        query = count_words(episode.query.x, vocabulary) * idf
        means = normalize(class_means(support, episode.support.y, tasks.spec.output_size), dim=-1)
        right.append((query @ means.mT).argmax(-1) == episode.query.y)
    return 100 * torch.cat(right).double().mean().item()


def count_words(tokens: Tensor, vocabulary: int) -> Tensor:
    counts = torch.zeros(*tokens.shape[:-1], vocabulary)
    counts.scatter_add_(-1, tokens, (tokens > 0).float())
    return counts


def class_means(rows: Tensor, y: Tensor, n_way: int) -> Tensor:
    one_hot = torch.nn.functional.one_hot(y, n_way).to(rows.dtype)
    return one_hot.mT @ rows / one_hot.sum(1)[..., None]


@pytest.mark.parametrize(("n_shot", "published"), [(1, 74.8), (5, 92.1)])
def test_tfidf_floor_of_clinc(clinc: CLINC150, n_shot: int, published: float) -> None:
    # Over 300 episodes a 95 % interval is +- 1.2 points at one shot and +- 0.6 at five, for either side.
    assert abs(tfidf_accuracy(clinc, n_shot) - published) < (1.7 if n_shot == 1 else 0.8)


@pytest.mark.parametrize(("loader", "key"), [(CLINC150, "clinc150"), (Banking77, "banking77")])
def test_damaged_files_are_named(loader: type[CLINC150], key: str, shared_data: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{key}.jsonl.gz"
    whole = (shared_data / path.name).read_bytes()
    for content in (whole[:1000], b"a page of a proxy", gzip.compress(b"[1]\n"), gzip.compress(b'{"text": "a"}\n')):
        path.write_bytes(content)
        with pytest.raises(OSError, match=f"{path.name} is damaged, or no file of"):
            loader(folder=tmp_path)


@pytest.mark.parametrize(("loader", "key"), [(CLINC150, "clinc150"), (Banking77, "banking77")])
def test_renamed_classes_are_named(loader: type[CLINC150], key: str, shared_data: Path, tmp_path: Path) -> None:
    rows = read_jsonl(shared_data / f"{key}.jsonl.gz")
    first = next(row["label"] for row in rows if row["label"] != "oos")
    renamed = [{**row, "label": "zzz_renamed" if row["label"] == first else row["label"]} for row in rows]
    path = tmp_path / f"{key}.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, renamed)).encode()))
    with pytest.raises(ValueError, match=f"under their published names.*{path.name} holds other names.*zzz_renamed"):
        loader(folder=tmp_path)
