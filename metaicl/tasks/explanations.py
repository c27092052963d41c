"""The world of explanations: hidden tasks, named by an index, that only explanations of other points tell."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metaicl.checks import check_choice, check_count
from metaicl.episode import Episode, Examples
from metaicl.spec import TaskSpec
from metaicl.task import SPLITS, Split, TaskDistribution, derive_generator
from metaicl.tasks.counted_points import N_INTEGERS, N_PLACES, Points, draw_points

Explanation = Literal["full", "causal", "evidential", "recomposable"]
Translation = Literal["none", "plus5", "mirror"]
IndexMap = Literal["identity", "easy", "hard", "random"]

N_INDICES = 10_000
_SHIFT = 5  # what the translation adds


class ExplainedPoints(NamedTuple):
    """Rows of the training set.

    Attributes:
        x: long (M, T), inputs.
        y: long (M,), labels.
        explanations: long (M, E), one for each row; 0 is padding.
        index: long (M,), the number of the row's hidden task, shown in x or not.
        ids: long (M,), the rows by the numbers that episodes use.
    """

    x: Tensor
    y: Tensor
    explanations: Tensor
    index: Tensor
    ids: Tensor


class ExplanationWorld(TaskDistribution):
    """Which of two integers occurs more often? The index says which integers are meant, but not in the open.

    A point is x = 20 integers. The first is an index of 1 .. 10,000, behind which stand four different hidden integers
    (m, n, r, d) of 1 .. 100. The second is an indicator: where it is 1 the label is 1[#m > #n], where it is 2 the label
    is 1[#r > #d], counted over the other 18 places. Counts of a pair never tie: one pair has a larger count a of
    1 .. 14 and a smaller one below a, 14 in all at most; the other pair lives in the places that are left, and which
    pair is which changes from point to point. In half of the points the other pair says the same as the pair that
    counts. Places left over hold integers that are not hidden ones of this index. Labels are balanced, and so is the
    indicator within each index.

    Training points have explanations (index', m, n, r, d), validation and test points have none. Episodes are batches
    of points: rows of the training set in the split "train", and rows of two other sets, of the same indices,
    in the other splits. Support and query of an episode share no row, and their labels are balanced. What a row's index
    stands for is in the latents `index` (B, Q) and `integers` (B, Q, 4), read by tests and analysis only.

    Args:
        n_tasks: Hidden tasks, each with an index of its own.
        points_per_task: Training points of each.
        explanation: "full"; "causal", the index and the pair that decides; "evidential", the four integers with
            whole noise of -epsilon .. epsilon each; "recomposable", where a point tells one of some pieces and
            zeros for the rest.
        epsilon: Largest noise of evidential explanations.
        pieces: Into how many pieces, 2 to 4, recomposable explanations are cut.
        translation: Explanations say each integer plus 5 ("plus5") or 101 minus it ("mirror").
        index_map: Which index an explanation gives: its own ("identity"), 10,001 minus it ("easy"), that for odd
            indices only ("hard"), or a random permutation ("random").
        weak_feature_correlation: How often, in the training set, the other pair says the same. 1 makes it a shortcut.
        index_visible: x shows its index; otherwise the first place is 0.
        integers_visible: x has four more places with m, n, r and d, so that nothing is hidden.
        disjoint_indices: Training, validation and test points have no index in common.
        smooth: Neighboring indices stand for neighboring integers.
        n_validation: Validation points, about; every index has as many.
        n_test: Test points, likewise.
        seed: Which world.

    Raises:
        ValueError: If a number is out of range or a name is unknown.

    Reference:
        Hase & Bansal 2021, arXiv:2102.02201, section 4. Differs: hidden integers keep a distance of epsilon (or of the
        translation) to the ends of 1 .. 100, so that no explanation leaves the range; a piece of a recomposable
        explanation is told by about as many points of an index as any other.
    """

    def __init__(
        self,
        *,
        n_tasks: int = 500,
        points_per_task: int = 10,
        explanation: Explanation = "full",
        epsilon: int = 2,
        pieces: int = 2,
        translation: Translation = "none",
        index_map: IndexMap = "identity",
        weak_feature_correlation: float = 0.5,
        index_visible: bool = True,
        integers_visible: bool = False,
        disjoint_indices: bool = False,
        smooth: bool = False,
        n_validation: int = 10_000,
        n_test: int = 50_000,
        seed: int = 0,
    ) -> None:
        """Draw the hidden tasks and the three sets of points."""
        self.explanation = check_choice("explanation", explanation, ("full", "causal", "evidential", "recomposable"))
        self.translation = check_choice("translation", translation, ("none", "plus5", "mirror"))
        self.index_map = check_choice("index_map", index_map, ("identity", "easy", "hard", "random"))
        self.epsilon, self.pieces = check_count("epsilon", epsilon, 0), check_count("pieces", pieces, 2)
        if pieces > 4 or epsilon > 40:
            raise ValueError(f"pieces must be 2 to 4 and epsilon at most 40; got pieces={pieces}, epsilon={epsilon}")
        if not 0 <= weak_feature_correlation <= 1:
            raise ValueError(f"weak_feature_correlation must be in [0, 1]; got {weak_feature_correlation}")
        self.index_visible, self.integers_visible, self.seed = index_visible, integers_visible, seed
        length = 2 + N_PLACES + 4 * integers_visible
        self.spec = TaskSpec("classification", (length,), x_kind="tokens", n_way=2, vocabulary=N_INDICES + 1)
        self.n_tasks = check_count("n_tasks", n_tasks)
        n_indices = n_tasks * (len(SPLITS) if disjoint_indices else 1)
        if n_indices > N_INDICES:
            raise ValueError(f"{n_indices} indices are asked for, and there are {N_INDICES} at most; got {n_tasks=}")
        sizes = [check_count("points_per_task", points_per_task)]
        sizes += [
            max(2, round(check_count(*n) / n_tasks)) for n in (("n_validation", n_validation), ("n_test", n_test))
        ]
        index, integers = self._draw_tasks(n_indices, smooth)
        self._points: dict[Split, Points] = {}
        for number, (split, size) in enumerate(zip(SPLITS, sizes, strict=True)):
            part = slice(number * n_tasks, (number + 1) * n_tasks) if disjoint_indices else slice(None)
            share = weak_feature_correlation if split == "train" else 0.5
            generator = derive_generator(seed, "explanations", split)
            self._points[split] = draw_points(index[part], integers[part], size, share, generator)
        self._shown = {split: self._inputs(points) for split, points in self._points.items()}
        self._said = self._explain(self._points["train"])
        if disjoint_indices:
            self.source_classes = torch.cat([self._points[split].index for split in SPLITS])
            self.class_splits = {split: self._points[split].index.unique() for split in SPLITS}

    def training_points(self) -> ExplainedPoints:
        """The training set with its explanations: the only place where there are any."""
        points = self._points["train"]
        rows = torch.arange(len(points.y))
        return ExplainedPoints(self._shown["train"], points.y, self._said, points.index, rows)

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Draw batches of points; see `TaskDistribution.sample`.

        Raises:
            ValueError: If the split has fewer rows of a class than one episode takes.
        """
        points, n_rows = self._points[split], n_shot + n_query
        chosen = []
        for label in (0, 1):
            rows = (points.y == label).nonzero()[:, 0]
            if len(rows) < n_rows:
                raise ValueError(
                    f"n_shot + n_query must be at most the {len(rows)} rows of a class in split {split!r}; got {n_rows}"
                )
            chosen.append(rows[torch.rand(n_tasks, len(rows), generator=generator).topk(n_rows, 1).indices])
        drawn = torch.stack(chosen, -1)  # (B, rows per class, C)
        shown, first = self._shown[split], sum(len(self._points[s].y) for s in SPLITS[: SPLITS.index(split)])
        parts = []
        for rows in (drawn[:, :n_shot], drawn[:, n_shot:]):
            rows = rows.flatten(1)
            rows = rows.gather(1, torch.rand(rows.shape, generator=generator).argsort(1))
            parts.append((Examples(shown[rows], points.y[rows], None, rows + first), rows))
        (support, _), (query, asked) = parts
        return Episode(support, query, {"index": points.index[asked], "integers": points.integers[asked]})

    def _draw_tasks(self, n_indices: int, smooth: bool) -> tuple[Tensor, Tensor]:
        """Different indices (I,), in random order, and the different hidden integers (I, 4) behind them."""
        source = derive_generator(self.seed, "explanations", "tasks")
        noisy, shifted = self.explanation == "evidential", self.translation == "plus5"
        margin = self.epsilon * noisy + _SHIFT * shifted
        index = torch.randperm(N_INDICES, generator=source)[:n_indices] + 1
        if n_indices > (most := math.perm(N_INTEGERS - 2 * margin, 4)):
            raise ValueError(
                f"{n_indices} hidden tasks need as many ways to draw four integers that are {margin} or more away from "
                f"the ends; got {most}. Ask for fewer tasks or a smaller epsilon"
            )
        integers = index.new_zeros(0, 4)
        while len(integers) < n_indices:  # four of the same integers in the same order are drawn again
            ranks = torch.rand(n_indices, N_INTEGERS - 2 * margin, generator=source).topk(4, 1).indices
            integers = torch.unique(torch.cat([integers, ranks + 1 + margin]), dim=0)
        chosen = torch.randperm(len(integers), generator=source)[:n_indices]
        if smooth:  # in the same order: integers by the first of the four, then by the second, and so on
            order = torch.randperm(n_indices, generator=source)
            return index.sort().values[order], integers[chosen.sort().values][order]
        return index, integers[chosen]

    def _inputs(self, points: Points) -> Tensor:
        """Inputs (P, T) as learners see them."""
        index = points.index * int(self.index_visible)
        parts = [index[:, None], points.indicator[:, None], points.places]
        return torch.cat([*parts, points.integers] if self.integers_visible else parts, 1)

    def _explain(self, points: Points) -> Tensor:
        """The explanation (P, 5) of every point, by the knobs."""
        source = derive_generator(self.seed, "explanations", "said")
        said = points.integers
        if self.explanation == "evidential":
            said = said + torch.randint(-self.epsilon, self.epsilon + 1, said.shape, generator=source)
        if self.translation != "none":
            said = said + _SHIFT if self.translation == "plus5" else N_INTEGERS + 1 - said
        if self.explanation == "causal":
            said = torch.where((points.indicator == 1)[:, None], said[:, :2], said[:, 2:])
            said = torch.cat([said, torch.zeros_like(said)], 1)
        elif self.explanation == "recomposable":
            told = torch.arange(len(said)).reshape(points.shape) + torch.randint(self.pieces, (), generator=source)
            place = torch.rand(points.shape, generator=source).argsort(1)
            piece = told.gather(1, place).flatten() % self.pieces
            said = said * (torch.arange(4) * self.pieces // 4 == piece[:, None])
        return torch.cat([self._index_map(source)[points.index][:, None], said], 1)

    def _index_map(self, source: torch.Generator) -> Tensor:
        """Long (10,001,): which index an explanation gives for an index; 0 is not one."""
        index = torch.arange(N_INDICES + 1)
        if self.index_map == "random":
            return torch.cat([index[:1], torch.randperm(N_INDICES, generator=source) + 1])
        turned = N_INDICES + 1 - index
        if self.index_map == "hard":
            return torch.where(index % 2 == 1, turned, index)
        return turned if self.index_map == "easy" else index
