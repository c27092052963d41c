"""The memory bank: what a search finds and may not find, on every backend, and that its content survives saving."""

import copy
import pickle
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metaicl.checkpoint import load_learner_weights, save_checkpoint, save_learner
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.retrieval import exclusion
from metaicl.learners.retrieval.augmented import RetrievalAugmented
from metaicl.learners.retrieval.bank import CorruptBankError, MemoryBank
from metaicl.learners.retrieval.content import content_ids
from metaicl.learners.retrieval.exact_search import best_items
from metaicl.learners.retrieval.exclusion import Exclusion
from metaicl.native import without_kernels
from metaicl.sealed_files import SealedFormat
from metaicl.spec import TaskSpec
from metaicl.tasks.gaussians import GaussianClasses

BACKENDS = ["exact", "faiss-flat", "faiss-ivf", "faiss-hnsw"]


def filled_bank(n_items: int, dim: int, *, backend: str = "exact", chunk: int = 7) -> MemoryBank:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(n_items, dim, generator=generator)
    bank = MemoryBank(backend=backend, chunk=chunk)
    bank.add(keys, {"x": keys[:, None]}, rows=torch.arange(n_items), classes=torch.arange(n_items) // 4)
    return bank


def brute_force(queries: Tensor, keys: Tensor, excluded: Tensor) -> Tensor:
    """Inner products (Q, M) in float64, -inf where excluded."""
    return (queries.double() @ keys.double().T).masked_fill(excluded, -torch.inf)


@pytest.mark.parametrize("backend", BACKENDS)
def test_search_equals_sorting(backend: str) -> None:
    bank = filled_bank(50, 6, backend=backend)
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(4, 2, 6, generator=generator)
    rows = torch.randint(-1, 50, (4, 1, 15), generator=generator)
    found = bank.search(queries, 5, exclude=Exclusion(rows=rows))
    excluded = (rows[..., None] == torch.arange(50)).any(-2)
    expected = np.argsort(-brute_force(queries, bank.keys, excluded).numpy(), axis=-1, kind="stable")[..., :5]
    assert bool(found.real.all())
    np.testing.assert_array_equal(found.index.numpy(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_few_allowed_items_are_marked(backend: str) -> None:
    bank = filled_bank(6, 3, backend=backend)
    found = bank.search(torch.randn(1, 3), 3, exclude=Exclusion(rows=torch.tensor([[0, 1, 3, 4, 5]])))
    assert found.real.tolist() == [[True, False, False]]
    assert found.index.tolist() == [[2, 0, 0]]
    assert found.score[0, 1:].tolist() == [-np.inf, -np.inf]
    beyond = bank.search(torch.randn(2, 3), 9)
    assert beyond.real.sum(1).tolist() == [6, 6]


@pytest.fixture(params=["kernel", "torch"])
def searched(request: pytest.FixtureRequest) -> Iterator[None]:
    """By the kernel, where there is one, and without."""
    with nullcontext() if request.param == "kernel" else without_kernels():
        yield


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n_keys", "chunk"), [(60, 60), (5000, 5000), (5000, 700)], ids=["few", "blocks", "pieces"])
def test_of_equal_items_the_first_are_found_in_order(n_keys: int, chunk: int, dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    keys = torch.randint(-1, 2, (n_keys, 4), generator=source).to(dtype)  # 81 different ones, exact products
    queries = torch.randint(-1, 2, (20, 4), generator=source).to(dtype)
    queries[0] = 0  # all alike
    expected = (queries @ keys.mT).sort(dim=1, descending=True, stable=True)
    for k in (1, 3, 7):
        found = best_items(queries, keys, k, chunk=chunk)
        assert torch.equal(found.index, expected.indices[:, :k])
        assert torch.equal(found.score, expected.values[:, :k])


@pytest.mark.usefixtures("searched")
def test_equal_items_are_found_alike_whoever_else_asks() -> None:
    """A later piece that is taken in as a whole does not come before hits of an earlier one that still wait."""
    keys = torch.zeros(192, 1)
    keys[69] = 2.0
    keys[128:] = 2.0
    bank = MemoryBank(chunk=64)
    bank.add(keys, {})
    for queries in ([1.0], [1.0, -1.0]):
        assert bank.search(torch.tensor(queries)[:, None], 1).index[0].tolist() == [69]


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize("n_keys", [300, 64, 65])
def test_more_items_than_a_piece_has_and_all_alike(n_keys: int) -> None:
    bank = MemoryBank(chunk=64)
    bank.add(torch.ones(n_keys, 2), {})
    for k in (63, 64, 65, 200, n_keys):
        found = bank.search(torch.ones(2, 2), k)
        assert found.index[0][found.real[0]].tolist() == list(range(min(k, n_keys)))


def test_bad_searches_are_refused() -> None:
    with pytest.raises(ValueError, match="empty; fill it with add"):
        MemoryBank().search(torch.randn(1, 3), 1)
    bank = filled_bank(4, 3)
    with pytest.raises(ValueError, match="must be an int >= 1; got 0"):
        bank.search(torch.randn(1, 3), 0)
    with pytest.raises(ValueError, match="size of the keys, 3; got 4"):
        bank.search(torch.randn(1, 4), 1)
    with pytest.raises(ValueError, match="backend must be one of"):
        MemoryBank(backend="exactt")


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), n_items=st.integers(1, 400), k=st.integers(1, 12), chunk=st.integers(1, 300))
def test_nothing_excluded_is_found_and_nothing_allowed_is_missed(
    backend: str, seed: int, n_items: int, k: int, chunk: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n_items, 5, generator=generator)
    keys = keys[torch.randint(n_items, (n_items,), generator=generator)]  # with duplicates
    rows = torch.randint(-1, 30, (n_items, 2), generator=generator)
    classes, tasks = torch.randint(-1, 6, (2, n_items), generator=generator)
    bank = MemoryBank(backend=backend, chunk=chunk)
    bank.add(keys, {}, rows=rows, classes=classes, tasks=tasks)
    queries = torch.randn(3, 2, 5, generator=generator)
    exclude = Exclusion(
        rows=torch.randint(-1, 30, (3, 1, 4), generator=generator),
        classes=torch.randint(-1, 6, (1, 2, 2), generator=generator),
        tasks=torch.randint(-1, 6, (3, 2, 1), generator=generator),
    )
    excluded = (exclude.rows[..., None, :, None] == rows[:, None]).logical_and(rows[:, None] >= 0)
    excluded = excluded.flatten(-2).any(-1)
    for wanted, ids in ((exclude.classes, classes), (exclude.tasks, tasks)):
        excluded = excluded | ((wanted[..., None, :] == ids[:, None]) & (ids >= 0)[:, None]).any(-1)
    found = bank.search(queries, k, exclude=exclude)
    allowed = brute_force(queries, keys, excluded.expand(3, 2, n_items))
    assert torch.equal(found.real.sum(-1), (~excluded).expand(3, 2, -1).sum(-1).clamp(max=k))
    at = allowed.gather(-1, found.index)
    assert bool(at[found.real].isfinite().all())
    distinct = found.index.masked_fill(~found.real, -1).sort(-1).values
    assert not bool(((distinct[..., 1:] == distinct[..., :-1]) & (distinct[..., 1:] >= 0)).any())
    torch.testing.assert_close(found.score[found.real].double(), at[found.real], rtol=1e-5, atol=1e-5)
    if backend in ("exact", "faiss-flat"):
        best = allowed.topk(min(k, n_items), -1).values
        best = torch.nn.functional.pad(best, (0, k - best.shape[-1]), value=-torch.inf)
        torch.testing.assert_close(found.score.double(), best, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 4), order=st.sampled_from(["drawn", "rising", "equal"]))
def test_a_stream_of_pieces_gives_what_sorting_gives(seed: int, k: int, order: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(3000, 4, generator=generator, dtype=torch.float64)
    if order == "rising":  # every piece beats all before it
        keys = keys.abs().sort(0).values
    elif order == "equal":
        keys = torch.ones_like(keys)
    queries = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    with without_kernels():
        score, index = best_items(queries, keys, k, chunk=600)
    scores = queries @ keys.T
    torch.testing.assert_close(score, scores.topk(k, 1).values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores.gather(1, index), score, rtol=1e-12, atol=1e-12)
    assert all(len(set(row)) == k for row in index.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_changes_are_followed(backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    bank = filled_bank(200, 8, backend=backend)
    queries = torch.randn(6, 8, generator=generator)
    bank.search(queries, 3)  # builds an index, which must follow
    for _ in range(4):
        selected = torch.randperm(len(bank), generator=generator)[:30]
        bank.refresh(selected, torch.randn(30, 8, generator=generator))
        new = torch.randn(20, 8, generator=generator)
        bank.add(new, {"x": new[:, None]}, rows=torch.arange(20))
        bank.remove(torch.randperm(len(bank), generator=generator)[:25])
        fresh = MemoryBank(backend="exact")
        fresh.add(bank.keys, bank.values, rows=bank.row_ids, classes=bank.class_ids)
        found, expected = bank.search(queries, 3), fresh.search(queries, 3)
        if backend in ("exact", "faiss-flat"):
            assert torch.equal(found.index, expected.index)
        assert float((found.index[:, :, None] == expected.index[:, None]).any(2).float().mean()) > 0.8
        torch.testing.assert_close(found.score, (bank.keys[found.index] @ queries[..., None])[..., 0])


@pytest.mark.parametrize("at_once", [2**26, 64, 1])
def test_heavy_exclusion_takes_a_table_with_the_same_result(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusion, "_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(3)
    keys, queries = torch.randn(500, 4, generator=generator), torch.randn(7, 4, generator=generator)
    bank = MemoryBank(chunk=100)
    bank.add(keys, {}, tasks=torch.arange(500) % 2)
    found = bank.search(queries, 4, exclude=Exclusion(tasks=torch.tensor([0])))
    expected = brute_force(queries, keys, (torch.arange(500) % 2 == 0).expand(7, 500)).topk(4, 1).indices
    assert torch.equal(found.index, expected)
    rows = torch.randint(-1, 300, (500, 3), generator=generator)
    bank = MemoryBank(chunk=100)
    bank.add(keys, {}, rows=rows, tasks=torch.arange(500) % 5)
    wanted, tasks = torch.randint(-1, 300, (7, 60), generator=generator), torch.randint(5, (7, 2), generator=generator)
    excluded = ((wanted[:, None, :, None] == rows[:, None]) & (rows[:, None] >= 0)).flatten(2).any(-1)
    excluded |= (tasks[:, None] == (torch.arange(500) % 5)[:, None]).any(-1)
    assert 0.5 < float(excluded.float().mean()) < 0.9
    found = bank.search(queries, 4, exclude=Exclusion(rows=wanted, tasks=tasks))
    assert torch.equal(found.index, brute_force(queries, keys, excluded).topk(4, 1).indices)


def test_a_bank_survives_its_file(tmp_path: Path) -> None:
    bank = MemoryBank(backend="exact", chunk=99)
    keys = torch.randn(5, 3)
    values = {"x": torch.rand(5, 2, 2).bfloat16(), "flag": torch.tensor([True, False, True, True, False])}
    bank.add(keys, values, rows=torch.arange(10).view(5, 2), tasks=torch.arange(5))
    bank.save(tmp_path / "bank")
    loaded = MemoryBank.load(tmp_path / "bank")
    assert loaded.chunk == 99
    for name, value in bank.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert list(loaded.values) == ["x", "flag"]
    fresh = MemoryBank()
    fresh.load_state_dict(bank.state_dict())
    assert torch.equal(fresh.values["x"], values["x"])


@pytest.mark.parametrize("backend", ["exact", "faiss-flat"])
def test_an_item_of_several_classes_is_excluded_by_each(backend: str, tmp_path: Path) -> None:
    bank = MemoryBank(backend=backend)
    bank.add(torch.ones(2, 1), {}, classes=torch.tensor([3, 4]))
    assert bank.class_ids.tolist() == [3, 4]
    bank.add(torch.ones(2, 1), {}, classes=torch.tensor([[5, 6, 6], [7, -1, 3]]))
    bank.add(torch.ones(1, 1), {}, classes=torch.tensor([8]))
    bank.save(tmp_path / "bank")
    wanted = torch.tensor([[3, -1], [4, 9], [6, 8], [7, 5], [-1, -1]])
    for one in (bank, MemoryBank.load(tmp_path / "bank")):
        assert one.class_ids.tolist() == [[3, -1, -1], [4, -1, -1], [5, 6, 6], [7, -1, 3], [8, -1, -1]]
        found = one.search(torch.ones(5, 1), 5, exclude=Exclusion(classes=wanted))
        kept = [sorted(index[real].tolist()) for index, real in zip(found.index, found.real, strict=True)]
        assert kept == [[1, 2, 4], [0, 2, 3, 4], [0, 1, 3], [0, 1, 4], [0, 1, 2, 3, 4]]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    filled_bank(5, 3).save(path)
    whole = path.read_bytes()
    for place in (0, 14, 30, 300, len(whole) - 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CorruptBankError, match=r"no metaicl bank|format|changed"):
            MemoryBank.load(path)
    for length in (0, 13, 100, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptBankError, match=r"is empty|damaged first line|must hold"):
            MemoryBank.load(path)
    torch.save({"keys": torch.zeros(1)}, path)
    with pytest.raises(CorruptBankError, match=r"looks like a plain torch\.save file"):
        MemoryBank.load(path)
    save_checkpoint(path, {"weights": torch.zeros(1)})
    with pytest.raises(CorruptBankError, match="begins like a metaicl checkpoint"):
        MemoryBank.load(path)


def test_a_whole_file_of_something_else_is_no_bank(tmp_path: Path) -> None:
    bank, path = filled_bank(5, 3), tmp_path / "bank"
    settings = {"backend": "exact", "chunk": 7, "breadth": 1}
    short = {**bank.state_dict(), "row_ids": torch.zeros(4, 1).long()}
    for content, message in (
        ({"tensors": bank.state_dict()}, "settings"),
        ({"tensors": bank.state_dict(), "settings": {**settings, "backend": "nope"}}, "backend must be one of"),
        ({"tensors": short, "settings": settings}, "row_ids are for 4 of 5 items"),
    ):
        SealedFormat("bank", 1, RuntimeError, RuntimeError).write(path, content)
        with pytest.raises(CorruptBankError, match=f"does not hold a memory bank: .*{message}"):
            MemoryBank.load(path)


def test_a_learner_checkpoint_fills_an_empty_bank(tmp_path: Path) -> None:
    tasks = GaussianClasses(dim=4)
    learner, other = (RetrievalAugmented(tasks.spec, learner=ProtoNet, n_items=20) for _ in range(2))
    learner.prepare(tasks, seed=0)
    save_learner(learner, tmp_path / "weights")
    load_learner_weights(other, tmp_path / "weights")
    assert torch.equal(other.bank.values["x"], learner.bank.values["x"])


def test_a_missing_faiss_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install .metaicl\[retrieval\]"):
        filled_bank(5, 3, backend="faiss-hnsw").search(torch.randn(1, 3), 1)


def test_items_that_do_not_fit_are_refused() -> None:
    bank = filled_bank(5, 3)
    with pytest.raises(ValueError, match="must look like those of the bank"):
        bank.add(torch.randn(2, 4), {"x": torch.randn(2, 1, 3)})
    with pytest.raises(ValueError, match="everything else for the same m items"):
        bank.add(torch.randn(2, 3), {"x": torch.randn(3, 1, 3)})
    with pytest.raises(TypeError, match="rows must be long"):
        bank.add(torch.randn(2, 3), {"x": torch.randn(2, 1, 3)}, rows=torch.zeros(2))
    with pytest.raises(ValueError, match="every selected item once"):
        bank.refresh(torch.tensor([1, 1]), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"must be in \[0, 5\)"):
        bank.remove(torch.tensor([5]))
    assert len(bank) == 5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_content_ids_name_rows_by_what_they_hold(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spec = TaskSpec("classification", (1, 4, 4), x_kind="image", n_way=2)
    x = torch.randint(0, 2, (40, 1, 4, 4), generator=generator).float()
    ids = content_ids(x.view(4, 10, 1, 4, 4), spec).flatten()
    same = (x.flatten(1)[:, None] == x.flatten(1)).all(2)
    assert torch.equal(ids[:, None] == ids, same)
    assert torch.equal(content_ids(-x.double() * -1.0, spec), ids)
    assert int(ids.min()) >= 0
    texts = TaskSpec("classification", (6,), x_kind="tokens", vocabulary=9, n_way=2)
    tokens = torch.randint(1, 9, (30, 6), generator=generator)
    found = content_ids(tokens, texts)
    assert torch.equal(found[:, None] == found, (tokens[:, None] == tokens).all(2))


NOT_FINITE = torch.tensor([[0.0, 1.0, 2.0], [0.0, float("nan"), 0.0]])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"keys": NOT_FINITE}, ValueError, "keys must be finite; 1 rows hold NaN or Inf, the first is row 1"),
        ({"keys": -1 / torch.zeros(2, 3)}, ValueError, "keys must be finite; 2 rows"),
        ({"keys": torch.ones(2, 3, dtype=torch.long)}, TypeError, "keys must be floating point; got torch.int64"),
        ({"keys": [[0.0] * 3] * 2}, TypeError, "keys must be a tensor; got list"),
        ({"keys": torch.zeros(2)}, ValueError, r"keys must be \(m, K\), one row of .* for each item; got \(2,\)"),
        ({"keys": torch.zeros(2, 0)}, ValueError, r"keys must be \(m, K\), one row of K >= 1 numbers .* got \(2, 0\)"),
        ({"keys": torch.full((2, 3), 1e39, dtype=torch.float64)}, ValueError, "keys must be finite; 2 rows"),
        ({"values": None}, TypeError, "values must be a mapping of names to tensors, perhaps empty; got NoneType"),
        ({"values": {"a.b": torch.arange(2)}}, ValueError, "names of values must be identifiers .* got 'a.b'"),
        ({"values": {"x": torch.arange(2).double()}}, TypeError, "x must be torch.int64, as in the bank"),
        ({"values": {"x": [1, 2]}}, TypeError, r"values\['x'\] must be a tensor; got list"),
        ({"rows": torch.arange(3)}, ValueError, r"rows must be \(2,\) or \(2, R\), for each of .*; got \(3,\)"),
        ({"rows": [0, 1]}, TypeError, "rows must be a tensor; got list"),
        (
            {"classes": torch.zeros(2, 1, 1).long()},
            ValueError,
            r"classes must be \(2,\) or \(2, R\), .*; got \(2, 1, 1\)",
        ),
        ({"tasks": torch.zeros(2, 1).long()}, ValueError, r"tasks must be \(2,\), for each of .*; got \(2, 1\)"),
        ({"values": {"x": torch.ones(2)}}, TypeError, "x must be torch.int64, as in the bank; got torch.float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_items_are_named_and_change_nothing(given: dict[str, Any], error: type[Exception], message: str) -> None:
    bank = MemoryBank()
    bank.add(torch.eye(3), {"x": torch.arange(3)})
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    with pytest.raises(error, match=message):
        bank.add(**{"keys": torch.eye(3)[:2], "values": {"x": torch.arange(2)}, **given})
    if "keys" in given:
        with pytest.raises(error, match=message):
            bank.refresh(torch.arange(2), given["keys"])
    with pytest.raises(TypeError, match="selected must be a tensor"):
        bank.refresh([0, 1], torch.eye(3)[:2])
    assert all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_queries_and_exclusions_are_refused(backend: str) -> None:
    bank, queries = filled_bank(6, 3, backend=backend), torch.ones(4, 2, 3)
    with pytest.raises(ValueError, match="queries must be finite; 1 rows hold NaN or Inf, the first is row 1"):
        bank.search(NOT_FINITE, 1)
    with pytest.raises(ValueError, match=r"queries must be \(..., Q, K\); got \(3,\). One query is query\[None\]"):
        bank.search(torch.ones(3), 1)
    with pytest.raises(TypeError, match=r"queries must be floating point; got torch\.int64"):
        bank.search(torch.ones(1, 3).long(), 1)
    for ids in (torch.zeros(3, 2, 1), torch.zeros(4, 1), torch.zeros(1, 1, 1, 1), torch.tensor(0)):
        with pytest.raises(ValueError, match=r"exclude.classes must be .* broadcast to those of the queries, \(4, 2\)"):
            bank.search(queries, 1, exclude=Exclusion(classes=ids.long()))
    with pytest.raises(TypeError, match=r"exclude\.rows must be long ids"):
        bank.search(queries, 1, exclude=Exclusion(rows=torch.zeros(4, 2, 1)))
    with pytest.raises(TypeError, match="exclude must be an Exclusion or None; got dict"):
        bank.search(queries, 1, exclude={"rows": torch.zeros(1).long()})
    for shape in ((4, 2, 1), (1, 2, 2), (2, 1), (1,)):  # these do broadcast
        assert bank.search(queries, 1, exclude=Exclusion(rows=torch.zeros(shape).long())).index.shape == (4, 2, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bank_may_run_empty_and_begin_anew(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    bank = filled_bank(20, 3, backend=backend)
    bank.search(torch.ones(1, 3), 2)
    bank.remove(torch.ones(20, dtype=torch.bool))
    with pytest.raises(ValueError, match="empty; fill it with add"):
        bank.search(torch.ones(1, 3), 1)
    bank.add(torch.eye(5)[:0], {"other": torch.zeros(0)})  # nothing, of another shape
    bank.add(torch.eye(5), {"y": torch.arange(5)}, rows=torch.tensor([2**63 - 1, 0, 1, 2, -(2**63)]))
    exclude = Exclusion(rows=torch.tensor([[2**63 - 1], [-(2**63)]]))
    found = bank.search(torch.stack([torch.eye(5)[0], torch.eye(5)[4]]), 5, exclude=exclude)
    assert found.real.sum(1).tolist() == [4, 5]  # negative ids stand for nothing
    assert bank.search(torch.ones(0, 2, 5), 3, exclude=Exclusion(rows=torch.zeros(1, 1, 1).long())).index.numel() == 0
    assert list(bank.values) == ["y"]
    for other in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert torch.equal(other.search(bank.keys, 1).index, bank.search(bank.keys, 1).index)
    assert capfd.readouterr().err == ""  # faiss warns of few points


def test_keys_and_queries_must_fit_the_precision_of_the_bank() -> None:
    bank = MemoryBank()
    bank.add(torch.eye(3).half(), {})
    with pytest.raises(ValueError, match="keys must be finite; 1 rows hold NaN or Inf, the first is row 0"):
        bank.refresh(torch.tensor([0]), torch.full((1, 3), 1e6))
    with pytest.raises(ValueError, match="queries must be finite; 1 rows"):
        bank.search(torch.full((1, 3), 1e6), 1)
    bank.refresh(torch.tensor([0]), torch.full((1, 3), 2.0, dtype=torch.float64))
    assert bank.keys[0].tolist() == [2.0, 2.0, 2.0]


def test_a_bank_filled_in_inference_mode_can_change_outside() -> None:
    bank = MemoryBank()
    with torch.inference_mode():
        bank.add(torch.eye(3), {"x": torch.arange(3)})
    bank.refresh(torch.tensor([1]), torch.full((1, 3), 5.0))
    bank.add(torch.eye(3), {"x": torch.arange(3)})
    assert bank.search(torch.ones(1, 3), 1).index.tolist() == [[1]]


def test_loading_keeps_the_precision_of_the_module(tmp_path: Path) -> None:
    bank = filled_bank(5, 3)
    wide = MemoryBank().double()
    wide.load_state_dict(bank.state_dict())
    assert wide.keys.dtype == wide.values["x"].dtype == torch.float64
    assert wide.row_ids.dtype == torch.long
    assert torch.equal(wide.keys, bank.keys.double())
    wide.save(tmp_path / "bank")
    assert MemoryBank.load(tmp_path / "bank").keys.dtype == torch.float64  # a file alone says its own precision
    bank.load_state_dict(wide.state_dict())
    assert bank.keys.dtype == bank.values["x"].dtype == torch.float32


def test_a_checkpoint_goes_into_a_learner_of_another_precision(tmp_path: Path) -> None:
    tasks = GaussianClasses(dim=4)
    learner = RetrievalAugmented(tasks.spec, learner=ProtoNet, n_items=20)
    learner.prepare(tasks, seed=0)
    save_learner(learner, tmp_path / "weights")
    other = RetrievalAugmented(tasks.spec, learner=ProtoNet, n_items=20).double()
    load_learner_weights(other, tmp_path / "weights")
    assert other.bank.keys.dtype == other.bank.values["x"].dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 50.0), (torch.bfloat16, 1e30), (torch.float32, 1e30), (torch.float64, 1e100)]
)
def test_products_beyond_the_precision_of_the_keys_are_found_in_order(
    backend: str, dtype: torch.dtype, size: float
) -> None:
    bank = MemoryBank(backend=backend).to(dtype)
    small = torch.tensor([1.0, -1.0, 0.75, -0.5, 0.5, 1.0])[:, None].double().expand(-1, 64)
    bank.add((small * size).to(dtype), {}, rows=torch.arange(6))
    found = bank.search((small[:2] * size).to(dtype), 6, exclude=Exclusion(rows=torch.tensor([[5], [0]])))
    assert found.index.tolist() == [[0, 2, 4, 3, 1, 0], [1, 3, 4, 2, 5, 0]]
    assert found.real.tolist() == [[True] * 5 + [False]] * 2
    expected = torch.tensor([64.0, 48, 32, -32, -64]).double() * float(torch.tensor(size, dtype=dtype)) ** 2
    torch.testing.assert_close(found.score[0, :5].double(), expected, rtol=1e-2, atol=0)  # sizes are rounded


def test_products_beyond_all_precisions_are_refused() -> None:
    bank = MemoryBank().double()
    bank.add(torch.tensor([[1e200, 1.0], [1.0, 1e200]], dtype=torch.float64), {})
    with pytest.raises(ValueError, match=r"must fit into float64; keys reach 1e\+200 and queries 2e\+200"):
        bank.search(torch.tensor([[-2e200, 1.0]], dtype=torch.float64), 1)
    assert bank.search(torch.tensor([[1.0, 0.0]]).double(), 1).score.tolist() == [[1e200]]
