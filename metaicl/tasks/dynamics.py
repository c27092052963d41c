"""Dynamical systems as streams: predict the next observation from those before it."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from metaicl.checks import check_choice, check_count
from metaicl.collation import split_rows
from metaicl.episode import Episode
from metaicl.learner import Learner
from metaicl.spec import TaskSpec
from metaicl.task import Split, TaskDistribution, derive_generator
from metaicl.tasks.bayes import BayesianLinearRegression
from metaicl.tasks.holdout import hold_out
from metaicl.tasks.inputs import random_rotations
from metaicl.tasks.orthogonal import KnownMap, OrthogonalPosterior

_CELL = 2.0**-9
_MIN_NOISE = 1e-4  # assumed by the references of noiseless systems
_TINY = 1e-20  # keeps the scaling of a blanked row finite

SYSTEMS = ("linear", "partial", "nonlinear")


class DynamicalSystem(TaskDistribution):
    """States h_{t+1} = f(h_t) W + e with an orthogonal W for each task, observed as s_t = h_t C.

    Rows are s_t -> s_{t+1}. An episode is one stream in order: the query goes on where the support ends. The stream
    starts at h_1 ~ N(0, I), and e is N(0, noise^2 I). Targets carry the noise of their step, so with C = I no
    predictor gets below noise^2 per coordinate. All predictions of a stream in one pass:
    `metaicl.prefixes.predict_prefixes` over `metaicl.objectives.stream_of(episode)`.

    The latents are "weights" W (B, H, H), "readout" C (B, H, D) where it is drawn, and "key" (B, 1), the number that
    tells tasks apart: the angle atan2(W_21, W_11), or with `fixed` the first coordinate of h_1.

    Args:
        system: "linear", f(h) = h and C = I; "partial", f(h) = h and fewer observations than states, where the
            entries of C are N(0, 1/2), new for each task; "nonlinear", C = I and f a random network h -> gelu(h A) B
            that is the same in all tasks, scaled to the length sqrt(H).
        dim: D = y_dim, observations per time step.
        hidden: H, states; None is `dim`, and 3 dim for "partial".
        noise: Standard deviation of e; .1 gives the variance of .01.
        fixed: One W for all tasks: a control that leaves nothing to learn in context.
        width: Units of the network of "nonlinear".
        teacher_seed: Of what is the same in all tasks.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        von Oswald et al. 2023, arXiv:2309.05858, section 3. Differs: observations have no noise of their own, and
        the output of f is scaled, because the states of most random networks grow without bound.
    """

    identity: tuple[str, ...] = ("key",)

    def __init__(
        self,
        *,
        system: str = "linear",
        dim: int = 10,
        hidden: int | None = None,
        noise: float = 0.1,
        fixed: bool = False,
        width: int = 40,
        teacher_seed: int = 0,
    ) -> None:
        """Draw what is the same in all tasks."""
        self.system = check_choice("system", system, SYSTEMS)
        dim = check_count("dim", dim, minimum=2)
        usual = 3 * dim if system == "partial" else dim
        self.hidden = usual if hidden is None else check_count("hidden", hidden)
        if system != "partial" and self.hidden != dim:
            raise ValueError(f"hidden must be dim = {dim} unless system is 'partial'; got {hidden}")
        if system == "partial" and self.hidden < dim + 2:
            raise ValueError(f"hidden must be at least dim + 2 = {dim + 2} for a partial view; got {hidden}")
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise must be a standard deviation >= 0; got {noise}")
        self.noise, self.fixed = float(noise), bool(fixed)
        source = derive_generator("dynamical system", teacher_seed)
        self.teacher = random_rotations(1, self.hidden, source)[0]
        self._inner = torch.randn(self.hidden, check_count("width", width), generator=source) / self.hidden**0.5
        self._outer = torch.randn(width, self.hidden, generator=source)
        self.spec = TaskSpec("regression", (dim,), y_dim=dim, ordered=True)

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Draw systems and run them for n_shot + n_query steps; see `TaskDistribution.sample`."""
        state = torch.randn(n_tasks, 1, self.hidden, generator=generator)
        latents: dict[str, Tensor] = {}
        if self.fixed:
            weights = self.teacher.expand(n_tasks, -1, -1)
            state[:, 0, :1] = hold_out(state[:, 0, :1], split, generator, cell=_CELL)
            latents["key"] = state[:, 0, :1].clone()
        else:
            weights, latents["key"] = draw_maps(n_tasks, self.hidden, split, generator)
        latents["weights"] = weights
        states = [state]
        for _ in range(n_shot + n_query):
            step = self.features(states[-1]) @ weights
            states.append(step + self.noise * torch.randn(state.shape, generator=generator))
        seen = torch.cat(states, 1)
        if self.system == "partial":
            readout = torch.randn(n_tasks, self.hidden, self.spec.output_size, generator=generator) * 0.5**0.5
            seen, latents["readout"] = seen @ readout, readout
        return split_rows(seen[:, :-1], seen[:, 1:], n_shot, latents)

    def features(self, states: Tensor) -> Tensor:
        """F of states (..., H), in their dtype."""
        if self.system != "nonlinear":
            return states
        found = F.gelu(states @ self._inner.to(states)) @ self._outer.to(states)
        return found * (found.square().mean(-1, keepdim=True) + _TINY).rsqrt()

    def references(self) -> Mapping[str, Learner]:
        """What is known to predict best from the pairs (s_t, s_{t+1}), with the true noise.

        "orthogonal posterior" is Bayes up to its large-D formula and "ridge" the best that does not know that W is
        orthogonal; both know f. With `fixed`, "teacher" knows W. Of a partial view, "ridge" uses the last
        observation only, and a learner that looks further back can beat it.
        """
        dim, noise = self.spec.output_size, max(self.noise, _MIN_NOISE)
        if self.system == "partial":
            # Of s' = h W C, the part of h that s does not show is noise to a linear map of s.
            unseen = (0.5 * (self.hidden - dim) + noise**2 * 0.5 * self.hidden) ** 0.5
            scale = (self.hidden - dim - 1) ** -0.5  # rms entry of C^+ W C
            return {"ridge": BayesianLinearRegression(self.spec, noise=unseen, weight_scale=scale)}
        if self.fixed:
            return {"teacher": KnownMap(self.spec, weights=self.teacher, noise=noise, features=self.features)}
        posterior = OrthogonalPosterior(self.spec, noise=noise, features=self.features)
        if self.system == "nonlinear":
            return {"orthogonal posterior": posterior}
        ridge = BayesianLinearRegression(self.spec, noise=noise, weight_scale=dim**-0.5)
        return {"orthogonal posterior": posterior, "ridge": ridge}


