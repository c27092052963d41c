"""The fingerprint names the algorithm it is shown, with its free number, and refuses nonsense."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution

from metaicl.analysis.fingerprint import fingerprint
from metaicl.analysis.fingerprint_result import Fingerprint
from metaicl.analysis.ranking import find_nearest, rank_overall
from metaicl.analysis.reference_algorithms import Reference, reference_library
from metaicl.episode import Episode, Examples
from metaicl.functional import gaussian
from metaicl.learner import Learner
from metaicl.learners.incontext.transformer import CausalInContextTransformer
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.reference.linear import Averaging, GradientDescent, LeastSquares
from metaicl.learners.reference.simple import Constant, NearestNeighbors, Ridge
from metaicl.tasks.bayes import BayesianLinearRegression
from metaicl.tasks.functions import LinearRegression, Sinusoid
from metaicl.tasks.gaussians import GaussianClasses

TASKS = LinearRegression(dim=3, noise=0.5)
CLASSES = GaussianClasses(dim=2, n_way=2)


def look(learner: Any, **options: Any) -> Fingerprint:
    return fingerprint(learner, TASKS, **{"n_shot": 6, "n_episodes": 48, "at": (2, 6), **options})


def numbers(value: Any) -> list[float]:
    """Every number in plain containers; the last bit of a sum may change with its place in memory."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [float(value)] if isinstance(value, (int, float)) else []


class NoisyBayes(Learner[tuple[Any, Tensor]]):
    """Bayes, off by a share that depends on the seed and the episode."""

    def __init__(self, share: float) -> None:
        super().__init__(TASKS.spec)
        self.share = share
        self.bayes = BayesianLinearRegression(TASKS.spec, noise=0.5)

    def adapt(self, support: Examples) -> tuple[Any, Tensor]:
        return self.bayes.adapt(support), 1 + self.share * support.y.sum((1, 2), keepdim=True).sign()

    def predict(self, state: tuple[Any, Tensor], x: Tensor) -> Distribution:
        mean = self.bayes.predict(state[0], x).mean * state[1]
        return gaussian(mean, torch.ones_like(mean))


@pytest.mark.parametrize(("steps", "rate"), [(1, 0.3), (3, 0.2)])
def test_gradient_descent_is_found_with_its_steps_and_rate(steps: int, rate: float) -> None:
    found = look(GradientDescent(TASKS.spec, steps=steps, lr=rate))
    assert found.best == f"GD-{steps}"
    assert found.overall_ties == ()
    assert found.stretches == [(f"GD-{steps}", 1, 6)]
    fit = found.fits[found.best]
    assert fit.overall.value == pytest.approx(rate, rel=1e-5)
    assert [one.value for one in fit.by_length.values()] == pytest.approx([rate] * 6, rel=1e-5)
    assert found.overall[found.best].mean < 1e-12


def test_ridge_is_found_with_its_penalty() -> None:
    """The bundled Ridge fits a bias that it does not penalize; the reference with a bias is that algorithm."""
    found = look(Ridge(TASKS.spec, penalty=1.7))
    assert (found.best, found.overall_ties) == ("ridge + bias", ())
    assert found.stretches[1:] == [("ridge + bias", 2, 6)]
    assert found.fits["ridge + bias"].overall.value == pytest.approx(1.7, rel=1e-5)
    assert found.overall["ridge"].mean > 1e-2


def test_of_the_same_answers_one_without_a_free_number_is_named() -> None:
    """From one row ridge with a bias can only answer its target, as the mean and its neighbors do without a number."""
    found = look(Ridge(TASKS.spec, penalty=1.7))
    same = {"mean", "1-NN", "3-NN", "ridge + bias", "kernel smoother"}
    first = found.nearest[0]
    assert {first.reference, *first.ties} == same
    assert all(found.relative[name][0].mean < 1e-8 for name in same)
    assert first.reference not in found.fits


def test_of_references_with_free_numbers_alone_the_preferred_one_is_named() -> None:
    values = {name: np.zeros((1, 20, 1)) for name in "abc"} | {"far": np.ones((1, 20, 1))}
    assert find_nearest(values, values, ["far", "b", "a", "c"], {"b", "a", "c"})[0].reference == "b"
    assert find_nearest(values, values, ["far", "b", "a", "c"], {"b"})[0].reference == "a"


