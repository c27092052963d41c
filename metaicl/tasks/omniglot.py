"""Omniglot: 1623 handwritten characters of 50 alphabets, twenty drawings each."""

import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metaicl.checks import check_choice
from metaicl.episode import Episode, Examples
from metaicl.task import Split
from metaicl.tasks.images import ImageClasses
from metaicl.tasks.published import Published
from metaicl.tasks.sources import atomic_file, open_zip

Arrays = dict[str, np.ndarray]

_ORIGIN = "https://raw.githubusercontent.com/brendenlake/omniglot/057f034baf2ecb8530bc5710e5a23584d2a519cc/python/"
_BACKGROUND, _EVALUATION, _TRIALS = "images_background.zip", "images_evaluation.zip", "all_runs.zip"
_SOURCE = Published(
    name="Omniglot",
    prepared="omniglot.npz",
    originals={
        _BACKGROUND: (_ORIGIN + _BACKGROUND, "md5:68d2efa1b9178cc56df9314c21c6e718"),
        _EVALUATION: (_ORIGIN + _EVALUATION, "md5:6b91aef0f799c5bb55b94e3f2daec811"),
        _TRIALS: (
            _ORIGIN + "one-shot-classification/" + _TRIALS,
            "sha256:437c1eeab0af8484112e1b4cc0f3d541ec727f7c47b9b202da738af9dfd6c325",
        ),
    },
    megabytes=16,
    cache="omniglot",
    instead=". Glyphs needs no data",
)
_SIZE = 28  # pixels of a side; the originals have 105
_DRAWERS = 20
_N_CHARACTERS = 1623
_N_RUNS = 20  # of the one-shot trials, each with 20 training and 20 test images
_FIRST_TEST = 1201  # the number of the first character of the Vinyals test set
_VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
_ANSWER = re.compile(r"item(\d\d)\.png\s+\S*class(\d\d)\.png")
_DRAWING = re.compile(r"([^/]+)/character(\d+)/(\d{4})_(\d\d)\.png$")  # alphabet, character in it, number, drawer


