"""In-context learning beside finetuning: does a context move a model as a gradient step on its keys and values would?

Three runs of one model are compared: zero-shot (no context), in-context (N demonstrations) and finetuned (no context,
after one gradient step for each task on W_K and W_V, which teaches the model to answer the demonstrations without
context).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from metaicl.analysis.answers import batches, check_learners, draw_episodes, still
from metaicl.analysis.finetuning_runs import WatchedModel
from metaicl.checks import check_count, check_positive
from metaicl.learners.incontext.sequence import SequenceLearner
from metaicl.statistics import COSINE, NOT_NEGATIVE, Array, Interval, interval, intervals
from metaicl.task import EVAL_SEED, Split, TaskDistribution, derive_seed

_RATES = tuple(10 ** (-4 + k / 3) for k in range(16))  # .0001 to 10


@dataclass(frozen=True)
class FinetuningComparison:
    """How alike in-context learning and finetuning are; every value is a mean over layers, queries and episodes.

    Args:
        sim_aou: Similarity of attention output updates, cos(h_ICL - h_ZSL, h_FT - h_ZSL) of outputs of length one.
        sim_aou_random: The same with a random change of W_K and W_V, as long as the gradient's, in place of finetuning.
        sim_aou_by_layer: `sim_aou` of each attention layer.
        sim_am: Similarity of attention maps, cos(m_ICL, m_FT), of the scores before softmax.
        sim_am_before: cos(m_ICL, m_ZSL): before finetuning.
        sim_am_gain: The difference of the two, paired.
        rec2ftp: Of what finetuning corrects, the share that a context corrects too.
        losses: Squared error, or 1 - accuracy, of "zero-shot", "finetuned" and "in-context" answers.
        rates: Step size of the finetuning, for each learner.
    """

    sim_aou: Interval
    sim_aou_random: Interval
    sim_aou_by_layer: Mapping[str, Interval]
    sim_am: Interval
    sim_am_before: Interval
    sim_am_gain: Interval
    rec2ftp: Interval
    losses: Mapping[str, Interval]
    rates: tuple[float, ...]

    def __str__(self) -> str:
        """A table."""
        rows = {"SimAOU": self.sim_aou, "SimAOU, random update": self.sim_aou_random}
        rows |= {f"SimAOU of {name}": one for name, one in self.sim_aou_by_layer.items()}
        rows |= {"SimAM after finetuning": self.sim_am, "SimAM before": self.sim_am_before}
        rows |= {"SimAM gain": self.sim_am_gain, "Rec2FTP": self.rec2ftp}
        rows |= {f"loss, {name}": one for name, one in self.losses.items()}
        width = max(map(len, rows))
        lines = [f"{name:{width}s}  {one.mean:8.4f}  {_ends(one)}" for name, one in rows.items()]
        steps = ", ".join(f"{rate:.3g}" for rate in self.rates)
        return "\n".join(["in-context learning beside one step of finetuning", *lines, f"step size: {steps}"])


def compare_with_finetuning(
    learner: SequenceLearner | Sequence[SequenceLearner],
    tasks: TaskDistribution,
    *,
    n_shot: int,
    n_query: int = 4,
    rates: Sequence[float] = _RATES,
    n_episodes: int = 512,
    split: Split = "test",
    seed: int = EVAL_SEED,
    batch_size: int = 32,
) -> FinetuningComparison:
    """Compare a model's in-context learning with one gradient step on its W_K and W_V for each task.

    The step has the full batch of demonstrations, on the squared error or the negative log-likelihood. Its size is the
    one of `rates` with the lowest query loss on other episodes, a quarter as many. All is computed in float64.

    Args:
        learner: A model with `CausalAttention` layers, or several trained alike from different seeds. Its queries may
            be several tokens each; the last one is looked at.
        tasks: What it was trained for.
        n_shot: N, demonstrations (per class in classification).
        n_query: Queries of each episode.
        rates: Step sizes to choose from.
        n_episodes: E.
        split: Which tasks.
        seed: The address.
        batch_size: Tasks at a time, each with weights of its own.

    Raises:
        TypeError: If a learner is no `SequenceLearner`.
        ValueError: If it has no `CausalAttention`, or does not fit the tasks, or there are no rates.

    Reference:
        Dai et al. 2022, arXiv:2212.10559. Differs: one step on all demonstrations instead of one for each;
        attention maps are compared over heads and own tokens together, as a query here has few tokens; the random
        update is one of weights, not of outputs. In regression an answer is right if its sign is.
    """
    learners = check_learners(learner, tasks)
    steps = [check_positive("rates", rate) for rate in rates]
    if not steps:
        raise ValueError("rates must hold at least one step size; got none")
    n_other = max(check_count("n_episodes", n_episodes, minimum=2) // 4, 2)
    options = {"n_shot": n_shot, "n_query": n_query, "split": split, "seed": seed}
    episode = draw_episodes(tasks, start=0, stop=n_episodes, **options)
    others = draw_episodes(tasks, start=n_episodes, stop=n_episodes + n_other, **options)
    found, chosen = [], []
    for one in learners:
        model = WatchedModel(one)
        with still(model.learner, seed):
            chosen.append(model.best_rate(others, steps, batch_size))
            starts = range(0, n_episodes, batch_size)
            parts = [
                model.compare(part, chosen[-1], [derive_seed(seed, "update", start + i) for i in range(part.n_tasks)])
                for start, part in zip(starts, batches(episode, batch_size), strict=True)
            ]
        found.append({name: np.concatenate([part[name] for part in parts], -1) for name in parts[0]})
    values = {name: np.stack([one[name] for one in found], -2) for name in found[0]}
    return _summary(values, WatchedModel(learners[0]).names, tuple(chosen))


def _summary(values: Mapping[str, Array], names: Sequence[str], rates: tuple[float, ...]) -> FinetuningComparison:
    """Intervals of values (..., S, E)."""
    share = _ratio(values["both"], values["corrected"])
    similar = [values[name] for name in ("aou", "random", "after", "before")]
    aou, random, after, before, *layers = intervals([*similar, *values["layers"]], bounds=COSINE)
    losses = [values[name] for name in ("loss zero-shot", "loss finetuned", "loss in-context")]
    zero, tuned, context = intervals(losses, bounds=NOT_NEGATIVE)
    gain, both = interval(values["after"] - values["before"]), interval(share, bounds=(0.0, 1.0))
    return FinetuningComparison(
        sim_aou=aou,
        sim_aou_random=random,
        sim_aou_by_layer=dict(zip(names, layers, strict=True)),
        sim_am=after,
        sim_am_before=before,
        sim_am_gain=gain,
        rec2ftp=both,
        losses={"zero-shot": zero, "finetuned": tuned, "in-context": context},
        rates=rates,
    )


def _ratio(parts: Array, wholes: Array) -> Array:
    """Values (S, E) whose mean is sum(parts) / sum(wholes) and whose spread is, to first order, that of the ratio."""
    whole = wholes.mean()
    if whole == 0:
        return np.zeros_like(parts)
    ratio = parts.mean() / whole
    return ratio + (parts - ratio * wholes) / whole


def _ends(one: Interval) -> str:
    return "" if one.ends is None else f"[{one.ends[0]:.4f}, {one.ends[1]:.4f}]"
