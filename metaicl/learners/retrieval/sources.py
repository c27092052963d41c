"""What retrieval learners read from the meta-training tasks: rows for a memory, and the source classes of rows."""

from typing import Any

import torch
from torch import Tensor, nn

from metaicl.collation import concatenate, join_tasks
from metaicl.episode import Episode, Examples
from metaicl.row_ids import look_up
from metaicl.task import TaskDistribution, derive_generator, single_precision

_ROUNDS = 12


class SourceClasses(nn.Module):
    """The source class of every row that `Examples.ids` can name, kept as a buffer so that a checkpoint has it."""

    classes: Tensor

    def __init__(self) -> None:
        """Know no class yet."""
        super().__init__()
        self.register_buffer("classes", torch.empty(0, dtype=torch.long))

    def read(self, tasks: TaskDistribution) -> None:
        """Take the classes of the tasks' source, or none where rows are made afresh."""
        known = torch.empty(0, dtype=torch.long) if tasks.source_classes is None else tasks.source_classes
        self.classes = known.to(self.classes.device, copy=True)

    def keep(self, classes: Tensor) -> None:
        """Forget all classes but these, long (any,)."""
        self.classes = self.classes.masked_fill(~torch.isin(self.classes, classes), -1)

    def of(self, rows: Examples) -> Tensor:
        """Class of each row, long (B, N), -1 where it is unknown and where there is no row."""
        return look_up(self.classes, rows)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "classes")
        if saved is not None:  # its length is the source's, not the architecture's
            self.classes = torch.empty_like(saved, device=self.classes.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def item_classes(classes: Tensor) -> Tensor:
    """Source classes of items, for a bank: long (M,) where the rows (M, R) of each are of one class, else all of them.

    Rows with one label are of several classes where labels are not the classes, as in one-against-the-rest tasks.
    """
    return classes[:, 0] if bool((classes == classes[:, :1]).all()) else classes


def draw_items(tasks: TaskDistribution, n_items: int, *, rows_per_item: int, seed: int, like: Tensor) -> Examples:
    """Items of meta-training rows, drawn at the address (seed, "memory"): axis B holds up to `n_items` of them.

    An item has rows of one class in classification and of one task in regression. Rows that a source names are drawn
    without repetition over the whole memory; a source with fewer rows gives fewer items.

    Args:
        tasks: Their split "train" is sampled, and nothing else.
        n_items: How many.
        rows_per_item: R.
        seed: Of the draw.
        like: The items go to its device. They keep the precision they were drawn in, which names them in any other.

    Raises:
        ValueError: If the tasks cannot give so many rows of a class or task, or give masked ones.
    """
    n_way = tasks.spec.n_way or 1
    generator, parts, seen, total = derive_generator(seed, "memory"), [], set[int](), 0
    n_tasks = -(-n_items // n_way)
    for _ in range(_ROUNDS):
        rows = _sample(tasks, n_tasks, rows_per_item, generator)
        if not bool(rows.real.all()):
            raise ValueError("a memory needs supports of real rows in split 'train'; these tasks mask some")
        items = _by_class(rows, n_way) if tasks.spec.kind == "classification" else rows
        fresh = _unseen(items, seen)
        parts.append(fresh)
        total += len(fresh)
        if total >= n_items or len(fresh) * 20 < len(items):
            break
    return join_tasks(parts)[:n_items].to(like.device)


def _sample(tasks: TaskDistribution, n_tasks: int, n_rows: int, generator: torch.Generator) -> Examples:
    """Tasks of `n_rows` rows per class, or per task in regression."""

    def draw(n_shot: int) -> Episode:
        with single_precision():
            return tasks.sample(n_tasks, split="train", n_shot=n_shot, n_query=1, generator=generator)

    try:
        return draw(n_rows).support
    except ValueError:
        if n_rows == 1:
            raise
    try:  # an episode has a query, and the source may have no row more: then that is one of the rows
        episode = draw(n_rows - 1)
    except ValueError as error:
        raise ValueError(
            f"a memory with rows_per_item = {n_rows} needs so many rows of a class or task: {error}; "
            "lower rows_per_item"
        ) from error
    return concatenate(episode.support, episode.query)


def _unseen(items: Examples, seen: set[int]) -> Examples:
    """The items none of whose source rows was seen; theirs are noted."""
    if items.ids is None:
        return items
    keep = []
    for number, ids in enumerate(items.ids.tolist()):
        if seen.isdisjoint(ids) or min(ids) < 0:
            keep.append(number)
            seen.update(ids)
    return items[torch.tensor(keep, dtype=torch.long)]


def _by_class(rows: Examples, n_way: int) -> Examples:
    """Balanced rows (B, C R) as items (B C, R) of one class each."""
    order = rows.y.argsort(dim=1, stable=True)
    n_rows = rows.n_rows // n_way

    def arrange(leaf: Tensor) -> Tensor:
        index = order.reshape(*order.shape, *(1,) * (leaf.ndim - 2)).expand_as(leaf)
        return leaf.gather(1, index).unflatten(1, (n_way, n_rows)).flatten(0, 1)

    ids = None if rows.ids is None else arrange(rows.ids)
    return Examples(arrange(rows.x), arrange(rows.y), None, ids)
