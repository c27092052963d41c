"""Image tasks from arrays and folders: layouts, values, rotations, and what is said of bad files."""

import numpy as np
import pytest
import torch
from PIL import Image

from metaicl.checks import check_episode
from metaicl.task import EpisodeStream, derive_generator
from metaicl.tasks.images import ImageClasses

SPLIT = {"train": [7, 42], "validation": [99, 3], "test": [5, 6]}
LABELS = np.repeat([7, 42, 99, 3, 5, 6], 5)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def sample(tasks, split="train", n_tasks=3, n_shot=1, n_query=2):
    return tasks.sample(n_tasks, split=split, n_shot=n_shot, n_query=n_query, generator=derive_generator(0))


def write_images(folder, names, size=(9, 6)):
    folder.mkdir(parents=True)
    for name in names:
        Image.fromarray(pixels(*size, seed=len(name))).save(folder / name)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_grey_images_become_float_and_ids_name_their_rows(split):
    images = pixels(30, 6, 8)
    tasks = ImageClasses(images, LABELS, n_way=2, class_splits=SPLIT)
    episode = sample(tasks, split)
    check_episode(episode, tasks.spec)
    assert tasks.spec.x_shape == (1, 6, 8)
    for part in (episode.support, episode.query):
        assert part.x.dtype == torch.float32
        torch.testing.assert_close(part.x[:, :, 0], torch.from_numpy(images)[part.ids] / 255)
        assert {LABELS[i] for i in part.ids.flatten().tolist()} <= set(SPLIT[split])
    names = [[tasks.class_names[c] for c in row] for row in episode.latents["class_ids"].tolist()]
    assert names[0][episode.query.y[0, 0]] == LABELS[episode.query.ids[0, 0]]


def test_black_and_white_are_exactly_zero_and_one():
    images = np.stack([np.full((4, 4), value, np.uint8) for value in (0, 255) * 15])
    x = sample(ImageClasses(images, LABELS, n_way=2, class_splits=SPLIT), n_tasks=20).query.x
    assert x.unique().tolist() == [0.0, 1.0]


def test_channels_last_and_first_are_the_same_pictures():
    last = pixels(30, 6, 8, 3)
    one = ImageClasses(last, LABELS, n_way=2, class_splits=SPLIT)
    two = ImageClasses(torch.from_numpy(last).permute(0, 3, 1, 2), LABELS, n_way=2, class_splits=SPLIT)
    said = ImageClasses(last, LABELS, n_way=2, class_splits=SPLIT, channels="last")
    assert one.spec.x_shape == (3, 6, 8)
    assert sample(one).fingerprint() == sample(two).fingerprint() == sample(said).fingerprint()


def test_uint8_bool_and_float_images_give_the_same_values():
    images = (pixels(30, 4, 4) > 127).astype(np.uint8)
    kinds = (images * 255, images.astype(bool), images.astype(np.float64), torch.from_numpy(images).half())
    prints = {sample(ImageClasses(kind, LABELS, n_way=2, class_splits=SPLIT)).fingerprint() for kind in kinds}
    assert len(prints) == 1


