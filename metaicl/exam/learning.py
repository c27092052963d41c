"""Checks of meta-training: gradients arrive, are slopes, agree with a loop, and a few updates on easy tasks help."""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metaicl.collation import split_rows
from metaicl.episode import Episode, Examples
from metaicl.exam.case import SEED, Case, fixed_generator, precision_of, require_same
from metaicl.learner import HasMetaGradients, Learner, Prepares
from metaicl.objectives import query_loss
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream, Split, TaskDistribution
from metaicl.tasks.classes import distinct
from metaicl.training import device_of, isolated_randomness

_UPDATES = 200
_MARGIN = 0.1
_STRIDES = (1e-7, 1e-8, 1e-9)  # short, since kinks and Adam's first step turn sharply; one for each direction
_SLOPE_GAP = 1e-4  # relative
_CLASSES, _ROWS = 64, 64  # of a source of easy classes, and of each of them


def check_meta_gradient(case: Case) -> None:
    """Every trainable parameter receives a finite gradient of the query loss that is not all zero, in some mode."""
    learner = case.learner
    trainable = [name for name, value in learner.named_parameters() if value.requires_grad]
    if not learner.traits.trainable:
        if trainable:
            raise AssertionError(
                f"Traits(trainable=False) goes with no parameter that requires grad; {trainable[:5]} do. "
                "Hint: register fixed numbers as buffers"
            )
        return
    if not trainable:
        raise AssertionError(
            "no parameter requires grad. Hint: declare Traits(trainable=False) if nothing is meta-trained"
        )
    found = [meta_gradients(learner, episode) for episode in (case.episode, case.short)]
    silent = _silent(trainable, found)
    if silent:  # some parameters serve training alone, such as the scale of noise
        with isolated_randomness(SEED, device_of(learner)):
            found.append(meta_gradients(copy.deepcopy(learner).train(), case.episode))
        silent = _silent(trainable, found)
    broken = [n for n in trainable if any(g.get(n) is not None and not bool(g[n].isfinite().all()) for g in found)]
    if silent or broken:
        problem = f"no gradient reaches {silent[:5]}" if silent else f"the gradient of {broken[:5]} is not finite"
        raise AssertionError(
            f"{problem} ({len(silent or broken)} of {len(trainable)} parameters). "
            "Hint: look for detach, for no_grad around adapt, and for a layer that predict never uses"
        )


def check_batch_gradient(case: Case) -> None:
    """The meta-gradient of a meta-batch is the mean over its tasks."""
    learner = case.learner
    if not learner.traits.trainable or isinstance(learner, HasMetaGradients):
        return
    whole = meta_gradients(learner, case.episode)
    singles = [meta_gradients(learner, one) for one in case.episode]
    for name, expected in whole.items():
        mean = torch.stack([single[name] for single in singles]).mean(0)
        require_same(
            f"the meta-gradient of {name}, meta-batch and loop", expected, mean, "treat axis B as independent tasks"
        )


def check_gradient_slope(case: Case) -> None:
    """The meta-gradient is the slope of the query loss, by differences along random directions in float64."""
    learner = case.learner
    exempt = not learner.traits.trainable or learner.traits.approximate or isinstance(learner, HasMetaGradients)
    if exempt or precision_of(learner) != torch.float64:
        return
    named = {name: value for name, value in learner.named_parameters() if value.requires_grad}
    gradients, source, gaps = meta_gradients(learner, case.episode), fixed_generator(), []
    for stride in _STRIDES:
        way = {name: _uphill(value, gradients.get(name), source) for name, value in named.items()}
        expected = sum(float((way[name] * gradient).sum()) for name, gradient in gradients.items())
        found = _rise(learner, case.episode, named, way, stride)
        gaps.append((abs(found - expected) / max(abs(found), abs(expected), 1e-6), found, expected))
    gap, found, expected = min(gaps)  # a right gradient may meet a kink, a wrong one is wrong along all of them
    if not gap <= _SLOPE_GAP:
        raise AssertionError(
            f"along a direction the query loss rises by {found:.6g} per unit, and by the meta-gradient {expected:.6g}. "
            "Hint: look for detach, no_grad, .data and functions whose backward is not differentiable; if the gradient "
            "is meant to be another, such as first order, call declare_approximate() in the learner's __init__"
        )


