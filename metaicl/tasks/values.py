"""Numbers as users have them, turned into finite rows."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaicl.tasks.columns import check_features, frame_columns, to_matrix


class Inputs(NamedTuple):
    """The rows of an array or a data frame, before anything is fitted to them.

    Attributes:
        shape: (rows, D), or (rows, channels, height, width) of images.
        columns: What a message calls each of the D columns; nothing for images.
        rows: Finite inputs (rows, ...), given the bool (rows,) of those whose statistics may be used: float64, or
            images as uint8 or float32.
    """

    shape: tuple[int, ...]
    columns: list[Hashable]
    rows: Callable[[np.ndarray], np.ndarray]


def read_inputs(x: Any) -> Inputs:
    """Read anything that holds numbers; uint8 images stay what they are.

    Raises:
        TypeError: If it is no array of numbers, or holds images that are neither uint8 nor floating point.
        ValueError: If it has another shape, a value is missing or not finite, or a pixel lies outside [0, 1].
    """
    if isinstance(x, Mapping) or hasattr(x, "columns"):
        columns = frame_columns(x)
        check_features(columns)
        shape = to_matrix(columns).shape
        return Inputs(shape, list(columns), lambda fit_rows: finite(to_matrix(columns, fit_rows), "x"))
    array = _as_array(x, "x")
    if array.ndim not in (2, 4) or 0 in array.shape:
        hint = "; gray images become that by x[:, None]" if array.ndim == 3 else ""
        raise ValueError(
            f"x must be (rows, D) or (rows, channels, height, width), none of them 0; got {array.shape}{hint}"
        )
    if array.ndim == 4 and array.shape[3] in (1, 3, 4) and min(array.shape[1:3]) > 4:
        raise ValueError(
            f"x must be (rows, channels, height, width); got {array.shape}, whose channels look last. "
            "np.moveaxis(x, 3, 1) puts them first"
        )
    rows = _pixels(array, "x") if array.ndim == 4 else finite(array.astype(np.float64), "x")
    return Inputs(rows.shape, list(range(rows.shape[1])) if rows.ndim == 2 else [], lambda _: rows)


def to_numbers(values: Any, name: str) -> np.ndarray:
    """A float64 array of anything that holds numbers.

    Raises:
        TypeError: If it holds objects, text or complex numbers, or is sparse.
        ValueError: If it is a ragged list, or a value is masked.
    """
    return _as_array(values, name).astype(np.float64)


def finite(array: np.ndarray, name: str) -> np.ndarray:
    """Return `array` if every value is finite.

    Raises:
        ValueError: If one is not; the message counts them and names the first.
    """
    bad = ~np.isfinite(array)
    if bad.any():
        first = tuple(np.argwhere(bad)[0].tolist())
        raise ValueError(
            f"{name} must be finite; {int(bad.sum())} values are NaN or infinite, the first at index {first}"
        )
    return array


def refuse_masked(values: Any, name: str) -> None:
    """Refuse masked arrays of NumPy that hide a value, and lists of such: what is under a mask is no data.

    Raises:
        ValueError: If a value is masked; the message counts them and names the first.
    """
    rows = enumerate(values) if isinstance(values, (list, tuple)) else [(None, values)]
    places = [
        tuple(place) if i is None else (i, *place)
        for i, row in rows
        if isinstance(row, np.ma.MaskedArray)
        for place in np.argwhere(np.ma.getmaskarray(row)).tolist()
    ]
    if places:
        raise ValueError(
            f"{name} must not be missing; {len(places)} values are masked, the first at index {places[0]}. Fill them, "
            "or leave their rows out"
        )


def _as_array(values: Any, name: str) -> np.ndarray:
    """Numbers of any kind; raises as `to_numbers`."""
    refuse_masked(values, name)
    if isinstance(values, Tensor) and values.layout == torch.strided:
        values = values.detach().cpu()
        values = values.double().numpy() if values.is_floating_point() else values.numpy()
    elif isinstance(values, Tensor) or hasattr(values, "toarray"):
        method = "to_dense" if isinstance(values, Tensor) else "toarray"
        raise TypeError(f"{name} must be a dense array; got a sparse one. {name}.{method}() makes it dense")
    try:
        array = np.asarray(values)
    except ValueError as error:
        lengths = [len(row) if hasattr(row, "__len__") else 1 for row in values]
        odd = next((i for i, length in enumerate(lengths) if length != lengths[0]), None)
        hint = "its rows differ inside" if odd is None else f"row {odd} has length {lengths[odd]}, row 0 {lengths[0]}"
        raise ValueError(f"{name} must be rectangular; {hint}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"{name} must be an array of numbers; got {array.dtype}. {name}.astype(float) if it holds numbers"
        )
    return array


def _pixels(array: np.ndarray, name: str) -> np.ndarray:
    """Images, a copy: uint8, or float32 in [0, 1]; what is accepted is what `ImageClasses` accepts."""
    if array.dtype == np.uint8:
        return array.copy()
    if array.dtype.kind in "iu":
        raise TypeError(
            f"{name} must be uint8 or floating point where it holds images; got {array.dtype}. "
            f"Values 0 .. 255: np.asarray({name}).astype(np.uint8); others: divide them by the largest possible one"
        )
    low, high = float(finite(array, name).min()), float(array.max())
    if low < 0 or high > 1:
        raise ValueError(
            f"{name} must lie in [0, 1] where it holds floating point images; got values in [{low:g}, {high:g}]. "
            "Divide by 255, or pass uint8; standardize inside the network"
        )
    return array.astype(np.float32)
