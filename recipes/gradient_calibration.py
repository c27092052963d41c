"""Does a posterior over weights know better how sure it is? Amortized Bayes beside MAML, at equal accuracy.

Claim    On 5-way Gaussian classes, trained at 5 shots, amortized Bayes answers as accurately as MAML (within .02), with
         a calibration error and a negative log-likelihood that are no larger: at 5 shots, and at 1 shot, which neither
         has seen and where a point estimate is too sure of itself.
Run      python recipes/gradient_calibration.py --out runs/gradient_calibration
Smoke    python recipes/gradient_calibration.py --smoke --out runs/gradient_calibration
Method   the same net, inner steps, updates and episodes for both; differences are paired by seed and episode. The
         calibration error (ECE, 15 bins) is that of all query rows of a seed, averaged over seeds.
After    Ravi & Beatson, 2019, who find their posteriors better calibrated than MAML on miniImageNet.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from metaicl import MAML, GaussianClasses, Report, TrainConfig, compare
from metaicl.learners import AmortizedBayes
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run
from metaicl.statistics import interval

TASK = "Gaussian classes"
BAYES, POINT = "amortized Bayes", "MAML"
SHOTS = (1, 5)
LEARNERS = {
    BAYES: partial(AmortizedBayes, inner_steps=3, inner_lr=0.4, n_samples=1, prior_scale=0.03),
    POINT: partial(MAML, inner_steps=3, inner_lr=0.4),
}


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"steps": 2, "n_episodes": 4, "seeds": 1}

    steps: int = option(1000, "updates of each learner")
    seeds: int = option(3, "training seeds")
    n_episodes: int = option(600, "meta-test tasks")


def calibration_errors(report: Report, learner: str, shots: int) -> list[float]:
    """The calibration error of every seed, over all query rows."""
    found = [result.evaluations[shots].calibration for result in report.of(TASK, learner)]
    return [one.error for one in found if one is not None]


def main(config: Config) -> RecipeResult:
    """Train both, ask both at the shots they know and at fewer."""
    report = compare(
        LEARNERS,
        {TASK: GaussianClasses()},
        train=TrainConfig(
            steps=config.steps, meta_batch_size=16, n_shot=5, n_query=5, outer_lr=5e-3, schedule="cosine",
            validate_every=None, select="last",
        ),
        n_episodes=config.n_episodes,
        seeds=range(config.seed, config.seed + config.seeds),
        n_query=10,
        shots=SHOTS,
        directory=config.comparison,
        processes=1,
    )  # fmt: skip
    print(report)
    criteria = []
    for shots in SHOTS:
        accuracy, nll = (
            interval(report.values(TASK, BAYES, metric, shots=shots) - report.values(TASK, POINT, metric, shots=shots))
            for metric in ("accuracy", "nll")
        )
        label = f"{shots}-shot, minus MAML's"
        criteria += [
            Criterion(f"accuracy, {label}", accuracy.mean, ">=", -0.02, ci=accuracy.ends),
            Criterion(f"nats per row, {label}", nll.mean, "<=", 0.0, ci=nll.ends),
        ]
        errors = {name: float(np.mean(calibration_errors(report, name, shots))) for name in LEARNERS}
        label = f"calibration error, {shots}-shot (bound: MAML's)"
        criteria.append(Criterion(label, errors[BAYES], "<=", errors[POINT]))
    claim = "At equal accuracy amortized Bayes is better calibrated than MAML, at trained shots and at fewer."
    return RecipeResult("gradient_calibration", claim, config, criteria)


if __name__ == "__main__":
    run(main, Config)