def test_images_with_a_gradient_are_taken_in_silence():
    images = torch.rand(30, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rows = ImageClasses(images, LABELS, n_way=2, class_splits=SPLIT).rows(torch.arange(30))  # warnings are errors
    assert not rows.requires_grad
    assert torch.equal(rows[:, 0], images.detach())


def test_read_only_and_reversed_arrays_work():
    images = pixels(30, 4, 4)
    images.flags.writeable = False
    plain = sample(ImageClasses(images, LABELS, n_way=2, class_splits=SPLIT))
    turned = sample(ImageClasses(images[:, ::-1], LABELS, n_way=2, class_splits=SPLIT))
    assert torch.equal(plain.query.x.flip(-2), turned.query.x)


def test_rotations_are_classes_and_rows_of_their_own():
    images = pixels(30, 4, 4)
    tasks = ImageClasses(images, LABELS, n_way=2, class_splits=SPLIT, rotations=True)
    assert tasks.source_classes.shape == (120,)
    assert len(tasks.class_names) == 24
    assert [len(ids) for ids in tasks.class_splits.values()] == [8, 8, 8]
    rows = tasks.rows(torch.arange(120).view(4, 30))
    for turn in range(4):
        expected = np.rot90(images, turn, axes=(1, 2)).copy()
        torch.testing.assert_close(rows[turn, :, 0], torch.from_numpy(expected) / 255)
        assert torch.equal(tasks.source_classes[turn * 30 :][:30], tasks.source_classes[:30] + 6 * turn)
    for split, ids in tasks.class_splits.items():
        assert {tasks.class_names[c % 6] for c in ids.tolist()} == set(SPLIT[split])
    episode = sample(tasks, n_tasks=50)
    classes = episode.latents["class_ids"].gather(1, episode.query.y)
    assert torch.equal(tasks.source_classes[episode.query.ids], classes)


def test_streams_do_not_depend_on_batches():
    tasks = ImageClasses(pixels(30, 4, 4), LABELS, n_way=2, class_splits=SPLIT)
    stream = EpisodeStream(tasks, seed=1, split="train", n_shot=(1, 2), n_query=2)
    one = [task.fingerprint() for task in stream.batches(0, 30, batch_size=1)]
    again = [task.fingerprint() for task in stream.batches(10, 30, batch_size=1)]
    assert one[10:] == again
    assert len(set(one)) == 30


def test_string_labels_and_a_random_split():
    labels = [f"name {c}" for c in range(10) for _ in range(3)]
    one, two = (ImageClasses(pixels(30, 4, 4), labels, n_way=2, seed=seed) for seed in (0, 1))
    assert one.class_names[0] == "name 0"
    assert [len(ids) for ids in one.class_splits.values()] == [6, 2, 2]
    assert one.class_splits["test"].tolist() != two.class_splits["test"].tolist()


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        ([[0]], {}, TypeError, "images must be an array or a tensor; got list"),
        (pixels(30, 4, 4).astype(np.int64), {}, TypeError, r"got torch.int64.*\.to\(torch.uint8\)"),
        (pixels(30, 4, 4).astype(object), {}, TypeError, "got object"),
        (pixels(30, 4, 4).astype(np.float32), {}, ValueError, r"must lie in \[0, 1\].*Divide by 255"),
        (np.full((30, 4, 4), np.nan), {}, ValueError, r"must lie in \[0, 1\]; got values in \[nan"),
        (
            np.ma.masked_equal(np.eye(30, 16, dtype=np.uint8).reshape(30, 4, 4), 1),
            {},
            ValueError,
            "16 values are masked",
        ),
        (np.zeros((0, 4, 4), np.uint8), {}, ValueError, "at least one pixel"),
        (pixels(30, 16), {}, ValueError, "images must be"),
        (pixels(29, 4, 4), {}, ValueError, "labels must be one per image, 29; got 30"),
        (pixels(30, 4, 8, 8), {"channels": "middle"}, ValueError, "channels must be one of"),
        (pixels(30, 5, 8, 7), {}, ValueError, "channels must be 'first' or 'last'"),
        (pixels(30, 3, 8, 3), {}, ValueError, "channels must be 'first' or 'last'"),
        (pixels(30, 4, 4), {"channels": "last"}, ValueError, "four dimensions"),
        (pixels(30, 4, 5), {"rotations": True}, ValueError, r"square images; got height and width \(4, 5\)"),
        (pixels(30, 4, 4), {"n_way": 1}, ValueError, "n_way must be an int >= 2; got 1"),
        (pixels(30, 4, 4), {"n_way": 2.0}, TypeError, "n_way must be an int"),
        (pixels(30, 4, 4), {"class_names": ["a"]}, ValueError, "one per distinct label, 6; got 1"),
        (pixels(30, 4, 4), {"class_splits": {**SPLIT, "test": [1000]}}, ValueError, "1000"),
        (pixels(30, 4, 4), {"class_splits": {**SPLIT, "test": [5, 7]}}, ValueError, "must not share"),
    ],
)
def test_bad_arrays(images, options, error, message):
    with pytest.raises(error, match=message):
        ImageClasses(images, LABELS, **{"n_way": 2, "class_splits": SPLIT, **options})


def test_a_folder_of_class_folders(tmp_path):
    for name in "abcdef":
        write_images(tmp_path / name, ["1.png", "22.png", "333.bmp"])
    (tmp_path / "a" / ".DS_Store").write_bytes(b"junk")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "README.txt").write_text("top-level files are no classes")
    splits = {"train": ["a", "b"], "validation": ["c", "d"], "test": ["e", "f"]}
    tasks = ImageClasses.from_folder(tmp_path, n_way=2, size=12, class_splits=splits)
    assert tasks.spec.x_shape == (1, 12, 12)
    assert tasks.class_names == list("abcdef")
    assert tasks.source_classes.tolist() == [c for c in range(6) for _ in range(3)]
    colored = ImageClasses.from_folder(tmp_path, n_way=2, size=12, grayscale=False, class_splits=splits)
    assert colored.spec.x_shape == (3, 12, 12)
    torch.testing.assert_close(colored.rows(torch.arange(18))[:, :1], tasks.rows(torch.arange(18)))


