"""Your own data in one call: what is accepted, what is fitted, and the early errors."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metaicl.checks import check_episode
from metaicl.task import SPLITS
from metaicl.tasks.arrays import tasks_from_arrays, tasks_from_csv, tasks_from_dataframe
from metaicl.tasks.labels import index_labels
from metaicl.tasks.rows import ArrayClasses, GroupRegression
from metaicl.tasks.text import TextClasses

LABELS = np.repeat([7, 42, 99, 100, 5, -3], 10)
X = np.random.default_rng(0).normal(size=(60, 3)) * [1, 10, 100] + LABELS[:, None]
CLASS_SPLIT = {"train": [7, 42], "validation": [99, 100], "test": [5, -3]}
GROUPS = np.array([f"shop {i % 6}" for i in range(60)])
GROUP_SPLIT = {"train": ["shop 0", "shop 1"], "validation": ["shop 2"], "test": ["shop 3", "shop 4", "shop 5"]}


IMAGES = np.arange(120, dtype=np.uint8).reshape(60, 1, 1, 2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classes(x: Any = X, y: Any = LABELS, **options: Any) -> ArrayClasses:
    tasks = tasks_from_arrays(x, y, **{"n_way": 2, "class_splits": CLASS_SPLIT, **options})
    assert isinstance(tasks, ArrayClasses)
    return tasks


def regression(x: Any = X, y: Any = X[:, 0], **options: Any) -> GroupRegression:
    tasks = tasks_from_arrays(x, y, **{"groups": GROUPS, "group_splits": GROUP_SPLIT, **options})
    assert isinstance(tasks, GroupRegression)
    return tasks


def test_classification_keeps_your_labels_and_row_numbers() -> None:
    tasks = classes(standardize=False)
    assert tasks.class_names == [-3, 5, 7, 42, 99, 100]
    for split in SPLITS:
        episode = tasks.sample(9, split=split, n_shot=2, n_query=3, generator=generator())
        check_episode(episode, tasks.spec)
        assert episode.query.ids is not None
        np.testing.assert_allclose(episode.query.x, X[episode.query.ids], rtol=1e-6)
        class_ids = episode.latents["class_ids"].gather(1, episode.query.y)
        assert [[tasks.class_names[c] for c in row] for row in class_ids.tolist()] == LABELS[episode.query.ids].tolist()
        assert {tasks.class_names[c] for c in class_ids.flatten().tolist()} <= set(CLASS_SPLIT[split])


def test_regression_draws_rows_of_one_group() -> None:
    tasks = regression(y=np.stack([X[:, 0], X[:, 1] * 5], 1))
    assert tasks.spec.y_dim == 2
    for split in SPLITS:
        episode = tasks.sample(9, split=split, n_shot=4, n_query=6, generator=generator())
        check_episode(episode, tasks.spec)
        ids = torch.cat([episode.support.ids, episode.query.ids], 1)  # type: ignore[list-item]
        assert all(sorted(row) == list(range(row[0] % 6, 60, 6)) for row in ids.tolist())
        names = [tasks.group_names[g] for g in episode.latents["group_ids"].tolist()]
        assert names == GROUPS[ids[:, 0]].tolist()
        assert set(names) <= set(GROUP_SPLIT[split])
        np.testing.assert_allclose(tasks.to_units(episode.query.y)[..., 1], X[episode.query.ids, 1] * 5, rtol=1e-4)


@settings(max_examples=10, deadline=None)
@given(shift=st.floats(-1e6, 1e6), scale=st.floats(0.5, 1e3))
def test_nothing_is_fitted_outside_meta_train(shift: float, scale: float) -> None:
    elsewhere = ~np.isin(LABELS, CLASS_SPLIT["train"])
    moved = np.where(elsewhere[:, None], X * scale + shift, X)
    first, second = (
        classes(x).sample(4, split="train", n_shot=3, n_query=3, generator=generator()) for x in (X, moved)
    )
    assert first.fingerprint() == second.fingerprint()
    outside = ~np.isin(GROUPS, GROUP_SPLIT["train"])
    moved = np.where(outside[:, None], X * scale + shift, X)
    pair = [
        regression(x, x[:, 0]).sample(4, split="train", n_shot=3, n_query=3, generator=generator()) for x in (X, moved)
    ]
    assert pair[0].fingerprint() == pair[1].fingerprint()


def test_standardized_columns_have_unit_scale_over_meta_train() -> None:
    rows = classes()._x[torch.from_numpy(np.isin(LABELS, CLASS_SPLIT["train"]))]
    torch.testing.assert_close(rows.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.std(0, correction=0), torch.ones(3), atol=1e-5, rtol=0)
    constant = classes(np.column_stack([X, np.full(60, 0.3)]))._x[:, 3]
    assert constant.abs().max() < 1e-6


def test_small_variation_on_a_large_offset_is_variation() -> None:
    times = 1.7e12 + np.arange(60) // 6 % 2  # milliseconds
    tasks = regression(np.column_stack([times, X[:, 0]]), times)
    expected = torch.tensor(2.0 * (np.arange(60) // 6 % 2) - 1).float()
    assert torch.equal(tasks._y[:, 0], expected)
    assert torch.equal(tasks._x[:, 0], expected)
    assert torch.equal(tasks.to_units(tasks._y.double())[:, 0], torch.from_numpy(times))


def test_splits_of_another_scale_are_named() -> None:
    train = np.isin(LABELS, CLASS_SPLIT["train"])
    x = np.where(train[:, None], X * 1e-37, X * 10)  # some 1e38 standard deviations
    with pytest.raises(ValueError, match=r"column 0 of x must fit into float32 .* over the meta-train rows is .*e-3\d"):
        classes(x)
    assert torch.isfinite(classes(x, standardize=False)._x).all()
    frame = make_frame().assign(b=x[:, 1])
    with pytest.raises(
        ValueError, match=r"column 'b' of x must .*, and row 20 is .*\. Take its logarithm, leave it out"
    ):
        tasks_from_dataframe(frame, target="label", features=["a", "b"], n_way=2, class_splits=CLASS_SPLIT)
    y = np.where(np.isin(GROUPS, GROUP_SPLIT["train"]), X[:, 0] * 1e-37, X[:, 0] * 100)
    with pytest.raises(ValueError, match="column 1 of y must fit into float32"):
        regression(y=np.column_stack([X[:, 0], y]))


@pytest.mark.parametrize(
    "x",
    [
        X.tolist(),
        torch.tensor(X),
        X.astype(">f8"),
        np.asfortranarray(X),
        pd.DataFrame(X),
        {"a": X[:, 0], "b": X[:, 1], "c": X[:, 2]},
    ],
    ids=["list", "tensor", "big-endian", "fortran", "frame", "mapping"],
)
@pytest.mark.parametrize("y", [LABELS.tolist(), torch.tensor(LABELS, dtype=torch.int32), pd.Series(LABELS)])
def test_every_container_gives_the_same_tasks(x: Any, y: Any) -> None:
    expected = classes().sample(3, split="test", n_shot=1, n_query=1, generator=generator())
    assert (
        classes(x, y).sample(3, split="test", n_shot=1, n_query=1, generator=generator()).fingerprint()
        == expected.fingerprint()
    )


def test_string_and_boolean_labels() -> None:
    names = {7: "seven", 42: "much", 99: "a", 100: "b", 5: "c", -3: "d"}
    splits = {split: [names[label] for label in labels] for split, labels in CLASS_SPLIT.items()}
    tasks = classes(y=[names[label] for label in LABELS], class_splits=splits)
    assert tasks.class_names == sorted(names.values())
    with pytest.raises(ValueError, match=r"need a class each; got 2 in all: \[False, True\]"):
        tasks_from_arrays(X, LABELS > 7, n_way=2)


def test_integer_images_are_scaled_and_others_left_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(60, 1, 4, 5), dtype=np.uint8)
    tasks = classes(pixels)
    assert (tasks.spec.x_kind, tasks.spec.x_shape) == ("image", (1, 4, 5))
    rows = tasks.rows(torch.arange(60))
    torch.testing.assert_close(rows, torch.tensor(pixels) / 255)
    assert torch.equal(classes(pixels / 255).rows(torch.arange(60)), rows)


def test_integer_images_take_a_byte_a_pixel() -> None:
    pixels = np.zeros((60, 1, 100, 100), dtype=np.uint8)
    tracemalloc.start()
    kept = classes(pixels)._x
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept.dtype == torch.uint8
    assert peak < 2 * pixels.nbytes
    pixels += 1
    assert not kept.any()  # a copy


def test_black_and_white_images_are_zero_and_one() -> None:
    pixels = np.random.default_rng(0).random((60, 1, 4, 5)) < 0.5
    assert torch.equal(classes(pixels)._x, torch.tensor(pixels).float())


def test_an_unused_mask_changes_nothing() -> None:
    tasks = classes(np.ma.masked_equal(X, -9999.0), np.ma.masked_equal(LABELS, -9999))
    assert torch.equal(tasks._x, classes()._x)
    assert torch.equal(tasks.source_classes, classes().source_classes)


def test_a_mask_in_a_mapping_is_a_missing_value() -> None:
    columns = {"a": X[:, 0], "b": np.ma.masked_array(np.arange(60), np.arange(60) < 2)}
    with pytest.raises(ValueError, match=r"x must be finite; 2 values are missing, by column {'b': 2}"):
        classes(columns)


def test_min_rows_leaves_small_classes_and_groups_out() -> None:
    few = np.array([*LABELS[:-9], *[8] * 9])
    assert classes(y=few, class_splits={**CLASS_SPLIT, "test": [5, 8, -3]}, min_rows=2).class_splits[
        "test"
    ].tolist() == [1, 3]
    small = np.array(["tiny", *GROUPS[1:]])
    tasks = regression(groups=small, group_splits=None, min_rows=5)
    assert "tiny" not in [tasks.group_names[g] for split in SPLITS for g in tasks.group_splits[split].tolist()]
    with pytest.raises(ValueError, match="no group of split 'train' has min_rows = 50 rows"):
        regression(min_rows=50)
    with pytest.raises(ValueError, match=r"group 'shop 2' of split 'validation' has 10. min_rows=11 leaves"):
        regression().sample(1, split="validation", n_shot=5, n_query=6, generator=generator())


def nan_at(row: int, column: int) -> np.ndarray:
    x = X.copy()
    x[row, column] = np.nan
    return x


@pytest.mark.parametrize("size", [1e40, 1e300])
def test_numbers_beyond_float32_are_standardized(size: float) -> None:
    torch.testing.assert_close(classes(X * size)._x, classes(X)._x)
    ours, theirs = regression(X * size, X[:, 0] * size), regression(X, X[:, 0])
    torch.testing.assert_close(ours._x, theirs._x)
    torch.testing.assert_close(ours._y, theirs._y)
    torch.testing.assert_close(
        ours.to_units(ours._y.double())[:, 0] / size, torch.from_numpy(X[:, 0]), rtol=0, atol=1e-5
    )
    chosen = {"target": "label", "features": ["a", "b"], "n_way": 2, "class_splits": CLASS_SPLIT}
    frame = make_frame()
    large = tasks_from_dataframe(frame.assign(b=frame["b"] * size), **chosen)
    torch.testing.assert_close(large._x, tasks_from_dataframe(frame, **chosen)._x)
    with pytest.raises(ValueError, match=r"column 0 of y must fit into float32; row 0 is .*e\+"):
        regression(X, X[:, 0] * size, standardize=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[:-1]}, ValueError, r"y must have one entry per row of x \(59\); got 60"),
        ({"x": X.astype(object)}, TypeError, "x must be an array of numbers; got object"),
        ({"x": [[1.0, 2.0], [3.0]]}, ValueError, "x must be rectangular; row 1 has length 1, row 0 2"),
        ({"x": [[[1], [1, 2]], [[1], [1, 2]]]}, ValueError, "its rows differ inside"),
        (
            {"x": nan_at(4, 1)},
            ValueError,
            r"x must be finite; 1 values are NaN or infinite, the first at index \(4, 1\)",
        ),
        (
            {"x": X * 1e300, "standardize": False},
            ValueError,
            r"column 0 of x must fit into float32; row 0 is .*e\+300\. Divide it by a number, or leave out standardize",
        ),
        ({"x": np.ma.masked_greater(X, 99)}, ValueError, r"x must not be missing; \d+ values are masked, the first at"),
        ({"x": [np.ma.masked_array(row, row == X[4, 1]) for row in X]}, ValueError, r"1 values are .* index \(4, 1\)"),
        ({"x": IMAGES.astype(np.uint16)}, TypeError, r"where it holds images; got uint16. .*\.astype\(np.uint8\)"),
        ({"x": IMAGES.astype(np.int64).tolist()}, TypeError, "must be uint8 or floating point .* got int64"),
        ({"x": IMAGES * 16.0}, ValueError, r"must lie in \[0, 1\] .* in \[0, 1904\]. Divide by 255, or pass uint8"),
        ({"x": IMAGES / 119 - 0.5}, ValueError, r"must lie in \[0, 1\] .* in \[-0.5, 0.5\]"),
        ({"x": np.where(IMAGES == 3, np.nan, 0)}, ValueError, r"1 values are NaN .* index \(1, 0, 0, 1\)"),
        ({"y": np.ma.masked_equal(LABELS, 42)}, ValueError, r"y must not be missing; 10 values are masked, .* \(10,\)"),
        ({"y": [np.ma.masked, *LABELS[1:]]}, ValueError, r"y must not be missing; 1 values are masked, .* \(0,\)"),
        ({"x": X[:, 0]}, ValueError, r"x must be \(rows, D\) or"),
        ({"x": X[:0]}, ValueError, "none of them 0"),
        ({"x": X[:, :0]}, ValueError, "none of them 0"),
        ({"x": X + 1j}, TypeError, "got complex128"),
        ({"x": torch.eye(60).to_sparse()}, TypeError, "x must be a dense"),
        ({"x": np.zeros((60, 8, 8))}, ValueError, r"gray images become that by x\[:, None\]"),
        ({"x": np.zeros((60, 8, 8, 3))}, ValueError, r"channels look last. np.moveaxis\(x, 3, 1\)"),
        ({"y": LABELS.astype(float)}, TypeError, r"y.astype\(int\); for regression give groups"),
        ({"y": LABELS.astype(float).tolist()}, TypeError, r"y must be integers or strings; got float64"),
        ({"y": np.eye(60)[:, :6].astype(int)}, ValueError, r"one-hot rows become indices by .argmax\(-1\)"),
        ({"y": [None, *LABELS[1:].tolist()]}, ValueError, "y must not be missing; row 0 is None"),
        ({"y": [float("nan"), *map(str, LABELS[1:])]}, ValueError, "y must not be missing; row 0 is nan"),
        (
            {"y": np.array([None, *map(str, LABELS[1:])], dtype=np.dtypes.StringDType(na_object=None))},
            ValueError,
            "y must not be missing; row 0 is None",
        ),
        ({"y": np.array(["NaT", *["2020-01-01"] * 59], "M8[ns]")}, TypeError, r"got datetime64\[ns\]. Dates as text"),
        ({"y": [2**70, *LABELS[1:].tolist()]}, ValueError, "y must fit into 64 bits where they are integers"),
        ({"y": LABELS[:, None]}, ValueError, r"got shape \(60, 1\); one column becomes that by .reshape\(-1\)"),
        ({"n_way": 3}, ValueError, "asked for 3 ways; split 'train' has 2 classes"),
        ({"n_way": 2.0}, TypeError, "n_way must be an int >= 2"),
        ({"class_splits": {**CLASS_SPLIT, "test": [7, 42, 5]}}, ValueError, r"2 are in two, for instance \[7, 42\]"),
        ({"class_splits": {split: [7] for split in CLASS_SPLIT}}, ValueError, r"1 are in two, for instance \[7\]"),
        ({"class_splits": {**CLASS_SPLIT, "test": []}}, ValueError, "split 'test' must own at least one class"),
        ({"class_splits": None, "fractions": {"train": 0.5, "validation": 0.1, "test": 0.1}}, ValueError, "sum to 1"),
        ({"class_splits": None, "seed": -1}, ValueError, "seed must be"),
        ({"groups": GROUPS, "kind": "classification"}, ValueError, r"\['groups'\] go with regression"),
        ({"kind": "ranking"}, ValueError, "kind must be one of"),
    ],
)
def test_bad_classification_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        classes(**change)


def test_labels_of_a_type_that_numpy_lacks_are_named() -> None:
    with pytest.raises(TypeError, match=r"labels must be integers or strings; got torch.bfloat16. .*labels.long\(\)"):
        index_labels(torch.tensor(LABELS).bfloat16())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"groups": GROUPS[:-1]}, ValueError, r"groups must have one entry per row of x \(60\); got 59"),
        ({"y": X[:-1, 0]}, ValueError, r"y must have one entry per row of x \(60\); got 59"),
        ({"y": np.where(X[:, 0] == X[3, 0], np.inf, X[:, 0])}, ValueError, r"y must be finite; 1 .* index \(3,\)"),
        ({"y": np.ma.masked_greater(X[:, 0], 99)}, ValueError, r"y must not be missing; \d+ values are masked"),
        (
            {"groups": np.ma.masked_equal(GROUPS, "shop 5")},
            ValueError,
            "groups must not be missing; 10 values are masked",
        ),
        ({"y": X[:, :, None]}, ValueError, r"y must be \(rows,\) or \(rows, y_dim\)"),
        ({"groups": None, "kind": "regression"}, ValueError, "regression needs groups"),
        ({"class_splits": CLASS_SPLIT}, ValueError, r"\['class_splits'\] go with classification"),
        ({"group_splits": {**GROUP_SPLIT, "test": ["shop 0"]}}, ValueError, r"share a group; 1 .* \['shop 0'\]"),
        ({"groups": ["one"] * 60, "group_splits": None}, ValueError, "need a group each; got 1 in all"),
        ({"x": np.zeros((60, 1, 2, 2))}, ValueError, r"x must be \(rows, D\) for regression"),
    ],
)
def test_bad_regression_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        regression(**change)


def make_frame() -> pd.DataFrame:
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    frame["color"] = pd.Categorical(np.where(LABELS == 5, "aqua", np.where(np.arange(60) % 2, "red", "blue")))
    frame["count"] = pd.array(range(60), dtype="Int64")
    frame["flag"] = np.arange(60) % 3 == 0
    return frame.assign(
        label=LABELS, shop=GROUPS, price=X[:, 0] * 2, note=[f"note {i} of {GROUPS[i]}" for i in range(60)]
    )


def test_a_data_frame_becomes_classes(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "target": "label",
        "features": ["a", "color", "count", "flag"],
        "n_way": 2,
        "class_splits": CLASS_SPLIT,
        "standardize": False,
    }
    tasks = tasks_from_dataframe(make_frame(), **options)
    assert isinstance(tasks, ArrayClasses)
    assert tasks.spec.x_shape == (4,)
    assert set(tasks._x[LABELS == 5, 1].tolist()) == {-1}  # aqua is not met in meta-training
    assert set(tasks._x[LABELS != 5, 1].tolist()) == {0, 1}
    assert tasks._x[:4, 2].tolist() == [0, 1, 2, 3]
    make_frame().to_csv(tmp_path / "frame.csv", index=False)
    options["features"] = ["a", "color", "count"]
    pair = [tasks_from_dataframe(make_frame(), **options), tasks_from_csv(tmp_path / "frame.csv", **options)]
    first, second = (tasks.sample(3, split="test", n_shot=2, n_query=2, generator=generator()) for tasks in pair)
    assert first.fingerprint() == second.fingerprint()


def test_a_data_frame_becomes_regression(tmp_path: Path) -> None:
    make_frame().to_csv(tmp_path / "frame.csv", index=False)
    options: dict[str, Any] = {
        "target": ["price", "c"],
        "groups": "shop",
        "features": ["a", "b"],
        "group_splits": GROUP_SPLIT,
    }
    for tasks in (tasks_from_dataframe(make_frame(), **options), tasks_from_csv(tmp_path / "frame.csv", **options)):
        assert isinstance(tasks, GroupRegression)
        assert (tasks.spec.x_shape, tasks.spec.y_dim) == ((2,), 2)
        check_episode(tasks.sample(3, split="test", n_shot=5, n_query=5, generator=generator()), tasks.spec)


def test_a_text_column_becomes_text_episodes(tmp_path: Path) -> None:
    make_frame().to_csv(tmp_path / "frame.csv", index=False)
    options: dict[str, Any] = {
        "target": "label",
        "text": "note",
        "n_way": 2,
        "class_splits": CLASS_SPLIT,
        "max_tokens": 6,
    }
    frame = make_frame().assign(when=pd.Timestamp("2024-01-01"))
    for tasks in (tasks_from_dataframe(frame, **options), tasks_from_csv(tmp_path / "frame.csv", **options)):
        assert isinstance(tasks, TextClasses)
        assert tasks.texts == make_frame()["note"].tolist()
        assert tasks.class_names == [-3, 5, 7, 42, 99, 100]


@pytest.mark.parametrize("start", [9 * 10**17, 2**63])
def test_long_ids_stay_apart(start: int, tmp_path: Path) -> None:
    ids = [start + 37 * (i // 10) for i in range(200)]
    frame = pd.DataFrame({"a": np.arange(200.0), "y": np.arange(200) % 7, "id": ids})
    frame.to_csv(tmp_path / "frame.csv", index=False)
    as_objects = frame.assign(id=frame["id"].astype(object))
    nullable = frame.assign(id=frame["id"].astype("UInt64"))
    for kind in (frame, as_objects, nullable, tmp_path / "frame.csv"):
        make: Any = tasks_from_csv if isinstance(kind, Path) else tasks_from_dataframe
        names = make(kind, target="id", features=["a"], n_way=2).class_names
        assert [int(name) for name in names] == sorted(set(ids))
        assert make(kind, target="y", features=["a"], groups="id").group_names == names
    rounded = frame.assign(id=frame["id"].astype(float))
    with pytest.raises(ValueError, match=r"beyond 2\*\*53 must be integers or text, as floating point numbers merge"):
        tasks_from_dataframe(rounded, target="id", n_way=2)


def test_columns_of_objects_may_hold_truth_values_of_numpy() -> None:
    high = np.arange(200) % 3 > 0
    frame = pd.DataFrame({"plain": high, "objects": pd.Series(list(high), dtype=object), "id": np.arange(200) // 10})
    assert isinstance(frame["objects"].iloc[0], np.bool_)
    tasks = tasks_from_dataframe(frame, target="id", n_way=2)
    rows = tasks.rows(torch.arange(200))
    assert torch.equal(rows[:, 0], rows[:, 1])
    assert rows[:, 0].unique().numel() == 2


def test_texts_of_a_csv_are_read_as_they_are(tmp_path: Path) -> None:
    path, texts = tmp_path / "x.csv", ["none", "12", "null", "na", *(f"word{i}" for i in range(4, 90))]
    path.write_text("t,y\n" + "\n".join(f"{text},{i % 15:02d}" for i, text in enumerate(texts)))
    tasks = tasks_from_csv(path, target="y", text="t", n_way=2, max_tokens=2)
    assert isinstance(tasks, TextClasses)
    assert tasks.texts == texts
    assert tasks.class_names == [f"{i:02d}" for i in range(15)]


def test_bad_frames_are_named() -> None:
    frame = make_frame()
    with pytest.raises(ValueError, match=r"no column 'lable'; it has"):
        tasks_from_dataframe(frame, target="lable")
    with pytest.raises(TypeError, match="column 'when' must be numbers or text; got datetime64"):
        tasks_from_dataframe(frame.assign(when=pd.Timestamp("2024-01-01")), target="label")
    with pytest.raises(TypeError, match="expected a data frame or a mapping of columns; got list"):
        tasks_from_dataframe([1, 2], target="label")
    with pytest.raises(ValueError, match=r"targets of a regression must be columns of numbers; \['note'\] are not"):
        tasks_from_dataframe(frame, target="note", groups="shop")
    with pytest.raises(ValueError, match="classification has one target column"):
        tasks_from_dataframe(frame, target=["label", "a"])
    with pytest.raises(ValueError, match="text goes with one target"):
        tasks_from_dataframe(frame, target="label", text="note", groups="shop")
    missing = frame.assign(count=frame["count"].where(frame["count"] != 3))
    with pytest.raises(ValueError, match=r"x must be finite; 1 values are missing, by column {'count': 1}. Fill them"):
        tasks_from_dataframe(missing, target="label", features=["count"], n_way=2, class_splits=CLASS_SPLIT)
    with pytest.raises(ValueError, match=r"column 'count' must not be missing; it is in 1 of \d+ rows, .* row 3"):
        tasks_from_dataframe(missing, target="count", features=["a"], n_way=2)


def test_one_feature_may_be_named_alone(tmp_path: Path) -> None:
    frame = make_frame()[["a", "b", "label"]].assign(ab=np.arange(60))
    frame.to_csv(tmp_path / "frame.csv", index=False)
    options: dict[str, Any] = {
        "target": "label",
        "features": "ab",
        "n_way": 2,
        "class_splits": CLASS_SPLIT,
        "standardize": False,
    }
    for tasks in (tasks_from_dataframe(frame, **options), tasks_from_csv(tmp_path / "frame.csv", **options)):
        assert isinstance(tasks, ArrayClasses)
        assert tasks._x[:, 0].tolist() == list(range(60))
    with pytest.raises(ValueError, match=r"the data frame has no column 'ba'; it has \['a', 'b'"):
        tasks_from_dataframe(frame, **{**options, "features": "ba"})
    numbered = frame.set_axis(range(4), axis=1)
    assert tasks_from_dataframe(numbered, **{**options, "target": 2, "features": 3}).spec.x_shape == (1,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": ["a", "a"]}, "a column must be named once; got 'a' twice, in features"),
        ({"features": ["a", "label"]}, "got 'label' twice, in target and in features"),
        ({"target": "price", "groups": "shop", "features": ["shop"]}, "got 'shop' twice, in groups and in features"),
        ({"target": ["price", "price"], "groups": "shop"}, "got 'price' twice, in target"),
        ({"target": "shop", "groups": "shop"}, "got 'shop' twice, in target and in groups"),
        ({"text": "label"}, "got 'label' twice, in target and in text"),
    ],
)
def test_a_column_that_is_named_twice_is_told(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_frame().to_csv(tmp_path / "frame.csv", index=False)
    for make, source in ((tasks_from_dataframe, make_frame()), (tasks_from_csv, tmp_path / "frame.csv")):
        with pytest.raises(ValueError, match=message):
            make(source, **{"target": "label", **change})


def test_an_index_without_a_name_is_no_feature(tmp_path: Path) -> None:
    path = tmp_path / "frame.csv"
    make_frame().drop(columns="note").to_csv(path)
    with pytest.raises(ValueError, match=r"frame\.csv must name its columns; .*to_csv\(index=False\)"):
        tasks_from_csv(path, target="label", n_way=2, class_splits=CLASS_SPLIT)
    chosen = tasks_from_csv(path, target="label", features=["", "a"], n_way=2, class_splits=CLASS_SPLIT)
    assert chosen.spec.x_shape == (2,)


def test_a_missing_text_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("t,y\none,1\n,2\n")
    with pytest.raises(ValueError, match=r"column 't' must not be missing; it is in 1 of 2 rows, the first is row 1"):
        tasks_from_csv(path, target="y", text="t")


def test_a_tuple_may_be_one_column_of_a_multi_index() -> None:
    frame = make_frame()[["a", "b", "label"]]
    frame.columns = pd.MultiIndex.from_tuples([("size", "a"), ("size", "b"), ("about", "label")])
    options: dict[str, Any] = {"n_way": 2, "class_splits": CLASS_SPLIT}
    assert tasks_from_dataframe(frame, target=("about", "label"), **options).spec.x_shape == (2,)
    both = tasks_from_dataframe(frame, target=("about", "label"), features=("size", "b"), **options)
    assert both.spec.x_shape == (1,)
    several = tasks_from_dataframe(make_frame(), target=("price", "c"), features=("a", "b"), groups="shop")
    assert several.spec.y_dim == 2


def test_columns_of_a_csv_have_no_numbers(tmp_path: Path) -> None:
    make_frame()[["a", "label"]].to_csv(tmp_path / "frame.csv", index=False)
    with pytest.raises(ValueError, match=r"frame\.csv has no column 1; it has \['a', 'label'\]"):
        tasks_from_csv(tmp_path / "frame.csv", target=1)  # type: ignore[arg-type]


def test_text_that_is_no_category_is_named() -> None:
    commas = make_frame().assign(price=[f"{i},5" for i in range(len(make_frame()))])
    with pytest.warns(RuntimeWarning, match=r"column 'price' is text with (\d+) different values in \1 rows"):
        tasks_from_dataframe(commas, target="label", features=["a", "price"], n_way=2, class_splits=CLASS_SPLIT)


def test_columns_may_be_numbered() -> None:
    frame = make_frame()[["a", "label"]].set_axis([0, 1], axis=1)
    tasks = tasks_from_dataframe(frame, target=1, n_way=2, class_splits=CLASS_SPLIT)
    assert tasks.spec.x_shape == (1,)
