"""A memory of keys and values: search by inner product, with rows, classes and tasks that must not be found."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaicl.checks import check_choice, check_count
from metaicl.learners.retrieval.bank_checks import (
    check_exclusion,
    check_fit,
    check_items,
    check_keys,
    check_lengths,
    check_queries,
    check_selected,
)
from metaicl.learners.retrieval.bank_search import BankSearch
from metaicl.learners.retrieval.exclusion import Exclusion
from metaicl.sealed_files import SealedFormat

BACKENDS = ("exact", "faiss-flat", "faiss-ivf", "faiss-hnsw")
_IDS = ("row_ids", "class_ids", "task_ids")
_PREFIX = "value_"


class CorruptBankError(RuntimeError):
    """The file is not what `MemoryBank.save` wrote, or was changed since."""


_FORMAT = SealedFormat("bank", 1, damaged=CorruptBankError, incompatible=CorruptBankError)


class Found(NamedTuple):
    """What a search brought, best first.

    Attributes:
        index: long (..., k), item numbers; 0 where `real` is False.
        score: (..., k), inner products, in float32 for keys in half precision and in float64 where that might overflow;
            -inf where `real` is False.
        real: bool (..., k), False where fewer than k items are allowed.
    """

    index: Tensor
    score: Tensor
    real: Tensor


class MemoryBank(nn.Module):
    """Items with a key, named values and ids, and a search over the keys.

    An item is what one retrieval brings: a row, a group of rows, a passage, a task. Everything is a buffer, so it
    moves with the module and is saved with it; loading takes whatever size was saved.

    The exact search of 256 queries among 1,000,000 keys of size 128 took .72 s on one core with AVX-512, 7.7 times as
    fast as faiss's flat index beside it; the bank held 519 MiB, and the search less than one more
    (`recipes/peers/search.py`).

    Args:
        backend: "exact" (every key is looked at, the default), or an index of faiss (extra `retrieval`):
            "faiss-flat" (exact), "faiss-ivf" (cells), "faiss-hnsw" (a graph).
        chunk: Items compared at once by the exact search; bounds memory.
        breadth: How much an approximate index looks at: cells of IVF (of about 4 sqrt(M)), candidates of HNSW. More
            is slower and finds more.

    Attributes:
        keys: (M, K), what the search compares by inner product.
        row_ids: long (M, R), the source rows that an item holds, -1 = none.
        class_ids: long (M,), its source class, -1 = none; (M, R) once an item was given several.
        task_ids: long (M,), its task, -1 = none.
    """

    keys: Tensor
    row_ids: Tensor
    class_ids: Tensor
    task_ids: Tensor
    takes_any_buffer = True  # see metaicl.checkpoint.load_weights: names of values are data, not architecture

    def __init__(self, *, backend: str = "exact", chunk: int = 16_384, breadth: int = 64) -> None:
        """Start empty; `add` gives it items."""
        super().__init__()
        self.backend = check_choice("backend", backend, BACKENDS)
        self.chunk = check_count("chunk", chunk)
        self.breadth = check_count("breadth", breadth)
        self.register_buffer("keys", torch.empty(0, 0))
        self.clear()

    def __len__(self) -> int:
        """M, the number of items."""
        return self.keys.shape[0]

    @property
    def values(self) -> Mapping[str, Tensor]:
        """The values (M, ...) by name."""
        return {name.removeprefix(_PREFIX): getattr(self, name) for name in self._value_names()}

    def add(
        self,
        keys: Tensor,
        values: Mapping[str, Tensor],
        *,
        rows: Tensor | None = None,
        classes: Tensor | None = None,
        tasks: Tensor | None = None,
    ) -> None:
        """Append items. Each call copies the whole bank: add many at once.

        The first items of an empty bank fix the names, shapes and dtypes. Nothing is changed by a call that fails.

        Args:
            keys: (m, K), K >= 1.
            values: Name -> (m, ...).
            rows: long (m, R) or (m,), ids of the source rows that an item holds, -1 = none.
            classes: long (m,), source class, -1 = none; or (m, R), where the rows of an item are of several.
            tasks: long (m,), task, -1 = none.

        Raises:
            TypeError: If something is no tensor, keys are not floating point, ids are not long, or the dtype that a
                value has in the bank cannot hold what is given.
            ValueError: If sizes, names or shapes do not fit each other or what is there, or a key is not finite in the
                precision of the bank.
        """
        rows, *others = check_items(keys, values, {"rows": rows, "classes": classes, "tasks": tasks})
        given = {"keys": keys, **{_PREFIX + name: value for name, value in values.items()}}
        given |= dict(zip(_IDS, (rows, *others), strict=True))
        if len(self):
            check_fit(given, {name: getattr(self, name) for name in ("keys", *self._value_names())})
        else:
            self.clear()
        self.row_ids, given["row_ids"] = _equally_wide(self.row_ids, rows)
        self.class_ids, given["class_ids"] = _equally_wide(self.class_ids, given["class_ids"])
        first, known = not len(self), self._search.knows(self.keys)
        for name, value in given.items():
            value = value.detach().to(self.keys.device)
            here = getattr(self, name, value)
            self.register_buffer(name, value.clone() if first else torch.cat([here, value.to(here.dtype)]))
        if known:
            self._search.follow(self.keys, lambda index: index.append(keys))

    def remove(self, selected: Tensor) -> None:
        """Take items out; the others keep their order.

        Args:
            selected: long (any,) item numbers, or bool (M,).
        """
        keep = torch.ones(len(self), dtype=torch.bool, device=self.keys.device)
        keep[check_selected(selected, len(self)).to(keep.device)] = False
        known = self._search.knows(self.keys)
        for name in ("keys", *_IDS, *self._value_names()):
            self.register_buffer(name, getattr(self, name)[keep])
        if known:
            self._search.follow(self.keys, lambda index: index.remove(keep))

    def clear(self) -> None:
        """Take everything out and forget names and shapes."""
        self._search = BankSearch(self.backend, chunk=self.chunk, breadth=self.breadth)
        for name in self._value_names():
            delattr(self, name)
        self.register_buffer("keys", self.keys.new_empty(0, 0))
        empty = torch.empty(0, dtype=torch.long, device=self.keys.device)
        self.register_buffer("row_ids", empty[:, None])
        self.register_buffer("class_ids", empty)
        self.register_buffer("task_ids", empty.clone())

    def refresh(self, selected: Tensor, keys: Tensor) -> None:
        """Give some items new keys, for instance while the encoder that makes them is trained.

        Args:
            selected: long (m,) item numbers, or bool (M,).
            keys: (m, K), in the order of `selected`.

        Raises:
            TypeError: If `selected` is neither, or the keys are not floating point.
            ValueError: If the shapes do not fit, an item is selected twice, or a key is not finite.
        """
        index = check_selected(selected, len(self)).to(self.keys.device)
        check_keys("keys", keys, dtype=self.keys.dtype)
        if keys.shape != (len(index), self.keys.shape[1]):
            raise ValueError(
                f"refresh needs keys of shape {(len(index), self.keys.shape[1])} for the selected items; "
                f"got {tuple(keys.shape)}"
            )
        if len(index.unique()) != len(index):
            raise ValueError(f"refresh needs every selected item once; got {len(index) - len(index.unique())} repeats")
        known = self._search.knows(self.keys)
        if self.keys.is_inference():  # a bank that was filled in inference mode may be trained with outside of it
            self.keys = self.keys.clone()
        with torch.no_grad():
            self.keys[index] = keys.detach().to(self.keys)
        if known:
            self._search.follow(self.keys, lambda found: found.refresh(index, keys))

    def search(self, queries: Tensor, k: int, *, exclude: Exclusion | None = None) -> Found:
        """The k allowed items with the largest inner product, best first; no gradient goes through.

        Args:
            queries: (..., Q, K).
            k: How many.
            exclude: What each query may not find; exact for every backend.

        Raises:
            TypeError: If queries are not floating point, or excluded ids not long.
            ValueError: If the bank is empty, the queries have another size than the keys or are not finite (compiled
                code does not look: there a query with NaN finds nothing), excluded ids do not broadcast, or inner
                products may be beyond float64.
        """
        if not len(self):
            raise ValueError("the memory bank is empty; fill it with add, as learners do in prepare(tasks, seed=...)")
        k = check_count("k", k)
        check_queries(queries, self.keys.shape[1], dtype=self.keys.dtype)
        check_exclusion(exclude, tuple(queries.shape[:-1]))
        with torch.no_grad(), torch.autocast(self.keys.device.type, enabled=False):
            leading, queries = queries.shape[:-1], queries.detach().to(self.keys.dtype).flatten(0, -2)
            wanted = {
                name: value.expand(*leading, value.shape[-1]).reshape(len(queries), value.shape[-1])
                for name, value in zip(_IDS, exclude or (), strict=False)
                if value is not None and value.shape[-1]
            }
            ids = {name: getattr(self, name) for name in wanted}
            score, index = self._search.best(self.keys, queries, min(k, len(self)), wanted, ids)
            missing = (0, k - score.shape[1])
            if missing[1]:
                score, index = F.pad(score, missing, value=-torch.inf), F.pad(index, missing)
            real = score > -torch.inf
            found = Found(index.masked_fill(~real, 0), score, real)
            return Found(*(part.unflatten(0, leading) for part in found))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file, atomically and with a checksum.

        Raises:
            OSError: If the file cannot be written; an older one then stands.
        """
        settings = {"backend": self.backend, "chunk": self.chunk, "breadth": self.breadth}
        _FORMAT.write(path, {"settings": settings, "tensors": self.state_dict()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MemoryBank":
        """Read what `save` wrote, on the CPU. No code in the file is ever run.

        Raises:
            FileNotFoundError: If there is no such file.
            CorruptBankError: If the file was truncated or changed, or is something else; the message says what.
        """
        content = _FORMAT.read(path)
        try:
            tensors = content["tensors"]
            bank = cls(**content["settings"]).to(tensors["keys"].dtype)
            bank.load_state_dict(tensors)
            check_lengths(bank.state_dict())
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CorruptBankError(f"{path} does not hold a memory bank: {error}") from error
        return bank

    def _value_names(self) -> list[str]:
        return [name for name in self._buffers if name.startswith(_PREFIX)]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Size and names of the content are data, not architecture: take what was saved.
        saved = {
            name.removeprefix(prefix): value
            for name, value in state_dict.items()
            if name.startswith(prefix) and "." not in name.removeprefix(prefix)
        }
        dtype = None
        if "keys" in saved:
            self.clear()
            if saved["keys"].dtype != self.keys.dtype:  # saved in another precision: all goes to this one, as by `to`
                dtype = self.keys.dtype
        for name, value in saved.items():
            if name in self._buffers or name.startswith(_PREFIX):
                own = dtype if value.is_floating_point() else None
                self.register_buffer(name, torch.empty_like(value, dtype=own, device=self.keys.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _equally_wide(*ids: Tensor) -> list[Tensor]:
    """Ids of items (any,) or (any, R), all with the same R, -1 = none; as they are where no item has several."""
    if all(value.ndim == 1 for value in ids):
        return list(ids)
    columns = [value if value.ndim == 2 else value[:, None] for value in ids]
    width = max(value.shape[1] for value in columns)
    return [F.pad(value, (0, width - value.shape[1]), value=-1) for value in columns]
