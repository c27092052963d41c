"""N-way episodes over labeled images, from arrays or from a folder."""

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from metaicl.checks import check_choice, check_count
from metaicl.native.gather import scaled_rows
from metaicl.spec import TaskSpec
from metaicl.task import SPLITS, Split
from metaicl.tasks.classes import ClassEpisodes, check_ways
from metaicl.tasks.labels import index_labels, splits_by_name
from metaicl.tasks.values import refuse_masked

Channels = Literal["first", "last"]

_CHANNEL_COUNTS = (1, 3, 4)  # grey, RGB, RGBA: what tells a channel axis from a height when nobody says
_LISTED = 5  # offending files named in a message
_SPLIT_FOLDERS: dict[str, Split] = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


class ImageClasses(ClassEpisodes):
    """N-way tasks over (images, labels); an input is float32 in [0, 1], (B, N, channels, height, width).

    uint8 images stay uint8 in memory; only the rows of an episode are converted. Arrays are not copied where that
    can be avoided, so leave them alone afterwards.

    Args:
        images: (rows, height, width), (rows, channels, height, width) or (rows, height, width, channels), uint8, or
            floating point in [0, 1]; an array or a CPU tensor.
        labels: (rows,) any integers or strings, see `index_labels`.
        n_way: Classes per task.
        class_splits: For each split the labels it owns; None draws one by `seed`. A chosen split with fewer than
            `n_way` classes can be kept, but gives no tasks.
        class_names: One name per distinct label, in sorted order of the labels; the labels themselves by default.
        channels: "first" or "last", where the channel axis of four-dimensional images stands. None finds out, if
            just one of the two axes has 1, 3 or 4 entries.
        rotations: Each class turned by 90, 180 and 270 degrees gives three more classes, in the split of their
            parent (Santoro et al. 2016). Source row `r * rows + i` is image `i` turned `r` times counterclockwise,
            and class `r * classes + c` is class `c` turned likewise. All four are kept in memory.
        fractions: Shares of a random split, by default 64 : 16 : 20 % of the classes.
        seed: Of the random split.

    Raises:
        TypeError: If the images are neither uint8 nor floating point, or the labels are of mixed types.
        ValueError: If shapes, values, splits or names do not fit each other, or a drawn split, or every chosen one, has
            fewer than `n_way` classes.
    """

    def __init__(
        self,
        images: Tensor | np.ndarray,
        labels: Any,
        *,
        n_way: int,
        class_splits: Mapping[Split, Iterable[Hashable]] | None = None,
        class_names: Sequence[Hashable] | None = None,
        channels: Channels | None = None,
        rotations: bool = False,
        fractions: Mapping[Split, float] | None = None,
        seed: int = 0,
    ) -> None:
        """Bring the images into one layout and number the classes."""
        pixels = _channels_first(_checked_pixels(images), channels)
        indices, values = index_labels(labels)
        if len(indices) != len(pixels):
            raise ValueError(f"labels must be one per image, {len(pixels)}; got {len(indices)}")
        owned: Mapping[Split, Sequence[int]] = splits_by_name(values, class_splits, fractions=fractions, seed=seed)
        names = values if class_names is None else list(class_names)
        if len(names) != len(values):
            raise ValueError(f"class_names must be one per distinct label, {len(values)}; got {len(names)}")
        if rotations:
            pixels, indices, owned, names = _with_rotations(pixels, indices, owned, names)
        check_ways(check_count("n_way", n_way, minimum=2), owned, drawn=class_splits is None)
        self._shape = tuple(pixels.shape[1:])
        self._pixels = pixels.flatten(1).contiguous()
        spec = TaskSpec("classification", self._shape, "image", n_way=n_way)
        super().__init__(spec, labels=indices, class_splits=owned, class_names=names)

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        n_way: int,
        size: int = 28,
        grayscale: bool = True,
        class_splits: Mapping[Split, Iterable[str]] | None = None,
        rotations: bool = False,
        fractions: Mapping[Split, float] | None = None,
        seed: int = 0,
    ) -> "ImageClasses":
        """Read a folder of one subfolder per class, or of train, validation (or val) and test with those inside.

        Names that start with a dot are ignored; everything else in a class folder must be an image. Transparent
        pixels become white.

        Args:
            path: The folder.
            n_way: Classes per task.
            size: Images are scaled to size x size pixels, whatever their aspect ratio.
            grayscale: One channel; False gives three (RGB).
            class_splits: For each split the class folders it owns; None takes the split of the folders, or draws one.
            rotations: See `ImageClasses`.
            fractions: Shares of a random split, see `ImageClasses`.
            seed: Of the random split.

        Raises:
            FileNotFoundError: If there is no such folder, or no image in it or in one of its class folders.
            OSError: If files are no readable images; all are counted and the first named.
            ValueError: If there are fewer than two classes, the split is given twice or shares a class, or folders lie
                where images should.
        """
        size = check_count("size", size)
        classes, split = _class_folders(Path(path))
        if split is not None and class_splits is not None:
            raise ValueError(f"{path} is split by its folders {sorted(_SPLIT_FOLDERS)}; class_splits must be None")
        files = [(file, folder.name) for folder in classes for file in _visible(folder)]
        empty = [str(folder) for folder in classes if not _visible(folder)]
        if empty:
            raise FileNotFoundError(f"every class folder needs images; {len(empty)} have none: {empty[:_LISTED]}")
        images = _read_images([file for file, _ in files], size, "L" if grayscale else "RGB")
        return cls(
            images,
            [label for _, label in files],
            n_way=n_way,
            class_splits=split if split is not None else class_splits,
            channels=None if grayscale else "last",
            rotations=rotations,
            fractions=fractions,
            seed=seed,
        )

    def rows(self, ids: Tensor) -> Tensor:
        """Images (..., channels, height, width), float32 in [0, 1], of the source rows `ids` (...,)."""
        flat = ids.flatten()
        if self._pixels.dtype == torch.uint8:
            images = scaled_rows(self._pixels, flat, 1 / 255)  # as fast as quotients are not, and 255 is exactly 1
        else:
            images = self._pixels.index_select(0, flat)
        return images.view(*ids.shape, *self._shape)