class Omniglot(ImageClasses):
    """N-way tasks over Omniglot: grey images (1, 28, 28), ink bright, in [0, 1].

    Both splits hold out the alphabets Armenian, Bengali, Early Aramaic, Hebrew and Mkhedruli (172 characters) for
    meta-validation.

      - "vinyals": meta-test is characters 1201 to 1623 (423); the other 1028 are for meta-training. That is the
        published list, character by character.
      - "lake": meta-test is the 20 evaluation alphabets (659), meta-training the rest of the background set (792).

    The arrays come from `omniglot.npz` in the folder, else from the three originals there (`images_background.zip`,
    `images_evaluation.zip`, `all_runs.zip`), which `download=True` fetches (16 MB). What is built from the originals
    is kept beside them as `omniglot.npz`, if the folder can be written. A pixel is the mean of those of the 105 x 105
    original whose centers lie in it (3 or 4 each way), not thresholded.

    Args:
        n_way: Classes per task.
        rotations: Turned characters are classes of their own, see `ImageClasses`: 6492 classes instead of 1623.
        split: "vinyals" or "lake".
        folder: Where to look; None is the cache folder.
        download: Fetch the originals if there is nothing in the folder.

    Raises:
        FileNotFoundError: If there is nothing in the folder and `download` is False.
        OSError: If a file is damaged or could not be fetched.
        ValueError: If the split is unknown.

    Reference:
        Lake, Salakhutdinov & Tenenbaum, 2015, Science 350. Split and rotations: Vinyals et al. 2016,
        arXiv:1606.04080, in the lists of Snell et al. 2017, arXiv:1703.05175.
    """

    def __init__(
        self,
        *,
        n_way: int = 20,
        rotations: bool = True,
        split: str = "vinyals",
        folder: str | Path | None = None,
        download: bool = False,
    ) -> None:
        """Read or build the arrays and apply the split."""
        check_choice("split", split, ("vinyals", "lake"))
        arrays = _load(_SOURCE.find(folder, fetch=download))
        self.alphabets = [str(arrays["alphabet_names"][i]) for i in arrays["alphabet"]]
        names = [f"{a}/character{c:02d}" for a, c in zip(self.alphabets, arrays["char_in_alphabet"], strict=True)]
        validation = np.isin(self.alphabets, _VALIDATION)
        test = arrays["char_id"] >= _FIRST_TEST if split == "vinyals" else ~arrays["background"]
        members: dict[Split, np.ndarray] = {"train": ~validation & ~test, "validation": validation, "test": test}
        super().__init__(
            arrays["images"],
            np.repeat(np.arange(_N_CHARACTERS), _DRAWERS),
            n_way=n_way,
            class_splits={name: np.flatnonzero(mask).tolist() for name, mask in members.items()},
            class_names=names,
            rotations=rotations,
        )
        self._trials = [
            torch.from_numpy(arrays[f"lake_{part}"].astype(np.int64)) for part in ("train", "test", "label")
        ]

    def lake_trials(self) -> Episode:
        """The original one-shot trials: twenty runs, each 20-way within one alphabet, with 20 queries (400 in all).

        Returns:
            An episode with B = 20 and N = Q = 20.

        Raises:
            ValueError: If some of their characters are in meta-training or meta-validation, as in split "vinyals".

        Reference:
            Lake, Salakhutdinov & Tenenbaum, 2015, Science 350; files `run01` to `run20`.
        """
        train, test, label = self._trials
        class_ids = self._classes_of(train)
        known = class_ids[~torch.isin(class_ids, self.class_splits["test"])].unique().numel()
        if known:
            raise ValueError(
                f"{known} of the {class_ids.unique().numel()} characters of the trials are not in the meta-test set of "
                "this split, so a learner may have met them in training; use Omniglot(split='lake')"
            )
        support = Examples(self.rows(train), torch.arange(train.shape[1]).repeat(_N_RUNS, 1), ids=train)
        return Episode(support, Examples(self.rows(test), label, ids=test), {"class_ids": class_ids})

    def _classes_of(self, ids: Tensor) -> Tensor:
        assert self.source_classes is not None  # every ClassEpisodes has them
        return self.source_classes[ids]


def _load(paths: list[Path]) -> Arrays:
    if paths[0].name == _SOURCE.prepared:
        return _read_prepared(paths[0])
    arrays = _build(*paths)
    prepared = paths[0].with_name(_SOURCE.prepared)
    with suppress(OSError), atomic_file(prepared) as file:  # a folder that cannot be written costs time, not answers
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # arrays, and no allow_pickle among the names
    return arrays


def _read_prepared(path: Path) -> Arrays:
    shapes: dict[str, tuple[int, ...]] = {"images": (_N_CHARACTERS * _DRAWERS, _SIZE, _SIZE)}
    shapes |= dict.fromkeys(("char_id", "alphabet", "char_in_alphabet", "background"), (_N_CHARACTERS,))
    shapes |= dict.fromkeys(("lake_train", "lake_test", "lake_label"), (_N_RUNS, 20))
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*shapes, "alphabet_names")}
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise OSError(f"{path} is no sound Omniglot file: {error}") from error
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise OSError(f"{path}: {name} must be {shape}; got {arrays[name].shape}")
    n_images, n_alphabets = _N_CHARACTERS * _DRAWERS, len(arrays["alphabet_names"])
    ends = {"alphabet": n_alphabets, "lake_train": n_images, "lake_test": n_images, "lake_label": 20}
    bad = [name for name, end in ends.items() if not np.isin(arrays[name], np.arange(end)).all()]
    if not np.array_equal(arrays["char_id"], np.arange(1, _N_CHARACTERS + 1)):
        bad.append("char_id")
    if bad or arrays["images"].dtype != np.uint8:
        raise OSError(
            f"{path} must hold uint8 images, characters 1 to {_N_CHARACTERS} in order and indices of what it holds; "
            f"got {arrays['images'].dtype} images, and {bad} are wrong"
        )
    return arrays


