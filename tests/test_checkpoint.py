import pickle
import random
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn
from training_helpers import Banked, Lines, Ridge, make_banked, make_maml, make_ridge, weights_of

from metaicl.checkpoint import (
    CheckpointError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    load_checkpoint,
    load_learner_weights,
    save_checkpoint,
    save_learner,
)

CONTENT = {
    "weights": {"a": torch.arange(300.0), "b": torch.ones(3, dtype=torch.long)},
    "step": 7,
    "names": ["x", None, (1.5, True)],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "file.ckpt", CONTENT)
    return tmp_path / "file.ckpt"


def test_round_trip(path: Path) -> None:
    found = load_checkpoint(path)
    assert torch.equal(found["weights"]["a"], CONTENT["weights"]["a"])
    assert torch.equal(found["weights"]["b"], CONTENT["weights"]["b"])
    assert (found["step"], found["names"]) == (7, ["x", None, (1.5, True)])


def test_every_flipped_bit_is_refused(path: Path) -> None:
    data = path.read_bytes()
    places = random.Random(0).sample(range(8 * len(data)), 900)
    for bit in [*range(8 * 100), *places]:  # the whole first line, and all over the rest
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def test_every_truncation_and_overwrite_is_refused(path: Path) -> None:
    data = path.read_bytes()
    chance = random.Random(0)
    for _ in range(200):
        start = chance.randrange(len(data))
        stop = min(start + chance.randrange(1, 200), len(data))
        for changed in (
            data[:start],
            data + data[start:stop],
            data[:start] + bytes(b ^ 255 for b in data[start:stop]) + data[stop:],
        ):
            path.write_bytes(changed)
            with pytest.raises(CorruptCheckpointError):
                load_checkpoint(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>404</html>", "looks like HTML"),
        (b"step,loss\n1,2\n", "looks like a text file"),
        (b"\x00\x01\xff" * 50, "starts with bytes of another format"),
        (b"metaicl-checkpoint 1 abc\n", "damaged first line"),
        (b"metaicl-checkpoint \xb2 abc 3\nxyz", "damaged first line"),
    ],
)
def test_another_file_is_named(path: Path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=message):
        load_checkpoint(path)


def test_directory_plain_torch_file_and_absent_file(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match="is a directory"):
        load_checkpoint(tmp_path)
    torch.save({}, path)
    with pytest.raises(CorruptCheckpointError, match=r"plain torch\.save file"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_checkpoint(tmp_path / "absent.ckpt")


def test_a_newer_format_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"metaicl-checkpoint 1 ", b"metaicl-checkpoint 2 ", 1))
    with pytest.raises(IncompatibleCheckpointError, match="has checkpoint format 2; this version reads format 1"):
        load_checkpoint(path)


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return (Path.touch, (self.path,))


def test_no_code_is_run(path: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    def hostile(content: object, buffer: object) -> None:
        buffer.write(pickle.dumps({"step": _Touch(canary)}))

    with patch("metaicl.checkpoint.torch.save", hostile):
        save_checkpoint(path, {})
    with pytest.raises(CorruptCheckpointError, match="more than tensors and plain containers"):
        load_checkpoint(path)
    assert not canary.exists()


def test_what_cannot_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"content\['a'\]\[1\] is a set"):
        save_checkpoint(tmp_path / "file.ckpt", {"a": [1, {2}]})
    assert list(tmp_path.iterdir()) == []


def test_learner_round_trip(path: Path) -> None:
    learner, other = make_ridge(), Ridge(Lines.spec)
    save_learner(learner, path)
    load_learner_weights(other, path)
    assert all(torch.equal(value, weights_of(learner)[name]) for name, value in weights_of(other).items())


def test_buffers_that_prepare_fills_come_back(path: Path) -> None:
    learner, other = make_banked(), Banked(Lines.spec)
    learner.prepare(Lines(), seed=3)
    save_learner(learner, path)
    load_learner_weights(other, path)
    assert other.bank.shape == (6, 2)
    assert torch.equal(other.bank, learner.bank)
    learner.bank.zero_()
    assert other.bank.abs().sum() > 0


def test_another_learner_is_refused(path: Path) -> None:
    save_learner(make_maml(), path)
    with pytest.raises(IncompatibleCheckpointError, match="holds the weights of a TinyMAML; got a Ridge"):
        load_learner_weights(make_ridge(), path)


def test_differences_are_listed_and_nothing_is_loaded(path: Path) -> None:
    learner = make_ridge()
    save_learner(learner, path)
    learner.encoder = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), *(nn.Linear(5, 5) for _ in range(6)))
    before = weights_of(learner)
    with pytest.raises(IncompatibleCheckpointError) as caught:
        load_learner_weights(learner, path)
    lines = str(caught.value).splitlines()
    assert lines[1] == "  encoder.0.weight: saved (4, 2), here (5, 2)"
    assert lines[3] == "  encoder.2.weight: saved absent, here (5, 5)"
    assert len(lines) == 12
    assert lines[-1] == "  and 4 more"
    assert all(torch.equal(value, before[name]) for name, value in weights_of(learner).items())


def test_a_checkpoint_that_is_no_learner(path: Path) -> None:
    with pytest.raises(IncompatibleCheckpointError, match="was not written by save_learner"):
        load_learner_weights(make_ridge(), path)
