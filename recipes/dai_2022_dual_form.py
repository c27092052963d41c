"""Why can GPT learn in-context? Attention as finetuning, after Dai et al. 2022, arXiv:2212.10559.

Claim    Linear attention is W_ZSL q + Delta W_ICL q exactly. In a trained Transformer, what demonstrations do to the
         attention outputs resembles what a gradient step on its keys and values does, and momentum helps attention.
Run      python recipes/dai_2022_dual_form.py --out runs/dai
Smoke    python recipes/dai_2022_dual_form.py --smoke --out runs/dai
Expect   Their GPT 1.3B on six classification sets: Rec2FTP .856, SimAOU .186, random 0, SimAM .442 after finetuning
         and .338 before. Ours, seed 0: Rec2FTP .914, SimAOU .286, random .011, SimAM .738 and .733.
Differs  Our own small Transformers on linear regression. An input is several tokens, as it is in a text, so that a
         query has tokens of its own to attend to and a gradient step can move its keys. The token of a target holds
         its input too, so that no positions are needed, which would set an empty context apart by themselves.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

from metaicl import Examples, TaskDistribution, TrainConfig, meta_train
from metaicl.analysis.answers import answers_at_prefixes, draw_episodes
from metaicl.analysis.attention import attention_scores
from metaicl.analysis.dual_form import dual_form
from metaicl.analysis.finetuning import FinetuningComparison, compare_with_finetuning
from metaicl.learner import Learner
from metaicl.learners.incontext.sequence import InterleavedTransformer, SequenceLearner
from metaicl.nets.linear_attention import LinearAttention
from metaicl.nets.sequence.attention import CausalAttention
from metaicl.nets.sequence.model import SequenceModel
from metaicl.objectives import prefix_squared_error
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run
from metaicl.spec import TaskSpec
from metaicl.statistics import interval
from metaicl.task import EVAL_SEED
from metaicl.tasks import LinearRegression


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"steps": 3, "n_episodes": 8, "momentum_steps": 2, "seeds": 2, "n_shot": 4}

    dim: int = option(2, "inputs D")
    n_shot: int = option(8, "demonstrations N")
    views: int = option(2, "tokens of an input")
    width: int = option(64, "width of the model that is looked at")
    depth: int = option(2, "layers of all models")
    steps: int = option(1200, "updates of the model that is looked at")
    lr: float = option(1.5e-3, "highest learning rate")
    n_episodes: int = option(512, "episodes of a comparison")
    momentum: float = option(0.5, "decay of momentum attention")
    momentum_width: int = option(32, "width of the models with and without momentum")
    momentum_steps: int = option(500, "updates of each of them")
    seeds: int = option(3, "training seeds of each of them")


class SeveralTokens(SequenceLearner):
    """A causal Transformer that reads an input as several tokens, each its own linear view of x, then one for (x, y).

    Args:
        spec: Regression with inputs that are vectors.
        views: Tokens of an input; the last one carries the answer.
        width: D.
        depth: Layers.
    """

    def __init__(self, spec: TaskSpec, *, views: int, width: int, depth: int) -> None:
        """Build the views beside the parts of any sequence learner."""
        super().__init__(spec, model=partial(SequenceModel, mixer=CausalAttention, depth=depth), dim=width)
        self.views, self.to_views = views, nn.Linear(math.prod(spec.x_shape), views * width, bias=False)

    def inputs(self, x: Tensor) -> Tensor:
        """Tokens (B, Q, views, D) of inputs."""
        return self.to_views(x.flatten(2)).unflatten(-1, (self.views, -1))

    def adapt(self, support: Examples) -> Any:
        """The state after all tokens of the support."""
        h, real = self._rows(support)
        return self._read(h, self.model.start(support.n_tasks, h), real, slice(0))[1]

    def update(self, state: Any, examples: Examples) -> Any:
        """The state after `examples` too."""
        h, real = self._rows(examples)
        return self._read(h, state, real, slice(0))[1]

    def predict(self, state: Any, x: Tensor) -> Distribution:
        """Answer at the last token of each query, which reads on from a copy of the state."""
        copies = pytree.tree_map(lambda leaf: leaf.repeat_interleave(x.shape[1], 0), state)
        out = self._read(self.inputs(x).flatten(0, 1), copies, None, slice(self.views - 1, None))[0]
        return self.head(out.unflatten(0, x.shape[:2]).squeeze(2))

    def predict_prefixes(self, examples: Examples) -> Distribution:
        """Answer every row from the rows before it, in one pass."""
        h, real = self._rows(examples)
        places = slice(self.views - 1, None, self.views + 1)
        return self.head(self._read(h, self.model.start(examples.n_tasks, h), real, places)[0])

    def _rows(self, examples: Examples) -> tuple[Tensor, Tensor | None]:
        labeled = self.tokens.inputs(examples.x) + self.tokens.from_y(examples.y)
        rows = torch.cat([self.inputs(examples.x), labeled[:, :, None]], 2)
        real = None if examples.mask is None else examples.mask.repeat_interleave(self.views + 1, 1)
        return rows.flatten(1, 2), real


def train(learner: Learner, tasks: TaskDistribution, config: Config, *, steps: int, seed: int) -> None:
    """Train on streams, every row from those before it."""
    choices: dict[str, Any] = {"schedule": "cosine", "clip_norm": 1.0, "validate_every": None, "seed": seed}
    choices |= {"warmup_steps": steps // 20, "meta_batch_size": 64, "n_shot": config.n_shot, "n_query": 1}
    plan = TrainConfig(steps=steps, outer_lr=config.lr, **choices)
    meta_train(learner, tasks, plan, objective=prefix_squared_error)


def identity_error(seed: int) -> float:
    """Largest relative error of W_ZSL q + Delta W_ICL q against the layer itself, in single precision."""
    torch.manual_seed(seed)
    layer = LinearAttention(16, heads=4, init_variance=1.0).requires_grad_(False)
    demonstrations, own, queries = (torch.randn(64, n, 16) for n in (20, 3, 5))
    context = torch.cat([demonstrations, own], 1)
    expected = layer.read(queries, context.mT @ context)
    found = dual_form(layer, demonstrations, own, queries).output()
    return float((found - expected).abs().max() / expected.abs().max())


def stream_losses(learner: Learner, tasks: TaskDistribution, config: Config) -> np.ndarray:
    """Squared error of each test stream (E,), mean over all its rows."""
    episode = draw_episodes(
        tasks, n_shot=config.n_shot + 1, n_query=1, start=0, stop=config.n_episodes, split="test", seed=EVAL_SEED
    )
    answers = answers_at_prefixes(learner, episode.support, batch_size=256, seed=EVAL_SEED)
    return (answers - episode.support.y).square().sum(-1).mean(-1).numpy()


def compare_momentum(tasks: TaskDistribution, config: Config) -> Criterion:
    """The loss with momentum over that without, on the same streams from the same first weights."""
    losses: dict[float | None, list[np.ndarray]] = {None: [], config.momentum: []}
    for seed in range(config.seed, config.seed + config.seeds):
        for momentum, found in losses.items():
            torch.manual_seed(seed)
            learner = InterleavedTransformer(
                tasks.spec, dim=config.momentum_width, depth=config.depth, momentum=momentum
            )
            train(learner, tasks, config, steps=config.momentum_steps, seed=seed)
            found.append(stream_losses(learner, tasks, config))
            print(f"seed {seed}, momentum {momentum}: loss {found[-1].mean():.4f}")
            if seed == config.seed:
                scores = attention_scores(learner, tasks, n_shot=config.n_shot, n_episodes=config.n_episodes)
                print(scores)
                scores.plot(config.out / f"attention_{'plain' if momentum is None else 'momentum'}.png")
    plain, ours = (np.stack(found) for found in losses.values())
    ratio = interval((ours - plain) / plain.mean() + 1)
    return Criterion("loss with momentum / without", ratio.mean, "<=", 0.995, ci=ratio.ends)


def judge(found: FinetuningComparison) -> list[Criterion]:
    """The similarities, beside those of GPT 1.3B."""
    aou, random, gain = found.sim_aou, found.sim_aou_random, found.sim_am_gain
    return [
        Criterion("SimAOU above a random update", aou.mean - random.mean, ">=", 0.15, reference=0.186),
        Criterion("SimAOU of a random update, absolute", abs(random.mean), "<=", 0.03, ci=random.ends, reference=0.0),
        Criterion("SimAM after finetuning - before", gain.mean, ">", 0.0, ci=gain.ends, reference=0.104),
    ]


def main(config: Config) -> RecipeResult:
    """Check the identity, train and compare, then train with and without momentum."""
    tasks = LinearRegression(dim=config.dim)
    error = identity_error(config.seed)
    criteria = [Criterion("dual form of linear attention, relative error", error, "<=", 1e-6)]
    torch.manual_seed(config.seed)
    learner = SeveralTokens(tasks.spec, views=config.views, width=config.width, depth=config.depth)
    train(learner, tasks, config, steps=config.steps, seed=config.seed)
    found = compare_with_finetuning(learner, tasks, n_shot=config.n_shot, n_episodes=config.n_episodes)
    print(found)
    criteria += [*judge(found), compare_momentum(tasks, config)]
    claim = "A context moves attention outputs as a gradient step on keys and values does."
    return RecipeResult("dai_2022_dual_form", claim, config, criteria)


if __name__ == "__main__":
    run(main, Config)
