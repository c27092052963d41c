"""Small tasks and learners for the tests of training, and the check that resuming is exact."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten

from metaicl.checkpoint import load_checkpoint
from metaicl.episode import Episode, Examples
from metaicl.functional import gaussian, masked_mean, positive, ridge_solve
from metaicl.learner import Learner, Traits
from metaicl.meta_training import TrainingRun, meta_train
from metaicl.spec import TaskSpec
from metaicl.task import TaskDistribution, derive_generator
from metaicl.train_config import TrainConfig
from metaicl.training import Step, outer_loop


class Lines(TaskDistribution):
    """Linear functions of two inputs with a little noise; `poison` may spoil an episode in place."""

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


class Averaging(Ridge):
    """Running statistics that are a new tensor after each update, and that only answers in eval mode use."""

    mean: Tensor

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.register_buffer("mean", torch.zeros(2))

    def encode(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().encode(x - self.mean)
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 1))
        return super().encode(x)


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


def make_averaging() -> Averaging:
    torch.manual_seed(0)
    return Averaging(Lines.spec)


MAKERS = {
    "ridge": make_ridge,
    "maml": make_maml,
    "dropout": make_dropout,
    "reptile": make_reptile,
    "banked": make_banked,
    "normalized": make_normalized,
    "averaging": make_averaging,
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


@contextlib.contextmanager
def killed_in_update(index: int) -> Iterator[None]:
    """Training inside the context dies when update `index` is made but not yet recorded."""

    def dying(*args: Any, **choices: Any) -> Iterator[Step]:
        for step in outer_loop(*args, **choices):
            if step.index == index:
                raise Killed
            yield step

    with patch("metaicl.meta_training.outer_loop", dying), pytest.raises(Killed):
        yield


def last_state(directory: Path) -> dict[str, Any]:
    """The newest checkpoint without its clock."""
    content = load_checkpoint(max(directory.glob("step-*.ckpt")))
    del content["seconds"]
    return content


def assert_same_state(found: Any, expected: Any) -> None:
    """Nested containers equal, tensors to the bit."""
    left, found_tree = tree_flatten(found)
    right, expected_tree = tree_flatten(expected)
    assert found_tree == expected_tree
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b


def assert_resume_is_exact(
    make_learner: Callable[[], Learner],
    tasks: TaskDistribution,
    config: TrainConfig,
    tmp_path: Path,
    cuts: Sequence[int],
) -> None:
    """A run killed in each update of `cuts` and resumed ends as a whole one: weights, optimizer, log, files.

    The learner that resumes starts from other weights, so that what it ends with can only come from the checkpoint.
    """
    learner = make_learner()
    whole = meta_train(learner, tasks, config, directory=tmp_path / "whole", progress=False)
    expected, state = weights_of(learner), last_state(tmp_path / "whole")
    for cut in cuts:
        directory = tmp_path / f"cut-{cut}"
        with killed_in_update(cut):
            meta_train(make_learner(), tasks, config, directory=directory, progress=False)
        resumed = make_learner()
        with torch.no_grad():
            for parameter in resumed.parameters():
                parameter.add_(1.0)
        run = meta_train(resumed, tasks, config, directory=directory, progress=False)
        assert_same_weights(weights_of(resumed), expected)
        assert_same_state(last_state(directory), state)
        assert without_seconds(run) == without_seconds(whole)
        assert (run.best_step, run.best_loss, run.steps_done) == (whole.best_step, whole.best_loss, config.steps)
