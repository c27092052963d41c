"""The kernel that gathers rows gives what torch gives, to the bit."""

import pytest
import torch

from metaicl.native import without_kernels
from metaicl.native.gather import scaled_rows
from metaicl.native.library import load


@pytest.mark.parametrize("shape", [(300,), (300, 1), (300, 7, 9), (40, 2, 64, 33)])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 500])
def test_rows_are_those_of_torch(shape: tuple[int, ...], count: int) -> None:
    source = torch.Generator().manual_seed(0)
    table = torch.randint(256, shape, dtype=torch.uint8, generator=source)
    rows = torch.randint(len(table), (count,), generator=source)
    found = scaled_rows(table, rows, 1 / 255)
    with without_kernels():
        expected = scaled_rows(table, rows, 1 / 255)
    assert torch.equal(found, expected)
    assert found.shape == (count, *shape[1:])
    strided = torch.stack([table, 255 - table], -1)[..., 0]
    assert torch.equal(scaled_rows(strided, rows, 1 / 255), expected)


@pytest.mark.skipif(load("gather") is None, reason="no C compiler")
def test_any_number_of_threads_and_every_byte() -> None:
    table = torch.arange(256, dtype=torch.uint8).repeat(500, 3)
    rows = torch.arange(499, -1, -1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = scaled_rows(table, rows, 1 / 255)
            assert torch.equal(found[7, :256], torch.arange(256).float().mul(1 / 255))
            assert torch.equal(found[0], found[-1])
            assert float(found.max()) == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("row", [-1, 4])
def test_a_row_that_is_not_there_is_an_error(row: int) -> None:
    with pytest.raises(IndexError, match="out of range"):
        scaled_rows(torch.zeros(4, 3, dtype=torch.uint8), torch.tensor([0, row]), 1.0)
