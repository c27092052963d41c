"""MNIST test digits: the prepared file, the originals in their format, and what is refused."""

import gzip

import numpy as np
import pytest
import torch

from metaicl.leakage import audit_leakage
from metaicl.task import EpisodeStream, derive_generator
from metaicl.tasks import mnist
from metaicl.tasks.mnist import MNIST


@pytest.fixture(scope="module")
def digits(shared_data):
    return MNIST(n_way=10, folder=shared_data)


def write_originals(folder, arrays) -> None:
    """The two files as they are published: magic numbers and sizes, then bytes."""
    images, labels = arrays["images"], arrays["labels"]
    heads = (np.array([2051, *images.shape], ">i4"), np.array([2049, len(labels)], ">i4"))
    for name, head, values in zip(mnist._SOURCE.originals, heads, (images, labels), strict=True):
        (folder / name).write_bytes(gzip.compress(head.tobytes() + values.astype(np.uint8).tobytes(), 1))


def test_episodes_are_rows_of_the_file(digits, shared_data):
    with np.load(shared_data / "mnist_test10k.npz") as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    episode = EpisodeStream(digits, seed=0, split="test", n_shot=2, n_query=3, chunk_size=4)[0]
    support = episode.support
    assert support.x.shape == (4, 20, 1, 28, 28)
    assert torch.equal(support.x[..., 0, :, :], images[support.ids].float() * (1 / 255))
    assert float(support.x.max()) == 1.0
    digit = episode.latents["class_ids"].gather(1, support.y)
    assert torch.equal(digit, labels[support.ids].long())
    assert not (set(support.ids[0].tolist()) & set(episode.query.ids[0].tolist()))
    assert digits.class_names[7] == "7"


def test_the_leakage_audit_leaves_splits_without_classes_out(digits):
    report = audit_leakage(digits, n_episodes=10)
    assert report.left_out == ("train", "validation")
    assert str(report).startswith("leakage in 10 tasks of each split but train, validation, which have too few classes")
    assert not report.leaky


def test_labels_belong_to_their_images(digits):
    episode = digits.sample(200, split="test", n_shot=5, n_query=5, generator=derive_generator(0))
    centers = torch.stack([episode.support.x[episode.support.y == c].view(200, 5, -1).mean(1) for c in range(10)], 1)
    found = torch.cdist(episode.query.x.flatten(2), centers).argmin(-1)
    assert float((found == episode.query.y).float().mean()) > 0.6  # chance is 0.1


def test_the_originals_give_the_same(shared_data, digits, tmp_path):
    with np.load(shared_data / "mnist_test10k.npz") as file:
        write_originals(tmp_path, file)
    ids = torch.arange(0, 10_000, 997)
    built = MNIST(n_way=10, folder=tmp_path)
    assert torch.equal(built.rows(ids), digits.rows(ids))
    assert torch.equal(built.source_classes, digits.source_classes)


def test_what_is_refused(digits, shared_data, tmp_path):
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match=f"split '{split}' has 0 classes"):
            digits.sample(1, split=split, n_shot=1, n_query=1, generator=derive_generator(0))
    with pytest.raises(ValueError, match="n_way must be at most 10"):
        MNIST(n_way=11, folder=shared_data)
    with pytest.raises(FileNotFoundError, match=r"originals with download=True \(1\.7 MB\)"):
        MNIST(folder=tmp_path)
    (tmp_path / "mnist_test10k.npz").write_bytes(b"PK no archive")
    with pytest.raises(OSError, match="must be MNIST; found damage"):
        MNIST(folder=tmp_path)
    np.savez(tmp_path / "mnist_test10k.npz", images=np.zeros((3, 28, 28), np.uint8), labels=np.zeros(3, np.uint8))
    with pytest.raises(OSError, match=r"must hold uint8 images \(10000, 28, 28\)"):
        MNIST(folder=tmp_path)
    for labels in (np.full(10_000, 7, np.uint8), np.array(["a"] * 10_000), np.full(10_000, np.nan)):
        np.savez(tmp_path / "mnist_test10k.npz", images=np.zeros((10_000, 28, 28), np.uint8), labels=labels)
        with pytest.raises(OSError, match="must hold the labels 0 to 9; got"):
            MNIST(folder=tmp_path)
