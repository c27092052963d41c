"""Which learning algorithm is in-context learning? After Akyürek et al. 2022, arXiv:2211.15661, sections 4 and 5.

Claim    A Transformer trained on noisy linear regression answers as Bayes does: as ridge regression with the penalty
         noise^2 / weight_scale^2. The moments X'y of the rows and then the weights can be read off its activations,
         and off those of a model that was trained on one fixed task they cannot. With depth it moves from a step of
         gradient descent to ridge to least squares (--depths).
Run      python recipes/akyurek_2022_which_algorithm.py --out runs/akyurek
Smoke    python recipes/akyurek_2022_which_algorithm.py --smoke --out runs/akyurek
Expect   Excess of Bayes at noise variance .25, D = 5: .228 and .054 per input at 5 and 10 rows.
Scale    by default D = 5, 20 rows, 3 layers 64 wide, 8,000 updates of 32 streams, over an hour of one core in all;
         --paper: D = 8, 40 rows, 16 layers 512 wide, 500,000 updates of 64 streams (for a GPU);
         --depths 1 2 4: the sweep over depth too, on tasks without noise, about 2 core-minutes more for each layer.
Differs  row and target are one token; linear probes for each position beside the paper's pooled MLP; the model that
         sees one task only is trained a quarter as long. The sweep over depth is off by default.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from peers.depth_sweep import judge_depths

from metaicl import Episode, Examples, TaskDistribution, TrainConfig, meta_train
from metaicl.analysis.fingerprint import fingerprint
from metaicl.analysis.fingerprint_result import Fingerprint
from metaicl.analysis.probe_report import ProbeReport, probe_layers, untrained
from metaicl.analysis.probe_targets import least_squares_weights, moment
from metaicl.evaluation import evaluate_shots
from metaicl.learner import Learner
from metaicl.learners import CausalInContextTransformer
from metaicl.learners.reference.linear import LeastSquares
from metaicl.objectives import prefix_squared_error
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, ratio_criterion, run
from metaicl.task import Split
from metaicl.tasks import LinearRegression


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {
        "steps": 4, "seeds": 1, "n_episodes": 16, "n_probed": 64, "rows": 6, "variances": (0.25,), "dim": 3,
        "depths": (1, 2),
    }  # fmt: skip
    PAPER: ClassVar = {
        "dim": 8, "rows": 40, "width": 512, "depth": 16, "steps": 500_000, "batch": 64, "lr": 1e-4,
    }  # fmt: skip

    variances: tuple[float, ...] = option((0.0, 0.25, 1.0), "noise variances; weights have variance 1")
    dim: int = option(5, "inputs D")
    rows: int = option(20, "rows of a stream")
    width: int = option(64, "width of the Transformer")
    depth: int = option(3, "its layers")
    depths: tuple[int, ...] = option((), "depths to sweep over, from shallow to deep; none by default")
    steps: int = option(8000, "updates of each model")
    batch: int = option(32, "streams in an update")
    lr: float = option(3e-3, "highest learning rate")
    seeds: int = option(3, "training seeds of each model")
    n_episodes: int = option(512, "episodes of a fingerprint")
    n_probed: int = option(4000, "episodes of the probes")
    compile: bool = option(False, "one compiled graph for the training step")
    device: str = option("cpu", "where to train")


class OneTask(LinearRegression):
    """Linear regression with the same weights in every episode: nothing is to be learned from the rows."""

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Episodes of the family with their targets moved to the weights (1, ..., 1) / sqrt(D)."""
        episode = super().sample(n_tasks, split=split, n_shot=n_shot, n_query=n_query, generator=generator)
        weights, dim = episode.latents["weights"], self.spec.x_shape[0]
        fixed = torch.full_like(weights, dim**-0.5)
        parts = [(part.x, part.y + part.x @ (fixed - weights)[..., None]) for part in (episode.support, episode.query)]
        support, query = (Examples(x, y) for x, y in parts)
        return Episode(support, query, {"weights": fixed})


