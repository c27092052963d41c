"""Episodes: shapes, masks, collation, fingerprints, pytrees."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metaicl.checks import check_episode
from metaicl.collation import collate, concatenate
from metaicl.episode import Episode, Examples
from metaicl.spec import TaskSpec

REGRESSION = TaskSpec("regression", (3,), y_dim=1)
CLASSIFICATION = TaskSpec("classification", (3,), n_way=2)


def rows(b: int = 2, n: int = 4, *, mask: bool = False, ids: bool = False, labels: bool = False) -> Examples:
    generator = torch.Generator().manual_seed(b * 100 + n)
    x = torch.randn(b, n, 3, generator=generator)
    y = (torch.arange(n) % 2).expand(b, n) if labels else torch.randn(b, n, 1, generator=generator)
    real = torch.ones(b, n, dtype=torch.bool) if mask else None
    return Examples(x, y, real, torch.arange(b * n).view(b, n) if ids else None)


def episode(b: int = 2, n: int = 4, q: int = 3, **options: bool) -> Episode:
    return Episode(rows(b, n, **options), rows(b, q, **options), {"w": torch.arange(float(b))[:, None]})


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans())
def test_collate_undoes_indexing(b: int, n: int, q: int, mask: bool, ids: bool) -> None:
    whole = episode(b, n, q, mask=mask, ids=ids)
    assert collate([whole[i] for i in range(b)]).fingerprint() == whole.fingerprint()
    assert collate(list(whole)).fingerprint() == whole.fingerprint()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_ragged_parts_are_padded_and_masked(lengths: list[int]) -> None:
    joined = collate([episode(1, n, 2) for n in lengths])
    assert joined.support.real.sum(1).tolist() == lengths
    for i, n in enumerate(lengths):
        assert torch.equal(joined.support.x[i, :n], rows(1, n).x[0])
        assert bool((joined.support.x[i, n:] == 0).all())


def test_ids_of_one_part_outlive_joining_with_parts_that_have_none() -> None:
    named, nameless = rows(ids=True), rows()
    joined = concatenate(named, nameless).ids
    assert joined is not None
    assert joined.tolist() == [[0, 1, 2, 3] + [-1] * 4, [4, 5, 6, 7] + [-1] * 4]
    found = collate([episode(1, 2, ids=True), episode(1, 2)]).support.ids
    assert found is not None
    assert found.tolist() == [[0, 1], [-1, -1]]
    assert concatenate(nameless, nameless).ids is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Examples(torch.zeros(1, 4, 3), torch.zeros(1, 4, 2)), "collate needs y of rows of one shape and dtype"),
        (Examples(torch.zeros(1, 4, 3), torch.zeros(1, 4).long()), "collate needs y of rows of one shape and dtype"),
        (Examples(torch.zeros(1, 4, 2), torch.zeros(1, 4, 1)), "collate needs x of rows of one shape and dtype"),
        (
            Examples(torch.zeros(1, 4, 3).double(), torch.zeros(1, 4, 1)),
            r"got \['\(3,\) torch.float32', '\(3,\) torch.f",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(other: Examples, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate([episode(1), Episode(other, other)])
    if other.x.dtype == torch.float32:
        with pytest.raises(ValueError, match=r"concatenate needs . of one shape but for the rows"):
            concatenate(rows(1), other)
    with pytest.raises(ValueError, match=r"concatenate needs x of one shape .* got \(2, 4, 3\), \(1, 4, 3\)"):
        concatenate(rows(2), rows(1))


def test_an_episode_equals_itself_alone() -> None:
    one = episode()
    assert one == one
    assert one != episode()
    assert one.support != episode().support
    assert len({one, episode(), one.support}) == 3


def test_fingerprints_see_every_value_shape_and_type() -> None:
    base = episode(ids=True)
    assert base.fingerprint() == episode(ids=True).fingerprint()
    changed = base.support.y.clone()
    changed[1, 2] += 1e-6
    others = [
        dataclasses.replace(base, support=dataclasses.replace(base.support, y=changed)),
        dataclasses.replace(base, latents={}),
        dataclasses.replace(base, support=dataclasses.replace(base.support, ids=None)),
        base.to(dtype=torch.float64),
        base[:1],
    ]
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 6


def test_a_fingerprint_does_not_see_strides() -> None:
    x, y = torch.arange(6.0).view(1, 2, 3), torch.arange(2.0).view(1, 2, 1)
    column = torch.arange(2.0).view(1, 1, 2).mT  # contiguous, and yet its last stride is 2
    assert column.stride(-1) == 2
    part, other = Examples(x, y), Examples(x.mT.contiguous().mT, column)
    assert Episode(part, part).fingerprint() == Episode(other, other).fingerprint()


def test_a_fingerprint_is_the_same_for_ever() -> None:
    part = Examples(torch.tensor([[[1.0, -2.5]]]), torch.tensor([[1]]))
    assert Episode(part, part).fingerprint().startswith("e6461e5423970eba")


def test_pytrees_pass_through_vmap_and_compile() -> None:
    whole = episode(3, mask=True)
    per_task = torch.vmap(lambda one: one.support.x.sum() + one.query.y.sum() + one.latents["w"].sum())(whole)
    expected = whole.support.x.sum((1, 2)) + whole.query.y.sum((1, 2)) + whole.latents["w"].sum(1)
    torch.testing.assert_close(per_task, expected)

    @torch.compile(fullgraph=True, backend="eager")
    def joined(one: Episode) -> torch.Tensor:
        return concatenate(one.support, one.query).x.sum((1, 2))

    torch.testing.assert_close(joined(whole), whole.support.x.sum((1, 2)) + whole.query.x.sum((1, 2)))


def test_to_casts_numbers_and_leaves_labels() -> None:
    moved = episode(labels=True, mask=True, ids=True).to("cpu", torch.float64)
    assert (moved.support.x.dtype, moved.latents["w"].dtype) == (torch.float64, torch.float64)
    assert (moved.support.y.dtype, moved.support.mask.dtype, moved.support.ids.dtype) == (
        torch.long,
        torch.bool,
        torch.long,
    )


def test_indexing_keeps_the_task_axis() -> None:
    whole = episode(3)
    assert whole[1].n_tasks == whole[-1].n_tasks == 1
    assert torch.equal(whole[torch.tensor([2, 0])].support.x, whole.support.x[[2, 0]])
    assert len(list(whole)) == 3
    with pytest.raises(IndexError, match=r"task index must be in \[-3, 3\); got 3"):
        whole[3]


@pytest.mark.parametrize("labels", [False, True])
def test_one_row_keeps_the_row_axis(labels: bool) -> None:
    whole = rows(3, 4, mask=True, ids=True, labels=labels)
    for index in (1, -3, np.int64(1), torch.tensor(1)):
        one = whole.rows(index)  # type: ignore[arg-type]  # NumPy's integers are
        assert one.x.shape == (3, 1, 3)
        for name in ("x", "y", "mask", "ids"):
            assert torch.equal(getattr(one, name), getattr(whole, name)[:, 1:2])
    assert torch.equal(whole.rows(torch.tensor([2, 0])).x, whole.x[:, [2, 0]])
    for index in (4, -5):
        with pytest.raises(IndexError, match=rf"row index must be in \[-4, 4\); got {index}"):
            whole.rows(index)


X, Y = torch.zeros(2, 5, 3), torch.zeros(2, 5, 1)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Examples(X, Y[:, :4]), ValueError, r"Examples.y must start with \(B, N\) = \(2, 5\), .* got \(2, 4\)"),
        (lambda: Examples(X.numpy(), Y), TypeError, "must be tensors; got ndarray"),
        (lambda: Examples(X, Y, torch.ones(2, 5)), TypeError, "mask must be bool"),
        (lambda: Examples(X, Y, torch.ones(2, 4).bool()), ValueError, "mask must start with"),
        (lambda: Examples(X, Y, None, torch.ones(2, 5).int()), TypeError, "ids must be long"),
        (lambda: Examples(X, Y).pad(3), ValueError, "at least N = 5; got 3"),
        (lambda: Episode(Examples(X, Y), Examples(X[:1], Y[:1])), ValueError, "as many tasks"),
        (lambda: Episode(Examples(X, Y), Examples(torch.zeros(2, 5, 4), Y)), ValueError, r"shape \(3,\); got \(4,\)"),
        (lambda: Episode(Examples(X, Y), Examples(X, Y), {"w": torch.zeros(3)}), ValueError, "task axis B = 2"),
        (lambda: Episode(rows(), rows(), {"a": 3.0}), TypeError, r"latents\['a'\] must be a tensor; got float"),
        (lambda: Episode(rows(), rows(), {"a": np.ones(2)}), TypeError, "must be a tensor; got ndarray"),
        (lambda: collate([]), ValueError, "at least one episode"),
        (lambda: TaskSpec("regression", (3,)), ValueError, "needs y_dim >= 1"),
        (lambda: TaskSpec("classification", (3,), n_way=1), ValueError, "needs n_way >= 2"),
        (lambda: TaskSpec("ranking", (3,), y_dim=1), ValueError, "must be 'regression' or 'classification'"),
        (lambda: TaskSpec("regression", (3, 3), y_dim=1), ValueError, "must have 1 positive sizes"),
        (lambda: TaskSpec("regression", 3, y_dim=1), TypeError, "must be a tuple, the shape of one row; got 3"),
        (lambda: TaskSpec("regression", (3,), x_kind="tokens", y_dim=1), ValueError, "which needs one, .*; got None"),
    ],
)  # fmt: skip
def test_bad_shapes_are_named(make, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def with_rows(spec: TaskSpec, **changes: torch.Tensor) -> Episode:
    base = rows(labels=spec.kind == "classification")
    return Episode(dataclasses.replace(base, **changes), base)


NAN = torch.zeros(2, 4, 3)
NAN[1, 2, 0] = float("nan")


@pytest.mark.parametrize(
    ("spec", "changes", "kind", "message"),
    [
        (CLASSIFICATION, {"y": torch.tensor([[0, 1, 2, 0]] * 2)}, ValueError, r"labels in \[0, n_way=2\); got \[2\]"),
        (CLASSIFICATION, {"y": torch.tensor([[0, 1, -100, 0]] * 2)}, ValueError, "mark rows to ignore in mask"),
        (CLASSIFICATION, {"y": torch.zeros(2, 4, dtype=torch.long)}, ValueError, "class 1 of task 0 has 0"),
        (CLASSIFICATION, {"y": torch.zeros(2, 4)}, TypeError, "must be long class indices"),
        (CLASSIFICATION, {"y": torch.zeros(2, 4, 2)}, TypeError, r"\.argmax\(-1\)"),
        (CLASSIFICATION, {"x": NAN}, ValueError, "1 rows hold NaN or Inf, the first at task 1, row 2"),
        (CLASSIFICATION, {"x": torch.zeros(2, 4, 3, dtype=torch.long)}, TypeError, "must be floating point"),
        (REGRESSION, {"y": torch.zeros(2, 4, 2)}, ValueError, "y_dim=1"),
        (REGRESSION, {"y": NAN[..., :1]}, ValueError, "y must be finite"),
        (REGRESSION, {"mask": torch.zeros(2, 4).bool()}, ValueError, "at least one real row"),
    ],
)
def test_bad_values_are_named(spec: TaskSpec, changes, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        check_episode(with_rows(spec, **changes), spec)


def test_masked_rows_may_hold_anything() -> None:
    mask = torch.tensor([[True, True, True, True], [True, True, False, True]])
    check_episode(with_rows(CLASSIFICATION, x=NAN, mask=mask), CLASSIFICATION)
