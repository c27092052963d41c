"""Characters of five alphabets, rendered from fonts: image tasks that need no data."""

import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metaicl.checks import check_count, check_seed
from metaicl.task import SPLITS, Split, derive_generator
from metaicl.tasks.images import ImageClasses

ALPHABETS: dict[Split, tuple[str, ...]] = {
    "train": ("LATIN", "CYRILLIC"),
    "validation": ("ARMENIAN",),
    "test": ("GEORGIAN", "GREEK"),
}
"""The alphabets of each split, by the first word of their characters' Unicode names."""

FACES = (
    *("DejaVuSans", "DejaVuSansMono", "DejaVuSerif"),
    *("DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif-Bold"),
    *("DejaVuSans-Oblique", "DejaVuSansMono-Oblique", "DejaVuSerif-Italic"),
    *("DejaVuSans-BoldOblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif-BoldItalic"),
)
"""The twelve font faces; matplotlib brings their files. The first three are the upright ones of normal weight."""

_UPRIGHT = 3
_BOX = 40  # pixels of the longer side of a rendered character, before jitter
_ALIKE_BOX = 24  # pixels of the same where shapes are compared
_ALIKE_WITHIN = 0.96  # likeness above which two characters of one split are one class (C and c have 0.965)
_ALIKE_ACROSS = 0.94  # and of two splits; stricter, for a look-alike there is a leak
_MAX_TURN = 0.14  # radians, about 8 degrees
_MAX_SHEAR = 0.12
_MAX_SCALE = 0.12  # of the size, either way, along each axis
_MAX_SHIFT = 0.08  # of half the image


class Glyphs(ImageClasses):
    """N-way tasks over characters: grey images (1, size, size), bright on dark, in [0, 1].

    An embedded stand-in for Omniglot: nothing is downloaded. Meta-training has the Latin and Cyrillic letters,
    meta-validation the Armenian and meta-test the Georgian and Greek ones. Letters are scaled to one size, rendered
    in twelve faces and moved by a small random affine map, once, when the object is made. Of letters that look alike
    in an upright face only one is a class; a held-out letter that looks like one of another split (the Greek
    capital alpha), or whose unaccented form does, is left out. That leaves about 570, 50 and 90 classes.

    The images depend on the arguments and on the versions of the fonts (matplotlib) and the renderer (Pillow).

    Args:
        n_way: Classes per task.
        size: Pixels of a side.
        n_instances: Images of each character; each face comes once before one comes twice.
        seed: Of the random maps.

    Raises:
        TypeError: If an argument is no int.
        ValueError: If an argument is out of range.

    Reference:
        After Lake et al. 2015 (Omniglot); differs in that the instances are of fonts and not of writers.
    """

    def __init__(self, *, n_way: int = 5, size: int = 28, n_instances: int = 20, seed: int = 0) -> None:
        """Choose the characters and render them; within a process that is done once for the same arguments."""
        characters = _characters()
        images = _instances(
            check_count("size", size, minimum=8), check_count("n_instances", n_instances, minimum=2), check_seed(seed)
        )
        labels = torch.arange(len(characters)).repeat_interleave(n_instances)
        names = [character.text for character in characters]
        splits: dict[Split, list[int]] = {
            split: [i for i, character in enumerate(characters) if character.split == split] for split in SPLITS
        }
        super().__init__(images, labels, n_way=n_way, class_splits=splits, class_names=names)


class _Character(NamedTuple):
    text: str
    split: Split
    base: str  # the letter without its accents

    @property
    def rank(self) -> tuple[int, int, bool, str]:
        """Who stays if two look alike: meta-training first, so that held-out means never seen; plain letters first."""
        alphabet = unicodedata.name(self.text).split()[0]
        return SPLITS.index(self.split), ALPHABETS[self.split].index(alphabet), self.text != self.base, self.text


