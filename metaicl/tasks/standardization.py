"""Columns of numbers brought to zero mean and unit variance, whatever their offset and scale."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDING = 4 * np.finfo(np.float64).eps  # columns that vary by less, as a share of their largest value, are constant


@dataclass(frozen=True)
class Standardization:
    """How to shift and scale the columns of a matrix, fitted to some of its rows.

    A column is first divided by a power of two and shifted by one of its own values. Both are without rounding where
    it matters, so that neither squares overflow nor a large offset (a time in milliseconds) takes the digits.

    Args:
        exponent: int (columns,), of the power of two; it brings the fitted values into [-1, 1].
        origin: (columns,), the value that is subtracted, after the division.
        center: (columns,), the mean of what is left.
        spread: (columns,), its standard deviation; 1 in the units of the column if it is constant.
        constant: bool (columns,), whether the fitted values are the same up to the rounding of float64.
    """

    exponent: np.ndarray
    origin: np.ndarray
    center: np.ndarray
    spread: np.ndarray
    constant: np.ndarray

    @classmethod
    def fit(cls, rows: np.ndarray) -> "Standardization":
        """Fit to float64 (rows, columns), at least one row; NaN = missing, and a column of NaN alone is constant."""
        there = ~np.isnan(rows)
        filled = np.where(there, rows, 0)
        exponent = np.frexp(np.abs(filled).max(0))[1]
        first = there.argmax(0), np.arange(rows.shape[1])
        moved = np.where(there, np.ldexp(filled, -exponent) - np.ldexp(filled[first], -exponent), 0)
        constant = np.abs(moved).max(0) <= _ROUNDING
        exponent = np.where(constant, 0, exponent)
        count = np.maximum(there.sum(0), 1)
        center = moved.sum(0) / count
        spread = np.sqrt(np.where(there, (moved - center) ** 2, 0).sum(0) / count)
        center, spread = np.where(constant, 0, center), np.where(constant, 1, spread)
        return cls(exponent, np.ldexp(filled[first], -exponent), center, spread, constant)

    @classmethod
    def identity(cls, n_columns: int) -> "Standardization":
        """One that changes nothing."""
        zeros = np.zeros(n_columns)
        return cls(zeros.astype(int), zeros, zeros, np.ones(n_columns), np.zeros(n_columns, dtype=bool))

    @property
    def is_identity(self) -> bool:
        """Whether nothing is changed, as by `identity`; a column that is fitted is constant or gets another unit."""
        changed = self.constant | (self.exponent != 0) | (self.origin != 0) | (self.center != 0) | (self.spread != 1)
        return not changed.any()

    @property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (columns,) of the fitted rows; 1 for a constant column."""
        return np.ldexp(self.origin + self.center, self.exponent), np.ldexp(self.spread, self.exponent)

    def apply(self, rows: np.ndarray, name: str, columns: Sequence[Hashable] | None = None) -> np.ndarray:
        """Standardize float64 (rows, columns); float32, NaN stays.

        Args:
            rows: The fitted rows or others.
            name: What a message calls them.
            columns: What a message calls their columns; by default their numbers.

        Raises:
            ValueError: If a value is beyond float32 in units of a standard deviation of the fitted rows, or as it is
                where nothing is changed.
        """
        with np.errstate(over="ignore"):  # which is told below
            scaled = (np.ldexp(rows, -self.exponent) - self.origin - self.center) / self.spread
        beyond = ~np.isnan(rows) & ~(np.abs(scaled) <= np.finfo(np.float32).max)
        if beyond.any():
            row, column = np.argwhere(beyond)[0].tolist()
            called, value = column if columns is None else columns[column], f"row {row} is {rows[row, column]:.3g}"
            if self.is_identity:
                raise ValueError(
                    f"column {called!r} of {name} must fit into float32; {value}. Divide it by a number, or leave out "
                    "standardize=False"
                )
            raise ValueError(
                f"column {called!r} of {name} must fit into float32 once it is standardized; its standard deviation "
                f"over the meta-train rows is {self.moments[1][column]:.3g}, and {value}. Take its logarithm, leave it "
                "out, or pass standardize=False"
            )
        return scaled.astype(np.float32)
