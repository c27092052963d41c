"""CAVIA: its meta-gradients, its context, and the nets that read one."""

import pytest
import torch
from gradient_helpers import (
    CLASSES,
    IMAGES,
    SINES,
    draw,
    masking_gap,
    meta_gradient,
    pictures,
    seeded,
    worst_slope_error,
)
from torch import nn

from metaicl.episode import Examples
from metaicl.learners.gradient.cavia import CAVIA
from metaicl.nets.modulation import FiLMConv4
from metaicl.spec import TaskSpec


class Shifted(nn.Module):
    """y = x w + V c: linear in input and context, so that one step of the inner loop can be done by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.mix = nn.Parameter(torch.randn(2, 1)), nn.Parameter(torch.randn(3, 1))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return x @ self.slope + context @ self.mix


def smooth(spec: TaskSpec) -> nn.Module:
    """A net without kinks, at which differences and derivatives would part."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(spec.x_shape[0] + 4, 8), nn.Linear(8, spec.output_size)

        def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.first(torch.cat([x, context.expand(len(x), -1)], -1))))

    return Net()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("tasks", [SINES, CLASSES], ids=["regression", "classification"])
def test_meta_gradient_equals_finite_differences(tasks, steps: int) -> None:
    learner = seeded(lambda: CAVIA(tasks.spec, net=smooth(tasks.spec), context_size=4, inner_steps=steps))
    assert worst_slope_error(learner, draw(tasks)) <= 1e-5


def test_one_step_equals_the_closed_form() -> None:
    """L = |X w + V'c - y|^2 / n at c = 0, so c' = -lr 2 V mean(X w - y)."""
    source = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 5, size, generator=source, dtype=torch.float64) for size in (2, 1))
    learner = seeded(lambda: CAVIA(TaskSpec("regression", (2,), y_dim=1), net=Shifted(), context_size=3, inner_lr=0.7))
    residual = (x @ learner.net.slope - y).mean(1)
    found, expected = learner.adapt(Examples(x, y)), -0.7 * 2 * residual @ learner.net.mix.T
    assert float((found - expected).detach().abs().max()) < 1e-12
    answer = learner.predict(found, x).mean
    assert float((answer - x @ learner.net.slope - (expected @ learner.net.mix)[:, None]).detach().abs().max()) < 1e-12


def test_images_are_modulated_and_a_context_of_zeros_is_the_start() -> None:
    learner = seeded(lambda: CAVIA(IMAGES))
    episode = pictures()
    assert isinstance(learner.net, FiLMConv4)
    assert learner.adapt(episode.support).shape == (2, 100)
    gradients = meta_gradient(learner, episode)
    assert float(gradients["net.film.weight"].abs().max()) > 0
    x = episode.query.x[0]
    with torch.no_grad():
        learner.net.film.bias.zero_()
        plain = learner.net.head(learner.net.encoder(x))
        assert float((learner.net(x, torch.zeros(100).double()) - plain).abs().max()) < 1e-12
        moved = learner.net(x, torch.ones(100).double())
    assert float((moved - plain).abs().max()) > 1e-3


def test_first_order_is_another_gradient_and_the_same_answer() -> None:
    episode = draw(SINES)
    first, second = (seeded(lambda order=order: CAVIA(SINES.spec, first_order=order)) for order in (True, False))
    assert torch.equal(first.adapt(episode.support), second.adapt(episode.support))
    found, expected = meta_gradient(first, episode), meta_gradient(second, episode)
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) > 1e-4


def test_masked_rows_are_absent() -> None:
    assert masking_gap(seeded(lambda: CAVIA(SINES.spec)), draw(SINES), 2) < 1e-12
    assert masking_gap(seeded(lambda: CAVIA(CLASSES.spec)), draw(CLASSES), 2) < 1e-12


def test_a_meta_batch_is_a_loop_over_tasks() -> None:
    learner, episode = seeded(lambda: CAVIA(CLASSES.spec, inner_steps=3)), draw(CLASSES)
    together, alone = meta_gradient(learner, episode), [meta_gradient(learner, one) for one in episode]
    for name, value in together.items():
        mean = torch.stack([one[name] for one in alone]).mean(0)
        assert float((mean - value).abs().max()) <= 1e-12 * max(1.0, float(value.abs().max()))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"context_size": 0}, ValueError, "context_size must be an int >= 1; got 0"),
        ({"context_size": 2.0}, TypeError, "context_size must be an int >= 1; got 2.0"),
        ({"inner_lr": -1.0}, ValueError, "inner_lr must be a finite number > 0; got -1.0"),
        ({"inner_steps": 0}, ValueError, "inner_steps must be an int >= 1; got 0"),
        ({"net": nn.Linear(1, 1)}, ValueError, r"net must turn x \(2, \(1,\)\) and a context \(5,\).*Linear raised"),
        ({"net": smooth(CLASSES.spec), "context_size": 4}, ValueError, "Net raised mat1 and mat2"),
        ({"net": nn.Bilinear(1, 5, 2)}, ValueError, "Bilinear raised"),
        ({"net": nn.Identity()}, ValueError, "Identity has no parameters to learn"),
    ],
)
def test_wrong_settings_are_named(settings, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CAVIA(SINES.spec, **settings)


def test_a_net_with_the_wrong_outputs_is_named() -> None:
    wide = TaskSpec("regression", (1,), y_dim=2)
    with pytest.raises(ValueError, match=r"into \(2, 1\); Net gave \(2, 2\)"):
        CAVIA(SINES.spec, net=smooth(wide), context_size=4)