def test_references_that_are_equally_far_are_seldom_told_apart() -> None:
    """Of eight, which one is nearest is chosen for what the distances show: 6 of 25 studies named one that is not."""
    claims = 0
    for seed in range(25):
        distances = 1 + 0.1 * np.random.default_rng(seed).normal(size=(8, 1, 40, 1))
        values = dict(zip("abcdefgh", distances, strict=True))
        claims += len(rank_overall(values, values, ())[2]) < 7
    assert claims <= 2


def test_bayes_is_ridge_at_noise_over_prior() -> None:
    """The posterior mean is ridge with penalty noise^2 / weight_scale^2 = .25."""
    found = look(BayesianLinearRegression(TASKS.spec, noise=0.5))
    assert found.best == "Bayes"
    assert found.overall_ties == ("ridge",)
    ridge = found.fits["ridge"]
    assert ridge.overall.value == pytest.approx(0.25, rel=1e-5)
    for one in (ridge.overall, *ridge.by_length.values()):
        assert one.low <= 0.25 * (1 + 1e-6)
        assert one.high >= 0.25 * (1 - 1e-6)
    assert all(one.reference == "Bayes" and "ridge" in one.ties for one in found.nearest)


def test_a_reference_keeps_its_free_number_under_a_name_of_its_own() -> None:
    library = reference_library(TASKS)
    found = look(BayesianLinearRegression(TASKS.spec, noise=0.5), references={"mine": library["ridge"]})
    assert found.fits["mine"].overall.value == pytest.approx(0.25, rel=1e-5)
    assert found.overall["mine"].mean < 1e-8


def test_tasks_keep_their_own_ridge_beside_the_one_with_a_free_number() -> None:
    """The own one knows the noise: as half of the weights are zero, its penalty is .25 * 2."""
    library = reference_library(LinearRegression(dim=20, nonzero=10, noise=0.5))
    own = library["ridge of the tasks"].learner
    assert isinstance(own, BayesianLinearRegression)
    assert (own.noise / own.weight_scale) ** 2 == pytest.approx(0.5)
    assert (library["ridge"].learner, len(library["ridge"].grid)) == (None, 36)


@pytest.mark.parametrize(
    ("learner", "name"),
    [
        (Averaging(TASKS.spec), "averaging"),
        (LeastSquares(TASKS.spec), "least squares"),
        (NearestNeighbors(TASKS.spec, k=3), "3-NN"),
        (Constant(TASKS.spec), "mean"),
    ],
)
def test_references_without_a_free_number_are_found(learner: Learner, name: str) -> None:
    found = look(learner)
    assert found.best == name
    assert found.overall[name].mean < 1e-10
    assert all(one.reference == name for one in found.nearest)


def test_least_squares_has_its_penalty_at_the_end_of_the_grid() -> None:
    fit = look(LeastSquares(TASKS.spec)).fits["ridge"]
    assert fit.overall.edge == "low"
    assert str(fit.overall).startswith("≤ ")


def test_weights_derivatives_and_gains_are_those_of_the_algorithms() -> None:
    """For a linear learner ILWD is the true difference of weights, R^2 is 1, and derivatives are the weights."""
    found = look(BayesianLinearRegression(TASKS.spec, noise=0.5), at=(6,))
    (view,) = found.closer
    assert view.r2.mean == pytest.approx(1.0, abs=1e-9)
    assert view.weight_difference["Bayes"].mean < 1e-20
    assert view.cosine["Bayes"].mean == pytest.approx(1.0, abs=1e-9)
    assert view.slope_difference["Bayes"].mean < 1e-9
    assert view.cosine["zero"].mean == 0.0
    assert view.slope_difference["zero"].mean == pytest.approx(view.slope_norm, rel=1e-9)
    assert view.weight_difference["zero"].mean == pytest.approx(view.weight_norm, rel=1e-9)
    assert view.gains["Bayes"] == pytest.approx([one.mean for one in view.gain], abs=1e-9)
    assert view.gains["least squares"] == pytest.approx([1.0] * len(view.gain), abs=1e-9)
    low, high = view.eigenvalues[0], view.eigenvalues[-1]
    assert view.gain[0].mean < view.gain[-1].mean
    assert view.gain[-1].mean == pytest.approx(high / (high + 0.25), abs=0.02)
    assert view.gain[0].mean == pytest.approx(low / (low + 0.25), abs=0.1)