def _checked_pixels(images: Tensor | np.ndarray) -> Tensor:
    if not isinstance(images, (Tensor, np.ndarray)):
        raise TypeError(f"images must be an array or a tensor; got {type(images).__name__}")
    refuse_masked(images, "images")
    if isinstance(images, np.ndarray):
        if images.dtype.kind not in "uifb":
            raise TypeError(f"images must be uint8 or floating point; got {images.dtype}")
        images = images.astype(images.dtype.newbyteorder("="), copy=False)  # torch knows the machine's order alone
        # torch cannot share read-only memory or negative strides
        images = torch.from_numpy(images if images.flags.writeable and images.flags.c_contiguous else images.copy())
    images = images.detach().cpu()
    if images.numel() == 0:
        raise ValueError(f"images must hold at least one pixel; got shape {tuple(images.shape)}")
    if images.dtype == torch.bool:
        return images.to(torch.uint8) * 255
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(
            f"images must be uint8 or floating point; got {images.dtype}. Values 0 .. 255: .to(torch.uint8)"
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise ValueError(
            f"floating point images must lie in [0, 1]; got values in [{low:g}, {high:g}]. "
            "Divide by 255, or pass uint8; standardize inside the network"
        )
    return images.to(torch.float32)


def _channels_first(images: Tensor, channels: Channels | None) -> Tensor:
    if images.ndim == 3:
        if channels is not None:
            raise ValueError(f"channels={channels!r} needs images of four dimensions; got shape {tuple(images.shape)}")
        return images[:, None]
    if images.ndim != 4:
        raise ValueError(f"images must be (rows, height, width) or that with channels; got shape {tuple(images.shape)}")
    if channels is None:
        first, last = images.shape[1] in _CHANNEL_COUNTS, images.shape[3] in _CHANNEL_COUNTS
        if first == last:
            raise ValueError(
                f"channels must be 'first' or 'last' where the shape does not tell; got images {tuple(images.shape)}"
            )
        channels = "first" if first else "last"
    return images if check_choice("channels", channels, ("first", "last")) == "first" else images.permute(0, 3, 1, 2)


def _with_rotations(
    images: Tensor, labels: Tensor, owned: Mapping[Split, Sequence[int]], names: Sequence[Hashable]
) -> tuple[Tensor, Tensor, dict[Split, list[int]], list[Hashable]]:
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(f"rotations need square images; got height and width {tuple(images.shape[-2:])}")
    count = len(names)
    # joined by numpy, which asks the system for huge pages: reading rows at random is a quarter faster
    pixels = torch.from_numpy(np.concatenate([images.rot90(turn, (-2, -1)).numpy() for turn in range(4)]))
    turned = torch.cat([labels + turn * count for turn in range(4)])
    splits: dict[Split, list[int]] = {s: [c + turn * count for turn in range(4) for c in owned[s]] for s in SPLITS}
    return pixels, turned, splits, [*names, *(f"{name} turned {turn * 90}" for turn in range(1, 4) for name in names)]


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _class_folders(path: Path) -> tuple[list[Path], dict[Split, list[str]] | None]:
    """The class folders, and their split if the folders above them give one."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} must be a folder with one subfolder of images per class; there is none")
    folders = [entry for entry in _visible(path) if entry.is_dir()]
    split: dict[Split, list[str]] | None = None
    if "train" in {folder.name for folder in folders} <= set(_SPLIT_FOLDERS):
        found = [_SPLIT_FOLDERS[folder.name] for folder in folders]
        if sorted(found) != sorted(SPLITS):
            names = [folder.name for folder in folders]
            raise ValueError(f"{path} must hold train, validation (or val) and test, once each; got {names}")
        parts: dict[Split, list[Path]] = {
            _SPLIT_FOLDERS[folder.name]: [entry for entry in _visible(folder) if entry.is_dir()] for folder in folders
        }
        split = {name: [folder.name for folder in part] for name, part in parts.items()}
        folders = [folder for part in parts.values() for folder in part]
    if not folders:
        raise FileNotFoundError(f"{path} must hold one subfolder of images per class; it has none")
    if len(folders) < 2:
        raise ValueError(f"{path} must hold at least two class folders; got only {folders[0].name!r}")
    nested = [folder for folder in folders if all(entry.is_dir() for entry in _visible(folder)) and _visible(folder)]
    if nested:
        raise ValueError(
            f"class folders must hold images; {nested[0]} holds folders only. The folders above the classes are called "
            "train, validation (or val) and test, and stand alone"
        )
    return folders, split


def _read_images(files: Sequence[Path], size: int, mode: str) -> np.ndarray:
    """All images as uint8, scaled to (size, size); every file that is none is reported, none is left out."""
    images = np.empty((len(files), size, size) + (() if mode == "L" else (3,)), dtype=np.uint8)
    bad = []
    for i, file in enumerate(files):
        try:
            images[i] = _read_image(file, size, mode)
        except (OSError, ValueError, SyntaxError, EOFError, Warning) as error:  # what Pillow raises for damaged files
            bad.append(f"{file} ({error})")
    if bad:
        raise OSError(
            f"{len(bad)} of {len(files)} files are no readable images, for instance: {'; '.join(bad[:_LISTED])}"
        )
    return images


def _read_image(file: Path, size: int, mode: str) -> np.ndarray:
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow only warns of a decompression bomb, and of damaged metadata
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of type {image.mode}; convert them to 8 bits per channel")
            upright = ImageOps.exif_transpose(image)
            if "A" in upright.getbands() or "transparency" in upright.info:
                # what a transparent pixel hides is arbitrary, and often black beside black ink
                colors = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors)
            return np.asarray(upright.convert(mode).resize((size, size), Image.Resampling.BILINEAR))
