"""A learner of your own, in under 40 lines: examined, trained, and compared with the bundled ones.

`KernelRegressor` learns an encoder and answers with a softmax-weighted mean of the support's targets. It is written
as a user would write it: two methods. The exam, training, evaluation and compiled meta-step come for free.

Run      python recipes/my_learner.py --out runs/my_learner
Smoke    python recipes/my_learner.py --smoke --out runs/my_learner
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from metaicl import (
    MAML,
    Examples,
    Learner,
    RidgeHead,
    Sinusoid,
    TaskSpec,
    TrainConfig,
    check_learner,
    compare,
)
from metaicl.functional import gaussian, learned_positive, squared_distances
from metaicl.learners import Constant
from metaicl.nets.backbones import MLP, encode
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run


class KernelRegressor(Learner[tuple[Tensor, Tensor, Tensor]]):
    """Kernel regression on a learned embedding of the inputs."""

    def __init__(self, spec: TaskSpec, *, dim: int = 32) -> None:
        """Build the encoder."""
        super().__init__(spec)
        self.encoder = MLP((spec.x_shape[0], 64, 64, dim))
        self.raw_scale = nn.Parameter(torch.zeros(spec.output_size))

    def adapt(self, support: Examples) -> tuple[Tensor, Tensor, Tensor]:
        """Remember the support: embeddings (B, N, D), targets, and which rows are real."""
        keys = encode(self.encoder, support.x) * support.real[..., None]
        return keys, support.y, support.real

    def predict(self, state: tuple[Tensor, Tensor, Tensor], x: Tensor) -> torch.distributions.Distribution:
        """Average the targets, near rows first."""
        keys, y, real = state
        scores = -squared_distances(encode(self.encoder, x), keys)  # (B, Q, N)
        weights = torch.softmax(scores.masked_fill(~real[:, None], -torch.inf), -1)
        return gaussian(weights @ y, learned_positive(self.raw_scale))


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"steps": 30, "n_episodes": 20, "seeds": 1}

    steps: int = option(2000, "updates of each learner")
    n_episodes: int = option(600, "meta-test episodes")
    seeds: int = option(3, "training seeds")


def main(config: Config) -> RecipeResult:
    """Exam, training and comparison on sine waves."""
    tasks = Sinusoid()
    check_learner(KernelRegressor, tasks)
    print("KernelRegressor passes the exam")
    train = TrainConfig(steps=config.steps, n_shot=10, n_query=10, seed=config.seed)
    learners = {"KernelRegressor": KernelRegressor, "RidgeHead": RidgeHead, "MAML": MAML, "constant": Constant}
    report = compare(
        learners, tasks, train=train, n_episodes=config.n_episodes, seeds=config.seeds, directory=config.comparison
    )
    print(report)
    report.to_html(config.out / "report.html")
    mse = {name: report.interval("Sinusoid", name).mean for name in learners}
    claim = "A learner of two methods trains on sine waves and beats the constant predictor."
    return RecipeResult(
        "my_learner",
        claim,
        config,
        [Criterion("MSE of the constant / ours", mse["constant"] / mse["KernelRegressor"], ">=", 5.0)],
    )


if __name__ == "__main__":
    run(main, Config)
