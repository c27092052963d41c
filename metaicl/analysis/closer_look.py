"""The linear map in a learner's answers, its derivatives, and its gain along the support's eigenvectors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaicl.analysis.answers import answers_at_length, check_answers, sensitivities, slopes
from metaicl.analysis.fingerprint_result import CloserLook, ParameterFit
from metaicl.analysis.linear_fit import cosines, explained, fit_linear, weight_difference
from metaicl.analysis.prefix_answers import value_at
from metaicl.analysis.reference_algorithms import Reference, Spectrum, read_spectrum
from metaicl.checks import check_count
from metaicl.episode import Episode
from metaicl.functional import raw_features
from metaicl.learner import Learner
from metaicl.prefixes import take_prefix
from metaicl.statistics import COSINE, NOT_NEGATIVE, Array, Bounds, Interval, intervals
from metaicl.training import training_mode

_LOOKS = 8
_BINS = 10


def look_closer(
    learners: Sequence[Learner],
    library: Mapping[str, Reference],
    fits: Mapping[str, ParameterFit],
    episode: Episode,
    *,
    at: Sequence[int] | None,
    batch_size: int,
    seed: int,
) -> tuple[tuple[CloserLook, ...], tuple[str, ...]]:
    """A `CloserLook` for each length in `at`, and notes on what could not be measured.

    Args:
        learners: One for each training seed.
        library: The references.
        fits: Their free numbers.
        episode: The query holds the fresh inputs.
        at: Prefix lengths; None takes at most 8, evenly, the last one included.
        batch_size: Tasks answered together.
        seed: The address.

    Raises:
        ValueError: If a length is out of range.
    """
    spec, n_rows = learners[0].spec, episode.support.n_rows
    lengths = _spread(n_rows) if at is None else sorted({check_count("at", k) for k in at})
    if lengths and lengths[-1] > n_rows:
        raise ValueError(f"at must hold prefix lengths from 1 to N = {n_rows}; got {lengths[-1]}")
    if spec.kind == "classification":
        return (), ("implicit linear maps and their derivatives are for regression",)
    if spec.x_kind == "tokens":
        return (), ("implicit linear maps and derivatives need inputs that are numbers",)
    dim = int(np.prod(spec.x_shape))
    if episode.query.n_rows < dim + 2:
        return (), (f"implicit linear maps need n_query >= D + 2 = {dim + 2} fresh inputs",)
    notes: tuple[str, ...] = ()
    smooth = not any(learner.traits.transductive for learner in learners)
    if not smooth:
        notes = ("no derivatives: the learner is transductive, so an answer has none by its own input alone",)
    shared: dict[str, Any] = {"learners": learners, "library": library, "fits": fits, "episode": episode}
    shared |= {"smooth": smooth, "options": {"batch_size": batch_size, "seed": seed}}
    return tuple(_View(length=k, **shared).look() for k in lengths), notes


@dataclass(frozen=True, kw_only=True)
class _View:
    """Learners and references after one prefix length."""

    learners: Sequence[Learner]
    library: Mapping[str, Reference]
    fits: Mapping[str, ParameterFit]
    episode: Episode
    length: int
    smooth: bool
    options: Mapping[str, int]

    @property
    def x(self) -> Tensor:
        """Fresh inputs as rows of numbers (E, Q, D)."""
        return raw_features(self.episode.query.x, self.learners[0].spec)

    def look(self) -> CloserLook:
        """Measure."""
        ours = [answers_at_length(one, self.episode, self.length, **self.options) for one in self.learners]
        own = [fit_linear(self.x, answers) for answers in ours]
        weights = torch.stack([fit.weights for fit in own])
        r2 = explained(torch.stack([fit.unexplained for fit in own]), torch.stack([fit.total for fit in own]))
        theirs, bends = self._references()
        differences = {name: weight_difference(weights, theirs[name]).numpy() for name in theirs}
        cosine, slope, norm = self._slopes(bends)
        spectrum = read_spectrum(take_prefix(self.episode.support, self.length), spec=self.learners[0].spec)
        eigenvalues, gain, gains = _gains(spectrum, weights, theirs)
        return CloserLook(
            length=self.length,
            r2=intervals([r2.numpy()], bounds=(-math.inf, 1.0))[0],
            weight_difference=_intervals(differences, NOT_NEGATIVE),
            weight_norm=float(weights.square().sum(-2).mean()),
            cosine=_intervals(cosine, COSINE),
            slope_difference=_intervals(slope, NOT_NEGATIVE),
            slope_norm=norm,
            eigenvalues=eigenvalues,
            gain=gain,
            gains=gains,
        )

    def _references(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Implicit weights (E, D, K) and derivatives (E, Q, D, K) of every reference."""
        weights, bends = {}, {}
        prefix, x, states = take_prefix(self.episode.support, self.length), self.episode.query.x, {}
        for name, one in self.library.items():
            value = value_at(self.fits.get(name), self.length)
            with training_mode(one.learner or torch.nn.Identity(), False), torch.no_grad():
                state = states[one.read] if one.read in states else states.setdefault(one.read, one.read(prefix))
                answers = one.answer(state, x, value)
                check_answers(f"references[{name!r}]", answers)
                weights[name] = fit_linear(self.x, answers).weights
                if self.smooth:
                    bends[name] = slopes(lambda x, one=one, state=state, value=value: one.answer(state, x, value), x)
        return weights, bends

    def _slopes(self, bends: Mapping[str, Tensor]) -> tuple[dict[str, Array], dict[str, Array], float | None]:
        """Cosines and differences (S, E) of derivatives to each reference, and the learner's mean length."""
        if not bends:
            return {}, {}, None
        own = torch.stack([sensitivities(one, self.episode, self.length, **self.options) for one in self.learners])
        cosine = {name: cosines(own, bend.expand_as(own)).numpy() for name, bend in bends.items()}
        apart = {name: (own - bend).norm(dim=-2).mean((-2, -1)).numpy() for name, bend in bends.items()}
        return cosine, apart, float(own.norm(dim=-2).mean())


