"""How the algorithm that a Transformer is nearest to moves with its depth."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from metaicl.analysis.fingerprint import fingerprint
from metaicl.analysis.reference_algorithms import reference_library
from metaicl.learner import Learner
from metaicl.recipe import Criterion
from metaicl.task import TaskDistribution

STAGES = ("GD-1", "ridge", "least squares")
"""What depth is said to pass through, in this order (Akyürek et al. 2022, arXiv:2211.15661)."""


def judge_depths(
    models: Mapping[int, Sequence[Learner]], tasks: TaskDistribution, *, n_shot: int, n_episodes: int
) -> list[Criterion]:
    """The stage each depth is at, and the penalty it answers with, from shallow to deep.

    Args:
        models: By depth, rising; one for each training seed.
        tasks: Without noise, where the deepest should be least squares.
        n_shot: Rows of a stream.
        n_episodes: Of a fingerprint.
    """
    library = reference_library(tasks)
    reached, penalties = [], []
    for depth, learners in models.items():
        found = fingerprint(
            learners, tasks, n_shot=n_shot, n_episodes=n_episodes, at=(), name=f"Transformer of depth {depth}",
            references={name: library[name] for name in STAGES},
        )  # fmt: skip
        print(found)
        reached.append(STAGES.index(found.best))
        penalties.append(found.fits["ridge"].overall.value)
    back = max(earlier - later for earlier, later in pairwise(reached))
    rise = max(later / earlier for earlier, later in pairwise(penalties))
    return [
        Criterion("depth: most stages back, of descent, ridge, least squares", back, "<=", 0),
        Criterion("depth: stage of the deepest less that of the shallowest", reached[-1] - reached[0], ">=", 1),
        Criterion("depth: largest factor by which the nearest penalty of ridge rises", rise, "<=", 1.0),
    ]
