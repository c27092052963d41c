"""Omniglot: the real file, and the originals in miniature, made here and served from this machine."""

import dataclasses
import functools
import hashlib
import http.server
import io
import threading
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from metaicl.checks import check_episode
from metaicl.task import derive_generator
from metaicl.tasks import omniglot
from metaicl.tasks.omniglot import Omniglot

N_CHARACTERS, N_DRAWERS = 40, 2


def sample(tasks, split="train"):
    return tasks.sample(4, split=split, n_shot=1, n_query=1, generator=derive_generator(0))


@pytest.fixture(scope="module")
def prepared(shared_data):
    with np.load(shared_data / "omniglot.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def lake(shared_data):
    return Omniglot(split="lake", rotations=False, folder=shared_data)


def test_the_rule_of_the_vinyals_split_gives_the_published_list(shared_data, prepared):
    tasks = Omniglot(rotations=False, folder=shared_data)
    for i, (split, size) in enumerate((("train", 1028), ("validation", 172), ("test", 423))):
        assert tasks.class_splits[split].tolist() == np.flatnonzero(prepared["vinyals_split"] == i).tolist()
        assert len(tasks.class_splits[split]) == size
    assert tasks.class_names[0] == "Arcadian/character01"
    assert len(set(tasks.class_names)) == 1623


def test_the_lake_split_holds_out_whole_alphabets(lake, prepared):
    assert [len(ids) for ids in lake.class_splits.values()] == [792, 172, 659]
    alphabets = [{lake.alphabets[c] for c in ids.tolist()} for ids in lake.class_splits.values()]
    assert [len(names) for names in alphabets] == [25, 5, 20]
    assert len(set.union(*alphabets)) == 50
    assert lake.class_splits["test"].tolist() == np.flatnonzero(~prepared["background"]).tolist()


def test_episodes_of_turned_characters(shared_data, prepared):
    tasks = Omniglot(folder=shared_data)
    assert {split: len(ids) for split, ids in tasks.class_splits.items()} == {
        "train": 4112,
        "validation": 688,
        "test": 1692,
    }
    episode = sample(tasks, "test")
    check_episode(episode, tasks.spec)
    assert episode.support.x.shape == (4, 20, 1, 28, 28)
    row = int(episode.query.ids[0, 0])
    turned = np.rot90(prepared["images"][row % 32460], row // 32460).astype(np.float32) / 255
    assert episode.query.x[0, 0, 0].numpy() == pytest.approx(turned, abs=1e-7)
    assert episode.fingerprint() == sample(Omniglot(folder=shared_data), "test").fingerprint()


def test_the_trials_have_the_published_pixel_error(lake):
    episode = lake.lake_trials()
    check_episode(episode, lake.spec.with_n_way(20))
    assert torch.equal(lake.source_classes[episode.query.ids], episode.latents["class_ids"].gather(1, episode.query.y))
    support, query = (
        torch.nn.functional.normalize(part.x.flatten(2), dim=2) for part in (episode.support, episode.query)
    )
    wrong = (query @ support.mT).argmax(-1) != episode.query.y
    assert wrong.double().mean().item() == pytest.approx(0.783, abs=0.001)
    for ids in episode.latents["class_ids"]:
        assert len({lake.alphabets[c] for c in ids.tolist()}) == 1


def test_the_trials_are_refused_where_training_may_have_seen_them(shared_data):
    with pytest.raises(ValueError, match=r"78 of the 200 characters.*split='lake'"):
        Omniglot(folder=shared_data).lake_trials()


def test_without_data_the_ways_to_it_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("METAICL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"folder=.*download=True.*Glyphs needs no data"):
        Omniglot()
    with pytest.raises(ValueError, match="did you mean 'vinyals'"):
        Omniglot(split="vinyal", folder=tmp_path)


def test_a_damaged_prepared_file(tmp_path, shared_data):
    data = (shared_data / "omniglot.npz").read_bytes()
    (tmp_path / "omniglot.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(OSError, match="no sound Omniglot file"):
        Omniglot(folder=tmp_path)
    np.savez(tmp_path / "omniglot.npz", images=np.zeros(3))
    with pytest.raises(OSError, match=r"no sound Omniglot file.*char_id"):
        Omniglot(folder=tmp_path)


def drawing(character, drawer):
    """A 105 x 105 picture, different for each pair: ink is black."""
    coarse = np.random.default_rng([character, drawer]).integers(0, 2, (15, 15), dtype=np.uint8)
    return np.kron(coarse, np.ones((7, 7), np.uint8)) * 255


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).convert("1").save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def originals(tmp_path, monkeypatch):
    """The three archives with four alphabets of ten characters and two runs; the last ten characters are tests."""
    monkeypatch.setattr(omniglot, "_N_CHARACTERS", N_CHARACTERS)
    monkeypatch.setattr(omniglot, "_DRAWERS", N_DRAWERS)
    monkeypatch.setattr(omniglot, "_N_RUNS", 2)
    monkeypatch.setattr(omniglot, "_FIRST_TEST", 31)
    folder = tmp_path / "originals"
    folder.mkdir()
    places = (("background", ("Zulu", "Hebrew")), ("evaluation", ("Early_Morning", "Alpha_(Beta)")))
    for part, (name, alphabets) in enumerate(places):
        with zipfile.ZipFile(folder / f"images_{name}.zip", "w") as archive:
            archive.writestr(f"images_{name}/", "")
            for a, alphabet in enumerate(alphabets):
                for c in range(10):
                    number = part * 20 + a * 10 + c + 1
                    for drawer in range(1, N_DRAWERS + 1):
                        place = f"images_{name}/{alphabet}/character{c + 1:02d}/{number:04d}_{drawer:02d}.png"
                        archive.writestr(place, png(drawing(number, drawer)))
                        archive.writestr(f"__MACOSX/{place.replace('/0', '/._0')}", b"junk")
    with zipfile.ZipFile(folder / "all_runs.zip", "w") as archive:
        for run in (1, 2):
            answers = []
            for j in range(20):
                archive.writestr(f"run{run:02d}/training/class{j + 1:02d}.png", png(drawing(21 + j, 1)))
                archive.writestr(f"run{run:02d}/test/item{j + 1:02d}.png", png(drawing(40 - j, 2)))
                answers.append(f"run{run:02d}/test/item{j + 1:02d}.png run{run:02d}/training/class{20 - j:02d}.png\n")
            archive.writestr(f"run{run:02d}/class_labels.txt", "".join(answers))
    return folder


def test_the_originals_are_read_and_kept(originals):
    tasks = Omniglot(n_way=2, split="lake", rotations=False, folder=originals)
    assert (originals / "omniglot.npz").is_file()
    assert tasks.class_names[10] == "Hebrew/character01"
    assert [ids.tolist() for ids in tasks.class_splits.values()] == [
        list(range(10)),
        list(range(10, 20)),
        list(range(20, 40)),
    ]
    image = tasks.rows(torch.tensor([13 * N_DRAWERS + 1]))[0, 0].numpy() * 255  # character 14, drawer 2
    owner = np.ceil((np.arange(105) + 0.5) / 3.75) - 1  # the pixel in which the center of an original one lies
    inside = (owner == np.arange(28)[:, None]).astype(float)
    inside /= inside.sum(1, keepdims=True)
    assert image == pytest.approx(inside @ (255.0 - drawing(14, 2)) @ inside.T, abs=1.01)  # rounded once for each axis
    trials = tasks.lake_trials()
    assert trials.support.ids[1].tolist() == [(20 + j) * N_DRAWERS for j in range(20)]
    assert trials.query.ids[0].tolist() == [(39 - j) * N_DRAWERS + 1 for j in range(20)]
    assert trials.query.y[0].tolist() == list(range(19, -1, -1))
    for name in ("images_background.zip", "images_evaluation.zip", "all_runs.zip"):
        (originals / name).unlink()
    again = Omniglot(n_way=2, split="lake", rotations=False, folder=originals)
    assert again.lake_trials().fingerprint() == trials.fingerprint()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lake_test", lambda a: a + 10_000, r"\['lake_test'\] are wrong"),
        ("char_id", lambda a: a[::-1], r"\['char_id'\] are wrong"),
        ("images", lambda a: a / 255, "got float64 images"),
    ],
)
def test_a_prepared_file_of_other_content(originals, name, change, message):
    Omniglot(n_way=2, split="lake", rotations=False, folder=originals)
    with np.load(originals / "omniglot.npz") as file:
        arrays = dict(file)
    np.savez(originals / "omniglot.npz", **{**arrays, name: change(arrays[name])})
    with pytest.raises(OSError, match=message):
        Omniglot(n_way=2, folder=originals)


def test_the_vinyals_rule_holds_for_the_originals_too(originals):
    tasks = Omniglot(n_way=2, rotations=False, folder=originals)
    assert tasks.class_splits["test"].tolist() == list(range(30, 40))
    assert tasks.class_splits["validation"].tolist() == list(range(10, 20))


def rewrite(path, drop=(), **changed):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name not in drop}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**members, **changed}.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("archive", "drop", "changed", "message"),
    [
        ("images_background.zip", ["images_background/Zulu/character01/0001_01.png"], {}, "80 drawings; got 79 with 1"),
        ("images_background.zip", [], {"images_background/Zulu/character01/0001_01.png": b"no"}, "damaged image"),
        ("all_runs.zip", ["run02/test/item07.png"], {}, "run02 lacks a file"),
        ("all_runs.zip", [], {"run01/test/item01.png": png(drawing(999, 1))}, "no Omniglot drawing"),
        ("all_runs.zip", [], {"run01/class_labels.txt": b""}, "must name 20 answers; got 0"),
    ],
)
def test_damaged_originals(originals, archive, drop, changed, message):
    rewrite(originals / archive, drop, **changed)
    with pytest.raises(OSError, match=message):
        Omniglot(n_way=2, folder=originals)
    assert not (originals / "omniglot.npz").exists()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_the_originals_are_downloaded_and_verified(originals, tmp_path, monkeypatch):
    handler = functools.partial(QuietHandler, directory=str(originals))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        base = f"http://127.0.0.1:{server.server_port}/"
        files = {p.name: (base + p.name, hashlib.md5(p.read_bytes()).hexdigest()) for p in sorted(originals.iterdir())}
        names = ("images_background.zip", "images_evaluation.zip", "all_runs.zip")
        served = dataclasses.replace(omniglot._SOURCE, originals={name: files[name] for name in names})
        monkeypatch.setattr(omniglot, "_SOURCE", served)
        monkeypatch.setenv("METAICL_DATA", str(tmp_path / "cache"))
        tasks = Omniglot(n_way=2, download=True)
        wrong = {**served.originals, "all_runs.zip": (base + "all_runs.zip", "0" * 32)}
        monkeypatch.setattr(omniglot, "_SOURCE", dataclasses.replace(served, originals=wrong))
        with pytest.raises(OSError, match="must have the md5 0000"):
            Omniglot(n_way=2, download=True, folder=tmp_path / "other")
        server.shutdown()
        thread.join()
    assert not (tmp_path / "other" / "all_runs.zip").exists()
    assert sample(tasks).fingerprint() == sample(Omniglot(n_way=2)).fingerprint()  # now from the cache folder
    assert (tmp_path / "cache" / "omniglot" / "omniglot.npz").is_file()


def test_the_origin_is_pinned():
    assert len(omniglot._SOURCE.originals) == 3
    for url, checksum in omniglot._SOURCE.originals.values():
        assert url.startswith("https://")
        assert "/057f034baf2ecb8530bc5710e5a23584d2a519cc/" in url
        assert checksum.split(":")[0] in ("md5", "sha256")
