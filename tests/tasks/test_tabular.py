"""Tables as tasks: families apart, columns standardized without looking at labels, sizes exact."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metaicl.checks import check_episode
from metaicl.task import SPLITS, Split
from metaicl.tasks.columns import read_csv, to_matrix
from metaicl.tasks.tables import Table, bundled_tables, read_folder, read_npz
from metaicl.tasks.tabular import TabularClasses, TabularRegression

SPLIT: dict[Split, list[str]] = {"train": ["a", "b"], "validation": ["c"], "test": ["d"]}
RNG = np.random.default_rng(0)


def make_pool(kind: str = "classification", rows: int = 40) -> list[Table]:
    pool = []
    for i, (name, width) in enumerate({"a1": 3, "a2": 7, "b": 1, "c": 4, "d": 5}.items()):
        x = 10 * i + RNG.normal(size=(rows, width)) * (i + 1)
        y = np.arange(rows) % (2 + i) if kind == "classification" else 100 + x.sum(1)
        pool.append(Table(name, x, y, name[0]))
    return pool


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), n_features=st.integers(1, 9), kind=st.sampled_from(["classification", "regression"]))
def test_rows_features_and_labels_are_those_of_one_table(seed: int, n_features: int, kind: str) -> None:
    pool = make_pool(kind)
    build = TabularClasses if kind == "classification" else TabularRegression
    tasks = build(pool, n_features=n_features, splits=SPLIT)
    flat = [row for table in pool for row in (table.x - table.x.mean(0)) / table.x.std(0)]
    owner = [i for i, table in enumerate(pool) for _ in table.x]
    for split in SPLITS:
        episode = tasks.sample(6, split=split, n_shot=2, n_query=3, generator=generator(seed))
        check_episode(episode, tasks.spec)
        ids = torch.cat([episode.support.ids, episode.query.ids], 1)  # type: ignore[list-item]
        x = torch.cat([episode.support.x, episode.query.x], 1).numpy()
        for task, (table, features) in enumerate(
            zip(episode.latents["dataset_ids"].tolist(), episode.latents["feature_ids"].tolist(), strict=True)
        ):
            assert pool[table].family in SPLIT[split]
            real = [f for f in features if f >= 0]
            assert len(real) == len(set(real)) == min(n_features, pool[table].x.shape[1])
            assert features[len(real) :] == [-1] * (n_features - len(real))
            assert len(set(ids[task].tolist())) == ids.shape[1]
            for row, values in zip(ids[task].tolist(), x[task], strict=True):
                assert owner[row] == table
                np.testing.assert_allclose(values[: len(real)], flat[row][real], atol=1e-5)
                assert not values[len(real) :].any()


def test_labels_follow_the_drawn_classes() -> None:
    pool = make_pool()
    tasks = TabularClasses(pool, splits=SPLIT, n_way=2)
    episode = tasks.sample(50, split="test", n_shot=2, n_query=2, generator=generator())
    truth = tasks.source_classes[episode.query.ids]  # type: ignore[index]
    assert torch.equal(episode.latents["class_ids"].gather(1, episode.query.y), truth)
    assert {tasks.class_names[c] for c in truth.flatten().tolist()} == {("d", label) for label in range(6)}


def test_regression_targets_are_standardized_per_table() -> None:
    pool = make_pool("regression")
    tasks = TabularRegression(pool, splits=SPLIT)
    episode = tasks.sample(1, split="validation", n_shot=20, n_query=20, generator=generator())
    y = torch.cat([episode.support.y, episode.query.y], 1)
    assert abs(y.mean()) < 1e-6
    assert abs(y.std(correction=0) - 1) < 1e-5


def test_missing_values_become_the_mean_whatever_the_labels() -> None:
    x = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan], [5.0, np.nan]])
    pool = [Table(name, x, np.array([0, 1, 0, 1])) for name in "abcd"]
    tasks = TabularClasses(pool, splits=SPLIT, n_features=2)
    spread = np.sqrt(8 / 3)
    np.testing.assert_allclose(tasks._values[:8].reshape(4, 2)[:, 0], [-2 / spread, 0, 0, 2 / spread], atol=1e-6)
    assert not tasks._values[:8].reshape(4, 2)[:, 1].any()


def test_nearly_constant_and_huge_columns_stay_finite() -> None:
    rounded = np.where(np.arange(10) % 2, 1e308, np.nextafter(1e308, 0))
    x = np.stack([np.full(10, 0.1), np.arange(10) * 1e300, 1e8 + np.arange(10), rounded], 1)
    tasks = TabularClasses([Table(n, x, np.arange(10) % 2) for n in "abcd"], splits=SPLIT)
    values = tasks._values[:40].reshape(10, 4)
    assert not values[:, [0, 3]].any()
    assert torch.isfinite(values).all()
    assert abs(values[:, 2].std(correction=0) - 1) < 1e-6


def test_bool_targets_serve_as_numbers() -> None:
    x, y = RNG.normal(size=(60, 4)), np.arange(60) % 2 == 0
    pair = [TabularRegression([Table(f"t{i}", x, one) for i in range(9)]) for one in (y, y.astype(float))]
    assert torch.equal(pair[0]._targets, pair[1]._targets)
    assert pair[0]._targets[:2, 0].tolist() == [1, -1]


@pytest.mark.parametrize("step", [1, 2.0**-11])  # the latter is twice the rounding of 1.7e12 + 0.5
def test_small_variation_on_a_large_offset_is_variation(step: float) -> None:
    times = 1.7e12 + step * (np.arange(60) % 2)
    pool = [Table(f"t{i}", times[:, None], times) for i in range(9)]
    if step < 1:
        assert not TabularClasses(
            [Table(n, times[:, None], np.arange(60) % 2) for n in "abcd"], splits=SPLIT
        )._values.any()
        with pytest.raises(ValueError, match=r"y must vary; every target is 1\.7e\+12 up to rounding"):
            TabularRegression(pool)
        return
    tasks = TabularRegression(pool)
    assert tasks._targets[:2, 0].tolist() == tasks._values[:2].tolist() == [-1, 1]


def test_masked_features_are_missing_and_masked_targets_refused() -> None:
    x, y = np.ma.masked_equal([[1.0], [3.0], [-9.0], [5.0]], -9.0), np.array([0, 1, 0, 1])
    assert np.isnan(Table("t", x, y).x[:, 0]).tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match=r"table 't': y must not be missing; 2 values are masked, .* index \(1,\)"):
        Table("t", x, np.ma.masked_equal(y, 1))
    assert Table("t", x, np.ma.masked_equal(y, 7)).y.tolist() == y.tolist()


def test_another_split_changes_nothing_in_this_one() -> None:
    pool = make_pool()
    other = [*pool[:4], Table("d", pool[4].x * 1000 + 7, pool[4].y)]
    episodes = [
        TabularClasses(tables, splits=SPLIT).sample(8, split="train", n_shot=2, n_query=2, generator=generator())
        for tables in (pool, other)
    ]
    assert episodes[0].fingerprint() == episodes[1].fingerprint()


@pytest.mark.parametrize("build", [TabularClasses, TabularRegression])
def test_the_bundled_default_works_in_every_split(build: type[TabularClasses]) -> None:
    tasks = build()
    names = {split: set(tasks.table_names(split, n_rows=20)) for split in SPLITS}
    if build is TabularClasses:
        assert names == {"train": {"digits", "wine"}, "validation": {"iris"}, "test": {"breast_cancer"}}
    else:
        assert [len(names[split]) for split in SPLITS] == [43, 4, 4]
        assert tasks.table_names("test", n_rows=21) == ["diabetes"]
    for split in SPLITS:
        episode = tasks.sample(30, split=split, n_shot=5, n_query=15, generator=generator())
        check_episode(episode, tasks.spec)


@pytest.mark.parametrize(("file", "n_tables", "n_families"), [("classification", 24, 21), ("regression", 27, 25)])
def test_the_prepared_tables_are_split_by_family(file: str, n_tables: int, n_families: int, shared_data: Path) -> None:
    pool = read_npz(shared_data / f"tabular_{file}.npz")
    tasks = TabularClasses(pool) if file == "classification" else TabularRegression(pool)
    assert (len(tasks.tables), len(tasks.families)) == (n_tables, n_families)
    seen = []
    for split in SPLITS:
        episode = tasks.sample(200, split=split, n_shot=5, n_query=10, generator=generator())
        check_episode(episode, tasks.spec)
        seen.append(set(episode.latents["family_ids"].tolist()))
    assert len(set.union(*seen)) == sum(map(len, seen))


def test_class_means_beat_chance_on_real_tables() -> None:
    tasks = TabularClasses()
    episode = tasks.sample(200, split="test", n_shot=5, n_query=15, generator=generator())
    one_hot = torch.nn.functional.one_hot(episode.support.y, 2).float()
    means = one_hot.mT @ episode.support.x / 5
    right = torch.cdist(episode.query.x, means).argmin(-1) == episode.query.y
    assert right.float().mean() > 0.8


def test_a_folder_of_csv_files_is_a_pool(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        lines = [
            f"{i},{'red' if i % 3 else 'blue'},{'' if i == 4 else i * i},{'yes' if i % 2 else 'no'}" for i in range(12)
        ]
        (tmp_path / f"{name}.csv").write_text("\ufeffa, b ,c,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    pool = read_folder(tmp_path, kind="classification")
    assert [table.name for table in pool] == ["one", "three", "two"]
    assert pool[0].x[:3, 1].tolist() == [0, 1, 1]
    assert np.isnan(pool[0].x[4, 2])
    assert pool[0].y[:3].tolist() == [0, 1, 0]
    tasks = TabularClasses(pool, splits={"train": ["one"], "validation": ["two"], "test": ["three"]})
    check_episode(tasks.sample(4, split="test", n_shot=1, n_query=2, generator=generator()), tasks.spec)
    assert read_folder(tmp_path, kind="regression", target="a")[0].y.tolist() == list(range(12))
    with pytest.raises(ValueError, match=r"column 'b' of .* must be numbers for regression"):
        read_folder(tmp_path, kind="regression", target="b")
    with pytest.raises(ValueError, match=r"has no column 'z'; it has \['a', 'b', 'c', 'label'\]"):
        read_folder(tmp_path, kind="regression", target="z")


def test_malformed_csv_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    with pytest.raises(FileNotFoundError, match=r"holds no \*.csv file"):
        read_folder(tmp_path, kind="regression")
    for content, message in (
        ("a,b\n", "got 1 lines"),
        ("a,a\n1,2\n", "differently"),
        ("a,b\n1,2\n3\n", "row 1 has 1"),
        ('a,b\n1,2\n3,"4\n5,6\n7,8\n', r"x\.csv must be comma-separated; the row from line 3 on is not: .*end of data"),
        ('a,b\n1,"2"3\n', "line 2 on is not"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_csv(path)


def test_an_index_and_missing_targets_of_a_folder_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(",a,y\n0,1,u\n1,2,v\n")
    with pytest.raises(ValueError, match=r"x\.csv must name its columns; .*to_csv\(index=False\)"):
        read_folder(tmp_path, kind="classification")
    path.write_text("a,y\n1,2\n2,\n3,4\n")
    for kind in ("classification", "regression"):
        with pytest.raises(ValueError, match=r"x\.csv: column 'y' must not be missing; it is in 1 of 3 rows, .* row 1"):
            read_folder(tmp_path, kind=kind)


def test_codes_with_an_underscore_are_text(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("code,y\n1_1,1_1\n11,11\n")
    columns = read_csv(path, labels=["y"])
    assert [columns[name].tolist() for name in ("code", "y")] == [["1_1", "11"]] * 2


def test_a_word_for_missing_is_missing_in_numbers_and_a_word_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("number,word,label\n1,none,NA\nNA,null,US\n3,?,DE\n,low,none\n")
    columns = read_csv(path, labels=["label"])
    assert np.isnan(columns["number"]).tolist() == [False, True, False, True]
    assert columns["word"].tolist() == ["none", "null", None, "low"]
    assert columns["label"].tolist() == ["NA", "US", "DE", "none"]
    path.write_text("t,u\nnone,\n12,?\n?,7\n")
    assert {name: one.tolist() for name, one in read_csv(path, texts=["t", "u"]).items()} == {
        "t": ["none", "12", "?"],
        "u": [None, "?", "7"],
    }


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["3", "-1", "0"], [3, -1, 0]),
        (["3.0", "1.00", "2."], [3, 1, 2]),
        (["07", "7"], ["07", "7"]),
        (["07", "08"], ["07", "08"]),
        (["7.0", "7"], ["7.0", "7"]),
        (["1e3", "1000"], ["1e3", "1000"]),
        ([str(2**53), str(2**53 + 1)], [2**53, 2**53 + 1]),
        ([str(2**63 - 1), str(-(2**63))], [2**63 - 1, -(2**63)]),
        ([str(2**63), "1"], [str(2**63), "1"]),
        (["0.5", "1"], [0.5, 1.0]),
    ],
)
def test_labels_of_a_csv_lose_nothing(cells: list[str], expected: list[object], tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("y\n" + "\n".join(cells) + "\n")
    found = read_csv(path, labels=["y"])["y"].tolist()
    assert found == expected
    assert [type(one) for one in found] == [type(one) for one in expected]
    (tmp_path / "z.csv").write_text("x,y\n" + "\n".join(f"{i},{cell}" for i, cell in enumerate(cells)) + "\n")
    path.unlink()
    if not isinstance(expected[0], float):
        assert len(set(read_folder(tmp_path, kind="classification")[0].y.tolist())) == len(set(cells))


@pytest.mark.parametrize(("encoding", "byte"), [("latin-1", "e9"), ("utf-16", "ff")])
def test_a_file_of_another_encoding_is_named(encoding: str, byte: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes("a,y\n1,caf\xe9\n".encode(encoding))
    with pytest.raises(ValueError, match=rf"x\.csv must be UTF-8, and byte 0x{byte} in it is not; save it as UTF-8"):
        read_csv(path)


def test_categories_are_numbered_where_they_may_be_looked_at() -> None:
    column = np.array(["b", "c", "a", None], dtype=object)
    assert to_matrix({"n": column})[:3, 0].tolist() == [1, 2, 0]
    fitted = to_matrix({"n": column}, np.array([True, True, False, False]))
    assert fitted[:3, 0].tolist() == [0, 1, -1]
    assert np.isnan(fitted[3, 0])
    with pytest.raises(ValueError, match="got none besides the target"):
        to_matrix({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_way": 4}, r"asked for 4 ways; no table of split 'train' has so many classes: \['a1', 'a2', 'b'\]"),
        ({"splits": {**SPLIT, "test": ["a"]}}, r"splits must not share a family; 1 are in two, for instance \['a'\]"),
        ({"splits": {**SPLIT, "test": ["z"]}}, "unknown family"),
        ({"n_features": 0}, "n_features must be an int >= 1"),
        ({"tables": make_pool()[:2] * 2}, "different names"),
        ({"tables": make_pool()[:2], "splits": None}, "need a family each; got 1 in all"),
    ],
)
def test_bad_pools_are_named(change: dict[str, object], message: str) -> None:
    options = {"tables": make_pool(rows=20), "splits": SPLIT, **change}
    if change == {"n_way": 4}:
        options["tables"] = [*make_pool()[:2], Table("b", RNG.normal(size=(9, 1)), np.arange(9) % 2), *make_pool()[3:]]
    with pytest.raises(ValueError, match=message):
        TabularClasses(options.pop("tables"), **options)  # type: ignore[arg-type]


def test_bad_tables_and_too_many_rows_are_named() -> None:
    x, y = np.ones((4, 2)), np.arange(4)
    for bad_x, bad_y, message in (
        (x[:, 0], y, "features >= 1"),
        (x, y[:3], r"y must be \(rows,\) = \(4,\); got \(3,\)"),
        (np.where(np.eye(4, 2) > 0, np.inf, x), y, "row 0, feature 0 is infinite"),
        (x, np.array([0, 1, np.nan, 3]), "table 't': y must be finite; row 2 is nan"),
        ([["a", "b"]] * 4, y, r"table 't': x must be \(rows, features\) numbers; could not convert"),
        ([[1.0, 2.0], [3.0]], y, r"table 't': x must be \(rows, features\) numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            Table("t", bad_x, bad_y)
    assert Table("t", x, y) != Table("t", x, y)
    assert len({Table("t", x, y), Table("t", x, y)}) == 2
    for bad_y, message in ((np.full(4, 2.0), "y must vary"), (np.array(list("abcd")), "finite numbers")):
        with pytest.raises(ValueError, match=message):
            TabularRegression([Table(n, x, bad_y) for n in "abcd"], splits=SPLIT)
    with pytest.raises(
        ValueError, match=r"no table of split 'test' serves n_shot \+ n_query = 41 rows .* which serve at most \d+"
    ):
        TabularClasses(make_pool(), splits=SPLIT).sample(1, split="test", n_shot=1, n_query=40, generator=generator())
    assert len(bundled_tables("classification")) == 4


def test_long_cells_are_read_and_the_limit_of_the_process_stays(tmp_path: Path) -> None:
    path, before = tmp_path / "long.csv", csv.field_size_limit()
    path.write_text("t,y\n" + "w " * 100_000 + "end,1\n", encoding="utf-8")
    assert before < 200_000
    assert [len(cell) for cell in read_csv(path, texts=["t"])["t"]] == [200_003]
    assert csv.field_size_limit() == before
