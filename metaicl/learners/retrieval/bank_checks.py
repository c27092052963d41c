"""What a memory bank may be given: told early and by name, before anything is changed."""

from collections.abc import Mapping

import torch
from torch import Tensor

from metaicl.learners.retrieval.exclusion import Exclusion


def check_items(
    keys: Tensor, values: Mapping[str, Tensor], ids: Mapping[str, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Row ids (m, R), class ids (m,) and task ids (m,) of new items, once everything is known to fit together.

    Args:
        keys: Floating point (m, K).
        values: Name -> (m, ...).
        ids: "rows" (m, R) or (m,), "classes" (m,) and "tasks" (m,), long; None stands for -1 everywhere.

    Raises:
        TypeError: If something is no tensor or has the wrong dtype.
        ValueError: If a size or a shape does not fit, or a key is NaN or infinite.
    """
    check_keys("keys", keys)
    for name, value in values.items():
        _check_tensor(f"values[{name!r}]", value)
    sizes = {"keys": keys, **values}
    if any(value.ndim == 0 or len(value) != len(keys) for value in sizes.values()):
        shapes = {name: tuple(value.shape) for name, value in sizes.items()}
        raise ValueError(f"a bank needs keys (m, K) and everything else for the same m items; got {shapes}")
    rows, classes, tasks = (_ids(name, value, len(keys)) for name, value in ids.items())
    return (rows if rows.ndim == 2 else rows[:, None]), classes, tasks


def check_keys(name: str, keys: Tensor) -> None:
    """Hold that keys are floating point (m, K) and finite.

    Raises:
        TypeError: If they are no tensor or not floating point.
        ValueError: If they have another number of axes, or one is NaN or infinite.
    """
    _check_floating(name, keys)
    if keys.ndim != 2:
        raise ValueError(f"{name} must be (m, K), one row for each item; got {tuple(keys.shape)}")
    _check_finite(name, keys)


def check_queries(queries: Tensor, size: int) -> None:
    """Hold that queries are floating point (..., Q, K), of the size of the keys and finite.

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
        _check_finite("queries", queries)


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
    fits = ids.ndim in ((1, 2) if name == "rows" else (1,)) and len(ids) == n_items
    if not fits:
        expected = f"({n_items},)" + (f" or ({n_items}, R)" if name == "rows" else "")
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


def _check_finite(name: str, value: Tensor) -> None:
    if not value.numel():
        return
    low, high = value.detach().aminmax()  # NaN wins both; unlike isfinite(), it takes no memory
    if not bool(low.isfinite() & high.isfinite()):
        bad = (~value.isfinite()).flatten(0, -2).any(1).nonzero()[:, 0]
        raise ValueError(f"{name} must be finite; {len(bad)} rows hold NaN or Inf, the first is row {int(bad[0])}")