def test_a_linear_map_explains_answers_that_are_all_the_same() -> None:
    """The mean of 33 equal numbers is not always equal to them; R2 is no ratio of such rounding."""
    found = look(Constant(TASKS.spec), n_query=33, n_episodes=16, at=range(1, 7))
    assert [(one.r2.mean, one.weight_norm) for one in found.closer] == [(1.0, 0.0)] * 6


def test_intervals_end_where_their_values_can() -> None:
    """Means of few episodes with a long tail; distances and risks are not negative, and no R2 is above one."""
    found = look(Constant(TASKS.spec), n_episodes=16)
    curves = (*found.distance.values(), *found.relative.values(), *found.risk.values())
    parts = [one for curve in (*curves, found.overall.values()) for one in curve]
    parts += [one for look in found.closer for one in look.weight_difference.values()]
    assert min(one.low for one in parts if one.low is not None) >= 0
    assert max(look.r2.high for look in found.closer if look.r2.high is not None) <= 1


def test_true_difference_of_weights() -> None:
    """ILWD of two linear learners against their weights on the same addressed episodes, to 1e-6."""
    from metaicl.analysis.answers import draw_episodes
    from metaicl.task import EVAL_SEED

    found = look(GradientDescent(TASKS.spec, lr=0.3), references={"average": Averaging(TASKS.spec)}, at=(4,))
    episode = draw_episodes(TASKS, n_shot=6, n_query=32, start=0, stop=48, split="test", seed=EVAL_SEED)
    x, y = episode.support.x[:, :4], episode.support.y[:, :4]
    average = x.mT @ y / 4
    expected = (0.3 * average - average).square().sum((1, 2)).mean()
    assert found.closer[0].weight_difference["average"].mean == pytest.approx(float(expected), abs=1e-6)
    assert found.episodes == episode.fingerprint()


def test_several_seeds_widen_the_interval() -> None:
    """Seeds that differ are a source of uncertainty; the mean stays inside."""
    one = look(NoisyBayes(0.1))
    three = look([NoisyBayes(share) for share in (0.02, 0.1, 0.18)])
    assert (one.n_seeds, three.n_seeds) == (1, 3)
    widths = []
    for found in (one, three):
        interval = found.overall["Bayes"]
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low < interval.mean < interval.high
        widths.append(interval.high - interval.low)
        assert found.values["Bayes"].shape == (found.n_seeds, 48)
        assert found.values["Bayes"].mean() == pytest.approx(interval.mean, abs=1e-12)
        assert "values" not in found.to_dict()
    assert widths[1] > 2 * widths[0]
    assert three.fits["ridge"].overall.low <= three.fits["ridge"].overall.value <= three.fits["ridge"].overall.high


def test_distances_are_the_mean_squared_difference_on_the_stream() -> None:
    """SPD by its definition, with a loop over prefixes."""
    from metaicl.analysis.answers import draw_episodes
    from metaicl.task import EVAL_SEED

    learner, other = Averaging(TASKS.spec), LeastSquares(TASKS.spec)
    found = look(learner, references={"least squares": other}, at=())
    episode = draw_episodes(TASKS, n_shot=6, n_query=32, start=0, stop=48, split="test", seed=EVAL_SEED)
    for k in range(1, 7):
        prefix = episode.support.rows(slice(k))
        x = (episode.support.x[:, k : k + 1]) if k < 6 else episode.query.x[:, :1]
        ours, theirs = (one(prefix, x).mean for one in (learner, other))
        expected = float((ours - theirs).square().mean())
        assert found.distance["least squares"][k].mean == pytest.approx(expected, rel=1e-6)
        zero = float(ours.square().mean())
        assert found.relative["least squares"][k - 1].mean == pytest.approx(expected / zero, rel=1e-6)


