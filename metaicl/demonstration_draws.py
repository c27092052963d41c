"""How much answers depend on which demonstrations were drawn: the same queries under several supports."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from metaicl.checks import check_choice, check_count
from metaicl.episode import Examples
from metaicl.learner import Learner
from metaicl.metrics import HIGHER_IS_BETTER, primary_metric, query_metrics
from metaicl.spec import TaskSpec
from metaicl.task import EVAL_SEED, EpisodeStream, Split, TaskDistribution, check_is_learner, derive_seed
from metaicl.training import device_of, isolated_randomness, place, training_mode


@dataclass(frozen=True)
class DrawEvaluation:
    """What one learner did on the same queries under several draws of the demonstrations.

    Args:
        kind: "regression" or "classification".
        metrics: For each metric its value under each draw on each episode, float64 (draws, E).
    """

    kind: str
    metrics: dict[str, NDArray[np.float64]]

    def mean(self, metric: str | None = None) -> float:
        """The mean over draws and episodes; None takes the primary metric."""
        return float(self._values(metric)[1].mean())

    def worst(self, metric: str | None = None) -> float:
        """The mean over episodes of the worst draw, one draw for all episodes: worst-of-seeds as papers report it."""
        better, values = self._values(metric)
        by_draw = values.mean(1)
        return float(by_draw.min() if better else by_draw.max())

    def worst_per_episode(self, metric: str | None = None) -> float:
        """The mean over episodes of each episode's own worst draw: what an unlucky user gets."""
        return float(self.episode_worsts(metric).mean())

    def episode_means(self, metric: str | None = None) -> NDArray[np.float64]:
        """The mean over the draws of each episode (E,), for paired intervals."""
        return self._values(metric)[1].mean(0)

    def episode_worsts(self, metric: str | None = None) -> NDArray[np.float64]:
        """The worst draw of each episode (E,), likewise."""
        better, values = self._values(metric)
        return values.min(0) if better else values.max(0)

    def _values(self, metric: str | None) -> tuple[bool, NDArray[np.float64]]:
        name = check_choice("metric", primary_metric(self.kind) if metric is None else metric, self.metrics)
        return HIGHER_IS_BETTER[name], self.metrics[name]


def evaluate_draws(
    learner: Learner,
    tasks: TaskDistribution,
    *,
    n_shot: int,
    n_query: int,
    n_draws: int = 5,
    n_episodes: int = 200,
    split: Split = "test",
    seed: int = EVAL_SEED,
    batch_size: int = 25,
) -> DrawEvaluation:
    """Judge a learner on the same query rows under `n_draws` disjoint supports, in eval mode and without gradients.

    Args:
        learner: Trained or not.
        tasks: Where the episodes come from; they must have `n_shot * n_draws` rows per class (per task in regression)
            beside the query.
        n_shot: Demonstrations of one draw, per class or per task.
        n_query: Query rows, likewise.
        n_draws: Supports per episode.
        n_episodes: E.
        split: Which tasks.
        seed: The address of the episodes.
        batch_size: Tasks adapted together.

    Reference:
        Min et al., 2022, arXiv:2110.15943, section 4.3 (mean and worst over 5 seeds of demonstrations).
    """
    check_is_learner(learner)
    n_draws = check_count("n_draws", n_draws)
    n_episodes = check_count("n_episodes", n_episodes)
    stream = EpisodeStream(
        tasks, seed=seed, split=split, n_shot=check_count("n_shot", n_shot) * n_draws, n_query=n_query
    )
    found: list[dict[str, list[torch.Tensor]]] = [{} for _ in range(n_draws)]
    randomness = isolated_randomness(derive_seed(seed, "learner"), device_of(learner))
    with torch.no_grad(), training_mode(learner, False), randomness:
        for episode in stream.batches(0, n_episodes, batch_size=batch_size):
            episode = place(episode, learner)
            for draw, metrics in enumerate(found):
                answer = learner(draw_of(episode.support, draw, n_shot, tasks.spec), episode.query.x)
                for name, value in query_metrics(answer, episode.query, tasks.spec).items():
                    metrics.setdefault(name, []).append(value.cpu().double())
    joined = {name: np.stack([torch.cat(metrics[name]).numpy() for metrics in found]) for name in found[0]}
    return DrawEvaluation(tasks.spec.kind, joined)


def draw_of(support: Examples, draw: int, n_shot: int, spec: TaskSpec) -> Examples:
    """Real rows draw * n_shot to (draw + 1) * n_shot - 1 of each class (of each task in regression), in their order.

    Args:
        support: (B, N).
        draw: Which; different draws share no row.
        n_shot: Rows to take.
        spec: What the tasks look like.
    """
    groups = support.real[..., None]
    if spec.kind == "classification":
        groups = groups & (support.y[..., None] == torch.arange(spec.output_size, device=support.y.device))
    place_in_group = groups.cumsum(1) - 1
    keep = (groups & (place_in_group >= draw * n_shot) & (place_in_group < (draw + 1) * n_shot)).any(-1)
    order = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)[:, : int(keep.sum(1).max())]
    task = torch.arange(support.n_tasks, device=order.device)[:, None]
    ids = None if support.ids is None else support.ids[task, order]
    return Examples(support.x[task, order], support.y[task, order], keep[task, order], ids)