def _font_path(face: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


@lru_cache(maxsize=1)
def _characters() -> tuple[_Character, ...]:
    """The letters that every face has, without look-alikes, best rank first."""
    from matplotlib.ft2font import FT2Font

    codes = set.intersection(*(set(FT2Font(str(_font_path(face))).get_charmap()) for face in FACES))
    owners: dict[str, Split] = {alphabet: split for split, alphabets in ALPHABETS.items() for alphabet in alphabets}
    found = []
    for text in map(chr, codes):
        alphabet = unicodedata.name(text, "?").split()[0]
        if unicodedata.category(text) in ("Lu", "Ll", "Lt", "Lo") and alphabet in owners:
            found.append(_Character(text, owners[alphabet], unicodedata.normalize("NFD", text)[0]))
    return _without_look_alikes(sorted(found, key=lambda character: character.rank))


def _without_look_alikes(found: list[_Character]) -> tuple[_Character, ...]:
    """Keep a character if it is like none kept before it."""
    texts = sorted({text for character in found for text in (character.text, character.base)})
    row = {text: i for i, text in enumerate(texts)}
    likeness = _likeness(texts)
    kept: list[_Character] = []
    rows: dict[Split, list[int]] = {split: [] for split in SPLITS}
    for character in found:
        own, base = row[character.text], row[character.base]
        within = likeness[own, rows[character.split]]
        others = [i for split in SPLITS if split != character.split for i in rows[split]]
        across = likeness[[[own], [base]], others]
        if within.max(initial=0) < _ALIKE_WITHIN and across.max(initial=0) < _ALIKE_ACROSS:
            kept.append(character)
            rows[character.split].append(own)
    return tuple(kept)


def _likeness(texts: list[str]) -> np.ndarray:
    """How alike two characters are, (n, n) in [0, 1], in the upright face in which they are most alike.

    It is the share of the one's ink that lies on the other's ink, or one pixel beside it; the smaller of the two
    shares. A pixel of tolerance forgives the weight of strokes (C and c), but not an accent.
    """
    likeness = torch.zeros(len(texts), len(texts), dtype=torch.float64)  # in which sums of pixels are exact
    for face in FACES[:_UPRIGHT]:
        ink = torch.from_numpy(_rendered(face, texts, _ALIKE_BOX)).double()
        reach = F.max_pool2d(ink[:, None], 3, stride=1, padding=1).flatten(1)
        covered = ink.flatten(1) @ reach.T
        covered = covered / covered.diagonal()[:, None]
        likeness = torch.maximum(likeness, torch.minimum(covered, covered.T))
    return likeness.numpy()


def _rendered(face: str, texts: list[str], box: int) -> np.ndarray:
    """uint8 (n, box, box): each character scaled until its longer side fills the box, in its middle."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(_font_path(face)), box, layout_engine=ImageFont.Layout.BASIC)
    images = np.zeros((len(texts), box, box), dtype=np.uint8)
    for i, text in enumerate(texts):
        left, top, right, bottom = font.getbbox(text)
        canvas = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
        ImageDraw.Draw(canvas).text((1 - left, 1 - top), text, fill=255, font=font)
        ink = canvas.crop(canvas.getbbox())
        scale = box / max(ink.size)
        width, height = (max(1, round(side * scale)) for side in ink.size)
        x, y = (box - width) // 2, (box - height) // 2
        images[i, y : y + height, x : x + width] = np.asarray(ink.resize((width, height), Image.Resampling.BILINEAR))
    return images


@lru_cache(maxsize=2)
def _instances(size: int, n_instances: int, seed: int) -> Tensor:
    """uint8 (characters * n_instances, size, size), character by character."""
    texts = [character.text for character in _characters()]
    # by face, then by character; every face once before one comes twice
    faces = [FACES[i % len(FACES)] for i in range(n_instances)]
    rendered = {face: torch.from_numpy(_rendered(face, texts, _BOX)) for face in dict.fromkeys(faces)}
    generator = derive_generator(seed, "glyphs")
    images = torch.stack([_jittered(rendered[face], size, generator) for face in faces], 1)
    return images.flatten(0, 1)


def _jittered(glyphs: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """uint8 (n, size, size) of glyphs (n, box, box), each moved by its own random affine map."""

    def uniform(limit: float, *shape: int) -> Tensor:
        return (torch.rand(len(glyphs), *shape, generator=generator) * 2 - 1) * limit

    turn, shear, scale = uniform(_MAX_TURN), uniform(_MAX_SHEAR), uniform(_MAX_SCALE, 2).exp()
    cos, sin = turn.cos(), turn.sin()
    theta = torch.stack([torch.stack([cos, shear - sin], 1), torch.stack([sin, cos], 1)], 1) * scale[:, None] * 1.4
    theta = torch.cat([theta, uniform(_MAX_SHIFT, 2)[..., None]], 2)  # (n, 2, 3), from the image into the glyph's box
    fine = 2 * size  # twice as fine, then averaged: the box is larger than the image
    grid = F.affine_grid(theta, [len(glyphs), 1, fine, fine], align_corners=False)
    moved = F.grid_sample(glyphs[:, None].float(), grid, padding_mode="zeros", align_corners=False)
    return F.avg_pool2d(moved, 2)[:, 0].round().clamp(0, 255).to(torch.uint8)
