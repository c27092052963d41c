"""Names for rows by what they hold, for where no source gives them one, and arbitrary keys for names."""

import torch
from torch import Tensor

from metaicl.functional import unit_rows
from metaicl.spec import TaskSpec

_PRECISIONS = {torch.bfloat16: 1, torch.float16: 2}  # rows that rounding made alike are no copies of any other row


def content_ids(x: Tensor, spec: TaskSpec) -> Tensor:
    """A 63-bit hash of the content of each row: equal rows have equal ids, on every machine and device.

    It is the id of a row whose source names none, and how a learner that is shown inputs only keeps a query from
    retrieving its own row or a copy of it. Numbers are compared as float32, so that a row keeps its id in float64; in
    half precision it has another one, see `ids_in_all_precisions`. 0.0 and -0.0 are equal. Padding at the end of a text
    (id 0) changes nothing. Two different rows share an id with a probability of about 2**-63; one of them is then
    excluded in vain.

    Args:
        x: Rows (..., *x_shape) with any leading axes.
        spec: Their kind and shape.

    Returns:
        Long (...,), at least 0.

    Raises:
        ValueError: If x does not end in `spec.x_shape`.
    """
    rank = len(spec.x_shape)
    if x.shape[x.ndim - rank :] != spec.x_shape:
        raise ValueError(f"content_ids needs rows of shape {spec.x_shape} at the end of x; got {tuple(x.shape)}")
    values = x.detach().flatten(x.ndim - rank)
    if spec.x_kind == "tokens":
        words = _mixed(values) * (values != 0)
    else:
        # Adding 0.0 turns -0.0 into 0.0; the others keep their bits.
        words = _mixed((values.to(torch.float32) + 0.0).view(torch.int32).long() + 1)
    places = _mixed(torch.arange(1, values.shape[-1] + 1, device=x.device)) | 1
    return hashed((words * places).sum(-1) + _PRECISIONS.get(x.dtype, 0))


def ids_in_all_precisions(x: Tensor, spec: TaskSpec) -> Tensor:
    """The ids that rows have as they are and once they are rounded to half precision, long (..., P).

    A memory that is filled with these finds the row of a query in any precision that the learner is cast to later,
    because both are then rounded alike. P is 1 for tokens and 3 for numbers.

    Args:
        x: Rows (..., *x_shape) with any leading axes, in the precision they come in.
        spec: Their kind and shape.
    """
    versions = [x] if spec.x_kind == "tokens" else [x.float(), x.bfloat16(), x.half()]
    return torch.stack([content_ids(version, spec) for version in versions], -1)


def hashed(value: Tensor) -> Tensor:
    """Integers as hashes of 63 bits, long (...), at least 0: the same ones on every machine and device."""
    return _mixed(value) & (2**63 - 1)


def arbitrary_keys(ids: Tensor, dtype: torch.dtype, *, size: int = 32) -> Tensor:
    """Unit vectors (..., K) that say nothing about the ids, but are the same for the same id.

    A search with them retrieves at random without a random state. Their directions are evenly spread.

    Args:
        ids: long (...).
        dtype: Of the keys.
        size: K.
    """
    places = torch.arange(1, size + 1, device=ids.device)
    bits = _mixed(_mixed(ids)[..., None] + places)
    uniform = (_shifted(bits, 12).double() + 0.5) / 2**52  # in (0, 1), ends excluded
    return unit_rows(torch.special.ndtri(uniform).to(dtype))


def _mixed(value: Tensor) -> Tensor:
    """A bijection on 64-bit integers that scatters them (Steele, Lea & Flood, 2014: the finalizer of SplitMix)."""
    value = value * -7046029254386353131  # the golden ratio times 2**64, as a signed number
    value = (value ^ _shifted(value, 30)) * -4658895280553007687
    value = (value ^ _shifted(value, 27)) * -7723592293110705685
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: the sign bit moves, too."""
    return (value >> bits) & (2 ** (64 - bits) - 1)
