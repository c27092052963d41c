"""N-way episodes over any labeled rows: the sampler under images, text and tables."""

import operator
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence, Sized

import numpy as np
import torch
from torch import Tensor

from metaicl.checks import check_choice, check_count, check_seed, is_finite_number
from metaicl.episode import Episode, Examples
from metaicl.spec import TaskSpec
from metaicl.task import SPLITS, Split, TaskDistribution, derive_seed

_FEW_KEYS = 1024


class ClassEpisodes(TaskDistribution):
    """N-way tasks over labeled rows, the classes split into meta-train, meta-validation and meta-test.

    A task draws `n_way` classes of its split, then rows of each without replacement. Labels 0 .. C - 1 follow the
    random order of the classes, and rows are shuffled, so that neither carries information. A subclass says
    what a row looks like.

    Args:
        spec: A classification spec.
        labels: long (rows,), the class of each row as an index into `class_names`.
        class_splits: For each split the class indices it owns; no class may have two owners.
        class_names: One name per class, for messages and reports.

    Raises:
        TypeError: If the labels are not integers (rows,), or a class index is no integer.
        ValueError: If two splits share a class, a class has no rows, a label is unknown, or every split has fewer
            classes than the spec has ways.
    """

    identity: tuple[str, ...] = ("class_ids",)

    def __init__(
        self,
        spec: TaskSpec,
        *,
        labels: Tensor,
        class_splits: Mapping[Split, Sequence[int]],
        class_names: Sequence[Hashable],
    ) -> None:
        """Sort the rows by class once, so that sampling is index arithmetic."""
        self.spec = spec
        self.class_names = list(class_names)
        self.class_splits = _check_splits(class_splits, self.class_names)
        self.source_classes = _check_labels(labels, len(self.class_names))
        # numpy throughout: an operation on few numbers costs it a fraction of what it costs torch
        self._order = torch.argsort(self.source_classes, stable=True).numpy()  # row ids, class by class
        self._sizes = np.bincount(self.source_classes.numpy(), minlength=len(self.class_names))
        self._starts = self._sizes.cumsum() - self._sizes
        empty = [self.class_names[c] for ids in self.class_splits.values() for c in ids.tolist() if not self._sizes[c]]
        if empty:
            raise ValueError(f"every class of a split needs rows; {empty[:5]} have none")
        check_ways(spec.output_size, self.class_splits, drawn=False)
        self._smallest: dict[str, int] = {  # of each split, the class with the fewest rows
            split: int(ids[self._sizes[ids].argmin()]) for split, ids in self.class_splits.items() if len(ids)
        }

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Inputs (..., *x_shape) of the source rows `ids` (...,)."""

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Draw classes, then rows; see `TaskDistribution.sample`.

        Raises:
            TypeError: If a count is no int.
            ValueError: If a count is below one, the split is unknown or has too few classes, or a class too few rows.
        """
        n_way = self.spec.output_size
        n_tasks = check_count("n_tasks", n_tasks)
        owned = self._owned(split, n_way, check_count("n_shot", n_shot) + check_count("n_query", n_query))
        pick = _distinct(np.full(n_tasks, len(owned)), n_way, generator)
        class_ids = owned.take(pick)  # (B, C)
        within = _distinct(self._sizes.take(class_ids), n_shot + n_query, generator)  # (B, C, rows)
        row_ids = self._order.take(self._starts.take(class_ids)[..., None] + within)
        support, query = self._examples((row_ids[..., :n_shot], row_ids[..., n_shot:]), generator)
        return Episode(support, query, {"class_ids": torch.from_numpy(class_ids)})

    def _examples(self, parts: Sequence[np.ndarray], generator: torch.Generator) -> list[Examples]:
        """The rows of each part (B, C, rows), shuffled; they are read all together, which costs less than in turn."""
        n_tasks = len(parts[0])
        orders = [_order(torch.rand(n_tasks, part[0].size, generator=generator).numpy()) for part in parts]
        drawn = [_along(part.reshape(n_tasks, -1), order) for part, order in zip(parts, orders, strict=True)]
        ids = torch.from_numpy(np.concatenate([part.ravel() for part in drawn]))
        x, examples, start = self.rows(ids), [], 0
        for part, order in zip(parts, orders, strict=True):
            own, start = slice(start, start + order.size), start + order.size
            y = torch.from_numpy(order // part.shape[2])
            examples.append(Examples(x[own].reshape(*order.shape, *x.shape[1:]), y, ids=ids[own].view(order.shape)))
        return examples

    def _owned(self, split: Split, n_way: int, n_rows: int) -> np.ndarray:
        owned = self.class_splits[check_choice("split", split, SPLITS)].numpy()  # type: ignore[index]  # checked here
        if len(owned) < n_way:
            sizes = {name: len(ids) for name, ids in self.class_splits.items()}
            raise ValueError(f"asked for {n_way} ways; split {split!r} has {len(owned)} classes (all splits: {sizes})")
        smallest = self._smallest[split]
        if self._sizes[smallest] < n_rows:
            raise ValueError(
                f"asked for n_shot + n_query = {n_rows} rows per class; class {self.class_names[smallest]!r} "
                f"of split {split!r} has {self._sizes[smallest]}. Ask for fewer rows, or leave small classes out"
            )
        return owned


def distinct(sizes: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Draw `k` different integers below each of `sizes`, in random order: long (...,) -> (..., k).

    Every ordered choice is equally likely. The cost grows with k, not with the sizes.

    Raises:
        ValueError: If a size is below k.

    Reference:
        Floyd's algorithm in Bentley, 1987, "A sample of brilliance", vectorized over the leading axes. Where k is
        a good part of the sizes, sorting one random key per candidate is faster and is done instead.
    """
    return torch.from_numpy(_distinct(sizes.numpy(), k, generator))


def _distinct(bounds: np.ndarray, k: int, generator: torch.Generator) -> np.ndarray:
    largest, smallest = (int(bounds.max()), int(bounds.min())) if bounds.size else (k, k)
    if smallest < k:
        raise ValueError(f"distinct needs sizes of at least k = {k}; got {smallest}")
    if largest <= 4 * k:
        keys = torch.rand(*bounds.shape, largest, generator=generator, dtype=torch.float64).numpy()
        if smallest < largest:
            keys[np.arange(largest) >= bounds[..., None]] = 1.0  # beyond every real key
        return _order(keys)[..., :k]
    draws = torch.rand(2, k, bounds.size, generator=generator, dtype=torch.float64).numpy()
    tops = bounds.ravel() + np.arange(1 - k, 1)[:, None]  # candidates of round i, the newest is the last
    chosen = (draws[0] * tops).astype(np.int64)
    ranked = np.sort(chosen, 0)
    if (ranked[1:] == ranked[:-1]).any():  # seldom among many candidates, and then there is nothing to do
        for i in range(1, k):
            np.copyto(chosen[i], tops[i] - 1, where=(chosen[:i] == chosen[i]).any(0))
    return _along(chosen.T, _order(draws[1].T)).reshape(*bounds.shape, k)


def _along(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Each row of values (rows, n) in its order (rows, n); quicker than `np.take_along_axis`."""
    return values.ravel().take(order + np.arange(0, values.size, values.shape[1])[:, None])


def _order(keys: np.ndarray) -> np.ndarray:
    """The order that sorts uniform keys (..., n) as `torch.rand` draws them, ties by position: int64 (..., n).

    Such keys are multiples of 2^-24 (2^-53 in double precision), so a key and its position fit into one integer.
    Sorting many integers costs a fraction of an argsort; few keys are not worth the packing.
    """
    n, bits = keys.shape[-1], 24 if keys.dtype == np.float32 else 53
    shift = max(n - 1, 1).bit_length()
    if keys.size <= _FEW_KEYS or bits + shift > 62:
        return keys.argsort(-1, kind="stable")
    packed = (keys * (1 << bits)).astype(np.int64)
    packed <<= shift
    packed |= np.arange(n)
    packed.sort(-1)
    packed &= (1 << shift) - 1
    return packed


def split_classes(
    n_classes: int, *, fractions: Mapping[Split, float] | None = None, seed: int = 0
) -> dict[Split, list[int]]:
    """A random split of classes 0 .. n_classes - 1, by default 64 : 16 : 20 %.

    Args:
        n_classes: How many there are.
        fractions: A share for each split; they must sum to one. The order of the keys does not matter.
        seed: Of the shuffle.

    Raises:
        ValueError: If the shares are no positive numbers that sum to one, or a split comes out empty.
    """
    shares = _check_shares({"train": 0.64, "validation": 0.16, "test": 0.2} if fractions is None else fractions)
    n_classes, seed = check_count("n_classes", n_classes, minimum=len(shares)), check_seed(seed)
    # torch reads the lower 32 bits of a seed: larger ones are hashed, so that they too differ
    generator = torch.Generator().manual_seed(seed if seed < 2**32 else derive_seed("split of classes", seed))
    order = torch.randperm(n_classes, generator=generator).tolist()
    edges = [0, *(round(n_classes * sum(list(shares.values())[: i + 1])) for i in range(len(shares)))]
    parts = {name: sorted(order[a:b]) for name, a, b in zip(shares, edges, edges[1:], strict=False)}
    empty = [name for name, part in parts.items() if not part]
    if empty:
        raise ValueError(f"{n_classes} classes split by {shares} leave {empty} empty; give larger shares")
    return parts  # type: ignore[return-value]  # the keys were checked against SPLITS above


def _check_shares(fractions: Mapping[Split, float]) -> dict[Split, float]:
    """The shares in the order of `SPLITS`: equal mappings split alike, whatever the order of their keys."""
    numbers = all(map(is_finite_number, fractions.values()))
    if not numbers or set(fractions) != set(SPLITS) or min(fractions.values()) <= 0:
        raise ValueError(f"fractions must give {list(SPLITS)} positive shares that sum to 1; got {dict(fractions)}")
    if abs(sum(fractions.values()) - 1) > 1e-9:
        raise ValueError(f"fractions must sum to 1; got {dict(fractions)}, whose sum is {sum(fractions.values()):g}")
    return {split: fractions[split] for split in SPLITS}


def check_ways(n_way: int, class_splits: Mapping[Split, Sized], *, drawn: bool) -> None:
    """Check that the splits can serve `n_way` classes, at construction and not at the first validation.

    Args:
        n_way: Classes per task.
        class_splits: For each split the classes it owns.
        drawn: Whether they were drawn at random, as then every one must serve. Who chose them may mean to judge alone:
            one of them must serve, and the others raise when a task is asked of them.

    Raises:
        ValueError: If too few of them can.
    """
    sizes = {name: len(owned) for name, owned in class_splits.items()}
    small = [name for name, size in sizes.items() if size < n_way]
    if small and (drawn or len(small) == len(sizes)):
        hint = "Ask for fewer ways, or set class_splits or fractions"
        if drawn and sum(sizes.values()) < len(sizes) * n_way:
            hint = f"All three need {len(sizes) * n_way}; with class_splits, one that does without tasks may have fewer"
        raise ValueError(
            f"asked for {n_way} ways; split {small[0]!r} has {sizes[small[0]]} classes (all splits: {sizes}). {hint}"
        )


def _check_splits(class_splits: Mapping[Split, Sequence[int]], names: Sequence[Hashable]) -> dict[Split, Tensor]:
    if set(class_splits) != set(SPLITS):
        raise ValueError(f"class_splits must name exactly {list(SPLITS)}; got {sorted(class_splits)}")
    owned: dict[Split, list[int]] = {split: [operator.index(c) for c in class_splits[split]] for split in SPLITS}
    owner: dict[int, str] = {}
    shared = []
    for split, ids in owned.items():
        for c in ids:
            if not 0 <= c < len(names):
                raise ValueError(f"class_splits[{split!r}] must hold class indices in [0, {len(names)}); got {c}")
            if owner.setdefault(c, split) != split:
                shared.append(names[c])
    if shared:
        raise ValueError(f"splits must not share a class; {len(shared)} are in two, for instance {shared[:5]}")
    return {split: torch.tensor(sorted(set(ids)), dtype=torch.long) for split, ids in owned.items()}


def _check_labels(labels: Tensor, n_classes: int) -> Tensor:
    if labels.is_floating_point() or labels.is_complex() or labels.ndim != 1:
        raise TypeError(f"labels must be long (rows,); got {labels.dtype} {tuple(labels.shape)}")
    if labels.numel() == 0 or int(labels.min()) < 0 or int(labels.max()) >= n_classes:
        found = "none" if labels.numel() == 0 else f"[{int(labels.min())}, {int(labels.max())}]"
        raise ValueError(f"labels must lie in [0, {n_classes}), one per class name; got {found}")
    return labels.long()
