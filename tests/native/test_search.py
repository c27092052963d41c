"""The kernel that searches finds what sorting all inner products finds."""

import pytest
import torch
from torch import Tensor

from metaicl.learners.retrieval.exact_search import best_in_order
from metaicl.learners.retrieval.exclusion import PairMask
from metaicl.native import without_kernels
from metaicl.native.library import load
from metaicl.native.search import best_products

pytestmark = pytest.mark.skipif(load("search") is None, reason="no C compiler")


def whole(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers, whose products are exact in any order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_size_and_any_number_of_threads(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    sizes = [(1, 1, 1, 1), (3, 39, 7, 5), (20, 40, 8, 30), (21, 41, 9, 2), (64, 333, 33, 32), (5, 2000, 3, 10)]
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for seed, (n_queries, n_keys, size, k) in enumerate(sizes):
                queries, keys = (whole(n, size, seed=seed + n, dtype=dtype) for n in (n_queries, n_keys))
                found = best_products(queries, keys, k)
                expected = best_in_order(queries @ keys.T, k)
                assert found is not None
                assert torch.equal(found[0], expected.score)
                assert torch.equal(found[1], expected.index), "of equal scores the first"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.97])
def test_excluded_keys(share: float) -> None:
    queries, keys = whole(17, 6, seed=0), whole(90, 6, seed=1)
    excluded = torch.rand(17, 90, generator=torch.Generator().manual_seed(2)) < share
    query, item = excluded.nonzero(as_tuple=True)
    again = torch.cat([query, query[:5]]), torch.cat([item, item[:5]])  # a pair may occur twice
    found = best_products(queries, keys, 12, PairMask(*again).by_query(17))
    expected = best_in_order((queries @ keys.T).masked_fill(excluded, -torch.inf), 12)
    assert found is not None
    assert torch.equal(found[0], expected.score)
    real = expected.score > -torch.inf
    assert torch.equal(found[1][real], expected.index[real])


def test_rising_scores_and_keys_that_lie_anywhere() -> None:
    keys = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0)).abs().sort(0).values
    queries = torch.ones(2, 5)
    shifted = torch.cat([torch.zeros(1), keys.flatten()])[1:].view(1000, 5)  # at no whole vector
    for given in (keys, shifted, keys.T.contiguous().T):
        found = best_products(queries, given, 3)
        assert found is not None
        assert found[1].tolist() == [[999, 998, 997]] * 2


def test_a_score_does_not_depend_on_who_else_is_there() -> None:
    source = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(30, 19, generator=source), torch.randn(200, 19, generator=source)
    together = best_products(queries, keys, 32)
    assert together is not None
    for row, place in ((0, 0), (7, 3), (29, 31)):
        item = int(together[1][row, place])
        alone = best_products(queries[row : row + 1], keys[item : item + 1], 1)
        assert alone is not None
        assert float(alone[0]) == float(together[0][row, place])


def test_what_is_left_to_torch() -> None:
    keys = torch.randn(300, 4)
    assert best_products(keys, keys, 33) is None
    assert best_products(keys[:1], keys.repeat(100, 1), 58) is not None
    assert best_products(keys[:1], keys.repeat(100, 1), 59) is None
    assert best_products(keys, keys.double(), 1) is None
    assert best_products(keys.half(), keys.half(), 1) is None
    assert best_products(keys[:0], keys, 1) is None
    with without_kernels():
        assert best_products(keys, keys, 1) is None
