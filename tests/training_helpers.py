"""Small tasks and learners for the tests of training, and the check that resuming is exact."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call, grad, vmap

from metaicl.episode import Episode, Examples
from metaicl.functional import gaussian, masked_mean, positive, ridge_solve
from metaicl.learner import Learner, Traits
from metaicl.meta_training import TrainingRun, meta_train
from metaicl.spec import TaskSpec
from metaicl.task import TaskDistribution, derive_generator
from metaicl.train_config import TrainConfig


class Lines(TaskDistribution):
    """Linear functions of two inputs with a little noise; `bad` makes the loss of that task of chunk 3 NaN."""

    spec = TaskSpec("regression", (2,), y_dim=1)

    def __init__(self, poison: Callable[[Episode], None] | None = None) -> None:
        self.poison = poison

    def sample(self, n_tasks: int, *, split: str, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        weights = torch.randn(n_tasks, 2, 1, generator=generator)
        x = torch.randn(n_tasks, n_shot + n_query, 2, generator=generator)
        y = x @ weights + 0.1 * torch.randn(n_tasks, n_shot + n_query, 1, generator=generator)
        support, query = Examples(x[:, :n_shot], y[:, :n_shot]), Examples(x[:, n_shot:], y[:, n_shot:])
        episode = Episode(support, query, {"weights": weights[..., 0]})
        if self.poison is not None:
            self.poison(episode)
        return episode


class Ridge(Learner[Tensor]):
    """Ridge regression on a learned encoding."""

    traits = Traits(kinds=("regression",))

    def __init__(self, spec: TaskSpec, *, dropout: float = 0.0, normalize: bool = False) -> None:
        super().__init__(spec)
        middle: list[nn.Module] = [nn.BatchNorm1d(4)] if normalize else []
        self.encoder = nn.Sequential(nn.Linear(2, 4), *middle, nn.Tanh(), nn.Dropout(dropout))
        self.raw_scale = nn.Parameter(torch.zeros(()))

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def adapt(self, support: Examples) -> Tensor:
        return ridge_solve(self.encode(support.x), support.y, 0.1, support.mask)

    def predict(self, state: Tensor, x: Tensor) -> Distribution:
        return gaussian(self.encode(x) @ state, positive(self.raw_scale))


class TinyMAML(Learner[dict[str, Tensor]]):
    """One inner gradient step on a small network, the inner gradient taken by torch.func."""

    traits = Traits(kinds=("regression",))

    def __init__(self, spec: TaskSpec, *, width: int = 5, inner_lr: float = 0.1) -> None:
        super().__init__(spec)
        self.inner_lr = inner_lr
        self.net = nn.Sequential(nn.Linear(spec.x_shape[0], width), nn.Tanh(), nn.Linear(width, 1))

    def adapt(self, support: Examples) -> dict[str, Tensor]:
        start = dict(self.net.named_parameters())

        def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor, real: Tensor) -> Tensor:
            return masked_mean((functional_call(self.net, weights, (x,)) - y).square().sum(-1), real, 0)

        gradients = vmap(grad(loss), in_dims=(None, 0, 0, 0))(start, support.x, support.y, support.real)
        return {name: value - self.inner_lr * gradients[name] for name, value in start.items()}

    def predict(self, state: dict[str, Tensor], x: Tensor) -> Distribution:
        mean = vmap(lambda weights, x: functional_call(self.net, weights, (x,)))(state, x)
        return gaussian(mean, torch.ones_like(mean))


class TinyReptile(TinyMAML):
    """Moves toward the adapted weights: its outer step is no gradient of a loss."""

    def meta_gradients(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        adapted = self.adapt(episode.support)
        loss = -self.predict(adapted, episode.query.x).log_prob(episode.query.y).mean()
        return loss, {f"net.{name}": value - adapted[name].mean(0) for name, value in self.net.named_parameters()}


class Banked(Ridge):
    """Ridge with a memory of training inputs that `prepare` draws; the encoding is relative to their mean."""

    bank: Tensor

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.register_buffer("bank", torch.zeros(0, 2))

    def prepare(self, tasks: TaskDistribution, *, seed: int) -> None:
        generator = derive_generator(seed, "bank")
        self.bank = tasks.sample(3, split="train", n_shot=2, n_query=1, generator=generator).support.x.flatten(0, 1)

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x - self.bank.mean(0))


def make_ridge() -> Ridge:
    torch.manual_seed(0)
    return Ridge(Lines.spec)


def make_maml() -> TinyMAML:
    torch.manual_seed(0)
    return TinyMAML(Lines.spec)


def make_dropout() -> Ridge:
    torch.manual_seed(0)
    return Ridge(Lines.spec, dropout=0.3)


def make_reptile() -> TinyReptile:
    torch.manual_seed(0)
    return TinyReptile(Lines.spec)


def make_banked() -> Banked:
    torch.manual_seed(0)
    return Banked(Lines.spec)


def make_normalized() -> Ridge:
    torch.manual_seed(0)
    return Ridge(Lines.spec, normalize=True)


MAKERS = {
    "ridge": make_ridge,
    "maml": make_maml,
    "dropout": make_dropout,
    "reptile": make_reptile,
    "banked": make_banked,
    "normalized": make_normalized,
}


def small_config(**changes: Any) -> TrainConfig:
    """Twelve updates with everything switched on."""
    config = TrainConfig(
        steps=12,
        meta_batch_size=4,
        micro_batch_size=3,
        n_shot=(2, 4),
        n_query=3,
        outer_lr=0.02,
        schedule="cosine",
        warmup_steps=2,
        clip_norm=5.0,
        validate_every=4,
        n_validation=6,
        checkpoint_every=3,
        log_every=2,
    )
    return replace(config, **changes)


def weights_of(learner: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: value.clone() for name, value in learner.state_dict().items()}


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every tensor equal to the bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def without_seconds(run: TrainingRun) -> list[dict[str, Any]]:
    """The log without its clock."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in run.history]


class Killed(BaseException):
    """What a kill looks like from inside: nobody handles it."""


def kill_at(step: int) -> Callable[[Learner, Episode], Tensor]:
    """A query loss that ends the process, as it were, in update `step`, before anything is written."""
    from metaicl.objectives import query_loss

    state = {"step": 0, "tasks": 0}

    def objective(learner: Learner, episode: Episode) -> Tensor:
        if state["tasks"] >= step * 4:
            raise Killed
        state["tasks"] += episode.n_tasks
        return query_loss(learner, episode)

    objective.__qualname__ = query_loss.__qualname__  # the same objective, as far as the run can tell
    return objective