def check_learns(case: Case) -> None:
    """A few updates on an easy family beat the best constant predictor, for learners with something to train."""
    learner = case.native
    if not learner.traits.trainable:
        return
    tasks = EasyTasks(learner.spec, named=case.tasks.source_classes is not None)
    if isinstance(learner, Prepares):
        learner.prepare(tasks, seed=SEED)
    device, dtype = next(learner.parameters()).device, precision_of(learner)
    n_tasks, n_rows = (16, 4) if learner.spec.x_kind == "vector" else (4, 2)
    stream = EpisodeStream(tasks, seed=SEED, split="train", n_shot=n_rows, n_query=n_rows, chunk_size=n_tasks)
    held_out = EpisodeStream(tasks, seed=SEED, split="test", n_shot=n_rows, n_query=n_rows, chunk_size=4 * n_tasks)[0]
    held_out = held_out.to(device, dtype)
    optimizer = torch.optim.Adam([p for p in learner.parameters() if p.requires_grad], lr=3e-3)
    best = math.inf
    for index in range(_UPDATES):
        gradients = meta_gradients(learner.train(), stream[index].to(device, dtype))
        for name, value in learner.named_parameters():
            value.grad = gradients.get(name)
        optimizer.step()
        if index % 10 == 9:
            best = min(best, float(query_loss(learner.eval(), held_out).mean().detach()))
            if best < tasks.constant_loss - _MARGIN:
                return
    raise AssertionError(
        f"after {_UPDATES} updates on easy tasks the query loss is {best:.3f} nats at best; a constant predictor has "
        f"{tasks.constant_loss:.3f} and {tasks.constant_loss - _MARGIN:.3f} was asked for. "
        "Hint: does the support reach the answer, and does the gradient reach the parameters?"
    )


def meta_gradients(learner: Learner, episode: Episode) -> dict[str, Tensor]:
    """The learner's own meta-gradients, or those of the query loss; parameters without one are left out."""
    if isinstance(learner, HasMetaGradients):
        return learner.meta_gradients(episode)[1]
    named = {name: value for name, value in learner.named_parameters() if value.requires_grad}
    loss = query_loss(learner, episode).mean()
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: value for name, value in zip(named, found, strict=True) if value is not None}


