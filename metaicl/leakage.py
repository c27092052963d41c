"""The leakage audit: does anything of one split, or of a query, occur where it must not?"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from metaicl.checks import check_count
from metaicl.episode import Episode, Examples
from metaicl.task import EVAL_SEED, SPLITS, EpisodeStream, Split, TaskDistribution

_LISTED = 5
_CHUNK = 25

Values = dict[bytes, str]  # a fingerprint, and how to show the value to a reader


@dataclass(frozen=True)
class LeakageReport:
    """What was looked at and what was found twice.

    Args:
        looked_at: Distinct values seen, by what they are.
        counts: How many of them leak; 0 is what one wants. The keys are those of `looked_at`.
        examples: Up to five of the leaking values each.
        n_episodes: Tasks looked at in each split.
        left_out: Splits that were not looked at, as they have fewer classes than a task.
    """

    looked_at: Mapping[str, int]
    counts: Mapping[str, int]
    examples: Mapping[str, tuple[str, ...]]
    n_episodes: int
    left_out: tuple[Split, ...] = ()

    @property
    def leaky(self) -> bool:
        """Anything leaks."""
        return any(self.counts.values())

    def __str__(self) -> str:
        """One line for each thing that was looked at."""
        but = f" but {', '.join(self.left_out)}, which have too few classes" if self.left_out else ""
        lines = [f"leakage in {self.n_episodes} tasks of each split{but}:"]
        for name, count in self.counts.items():
            shown = f", for instance {', '.join(self.examples[name])}" if count else ""
            lines.append(f"  {name}: {count} of {self.looked_at[name]}{shown}")
        return "\n".join(lines)

    def raise_if_leaky(self) -> None:
        """Raise with the whole report if anything leaks.

        Raises:
            ValueError: If it does.
        """
        if self.leaky:
            raise ValueError(str(self))


def audit_leakage(
    tasks: TaskDistribution,
    *,
    n_episodes: int = 200,
    seed: int = EVAL_SEED,
    n_shot: int = 2,
    n_query: int = 2,
) -> LeakageReport:
    """Sample every split and look for what occurs in two of them, and for query rows in their own support.

    Looked at across splits: the latents named in `tasks.identity`, source rows (`ids`), their classes
    (`tasks.source_classes`) and the content of rows: their inputs, and where these are single numbers, which meet by
    chance, input and target together in regression, and nothing in classification. Query rows are looked for in their
    support in the same way; single numbers without `ids` by themselves. Where inputs are discrete (tokens, vectors of
    integers, and `tasks.discrete`) the same content occurs by right, and only `ids` count. In a classification family,
    a latent (B, C, ...) with C = n_way holds one identity per class, any other latent one per task. Splits with fewer
    classes than that have no tasks and are left out.

    Args:
        tasks: The distribution.
        n_episodes: Tasks to sample per split.
        seed: Of the episode streams.
        n_shot: Support rows, as in `TaskDistribution.sample`.
        n_query: Query rows.

    Returns:
        Counts and examples. A sample cannot prove the absence of rare collisions; it finds frequent ones.

    Raises:
        ValueError: If `tasks.identity` names a latent that the episodes do not have.
    """
    n_episodes = check_count("n_episodes", n_episodes)
    found: dict[str, dict[Split, Values]] = {}
    overlap: dict[str, tuple[int, Values]] = {}
    without = _without_tasks(tasks)
    for split in SPLITS:
        if split in without:
            continue
        stream = EpisodeStream(tasks, seed=seed, split=split, n_shot=n_shot, n_query=n_query, chunk_size=_CHUNK)
        for episode in stream.batches(0, n_episodes, batch_size=_CHUNK):
            for name, values in _values(tasks, episode):
                found.setdefault(name, {each: {} for each in SPLITS})[split].update(values)
            for name, n_rows, values in _overlaps(tasks, episode):
                seen, known = overlap.get(name, (0, {}))
                overlap[name] = (seen + n_rows, {**known, **{f"{split} {k!r}".encode(): v for k, v in values.items()}})
    return _report(found, overlap, n_episodes, without)


def discrete_inputs(x: Tensor, tasks: TaskDistribution) -> bool:
    """Whether equal inputs occur by right: tokens, vectors of whole numbers, and rows that were such before scaling."""
    kind = tasks.spec.x_kind
    return tasks.discrete or kind == "tokens" or (kind == "vector" and bool((x == x.round()).all()))


def _without_tasks(tasks: TaskDistribution) -> tuple[Split, ...]:
    n_way = getattr(getattr(tasks, "spec", None), "n_way", None)  # what no task distribution is, the stream says
    owned = getattr(tasks, "class_splits", None)
    return tuple(split for split in SPLITS if n_way and owned and split in owned and len(owned[split]) < n_way)


def _values(tasks: TaskDistribution, episode: Episode) -> Iterator[tuple[str, Values]]:
    """Everything in an episode that must not occur in two splits."""
    n_way = tasks.spec.n_way
    for name in tasks.identity:
        if name not in episode.latents:
            raise ValueError(
                f"{type(tasks).__name__}.identity names {name!r}; the latents are {sorted(episode.latents)}"
            )
        value = episode.latents[name]
        per_class = n_way is not None and value.ndim >= 2 and value.shape[1] == n_way
        yield f"identity {name}", _fingerprints(value.flatten(0, 1) if per_class else value)
    for part in (episode.support, episode.query):
        if part.ids is not None:
            ids = part.ids[part.real & (part.ids >= 0)]
            yield "source rows", _fingerprints(ids)
            if tasks.source_classes is not None:
                yield "classes", _fingerprints(tasks.source_classes[ids])
        content = _content(tasks, part)
        if content is not None:
            yield "row content", _fingerprints(content[part.real])


def _content(tasks: TaskDistribution, part: Examples) -> Tensor | None:
    """What tells rows apart, (B, N, any): their inputs; None where equal ones occur by right or by chance.

    Single numbers meet by chance, as [0, 1) has 2**24 and tables have few decimals; targets tell them apart.
    """
    if discrete_inputs(part.x, tasks):
        return None
    x = part.x.flatten(2)
    if x.shape[2] > 1:
        return x
    return torch.cat([x, part.y], 2) if tasks.spec.kind == "regression" else None


def _overlaps(tasks: TaskDistribution, episode: Episode) -> Iterator[tuple[str, int, Values]]:
    """Query rows that occur in the support of their own task, by source row and by content."""
    support, query = episode.support, episode.query
    n_rows = int(query.real.sum())
    if support.ids is not None and query.ids is not None:
        both = (
            _real_pairs(support, query) & (query.ids[:, :, None] == support.ids[:, None]) & (query.ids >= 0)[..., None]
        )
        yield "query rows in the support, by source row", n_rows, _places(both.any(2), episode)
    # Without ids nothing else would tell of rows that are asked again.
    named = support.ids is not None and query.ids is not None
    asked, seen = (
        _content(tasks, part) if named or discrete_inputs(part.x, tasks) else part.x for part in (query, support)
    )
    if asked is not None and seen is not None:
        both = _real_pairs(support, query) & (_keys(asked)[:, :, None] == _keys(seen)[:, None])
        yield "query rows in the support, by content", n_rows, _places(both.any(2), episode)


def _real_pairs(support: Examples, query: Examples) -> Tensor:
    return query.real[:, :, None] & support.real[:, None]


def _keys(content: Tensor) -> Tensor:
    """A 63-bit key of every row's content, long (B, N)."""
    keys = [int.from_bytes(_digest(row), "big") >> 1 for row in content.flatten(0, 1)]
    return torch.tensor(keys, dtype=torch.long).reshape(content.shape[:2]).to(content.device)


