"""MNIST test digits, as a set that no learner of ours is meta-trained on."""

import gzip
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metaicl.checks import check_count
from metaicl.native.gather import scaled_rows
from metaicl.spec import TaskSpec
from metaicl.tasks.classes import ClassEpisodes
from metaicl.tasks.published import Published

_ORIGIN = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_IMAGES, _LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
_HEADS = {_IMAGES: 16, _LABELS: 8}  # bytes before the numbers begin
_SOURCE = Published(
    name="MNIST",
    prepared="mnist_test10k.npz",
    originals={
        _IMAGES: (_ORIGIN + _IMAGES, "md5:9fb629c4189551a2d022fa330f9573f3"),
        _LABELS: (_ORIGIN + _LABELS, "md5:ec29112dd5afa0611ce80d1b7f02629c"),
    },
    megabytes=1.7,
    cache="mnist",
)
_N_IMAGES, _SIZE = 10_000, 28


class MNIST(ClassEpisodes):
    """N-way tasks over the 10,000 MNIST test images: grey (1, 28, 28), ink bright, in [0, 1].

    All ten digits are meta-test classes: what learns on other images is judged here. There is no meta-training and no
    meta-validation split, and asking for one raises.

    Args:
        n_way: Classes per task, at most ten.
        folder: Where `mnist_test10k.npz` (images, labels) or the two original files of the test set lie; None looks
            into the cache folder.
        download: Fetch the originals (1.7 MB, verified by checksum) if there is nothing in the folder.

    Raises:
        FileNotFoundError: If there is nothing in the folder and `download` is False.
        OSError: If a file is damaged or could not be fetched.
        ValueError: If there are fewer digits than `n_way`.

    Reference:
        LeCun, Bottou, Bengio & Haffner, 1998, "Gradient-based learning applied to document recognition"
        (CC BY-SA 3.0).
    """

    def __init__(self, *, n_way: int = 5, folder: str | Path | None = None, download: bool = False) -> None:
        """Read the images."""
        if check_count("n_way", n_way, minimum=2) > 10:
            raise ValueError(f"n_way must be at most 10, the number of digits; got {n_way}")
        images, labels = _read(_SOURCE.find(folder, fetch=download))
        self._pixels = torch.from_numpy(images)
        super().__init__(
            TaskSpec("classification", (1, _SIZE, _SIZE), "image", n_way=n_way),
            labels=torch.from_numpy(labels.astype(np.int64)),
            class_splits={"train": (), "validation": (), "test": range(10)},
            class_names=[str(digit) for digit in range(10)],
        )

    def rows(self, ids: Tensor) -> Tensor:
        """Images (..., 1, 28, 28), float32 in [0, 1], of the source rows `ids` (...,)."""
        return scaled_rows(self._pixels, ids.flatten(), 1 / 255).view(*ids.shape, 1, *self._pixels.shape[1:])


def _read(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (10000, 28, 28) and labels (10000,)."""
    places = ", ".join(map(str, paths))
    try:
        if paths[0].name == _SOURCE.prepared:
            with np.load(paths[0], allow_pickle=False) as file:
                images, labels = file["images"], file["labels"]
        else:
            images, labels = (
                np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=_HEADS[path.name]).copy()
                for path in paths
            )
            images = images.reshape(-1, _SIZE, _SIZE)
    except (ValueError, KeyError, TypeError, EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise OSError(f"{places} must be MNIST; found damage: {type(error).__name__}: {error}") from error
    if images.shape != (_N_IMAGES, _SIZE, _SIZE) or labels.shape != (_N_IMAGES,) or images.dtype != np.uint8:
        raise OSError(
            f"{places} must hold uint8 images ({_N_IMAGES}, {_SIZE}, {_SIZE}) and as many labels; "
            f"got {images.dtype} {images.shape} and {labels.shape}"
        )
    found = np.unique(labels).tolist()
    if found != list(range(10)):
        raise OSError(f"{places} must hold the labels 0 to 9; got {found[:12]}")
    return images, labels