class InterleavedPairs(TaskDistribution):
    """Pairs y_i = x_i W of an orthogonal map as one stream x_1, y_1, x_2, y_2, ...; rows are s_t -> s_{t+1}.

    Rows 0, 2, 4, ... ask for y_i given x_i; the rows between ask for x_{i+1}, which nothing tells. A learner trained
    on `DynamicalSystem` takes both kinds for pairs of the map ("overlapping pairs"), and its error first rises with
    the number of pairs before it falls ("early ascent"). x is N(0, I).

    Args:
        dim: D.

    Reference:
        von Oswald et al. 2023, arXiv:2309.05858, section 5.
    """

    identity: tuple[str, ...] = ("key",)

    def __init__(self, *, dim: int = 10) -> None:
        """Keep the size."""
        dim = check_count("dim", dim, minimum=2)
        self.spec = TaskSpec("regression", (dim,), y_dim=dim, ordered=True)

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Draw maps and pairs; n_shot and n_query count rows, two for each pair. See `TaskDistribution.sample`."""
        dim, n_pairs = self.spec.output_size, (n_shot + n_query) // 2 + 1
        weights, key = draw_maps(n_tasks, dim, split, generator)
        x = torch.randn(n_tasks, n_pairs, dim, generator=generator)
        stream = torch.stack([x, x @ weights], 2).flatten(1, 2)[:, : n_shot + n_query + 1]
        return split_rows(stream[:, :-1], stream[:, 1:], n_shot, {"weights": weights, "key": key})

    def references(self) -> Mapping[str, Learner]:
        """Ridge regression with penalty 1 on all rows, overlapping pairs included: not the best, but the expected."""
        scale = self.spec.output_size**-0.5
        return {"overlapping ridge": BayesianLinearRegression(self.spec, noise=scale, weight_scale=scale)}


def draw_maps(n_tasks: int, dim: int, split: Split, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Orthogonal maps W (B, D, D) of a split, and the angles atan2(W_21, W_11) (B, 1) that its splits interleave in.

    A uniform W is turned in the plane of its first two rows until its angle lies in the part of the split.
    """
    maps = random_rotations(n_tasks, dim, generator)
    angle = torch.atan2(maps[:, 1, :1], maps[:, 0, :1])
    key = hold_out(angle, split, generator, cell=_CELL)
    turn = (key - angle)[..., None]
    first, second = maps[:, :1], maps[:, 1:2]
    turned = [turn.cos() * first - turn.sin() * second, turn.sin() * first + turn.cos() * second]
    return torch.cat([*turned, maps[:, 2:]], 1), key
