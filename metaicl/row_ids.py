"""What is known of source rows by their number, such as the class of each: looked up for rows of episodes."""

from torch import Tensor

from metaicl.episode import Examples


def look_up(table: Tensor, rows: Examples) -> Tensor:
    """The entry of each row in a table over source rows: long (B, N), -1 where there is none.

    Args:
        table: long (rows of the source,), -1 where nothing is known; perhaps empty.
        rows: Rows (B, N); masked rows, rows without an id and rows that the table does not reach have no entry.
    """
    if rows.ids is None or not len(table):
        return table.new_full(rows.real.shape, -1)
    known = rows.real & (rows.ids >= 0) & (rows.ids < len(table))
    return table[rows.ids.clamp(0, len(table) - 1)].masked_fill(~known, -1)
