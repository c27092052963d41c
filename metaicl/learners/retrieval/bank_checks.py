"""What a memory bank may be given: told early and by name, before anything is changed."""

from collections.abc import Mapping

import torch
from torch import Tensor

from metaicl.learners.retrieval.exclusion import Exclusion


def check_items(
    keys: Tensor, values: Mapping[str, Tensor], ids: Mapping[str, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Row ids (m, R), class ids (m,) or (m, R), and task ids (m,) of new items that are known to fit together.

    Args:
        keys: Floating point (m, K).
        values: Name -> (m, ...).
        ids: "rows" and "classes" (m, R) or (m,), and "tasks" (m,), long; None stands for -1 everywhere.

    Raises:
        TypeError: If something is no tensor or has the wrong dtype, or values have no names.
        ValueError: If a size or a shape does not fit, a name is no Python identifier, or a key is NaN or infinite.
    """
    check_keys("keys", keys)
    if not isinstance(values, Mapping):
        raise TypeError(f"values must be a mapping of names to tensors, perhaps empty; got {type(values).__name__}")
    for name, value in values.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"names of values must be identifiers such as 'x'; got {name!r}")
        _check_tensor(f"values[{name!r}]", value)
    sizes = {"keys": keys, **values}
    if any(value.ndim == 0 or len(value) != len(keys) for value in sizes.values()):
        shapes = {name: tuple(value.shape) for name, value in sizes.items()}
        raise ValueError(f"a bank needs keys (m, K) and everything else for the same m items; got {shapes}")
    rows, classes, tasks = (_ids(name, value, len(keys)) for name, value in ids.items())
    return (rows if rows.ndim == 2 else rows[:, None]), classes, tasks


def check_fit(given: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
    """Hold that new items can stand beside those of a bank.

    Args:
        given: "keys" (m, K), "value_..." (m, ...) and ids, as the buffers of a bank are called.
        here: Keys and values of the bank.

    Raises:
        TypeError: If an integer dtype of the bank cannot hold what is given.
        ValueError: If names or shapes differ, or keys are too large for the precision of the bank.
    """
    shapes = [
        {name: tuple(part[name].shape[1:]) for name in part if not name.endswith("_ids")} for part in (here, given)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(f"items must look like those of the bank, {shapes[0]}; got {shapes[1]}")
    for name, value in here.items():
        new, old = given[name].dtype, value.dtype
        rounds = new.is_floating_point and old.is_floating_point  # to the precision of the bank
        if not rounds and torch.promote_types(new, old) != old:
            raise TypeError(f"{name.removeprefix('value_')} must be {old}, as in the bank; got {new}")
    check_keys("keys", given["keys"], dtype=here["keys"].dtype)


def check_keys(name: str, keys: Tensor, *, dtype: torch.dtype | None = None) -> None:
    """Hold that keys are floating point (m, K), K >= 1, and finite, also in the precision `dtype` if one is given.

    Raises:
        TypeError: If they are no tensor or not floating point.
        ValueError: If they have another number of axes or no numbers, or one is NaN or infinite.
    """
    _check_floating(name, keys)
    if keys.ndim != 2 or keys.shape[1] == 0:
        raise ValueError(f"{name} must be (m, K), one row of K >= 1 numbers for each item; got {tuple(keys.shape)}")
    _check_finite(name, keys, dtype)


def check_lengths(content: Mapping[str, Tensor]) -> None:
    """Hold that keys, values and ids are for the same number of items.

    Raises:
        ValueError: If one is not.
    """
    n_items = len(content["keys"])
    for name, value in content.items():
        if len(value) != n_items:
            raise ValueError(f"{name} are for {len(value)} of {n_items} items")


def check_selected(selected: Tensor, n_items: int) -> Tensor:
    """Numbers, long (any,), of the items that are selected by number or by bool (M,).

    Raises:
        TypeError: If they are neither.
        ValueError: If there is no such item.
    """
    if not isinstance(selected, Tensor):
        raise TypeError(f"selected must be a tensor of item numbers or bool; got {type(selected).__name__}")
    if selected.dtype == torch.bool and selected.shape == (n_items,):
        return selected.nonzero()[:, 0]
    if selected.dtype != torch.long or selected.ndim != 1:
        raise TypeError(
            f"selected must be item numbers, long (any,), or bool ({n_items},); "
            f"got {selected.dtype} {tuple(selected.shape)}"
        )
    if selected.numel() and not 0 <= int(selected.min()) <= int(selected.max()) < n_items:
        raise ValueError(f"selected must be in [0, {n_items}); got {int(selected.min())} .. {int(selected.max())}")
    return selected


def check_queries(queries: Tensor, size: int, *, dtype: torch.dtype) -> None:
    """Hold that queries are floating point (..., Q, K), of the size of the keys and finite in their precision.

    In compiled code values are not looked at; there a query with NaN finds nothing.

    Raises:
        TypeError: If they are no tensor or not floating point.
        ValueError: If their shape does not fit, or one is NaN or infinite.
    """
    _check_floating("queries", queries)
    if queries.ndim < 2:
        raise ValueError(f"queries must be (..., Q, K); got {tuple(queries.shape)}. One query is query[None]")
    if queries.shape[-1] != size:
        raise ValueError(f"queries must have the size of the keys, {size}; got {queries.shape[-1]}")
    if not torch.compiler.is_compiling():
        _check_finite("queries", queries, dtype)


def check_exclusion(exclude: Exclusion | None, leading: tuple[int, ...]) -> None:
    """Hold that excluded ids are long and that their leading axes broadcast to those of the queries.

    Raises:
        TypeError: If it is no Exclusion, or one of its fields is no long tensor.
        ValueError: If the axes do not broadcast.
    """
    if exclude is None:
        return
    if not isinstance(exclude, Exclusion):
        raise TypeError(f"exclude must be an Exclusion or None; got {type(exclude).__name__}")
    for name, ids in zip(Exclusion._fields, exclude, strict=True):
        if ids is None:
            continue
        _check_long(f"exclude.{name}", ids)
        axes = tuple(ids.shape[:-1])
        pairs = zip(axes[::-1], leading[::-1], strict=False)
        if ids.ndim == 0 or len(axes) > len(leading) or any(size not in (1, there) for size, there in pairs):
            raise ValueError(
                f"exclude.{name} must be (..., any), with leading axes that broadcast to those of the queries, "
                f"{leading}; got {tuple(ids.shape)}"
            )


def _ids(name: str, ids: Tensor | None, n_items: int) -> Tensor:
    if ids is None:
        return torch.full((n_items,), -1)
    _check_long(name, ids)
    fits = ids.ndim in ((1,) if name == "tasks" else (1, 2)) and len(ids) == n_items
    if not fits:
        expected = f"({n_items},)" + ("" if name == "tasks" else f" or ({n_items}, R)")
        raise ValueError(f"{name} must be {expected}, for each of the {n_items} keys; got {tuple(ids.shape)}")
    return ids


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")


def _check_long(name: str, ids: Tensor) -> None:
    _check_tensor(name, ids)
    if ids.dtype != torch.long:
        raise TypeError(f"{name} must be long ids, -1 for none; got {ids.dtype}")


def _check_floating(name: str, value: Tensor) -> None:
    _check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point; got {value.dtype}")


def _check_finite(name: str, value: Tensor, dtype: torch.dtype | None) -> None:
    if not value.numel():
        return
    # NaN wins both; unlike isfinite(), it takes no memory. Rounding keeps the order, so the ends tell for all.
    low, high = (end if dtype is None else end.to(dtype) for end in value.detach().aminmax())
    if not bool(low.isfinite() & high.isfinite()):
        bad = (~value.to(dtype or value.dtype).isfinite()).flatten(0, -2).any(1).nonzero()[:, 0]
        raise ValueError(f"{name} must be finite; {len(bad)} rows hold NaN or Inf, the first is row {int(bad[0])}")