def _build(background: Path, evaluation: Path, trials: Path) -> Arrays:
    """The arrays of the prepared file, from the original archives."""
    drawings: dict[tuple[int, int], np.ndarray] = {}  # by number of the character and drawer, both from 1
    characters: dict[int, tuple[str, int, bool]] = {}  # by number: alphabet, number in it, background
    for path in (background, evaluation):
        for match, image in _drawings(path):
            alphabet, in_alphabet, number, drawer = match[1], int(match[2]), int(match[3]), int(match[4])
            characters[number] = (alphabet, in_alphabet, path == background)
            drawings[number, drawer] = image
    expected = {(c + 1, d + 1) for c in range(_N_CHARACTERS) for d in range(_DRAWERS)}
    if set(drawings) != expected:
        got = f"{len(drawings)} with {len(expected - set(drawings))} missing"
        raise OSError(f"{background} and {evaluation} must hold {len(expected)} drawings; got {got}")
    alphabets, in_alphabet, from_background = zip(*(characters[c + 1] for c in range(_N_CHARACTERS)), strict=True)
    names, alphabet = np.unique(alphabets, return_inverse=True)
    images = np.stack([drawings[key] for key in sorted(drawings)])
    return {
        "images": images,
        "char_id": np.arange(1, _N_CHARACTERS + 1),
        "alphabet": alphabet,
        "alphabet_names": names,
        "char_in_alphabet": np.array(in_alphabet),
        "background": np.array(from_background),
        **_read_trials(trials, images),
    }


def _drawings(path: Path) -> Iterator[tuple[re.Match[str], np.ndarray]]:
    with open_zip(path) as archive:
        for name in archive.namelist():
            if match := _DRAWING.search(name):
                yield match, _read_drawing(archive, name)


def _read_drawing(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """uint8 (28, 28), ink bright: the mean of the original pixels whose centers lie in each new one."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(archive.read(name))) as image:
            ink = Image.fromarray(255 - np.asarray(image.convert("L")))
    except (OSError, ValueError, SyntaxError) as error:
        raise OSError(f"{archive.filename} holds a damaged image, {name}: {error}") from error
    return np.asarray(ink.resize((_SIZE, _SIZE), Image.Resampling.BOX))


def _read_trials(path: Path, images: np.ndarray) -> Arrays:
    """The trials as rows of `images`; their files are copies of drawings, so equal pixels tell which."""
    row = {image.tobytes(): i for i, image in reversed(list(enumerate(images)))}
    train, test, label = (np.zeros((_N_RUNS, 20), dtype=np.int64) for _ in range(3))
    with open_zip(path) as archive:
        for run in range(_N_RUNS):
            folder = f"run{run + 1:02d}"
            try:
                for j in range(20):
                    train[run, j] = row[_read_drawing(archive, f"{folder}/training/class{j + 1:02d}.png").tobytes()]
                    test[run, j] = row[_read_drawing(archive, f"{folder}/test/item{j + 1:02d}.png").tobytes()]
                answers = archive.read(f"{folder}/class_labels.txt").decode()
            except KeyError as error:
                raise OSError(f"{path}: {folder} lacks a file, or an image of it is no Omniglot drawing") from error
            pairs = _ANSWER.findall(answers)
            if len(pairs) != 20:
                raise OSError(f"{path}: {folder}/class_labels.txt must name 20 answers; got {len(pairs)}")
            label[run, [int(item) - 1 for item, _ in pairs]] = [int(c) - 1 for _, c in pairs]
    return {"lake_train": train, "lake_test": test, "lake_label": label}
