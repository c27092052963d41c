"""Associative recall: which value came with this key? The test of what a memory can hold."""

from collections.abc import Mapping
from itertools import permutations

import torch
from torch import Tensor
from torch.distributions import Distribution

from metaicl.checks import check_count
from metaicl.episode import Episode, Examples
from metaicl.functional import categorical, class_weights
from metaicl.learner import Learner, Traits, check_support_labels
from metaicl.spec import TaskSpec
from metaicl.task import Split, TaskDistribution, derive_seed

_CELLS = 16  # of the sum that tells a task's split: 12 train, 2 validation, 2 test
_FEW = 4  # keys; with more of them every split has tasks
_SHARES: dict[Split, tuple[int, int]] = {"train": (0, 12), "validation": (12, 14), "test": (14, 16)}


class AssociativeRecall(TaskDistribution):
    """Pairs of a key and a value; a query is one of the keys, the answer its value.

    Keys are tokens 1 .. `n_keys`, an input is a single token; with `key_dim` each key is a unit vector instead, drawn
    once for all tasks, so that a memory needs no embedding to be tried (an audit of leakage by content then reports the
    queries in the support, which are the task). Values are the classes 0 .. C - 1, a vocabulary of their own. With
    `n_shot` keys per value a task has C n_shot pairs, all with different keys; a query asks for `n_query` keys of each
    value (again from the first when it has no more), in random order. Support ids and query ids are not given: that a
    query's key is in the support is the task. A task is its set of pairs, and which split it belongs to depends on that
    set alone.

    Args:
        n_values: C.
        n_keys: Size of the vocabulary of keys.
        key_dim: D of the unit vectors that stand for the keys; None keeps tokens.

    Reference:
        Arora et al. 2024, arXiv:2312.04927 (MQAR), section 3. Differs: a pair is one row, queries come after all
        pairs, and every value occurs equally often.
    """

    identity: tuple[str, ...] = ("pairs",)

    def __init__(self, *, n_values: int = 16, n_keys: int = 256, key_dim: int | None = None) -> None:
        """Keep the sizes, and draw the vectors of the keys."""
        self.n_keys = check_count("n_keys", n_keys, check_count("n_values", n_values, 2))
        self.spec = TaskSpec("classification", (1,), x_kind="tokens", n_way=n_values, vocabulary=n_keys + 1)
        self.vectors = None
        if key_dim is not None:
            shape = n_keys + 1, check_count("key_dim", key_dim, 2)  # one for each token, so that tokens are places
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(derive_seed(0, "vectors of keys")))
            self.vectors = torch.nn.functional.normalize(drawn, dim=-1)
            self.spec = TaskSpec("classification", (key_dim,), n_way=n_values)

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Draw pairs; see `TaskDistribution.sample`.

        Raises:
            ValueError: If there are fewer keys than pairs, or so few that the split has no task.
        """
        n_values = self.spec.output_size
        n_pairs = n_values * n_shot
        if n_pairs > self.n_keys:
            raise ValueError(
                f"n_keys must be at least n_values x n_shot = {n_pairs}, as no key occurs twice; got {self.n_keys}"
            )
        keys = self._keys(n_tasks, n_shot, split, generator)  # (B, n_shot, C), the value is the last place
        values = torch.arange(n_values).expand_as(keys)
        asked = torch.arange(n_query) % n_shot
        support = _shuffled(keys.flatten(1), values.flatten(1), generator)
        query = _shuffled(keys[:, asked].flatten(1), values[:, asked].flatten(1), generator)
        order = keys.flatten(1).argsort(1)
        pairs = torch.stack([keys.flatten(1).gather(1, order), values.flatten(1).gather(1, order)], -1)
        return Episode(self._shown(support), self._shown(query), {"pairs": pairs[:, None]})

    def references(self) -> Mapping[str, Learner]:
        """Looking the key up."""
        return {"lookup": ExactLookup(self.spec)}

    def _shown(self, examples: Examples) -> Examples:
        """Rows with their keys as learners see them: tokens (B, N, 1) or vectors (B, N, D)."""
        if self.vectors is None:
            return examples
        return Examples(self.vectors[examples.x[..., 0]], examples.y)

    def _keys(self, n_tasks: int, n_shot: int, split: Split, generator: torch.Generator) -> Tensor:
        """Different keys (B, n_shot, C), drawn again where they belong to another split."""
        low, high = _SHARES[split]
        self._check_reachable(n_shot, split)
        found = torch.zeros(n_tasks, n_shot, self.spec.output_size, dtype=torch.long)
        open_tasks = torch.ones(n_tasks, dtype=torch.bool)
        while bool(open_tasks.any()):
            drawn = torch.rand(int(open_tasks.sum()), self.n_keys, generator=generator).argsort(1) + 1
            found[open_tasks] = drawn[:, : n_shot * self.spec.output_size].unflatten(1, (n_shot, -1))
            # a sum over pairs, so that it does not depend on their order; products tell values apart
            cell = (found * _factors(self.spec.output_size)).sum((1, 2)) % _CELLS
            open_tasks = (cell < low) | (cell >= high)
        return found

    def _check_reachable(self, n_shot: int, split: Split) -> None:
        """Few keys make few sums: refuse a split that has no task instead of drawing for ever."""
        if self.n_keys > _FEW:
            return
        factors = _factors(self.spec.output_size).tolist() * n_shot
        tasks = permutations(range(1, self.n_keys + 1), len(factors))
        cells = {sum(key * factor for key, factor in zip(task, factors, strict=True)) % _CELLS for task in tasks}
        low, high = _SHARES[split]
        if cells.isdisjoint(range(low, high)):
            raise ValueError(
                f"n_keys must leave tasks for every split; got {self.n_keys}, which with n_values = "
                f"{self.spec.output_size} and n_shot = {n_shot} leaves none for {split!r}: raise n_keys to {_FEW + 1}"
            )


class ExactLookup(Learner[tuple[Tensor, Tensor, Tensor]]):
    """The value of the rows with exactly the query's input, and a guess where there is none.

    Args:
        spec: Classification.
    """

    traits = Traits(kinds=("classification",), trainable=False)

    def adapt(self, support: Examples) -> tuple[Tensor, Tensor, Tensor]:
        """The rows as they are: inputs, one-hot labels (B, N, C), and which rows are real (B, N)."""
        check_support_labels(self.spec, support)
        dtype = support.x.dtype if support.x.is_floating_point() else torch.get_default_dtype()
        weights = class_weights(support.y, self.spec.output_size, support.mask, dtype)
        return support.x, weights, support.real

    def predict(self, state: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Distribution:
        """How often each class came with this input; a thousandth of a row is added to each class."""
        inputs, weights, real = state
        same = (x[:, :, None] == inputs[:, None]).flatten(3).all(-1) & real[:, None]
        return categorical((same.to(weights.dtype) @ weights + 1e-3).log())


def _factors(n_values: int) -> Tensor:
    """What the keys of each value (C,) are multiplied by."""
    return 2 * torch.arange(n_values) + 1


def _shuffled(keys: Tensor, values: Tensor, generator: torch.Generator) -> Examples:
    order = torch.rand(keys.shape, generator=generator).argsort(1)
    return Examples(keys.gather(1, order)[..., None], values.gather(1, order))
