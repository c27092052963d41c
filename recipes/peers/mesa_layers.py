"""What layers trained on dynamical systems hold: weights outside of the construction, and what probes read in them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metaicl.analysis.answers import draw_episodes
from metaicl.analysis.probe_report import ProbeReport, probe_layers, untrained
from metaicl.analysis.probe_targets import own_target, preconditioned_input
from metaicl.analysis.weight_structure import block_structure
from metaicl.collation import concatenate
from metaicl.learner import Learner
from metaicl.learners.incontext.linear_transformer import CausalLinearTransformer
from metaicl.learners.reference.recursive import RecursiveLeastSquares
from metaicl.recipe import Criterion
from metaicl.task import EVAL_SEED, TaskDistribution


def off_block(learner: Learner) -> float:
    """Share of the squared entries of both products of the only layer that a step of descent has no use for."""
    assert isinstance(learner, CausalLinearTransformer)
    dim = learner.x_size
    key_query, project_value = learner.stack[0].products()
    read = project_value[0][dim:]  # the other rows change what nothing reads
    shares = [
        block_structure(key_query[0], (dim, dim), [(0, 0)]).off_block,
        block_structure(read, (dim,), [(0, 1)], columns=(dim, dim)).off_block,
    ]
    return max(shares)


def probe_criteria(
    learners: Sequence[Learner], tasks: TaskDistribution, ridge: Learner, length: int, n_episodes: int, out: Path
) -> list[Criterion]:
    """Probe errors fall with depth and rows, below those of untrained copies and of chance; a heat map of the first.

    Args:
        learners: Linear Transformers of several layers, one for each training seed.
        tasks: Streams of states.
        ridge: Recursive least squares, whose penalty preconditions.
        length: States in a sequence.
        n_episodes: Sequences.
        out: Folder of probes.png and probes.json.
    """
    assert isinstance(ridge, RecursiveLeastSquares)
    n_shot, dim = length - 2, tasks.spec.output_size
    targets = {"next state": own_target, "preconditioned input": preconditioned_input(ridge.strength)}
    reports = [
        probe_layers(one, tasks, names=["stack.layers.*"], targets=targets, controls={"untrained": untrained(one)},
                     n_shot=n_shot, n_episodes=n_episodes, seed=EVAL_SEED)
        for one in learners
    ]  # fmt: skip
    print(reports[0])
    reports[0].plot(out / "probes.png")
    reports[0].to_json(out / "probes.json")
    episode = draw_episodes(
        tasks, n_shot=n_shot, n_query=1, start=0, stop=n_episodes, split="test", seed=EVAL_SEED
    )  # those that were probed
    stream, criteria = concatenate(episode.support, episode.query), []
    for name, target in targets.items():
        variance = target(stream, episode.latents)[:, 1:].var(0).mean(-1).numpy()
        mse = {subject: _unexplained(reports, name, subject) * variance for subject in reports[0].r2[name]}
        if name == "preconditioned input":
            mse = {subject: one[:-1] for subject, one in mse.items()}  # the last layer only answers
        late = {subject: one[:, dim - 1 :].mean(1) for subject, one in mse.items()}  # from D rows on
        ours, control = late["trained"], min(late["untrained"].min(), late["shuffled"].min())
        label = f"probe of the {name}, error at late rows"
        criteria += [
            Criterion(f"{label}: least fall from a layer to the next", float(-np.diff(ours).max()), ">", 0),
            Criterion(f"{label}: deepest layer / best control", float(ours[-1] / control), "<=", 1),
        ]
        if name == "next state":
            deepest, quarter = mse["trained"][-1], max(len(variance) // 4, 1)
            fall = float(deepest[-quarter:].mean() / deepest[:quarter].mean())
            criteria.append(Criterion(f"probe of the {name}, error: last quarter of the rows / first", fall, "<=", 1))
    return criteria


def _unexplained(reports: Sequence[ProbeReport], target: str, subject: str) -> np.ndarray:
    """Share of the variance that a probe leaves, mean over seeds: layers by rows."""
    values = [[[1 - one.mean for one in rows] for rows in report.r2[target][subject].values()] for report in reports]
    return np.mean(values, 0)