def test_a_folder_that_is_split(tmp_path):
    for split, name in (("train", "a"), ("train", "b"), ("val", "c"), ("val", "d"), ("test", "e"), ("test", "f")):
        write_images(tmp_path / split / name, ["1.png", "22.png", "333.png"])
    tasks = ImageClasses.from_folder(tmp_path, n_way=2)
    owned = {split: [tasks.class_names[c] for c in ids.tolist()] for split, ids in tasks.class_splits.items()}
    assert owned == {"train": ["a", "b"], "validation": ["c", "d"], "test": ["e", "f"]}
    check_episode(sample(tasks), tasks.spec)
    with pytest.raises(ValueError, match="class_splits must be None"):
        ImageClasses.from_folder(tmp_path, n_way=2, class_splits=owned)
    write_images(tmp_path / "test" / "a", ["1.png", "22.png", "333.png"])
    with pytest.raises(ValueError, match=r"splits must not share a class.*'a'"):
        ImageClasses.from_folder(tmp_path, n_way=2)


def test_a_split_folder_needs_all_three(tmp_path):
    write_images(tmp_path / "train" / "a", ["1.png"])
    write_images(tmp_path / "test" / "b", ["1.png"])
    with pytest.raises(ValueError, match=r"once each; got \['test', 'train'\]"):
        ImageClasses.from_folder(tmp_path, n_way=2)


def test_split_folders_of_other_names_are_told(tmp_path):
    for split in ("train", "valid", "test"):
        for name in "ab":
            write_images(tmp_path / split / f"{split} {name}", ["1.png"])
    with pytest.raises(ValueError, match=r"holds folders only. The folders above the classes are called train, valid"):
        ImageClasses.from_folder(tmp_path, n_way=2)


def test_images_of_another_byte_order_are_read():
    images = np.random.default_rng(0).random((12, 3, 3), dtype=np.float32)
    both = (images, images.astype(">f4"))
    tasks = [ImageClasses(x, np.repeat([7, 42, 99, 3, 5, 6], 2), n_way=2, class_splits=SPLIT) for x in both]
    assert torch.equal(*(one.rows(torch.arange(12)) for one in tasks))


def test_damaged_files_are_counted_and_named(tmp_path):
    for name in "abcd":
        write_images(tmp_path / name, ["1.png", "22.png"])
    (tmp_path / "a" / "notes.txt").write_text("no image")
    whole = (tmp_path / "b" / "1.png").read_bytes()
    (tmp_path / "b" / "1.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "c" / "deep.png")
    with pytest.raises(OSError, match=r"3 of 10 files are no readable images") as caught:
        ImageClasses.from_folder(tmp_path, n_way=2)
    for path in ("a/notes.txt", "b/1.png", "c/deep.png"):
        assert str(tmp_path / path) in str(caught.value)


def test_folders_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent must be a folder"):
        ImageClasses.from_folder(tmp_path / "absent", n_way=2)
    with pytest.raises(FileNotFoundError, match="it has none"):
        ImageClasses.from_folder(tmp_path, n_way=2)
    write_images(tmp_path / "a", ["1.png"])
    with pytest.raises(ValueError, match="at least two class folders; got only 'a'"):
        ImageClasses.from_folder(tmp_path, n_way=2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".hidden.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"1 have none: \['.*b'\]"):
        ImageClasses.from_folder(tmp_path, n_way=2)


@pytest.mark.parametrize("grayscale", [True, False])
def test_folders_may_mix_modes_and_sizes_and_transparency_is_white(tmp_path, grayscale):
    ink = Image.fromarray(np.tile(np.array([[[0, 0, 0, 0], [0, 0, 0, 255]]], np.uint8), (4, 1, 1)), "RGBA")
    for name in "abcdef":
        (tmp_path / name).mkdir()
        for i, mode in enumerate(("RGBA", "P", "LA", "L", "RGB", "1", "CMYK")):
            image = Image.alpha_composite(Image.new("RGBA", ink.size, "white"), ink) if i > 2 else ink
            image.convert(mode).resize((2 + 2 * i, 4)).save(tmp_path / name / f"{i}.{'tiff' if i == 6 else 'png'}")
    with pytest.raises(ValueError, match="asked for 2 ways; split 'validation' has 1 classes"):
        ImageClasses.from_folder(tmp_path, n_way=2, size=2)
    share = {"train": 0.34, "validation": 0.33, "test": 0.33}
    tasks = ImageClasses.from_folder(tmp_path, n_way=2, size=2, grayscale=grayscale, fractions=share)
    assert {split: len(classes) for split, classes in tasks.class_splits.items()} == dict.fromkeys(share, 2)
    rows = tasks.rows(torch.arange(42)).unflatten(0, (6, 7))
    assert bool((rows[..., 0] > 0.8).all())
    assert bool((rows[..., 1] < 0.2).all())
