"""The algorithm fingerprint: which reference does a learner answer like, and where along the prefix?"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metaicl.analysis.answers import answers_at_prefixes, check_answers, check_learners, draw_episodes, zero_answer
from metaicl.analysis.closer_look import look_closer
from metaicl.analysis.fingerprint_result import Fingerprint, ParameterFit
from metaicl.analysis.parameter_fits import Estimate, fit_parameter
from metaicl.analysis.prefix_answers import PrefixStates, answers_of, distances, linearized_ratio
from metaicl.analysis.ranking import CAP, find_nearest, rank_overall
from metaicl.analysis.reference_algorithms import Reference, as_references, reference_library
from metaicl.checks import check_count
from metaicl.collation import concatenate
from metaicl.episode import Episode, Examples
from metaicl.learner import Learner
from metaicl.spec import TaskSpec
from metaicl.statistics import NOT_NEGATIVE, Array, Interval, intervals
from metaicl.task import EVAL_SEED, Split, TaskDistribution

_MEASURES = {"regression": "squared difference per output", "classification": "total variation"}
_CLOSER = 8  # lengths that are looked at closely, by default


def fingerprint(
    learner: Learner | Sequence[Learner],
    tasks: TaskDistribution,
    *,
    n_shot: int,
    n_query: int | None = None,
    n_episodes: int = 256,
    at: Sequence[int] | None = None,
    references: Mapping[str, Reference | Learner] | None = None,
    split: Split = "test",
    seed: int = EVAL_SEED,
    batch_size: int = 128,
    name: str | None = None,
    progress: bool = False,
) -> Fingerprint:
    """Compare a learner's answers at every prefix of the same addressed episodes with those of reference algorithms.

    Row k of a stream is answered from the k rows before it, by the learner (its `predict_prefixes` where it has one)
    and by each reference. A reference with a free number (the penalty of ridge, the rate of gradient descent, a
    bandwidth) takes at each length the one at which it is nearest to the learner, fitted on `n_episodes` other
    episodes, so that the measured distances flatter nobody. In regression the learner's implicit linear map and its
    derivatives are compared too, on fresh inputs. Everything is decided by the address: the same call, the same result.

    Args:
        learner: A trained learner, or several trained alike from different seeds: intervals are then over seeds and
            episodes. Any learner will do; nothing about it is changed.
        tasks: What it is asked about; need not be what it was trained on.
        n_shot: Support rows, per class in classification: prefixes of 0 to N rows are compared.
        n_query: Fresh inputs for the closer look, per class in classification; None takes 4 D, at least 32.
        n_episodes: E, episodes measured.
        at: Prefix lengths of the closer look; None takes at most 8, evenly.
        references: Algorithms by name, learners among them; None takes `reference_library(tasks)`.
        split: Which tasks.
        seed: The address.
        batch_size: Tasks answered together; changes rounding only.
        name: Of the learner, for tables; None takes its class name.
        progress: Show a bar.

    Raises:
        TypeError: If learner, tasks or a reference are something else.
        ValueError: If a count is out of range, there are no references, tasks are ragged, or a spec does not fit.
        FloatingPointError: If an answer is NaN or infinite.

    Reference:
        Akyürek et al. 2022, arXiv:2211.15661, section 4 (squared prediction difference, implicit linear weight
        difference) and von Oswald et al. 2022, arXiv:2212.07677, section 3 (sensitivities). Differs: fitted numbers and
        distances are from different episodes; every value has an interval; ties are named.
    """
    learners = check_learners(learner, tasks)
    n_episodes = check_count("n_episodes", n_episodes, minimum=2)
    library = reference_library(tasks) if references is None else as_references(references, tasks.spec)
    closer_query = max(32, 4 * int(np.prod(tasks.spec.x_shape))) if n_query is None else check_count("n_query", n_query)
    if tasks.spec.kind == "classification":
        closer_query = 1
    draw: dict[str, Any] = {"n_shot": n_shot, "n_query": closer_query, "split": split, "seed": seed}
    measured = draw_episodes(tasks, start=0, stop=n_episodes, **draw)
    fitted = draw_episodes(tasks, start=n_episodes, stop=2 * n_episodes, **draw)
    look = _Look(learners, library, tasks.spec, batch_size, seed, progress)
    fits = look.fit(_stream(fitted))
    closer, notes = look_closer(learners, library, fits, measured, at=at, batch_size=batch_size, seed=seed)
    found = look.measure(_stream(measured), fits)
    common = {"n_seeds": len(learners), "n_episodes": n_episodes, "n_shot": n_shot, "seed": seed, "split": split}
    return Fingerprint(
        learner=name or type(learners[0]).__name__,
        task=type(tasks).__name__,
        kind=tasks.spec.kind,
        measure=_MEASURES[tasks.spec.kind],
        episodes=measured.fingerprint(),
        fits=fits,
        closer=closer,
        notes=notes,
        **common,
        **found,
    )


class _Look:
    """What stays the same while a learner is compared."""

    def __init__(
        self,
        learners: Sequence[Learner],
        library: Mapping[str, Reference],
        spec: TaskSpec,
        batch_size: int,
        seed: int,
        progress: bool,
    ) -> None:
        self.learners, self.library, self.spec = learners, library, spec
        self.batch_size, self.seed, self.progress = batch_size, seed, progress

    def fit(self, stream: Examples) -> dict[str, ParameterFit]:
        """The free numbers nearest to the learner, at each length and overall."""
        free = [one for one in self.library.values() if one.grid]
        ours, states = self._ours(stream), PrefixStates(stream)
        lengths = range(1, stream.n_rows)
        zero = {k: distances(ours[:, :, k], self._zero(stream, k), self.spec.kind) for k in lengths}
        scales = {k: _scale(zero[k], stream, k) for k in lengths}
        fits = {}
        with tqdm(total=len(free) * len(lengths), desc="fingerprint", disable=not self.progress, leave=False) as bar:
            for one in free:
                by_length = {}
                for k in lengths:
                    by_length[k] = fit_parameter(one.grid, self._distances(one, states, ours, k))
                    bar.update()
                fits[one.name] = ParameterFit(one.symbol, self._overall(one, states, ours, scales), by_length)
        return fits

    def measure(self, stream: Examples, fits: Mapping[str, ParameterFit]) -> dict[str, Any]:
        """Risks, distances and rankings on other episodes."""
        ours, kind = self._ours(stream), self.spec.kind
        zero = distances(ours, torch.stack([self._zero(stream, k) for k in range(stream.n_rows)], 1), kind)
        scale = np.array([_scale(zero[..., k], stream, k) for k in range(stream.n_rows)])
        risk, apart, relative, cut = {"learner": _risk(ours, stream, self.spec)}, {}, {}, {}
        states = PrefixStates(stream)
        for name, one in self.library.items():
            answers = answers_of(one, states, fits.get(name), batch_size=self.batch_size, seed=self.seed)
            check_answers(f"references[{name!r}]", answers)
            risk[name] = _risk(answers[None], stream, self.spec)
            apart[name] = distances(ours, answers, kind)
            relative[name] = linearized_ratio(apart[name], zero, scale)[..., 1:]
            cut[name] = np.minimum(apart[name] / scale, CAP)[..., 1:]
        free = {name for name, one in self.library.items() if one.grid}
        order, overall, ties = rank_overall(relative, cut, free)
        return {
            "lengths": tuple(range(stream.n_rows)),
            "risk": _curves(risk),
            "distance": _curves({name: apart[name] for name in order}),
            "relative": _curves({name: relative[name] for name in order}),
            "overall": overall,
            "overall_ties": ties,
            "nearest": find_nearest(relative, cut, order, free),
            "values": {name: relative[name].mean(-1) for name in order},
        }

    def _ours(self, stream: Examples) -> Tensor:
        found = [answers_at_prefixes(one, stream, batch_size=self.batch_size, seed=self.seed) for one in self.learners]
        return torch.stack(found)

    def _zero(self, stream: Examples, length: int) -> Tensor:
        return zero_answer(self.spec, stream.x[:, length : length + 1])[:, 0]

    def _distances(self, one: Reference, states: PrefixStates, ours: Tensor, length: int) -> Callable[[Array], Array]:
        """Values of a free number (G,) to distances (G, S, E) at one length."""
        return lambda values: distances(
            ours[:, :, length], states.answers(one, length, values)[:, None], self.spec.kind
        )

    def _overall(self, one: Reference, states: PrefixStates, ours: Tensor, scales: Mapping[int, float]) -> Estimate:
        parts = [(self._distances(one, states, ours, k), scale) for k, scale in scales.items()]
        return fit_parameter(one.grid, lambda values: np.mean([part(values) / scale for part, scale in parts], axis=0))


def _stream(episode: Episode) -> Examples:
    """The support and one query row: N + 1 rows, so that the whole support is a prefix too."""
    return concatenate(episode.support, episode.query.rows(slice(1)))


def _scale(zero: Array, stream: Examples, length: int) -> float:
    """The mean distance to zero answers, kept off zero for learners that give them."""
    floor = 1e-6 * (float(stream.y[:, length].square().mean()) if stream.y.is_floating_point() else 1.0)
    return max(float(zero.mean()), floor, 1e-300)


def _risk(answers: Tensor, stream: Examples, spec: TaskSpec) -> Array:
    """Squared error per output, or Brier score, of answers (S, E, T, K): (S, E, T)."""
    if spec.kind == "regression":
        return (answers - stream.y.double()).square().mean(-1).numpy()
    one_hot = torch.nn.functional.one_hot(stream.y, spec.output_size).double()
    return (answers - one_hot).square().sum(-1).numpy()


def _curves(values: Mapping[str, Array]) -> dict[str, tuple[Interval, ...]]:
    """Intervals of (S, E, T) arrays of distances or risks, one for each T."""
    flat = [array[..., k] for array in values.values() for k in range(array.shape[-1])]
    found = iter(intervals(flat, bounds=NOT_NEGATIVE))
    return {name: tuple(next(found) for _ in range(array.shape[-1])) for name, array in values.items()}