def _silent(names: Sequence[str], found: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """The parameters that none of these gradients reaches."""
    return [name for name in names if all(g.get(name) is None or not bool(g[name].any()) for g in found)]


def _uphill(value: Tensor, gradient: Tensor | None, source: torch.Generator) -> Tensor:
    """A random direction of length one, plus that of the gradient, so that slopes do not cancel out."""
    way = torch.randn(value.shape, generator=source).to(value)
    way = way / way.norm().clamp(min=1e-12)
    return way if gradient is None else way + gradient / gradient.norm().clamp(min=1e-12)


def _rise(
    learner: Learner, episode: Episode, named: Mapping[str, Tensor], way: Mapping[str, Tensor], stride: float
) -> float:
    """The slope of the query loss along `way`, by a central difference."""
    start, values = {name: value.detach().clone() for name, value in named.items()}, []
    with torch.no_grad():
        for shift in (stride, -stride, 0.0):
            for name, value in named.items():
                value.copy_(start[name] + shift * way[name])
            if shift:
                values.append(float(query_loss(learner, episode).mean()))
    return (values[0] - values[1]) / (2 * stride)


class EasyTasks(TaskDistribution):
    """Tasks that any learner of the spec should pick up at once, without noise.

    Regression: y = b m(x) with b ~ N(0, I) per task; m(x) is the mean of the entries of x, which stays near one
    (and is one for tokens). It is linear without an intercept and almost constant within a task, so that learners
    of either taste can do it. Classification: each class is a random pattern with a little noise. Vectors get new
    patterns in every task; images and tokens keep theirs, because an encoder takes longer to learn than an exam.

    Args:
        spec: What the tasks look like.
        named: The rows of a classification have a source that names them and their classes; vectors then get
            patterns of that source in every task.
    """

    identity: tuple[str, ...] = ()

    def __init__(self, spec: TaskSpec, *, named: bool = False) -> None:
        """Work out the loss of the best constant predictor, in nats per row."""
        self.spec, self._rows = spec, None
        gaussian = 0.5 * math.log(2 * math.pi * math.e)
        classes = spec.kind == "classification"
        self.constant_loss = math.log(spec.output_size) if classes else spec.output_size * gaussian
        if named and classes:
            source = fixed_generator()
            n_classes = max(_CLASSES, spec.output_size) if spec.x_kind == "vector" else spec.output_size
            patterns = self._patterns((n_classes,), source)
            self.source_classes = torch.arange(n_classes).repeat_interleave(_ROWS)
            self._rows = self._noisy(patterns[self.source_classes], source)

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Draw tasks; the splits differ by their generators only."""
        n_way = self.spec.output_size if self.spec.kind == "classification" else 1
        n_rows = (n_shot + n_query) * n_way
        if self.spec.kind == "regression":
            x = self._inputs((n_tasks, n_rows), generator)
            slope = torch.randn(n_tasks, 1, self.spec.output_size, generator=generator)
            level = torch.ones(n_tasks, n_rows) if self.spec.x_kind == "tokens" else x.flatten(2).mean(-1)
            return split_rows(x, slope * level[..., None], n_shot)
        y = torch.arange(n_way).repeat(n_shot + n_query).expand(n_tasks, -1)  # shot by shot, every class once
        if self._rows is not None:
            ids = self._draw((n_tasks, n_way), n_shot + n_query, generator)
            drawn = Examples(self._rows[ids], y, ids=ids)
            return Episode(drawn.rows(slice(n_shot * n_way)), drawn.rows(slice(n_shot * n_way, None)))
        shared = self.spec.x_kind != "vector"
        patterns = self._patterns((1 if shared else n_tasks, n_way), fixed_generator() if shared else generator)
        x = patterns.expand(n_tasks, *patterns.shape[1:])[torch.arange(n_tasks)[:, None], y]
        return split_rows(self._noisy(x, generator), y, n_shot * n_way)

    def _draw(self, shape: tuple[int, int], n_rows: int, generator: torch.Generator) -> Tensor:
        """Different rows of classes (B, C), shot by shot: source rows, long (B, rows C)."""
        assert self.source_classes is not None
        n_classes = len(self.source_classes) // _ROWS
        classes = torch.arange(n_classes).expand(shape[0], -1)
        if self.spec.x_kind == "vector":
            classes = distinct(torch.full(shape[:1], n_classes), shape[1], generator)
        rows = distinct(torch.full(shape, _ROWS), n_rows, generator)  # (B, C, rows)
        return (classes[..., None] * _ROWS + rows).mT.flatten(1)

    def _inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self.spec.vocabulary is not None:
            return self._patterns(shape, generator)
        return 1 + 0.3 * torch.randn(*shape, *self.spec.x_shape, generator=generator)

    def _patterns(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        shape = (*shape, *self.spec.x_shape)
        if self.spec.vocabulary is not None:
            return torch.randint(min(1, self.spec.vocabulary - 1), self.spec.vocabulary, shape, generator=generator)
        return 2 * torch.randn(shape, generator=generator)

    def _noisy(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x + 0.1 * torch.randn(x.shape, generator=generator) if x.is_floating_point() else x