def test_the_same_call_gives_the_same_result_and_leaves_the_learner_alone() -> None:
    torch.manual_seed(0)
    learner = CausalInContextTransformer(TASKS.spec, dim=8, depth=1, heads=1).train()
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    state = torch.random.get_rng_state()
    first, second = (look(learner, n_shot=4, n_episodes=12, at=(4,)) for _ in range(2))
    assert numbers(first.to_dict()) == pytest.approx(numbers(second.to_dict()), rel=1e-12, abs=1e-14)
    assert first.verdict == second.verdict
    assert learner.training
    assert all(torch.equal(before[name], value) for name, value in learner.state_dict().items())
    assert all(parameter.grad is None for parameter in learner.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    other = look(learner, n_shot=4, n_episodes=12, at=(4,), batch_size=5)
    assert other.overall["Bayes"].mean == pytest.approx(first.overall["Bayes"].mean, rel=1e-4)


@pytest.mark.parametrize(
    ("learner", "name"),
    [
        (NearestNeighbors(CLASSES.spec, k=3), "3-NN"),
        (CLASSES.references()["Bayes"], "Bayes"),
        (ProtoNet(CLASSES.spec, encoder=torch.nn.Identity(), temperature=0.7), "nearest mean"),
    ],
)
def test_classification(learner: Learner, name: str) -> None:
    found = fingerprint(learner, CLASSES, n_shot=3, n_episodes=32)
    assert found.best == name
    assert found.measure == "total variation"
    assert found.overall[name].mean < 1e-6
    assert found.closer == ()
    assert "regression" in found.notes[0]
    if name == "nearest mean":
        assert found.fits[name].overall.value == pytest.approx(0.7, rel=1e-4)


def test_text_json_and_picture(tmp_path: Any) -> None:
    found = look(BayesianLinearRegression(TASKS.spec, noise=0.5), name="ours")
    text = str(found)
    assert "ours answers most like Bayes" in text
    assert "ridge (λ = 0.25)" in text
    assert "95 %" in text
    found.to_json(tmp_path / "found.json")
    read = json.loads((tmp_path / "found.json").read_text())
    assert read["best"] == "Bayes"
    assert read["fits"]["ridge"]["overall"]["value"] == pytest.approx(0.25, rel=1e-5)
    figure = found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 10_000
    titles = [axes.get_title("left") for axes in figure.get_axes()]
    assert "Risk" in titles
    assert "ridge: nearest λ" in titles
    assert any(title.startswith("Gain after") for title in titles)


def test_inputs_that_are_not_linear_features() -> None:
    """A sine wave has a Bayes reference of its own, and it is found."""
    waves = Sinusoid()
    found = fingerprint(waves.references()["Bayes"], waves, n_shot=5, n_episodes=16, at=(5,))
    assert found.best == "Bayes"
    assert found.closer[0].r2.mean < 0.9


def test_nonsense_is_refused() -> None:
    ridge = Ridge(TASKS.spec)
    with pytest.raises(ValueError, match="built for"):
        look(Ridge(LinearRegression(dim=4).spec))
    with pytest.raises(ValueError, match="classification"):
        look(NearestNeighbors(CLASSES.spec))
    with pytest.raises(TypeError, match="got the class itself: GradientDescent"):
        fingerprint(GradientDescent, TASKS, n_shot=3)
    with pytest.raises(TypeError, match="learner must be a Learner"):
        look(["ridge"])
    with pytest.raises(ValueError, match="empty sequence"):
        look([])
    with pytest.raises(ValueError, match="at least one algorithm"):
        look(ridge, references={})
    with pytest.raises(TypeError, match="must be a Learner or a Reference"):
        look(ridge, references={"x": 3})
    with pytest.raises(ValueError, match="prefix lengths"):
        look(ridge, at=(9,))
    with pytest.raises(TypeError, match="tasks must be"):
        fingerprint(ridge, "tasks", n_shot=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"n_shot must be an int >= 1; got \(2, 3\)"):
        look(ridge, n_shot=(2, 3))
    with pytest.raises(ValueError, match="n_episodes"):
        look(ridge, n_episodes=1)
    assert look(ridge, n_query=2, n_shot=2, n_episodes=4, at=(1,)).notes == (
        "implicit linear maps need n_query >= D + 2 = 5 fresh inputs",
    )


class Broken(Constant):
    def predict(self, state: Any, x: Tensor) -> Distribution:
        return gaussian(torch.full((*x.shape[:2], 1), float("nan")), torch.ones(1, 1, 1))


def test_a_learner_that_diverges_is_named() -> None:
    with pytest.raises(FloatingPointError, match="Broken answers NaN"):
        look(Broken(TASKS.spec))


def test_references_that_diverge_or_answer_something_else_are_named() -> None:
    options: Any = {"n_shot": 2, "n_episodes": 4}
    for at in ((), (2,)):
        with pytest.raises(FloatingPointError, match="answers NaN or infinity in episode 0"):
            look(Constant(TASKS.spec), references={"mine": Broken(TASKS.spec)}, at=at, **options)
    pairs = LinearRegression(dim=3, y_dim=2)
    with pytest.raises(ValueError, match=r"references\['mine'\] was built for .* 1\); the tasks have .* 2\)"):
        fingerprint(Constant(pairs.spec), pairs, references={"mine": Constant(TASKS.spec)}, **options)


@pytest.mark.parametrize("grid", [(0.1, 1.0), (1.0, 0.1, 0.01), (0.0, 1.0, 2.0), (0.1, 0.2, 5.0), (-1.0, 1.0, 2.0)])
def test_a_grid_that_cannot_be_searched_is_named(grid: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="grid"):
        Reference("mine", lambda prefix: prefix, lambda state, x, number: number * x, "a", grid)


def test_answers_of_a_reference_that_would_broadcast_are_named() -> None:
    pairs = LinearRegression(dim=3, y_dim=2)
    options: Any = {"n_shot": 2, "n_episodes": 4, "at": ()}
    for grid in ((), (0.1, 1.0, 10.0)):
        one = Reference("mine", lambda prefix: prefix, lambda state, x, number: number * x[..., :1].double(), "a", grid)
        with pytest.raises(ValueError, match=r"references\['a'\] must answer .*\(4, 1, 2\).*got"):
            fingerprint(Constant(pairs.spec), pairs, references={"a": one}, **options)


class Silent(LinearRegression):
    """Targets of zero and nothing else, in one dimension."""

    def sample(self, n_tasks: int, **options: Any) -> Episode:
        episode = super().sample(n_tasks, **options)
        parts = (Examples(one.x, torch.zeros_like(one.y)) for one in (episode.support, episode.query))
        return Episode(*parts, episode.latents)


def test_the_smallest_looks_there_are(tmp_path: Any) -> None:
    """One row, two episodes, one input: fewer eigenvalues than bins; and targets that have no direction at all."""
    options: Any = {"n_shot": 1, "n_episodes": 2, "at": (1,)}
    found = fingerprint(LeastSquares(TASKS.spec), TASKS, **options)
    assert [one.mean for one in found.closer[0].gain] == pytest.approx([1.0, 1.0], abs=1e-9)
    silent = Silent(dim=1, noise=0.0)
    found = fingerprint(
        Constant(silent.spec), silent, references={"least squares": LeastSquares(silent.spec)}, **options
    )
    assert found.closer[0].gain == ()
    assert found.overall["least squares"].mean == 0.0
    assert "Gain" not in " ".join(axes.get_title("left") for axes in found.plot(tmp_path / "silent.png").get_axes())


def test_intervals_cover_the_distance_of_many_episodes() -> None:
    """The interval from 64 episodes holds the value that 2,000 give."""
    learner = NearestNeighbors(TASKS.spec)
    options: Any = {"references": {"mean": Constant(TASKS.spec)}, "at": (), "n_shot": 3}
    few, many = look(learner, n_episodes=64, **options), look(learner, n_episodes=2000, **options)
    inside = [a.low <= b.mean <= a.high for a, b in zip(few.relative["mean"], many.relative["mean"], strict=True)]
    assert np.mean(inside) == 1.0