def _places(where: Tensor, episode: Episode) -> Values:
    task, row = where.nonzero(as_tuple=True)
    first = _digest(episode.query.x).hex()  # tells the chunks apart
    return {
        f"{first} {t} {r}".encode(): f"query row {r} of a task"
        for t, r in zip(task.tolist(), row.tolist(), strict=True)
    }


def _fingerprints(values: Tensor) -> Values:
    return {_digest(value): _show(value) for value in values}


def _digest(value: Tensor) -> bytes:
    content = value.detach().cpu().reshape(-1).view(torch.uint8)  # NumPy does not know every type
    return hashlib.blake2b(content.numpy().tobytes(), digest_size=8).digest()


def _show(value: Tensor) -> str:
    flat = value.flatten()[:3].tolist()
    text = ", ".join(f"{number:.6g}" for number in flat)
    return text if value.numel() == 1 else f"[{text}{', ...' if value.numel() > 3 else ''}]"


def _report(
    found: Mapping[str, Mapping[Split, Values]],
    overlap: Mapping[str, tuple[int, Values]],
    n_episodes: int,
    left_out: tuple[Split, ...],
) -> LeakageReport:
    looked_at, leaks = {}, {}
    for name, splits in found.items():
        looked_at[f"{name} in two splits"] = len(set().union(*splits.values()))
        leaks[f"{name} in two splits"] = _shared(splits)
    for name, (n_rows, values) in overlap.items():
        looked_at[name], leaks[name] = n_rows, list(values.values())
    counts = {name: len(values) for name, values in leaks.items()}
    examples = {name: tuple(values[:_LISTED]) for name, values in leaks.items()}
    return LeakageReport(looked_at, counts, examples, n_episodes, left_out)


def _shared(splits: Mapping[Split, Values]) -> list[str]:
    shown: dict[bytes, str] = {}
    for first, second in combinations(splits, 2):
        for key in sorted(splits[first].keys() & splits[second].keys()):
            shown.setdefault(key, f"{splits[first][key]} ({first} and {second})")
    return list(shown.values())
