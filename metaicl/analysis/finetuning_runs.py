"""Runs of one model that are compared: in context, without it, and without it after a gradient step for each task."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from metaicl.analysis.activations import recording
from metaicl.analysis.answers import as_answers, batches
from metaicl.episode import Episode
from metaicl.learner import Learner
from metaicl.learners.incontext.sequence import SequenceLearner
from metaicl.nets.sequence.attention import CausalAttention
from metaicl.second_order import twice_differentiable
from metaicl.spec import TaskSpec
from metaicl.statistics import Array


class Run(NamedTuple):
    """One run: answers (B, Q, C), attention outputs (B, Q, L, D) and own scores (B, Q, L, H M), of the last token."""

    answers: Tensor
    outputs: Tensor
    scores: Tensor


class WatchedModel:
    """A copy of a learner in float64 with its attention layers at hand."""

    def __init__(self, learner: Learner) -> None:
        """Copy it."""
        if not isinstance(learner, SequenceLearner):
            raise TypeError(f"learner must be a SequenceLearner; got {type(learner).__name__}")
        self.learner = copy.deepcopy(learner).to("cpu", torch.float64)
        self.layers = {n: m for n, m in self.learner.named_modules() if isinstance(m, CausalAttention)}
        if not self.layers:
            raise ValueError(f"{type(learner).__name__} has no CausalAttention layers to compare")
        self.names = tuple(self.layers)
        self.without_context = _WithoutContext(self.learner)
        weights = {f"learner.{name}.to_query_key_value.weight": layer for name, layer in self.layers.items()}
        self.weights = {name: layer.to_query_key_value.weight.detach() for name, layer in weights.items()}

    def compare(self, part: Episode, rate: float, seeds: Sequence[int]) -> dict[str, Array]:
        """Values of each episode, the last axis (B,).

        Args:
            part: B tasks.
            rate: Step size.
            seeds: Of the random update of each task, B.
        """
        slopes = self.slopes(part)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = {name: _like(slope, generators) for name, slope in slopes.items()}
        with torch.no_grad():
            context, zero = self.in_context(part), self.moved(part, slopes, 0.0)
            tuned, moved = (self.moved(part, change, rate) for change in (slopes, noise))
        spec, truth = self.learner.spec, part.query.y
        aou = _cosine(_unit(context.outputs) - _unit(zero.outputs), _unit(tuned.outputs) - _unit(zero.outputs))
        control = _cosine(_unit(context.outputs) - _unit(zero.outputs), _unit(moved.outputs) - _unit(zero.outputs))
        after, before = _cosine(context.scores, tuned.scores), _cosine(context.scores, zero.scores)
        runs = {"zero-shot": zero, "finetuned": tuned, "in-context": context}
        right = {name: _right(run.answers, truth, spec) for name, run in runs.items()}
        corrected = right["finetuned"] & ~right["zero-shot"]
        values = {"aou": aou, "random": control, "after": after, "before": before}
        found = {name: value.mean((1, 2)) for name, value in values.items()}
        found |= {f"loss {name}": _loss(run.answers, truth, spec).mean(1) for name, run in runs.items()}
        found |= {"corrected": corrected.double().sum(1), "layers": aou.mean(1).mT}
        found["both"] = (corrected & right["in-context"]).double().sum(1)
        return {name: value.numpy() for name, value in found.items()}

    def best_rate(self, episode: Episode, rates: Sequence[float], batch_size: int) -> float:
        """The step size whose finetuned answers are best."""
        if len(rates) == 1:
            return rates[0]
        losses = torch.zeros(len(rates), dtype=torch.float64)
        for part in batches(episode, batch_size):
            slopes = self.slopes(part)
            with torch.no_grad():
                for i, rate in enumerate(rates):
                    answers = self.moved(part, slopes, rate).answers
                    losses[i] += _loss(answers, part.query.y, self.learner.spec, smooth=True).sum()
        return rates[int(losses.nan_to_num(torch.inf).argmin())]

    def slopes(self, part: Episode) -> dict[str, Tensor]:
        """Gradients (B, 3 D, D) of the loss of the demonstrations without context; that of W_Q is left out."""
        spec = self.learner.spec

        def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            answer = functional_call(self.without_context, weights, (x[None],))
            return _loss(answer, y[None], spec, smooth=True).mean()

        with twice_differentiable():
            slopes = vmap(grad(loss), in_dims=(None, 0, 0))(self.weights, part.support.x, part.support.y)
        for slope in slopes.values():
            slope[:, : slope.shape[1] // 3] = 0
        return slopes

    def moved(self, part: Episode, slopes: Mapping[str, Tensor], rate: float) -> Run:
        """Without context, after a step of each task's own against `slopes`; a step of 0 is zero-shot."""

        def one_task(weights: dict[str, Tensor], x: Tensor) -> Run:
            answer = partial(functional_call, self.without_context, weights, (x[None],))
            return self._watched((1, x.shape[0]), answer)

        with twice_differentiable():
            stepped = {name: self.weights[name] - rate * slope for name, slope in slopes.items()}
            seen = vmap(one_task)(stepped, part.query.x)
        return Run(*(value.squeeze(1) for value in seen))

    def in_context(self, part: Episode) -> Run:
        """After the demonstrations, with the weights as they are."""

        def answer() -> Tensor:
            return as_answers(self.learner(part.support, part.query.x), self.learner.spec)

        return self._watched(part.query.x.shape[:2], answer)

    def _watched(self, shape: Sequence[int], run: Callable[[], Tensor]) -> Run:
        with recording(self.learner, [*self.names, *(f"{name}.to_query_key_value" for name in self.names)]) as calls:
            answers = run()
        outputs, scores = [], []
        for name, layer in self.layers.items():
            last = calls[name][-1]
            outputs.append(last.reshape(*shape, -1, last.shape[-1])[:, :, -1])
            joint = calls[f"{name}.to_query_key_value"][-1]
            parts = joint.reshape(*shape, -1, 3, layer.heads, joint.shape[-1] // (3 * layer.heads))
            query, keys = parts[:, :, -1, 0], parts[:, :, :, 1]  # (B, Q, H, size), (B, Q, M, H, size)
            scores.append((query[:, :, None] * keys).sum(-1).flatten(2) * keys.shape[-1] ** -0.5)
        return Run(answers, torch.stack(outputs, 2), torch.stack(scores, 2))


class _WithoutContext(nn.Module):
    """A learner that answers from nothing, as a module to call with other weights."""

    def __init__(self, learner: SequenceLearner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, x: Tensor) -> Tensor:
        like = next(self.learner.parameters())
        return as_answers(self.learner.predict(self.learner.model.start(x.shape[0], like), x), self.learner.spec)


def _like(slope: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Random changes (B, 3 D, D), those of W_Q, W_K and W_V each as long as in `slope`."""
    noise = torch.stack([torch.randn(slope.shape[1:], generator=one, dtype=slope.dtype) for one in generators])
    noise, parts = noise.unflatten(1, (3, -1)), slope.unflatten(1, (3, -1))
    length = parts.square().sum((-2, -1), keepdim=True) / noise.square().sum((-2, -1), keepdim=True)
    return (noise * length.sqrt()).flatten(1, 2)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines along the last axis; 0 where one of the two is zero."""
    return (_unit(a) * _unit(b)).sum(-1)


def _loss(answers: Tensor, y: Tensor, spec: TaskSpec, *, smooth: bool = False) -> Tensor:
    """Of each query (B, Q): squared error, or 1 - accuracy (negative log-likelihood if `smooth`)."""
    if spec.kind == "regression":
        return (answers - y).square().sum(-1)
    if smooth:
        classes = torch.arange(spec.output_size, device=y.device)
        return -(answers * (y[..., None] == classes)).sum(-1).log()
    return (answers.argmax(-1) != y).to(answers.dtype)


def _right(answers: Tensor, y: Tensor, spec: TaskSpec) -> Tensor:
    """Whether each query (B, Q) is answered right; in regression, with the right sign of every output."""
    return (answers * y > 0).all(-1) if spec.kind == "regression" else answers.argmax(-1) == y