def train(tasks: TaskDistribution, config: Config, seed: int, steps: int, depth: int | None = None) -> Learner:
    """One model."""
    torch.manual_seed(seed)
    learner = CausalInContextTransformer(tasks.spec, dim=config.width, depth=depth or config.depth)
    choices: dict[str, Any] = {"schedule": "cosine", "clip_norm": 1.0, "validate_every": None, "seed": seed}
    choices |= {"warmup_steps": steps // 50, "meta_batch_size": config.batch, "n_shot": config.rows, "n_query": 1}
    choices |= {"compile": config.compile, "device": config.device}
    plan = TrainConfig(steps=steps, outer_lr=config.lr, **choices)
    meta_train(learner, tasks, plan, objective=prefix_squared_error)
    return learner.cpu()


def judge(found: Fingerprint, tasks: LinearRegression, models: list[Learner], config: Config) -> list[Criterion]:
    """What one noise level says."""
    dim, variance = config.dim, tasks.noise**2
    cell, criteria = f"variance {variance:g}", []
    late = [one for k, one in enumerate(found.relative["Bayes"], start=1) if k >= dim]
    worst = max(late, key=lambda one: one.mean)
    label = f"{cell}: distance to Bayes / to zero, worst of k >= D"
    criteria.append(Criterion(label, worst.mean, "<=", 0.1, ci=worst.ends))
    r2 = min((look.r2 for look in found.closer if look.length >= dim), key=lambda one: one.mean)
    criteria.append(Criterion(f"{cell}: R2 of a linear map, worst of k >= D", r2.mean, ">=", 0.98, ci=r2.ends))
    if variance == 0:
        return criteria
    fit = found.fits["ridge"].overall
    ratio = max(fit.value / variance, variance / fit.value)
    criteria.append(Criterion(f"{cell}: nearest penalty, factor from noise / prior", ratio, "<=", 2.0, reference=1.0))
    clean = LinearRegression(dim=dim, noise=tasks.noise, noisy_query=False)
    options: dict[str, Any] = {"shots": (dim, 2 * dim), "n_query": 20, "n_episodes": 4 * config.n_episodes}
    bayes = evaluate_shots(clean.references()["Bayes"], clean, **options)
    ours = [evaluate_shots(model, clean, **options) for model in models]
    for k in options["shots"]:
        risk, best = np.stack([one[k].metrics["mse"] for one in ours]), bayes[k].metrics["mse"][None]
        criteria.append(ratio_criterion(f"{cell}: risk / Bayes after {k} rows", risk, best, "<=", 1.15))
    if variance >= 1:
        least = fingerprint(
            tasks.references()["Bayes"], tasks, n_shot=dim, references={"ols": LeastSquares(tasks.spec)}, at=()
        )
        share = found.distance["Bayes"][dim].mean / least.distance["ols"][dim].mean
        criteria.append(Criterion(f"{cell}: distance to Bayes / of least squares to Bayes, k = D", share, "<=", 0.25))
    return criteria


def judge_probes(report: ProbeReport) -> list[Criterion]:
    """Weights at the last layer, moments wherever they are: in the model, and in the one that never needed them."""
    found = {
        target: {subject: [values[-1] for values in modules.values()] for subject, modules in subjects.items()}
        for target, subjects in report.r2.items()
    }  # at the last position, from the embedding to the last layer
    weights, moments = found["weights"], found["moment"]
    last, best = weights["trained"][-1], max(moments["trained"], key=lambda one: one.mean)
    controls = ("fixed task", "shuffled")
    weights_control = max(weights[subject][-1].mean for subject in controls)
    moments_control = max(one.mean for subject in controls for one in moments[subject])
    layers = [int(np.argmax([one.mean for one in target["trained"]])) for target in (moments, weights)]
    name = f"{report.kind} probe, pooled" if report.pooled else f"{report.kind} probe"
    gap = best.mean - moments_control
    return [
        Criterion(f"{name}: R2 for the weights, last layer", last.mean, ">=", 0.9, ci=last.ends),
        Criterion(f"{name}: the same above the control", last.mean - weights_control, ">=", 0.3),
        Criterion(f"{name}: R2 for the moments, best layer, above the control's best", gap, ">=", 0.3),
        Criterion(f"{name}: layers by which moments are best read after weights", layers[0] - layers[1], "<=", 0),
    ]


def main(config: Config) -> RecipeResult:
    """Train at each noise level, take fingerprints, probe the middle one; then sweep over depth, where asked to."""
    if list(config.depths) != sorted(set(config.depths)) or len(config.depths) == 1:
        raise ValueError(f"depths must be two or more that rise, or none; got {config.depths}")
    criteria: list[Criterion] = []
    at = sorted({1, config.dim, 2 * config.dim, config.rows} & set(range(1, config.rows + 1)))
    for variance in config.variances:
        tasks = LinearRegression(dim=config.dim, noise=math.sqrt(variance))
        seeds = range(config.seed, config.seed + config.seeds)
        models = [train(tasks, config, seed, config.steps) for seed in seeds]
        options: dict[str, Any] = {"n_shot": config.rows, "n_episodes": config.n_episodes, "at": at}
        found = fingerprint(models, tasks, name="Transformer", **options)
        print(found)
        found.plot(config.out / f"fingerprint_{variance:g}.png", at=2 * config.dim)
        found.to_json(config.out / f"fingerprint_{variance:g}.json")
        criteria += judge(found, tasks, models, config)
        if variance == sorted(config.variances)[len(config.variances) // 2]:
            criteria += [one for report in probes(tasks, models[0], config) for one in judge_probes(report)]
    if config.depths:
        tasks, seeds = LinearRegression(dim=config.dim), range(config.seed, config.seed + config.seeds)
        models = {k: [train(tasks, config, seed, config.steps, k) for seed in seeds] for k in config.depths}
        criteria += judge_depths(models, tasks, n_shot=config.rows, n_episodes=config.n_episodes)
    claim = "A Transformer trained on linear regression answers as ridge regression at the penalty of Bayes."
    return RecipeResult("akyurek_2022_which_algorithm", claim, config, criteria)


def probes(tasks: LinearRegression, model: Learner, config: Config) -> list[ProbeReport]:
    """Every layer beside an untrained copy and a model that was trained on one task: position by position, and pooled.

    The pooled probe is the paper's: an MLP on the mean of all positions under a learned softmax.
    """
    fixed = train(OneTask(dim=config.dim, noise=tasks.noise), config, config.seed, max(config.steps // 4, 1))
    controls: Mapping[str, Learner] = {"untrained": untrained(model), "fixed task": fixed}
    options: dict[str, Any] = {"n_shot": config.rows, "n_episodes": config.n_probed, "controls": controls}
    options |= {"names": ["embed", "transformer.blocks.*"]}
    options |= {"targets": {"moment": moment, "weights": least_squares_weights}}
    reports = [
        probe_layers(model, tasks, **options),
        probe_layers(model, tasks, kind="mlp", pooled=True, **options),
    ]
    print(*reports, sep="\n")
    if not config.smoke:
        reports[0].plot(config.out / "probes.png")
    return reports


if __name__ == "__main__":
    run(main, Config)
