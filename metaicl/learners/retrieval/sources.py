"""What retrieval learners read from the meta-training tasks: rows for a memory, and the source classes of rows."""

from typing import Any

import torch
from torch import Tensor, nn

from metaicl.episode import Examples
from metaicl.task import TaskDistribution, derive_generator


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
        if rows.ids is None or not len(self.classes):
            return torch.full(rows.real.shape, -1, device=rows.x.device)
        known = (rows.ids >= 0) & (rows.ids < len(self.classes))
        return torch.where(known, self.classes[rows.ids.clamp(0, len(self.classes) - 1)], -1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "classes")
        if saved is not None:  # its length is the source's, not the architecture's
            self.classes = torch.empty_like(saved, device=self.classes.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def draw_groups(
    tasks: TaskDistribution,
    n_groups: int,
    *,
    rows_per_group: int,
    seed: int,
    like: Tensor,
    setting: str = "rows_per_group",
) -> Examples:
    """Groups of meta-training rows, drawn at the address (seed, "memory"): axis B holds up to `n_groups` groups.

    A group has rows of one class in classification and of one task in regression. Rows that a source names are drawn
    without repetition over the whole memory; a source with fewer rows gives fewer groups.

    Args:
        tasks: Their split "train" is sampled, and nothing else.
        n_groups: How many.
        rows_per_group: R.
        seed: Of the draw.
        like: The groups go to its device, and their floating-point fields to its dtype.
        setting: What the learner calls `rows_per_group`, for the error message.

    Raises:
        ValueError: If the tasks cannot give so many rows and one more, the query that every episode has.
    """
    n_way = tasks.spec.n_way or 1
    generator, parts, seen, total = derive_generator(seed, "memory"), [], set[int](), 0
    n_tasks = -(-n_groups // n_way)
    for _ in range(_ROUNDS):
        try:
            rows = tasks.sample(n_tasks, split="train", n_shot=rows_per_group, n_query=1, generator=generator).support
        except ValueError as error:
            if rows_per_group == 1:
                raise
            raise ValueError(
                f"a memory with {setting} = {rows_per_group} draws one row more than that of a class or task: {error}; "
                f"lower {setting}"
            ) from error
        groups = _by_class(rows, n_way) if tasks.spec.kind == "classification" else rows
        fresh = _unseen(groups, seen)
        parts.append(fresh)
        total += len(fresh)
        if total >= n_groups or len(fresh) * 20 < len(groups):
            break
    return _concatenate(parts)[:n_groups].to(like.device, like.dtype)


_ROUNDS = 12


def _unseen(groups: Examples, seen: set[int]) -> Examples:
    """The groups none of whose source rows was seen; theirs are noted."""
    if groups.ids is None:
        return groups
    keep = []
    for number, ids in enumerate(groups.ids.tolist()):
        if seen.isdisjoint(ids) or min(ids) < 0:
            keep.append(number)
            seen.update(ids)
    return groups[torch.tensor(keep, dtype=torch.long)]


def _concatenate(parts: list[Examples]) -> Examples:
    ids = None if any(part.ids is None for part in parts) else torch.cat([part.ids for part in parts])  # type: ignore[misc]
    mask = None if all(part.mask is None for part in parts) else torch.cat([part.real for part in parts])
    return Examples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]), mask, ids)


def _by_class(rows: Examples, n_way: int) -> Examples:
    """Balanced rows (B, C R) as groups (B C, R) of one class each."""
    order = rows.y.argsort(dim=1, stable=True)
    n_rows = rows.n_rows // n_way

    def arrange(leaf: Tensor) -> Tensor:
        index = order.reshape(*order.shape, *(1,) * (leaf.ndim - 2)).expand_as(leaf)
        return leaf.gather(1, index).unflatten(1, (n_way, n_rows)).flatten(0, 1)

    ids = None if rows.ids is None else arrange(rows.ids)
    return Examples(arrange(rows.x), arrange(rows.y), None, ids)