def _gains(
    spectrum: Spectrum, weights: Tensor, references: Mapping[str, Tensor]
) -> tuple[tuple[float, ...], tuple[Interval, ...], dict[str, tuple[float, ...]]]:
    """The gain s f(s) of weights V f(s) V'X'y, estimated in bins of the eigenvalue s that hold equally many of them.

    The coordinates of the weights along V are regressed on those of least squares, V'X'y / s, weighted by s, which is
    the inverse variance that noise gives the latter.
    """
    s, cross = spectrum.values, spectrum.cross
    positive = s[s > 0]
    bins = min(_BINS, len(positive.unique()))
    if bins == 0:  # inputs of zeros: there are no directions to look along
        return (), (), dict.fromkeys(references, ())
    edges = torch.quantile(positive[: 2**20], torch.linspace(0, 1, bins + 1, dtype=s.dtype))
    base = torch.where(s > 0, 1 / torch.where(s > 0, s, 1.0), 0.0)[..., None] * cross.square()  # (E, D, K)
    index = torch.bucketize(s, edges[1:-1]).masked_fill(s <= 0, bins)
    members = torch.nn.functional.one_hot(index, bins + 1)[..., :bins].double()  # (E, D, bins)
    members = members[..., torch.einsum("edk,edb->b", base, members) > 0]  # a bin may be empty, or targets zero
    below = torch.einsum("edk,edb->eb", base, members)

    def share(one: Tensor) -> Tensor:
        along = spectrum.vectors.mT @ one * cross
        return torch.einsum("...edk,edb->...eb", along, members)

    scale = below.mean(0)
    own = share(weights)  # (S, E, bins)
    ratio = own.mean((0, 1)) / scale
    values = own / scale + ratio * (1 - below / scale)
    centers = (s[..., None] * members).sum((0, 1)) / members.sum((0, 1))
    gains = {name: tuple((share(one).mean(0) / scale).tolist()) for name, one in references.items()}
    found = intervals([values[..., b].numpy() for b in range(values.shape[-1])])
    return tuple(centers.tolist()), tuple(found), gains


def _intervals(values: Mapping[str, Array], bounds: Bounds) -> dict[str, Interval]:
    return dict(zip(values, intervals(list(values.values()), bounds=bounds), strict=True))


def _spread(n_rows: int) -> list[int]:
    return sorted({round(k) for k in np.linspace(1, n_rows, min(_LOOKS, n_rows))})
