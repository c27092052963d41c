"""The meta-step: the loss of each task and the meta-gradient, for any learner, eager or as one compiled graph."""

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from metaicl.checks import check_choice, check_count
from metaicl.episode import Episode
from metaicl.learner import HasMetaGradients, Learner
from metaicl.objectives import Objective, query_loss

Gradients = dict[str, Tensor]
AUTOCAST = ("bf16",)

_GRAPHS_PER_LEARNER = 64  # torch stops at 8, which a range of n_shot exceeds
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}  # compiled against eager, relative
_PREFIX = "learner."


class MetaStep:
    """The loss of each task of an episode, and the gradient of their mean with respect to the learner's parameters.

    Nothing is updated here. A learner with `meta_gradients` is asked for them, and `objective` is then not used.
    Parameters that the objective does not reach get a gradient of zeros; those with `requires_grad=False`, which
    is read once, get none.

    With `compile=True` objective, inner loop and meta-gradient become one graph that takes every tensor, weights too,
    as an argument (RELIABILITY.md, trap 5: a graph that knows the module's own weights goes on using them). Every new
    shape, such as another n_shot or a smaller last micro-batch, costs another graph of some seconds. The first call of
    each shape compares the graph with the eager step at two sets of weights. A learner whose graph differs, or that
    cannot be compiled, is served eagerly, after one RuntimeWarning that names the reason.

    Args:
        learner: Any learner with trainable parameters.
        objective: (learner, episode) -> loss of each task (B,).
        compile: One graph around the whole step.
        autocast: None, or "bf16" for bfloat16 matrix products in the objective.

    Raises:
        ValueError: If nothing can be trained or `autocast` is unknown.
    """

    def __init__(
        self,
        learner: Learner,
        objective: Objective = query_loss,
        *,
        compile: bool = False,
        autocast: str | None = None,
    ) -> None:
        """Collect the trainable parameters; a graph is compiled by the first call."""
        self.learner = learner
        self.parameters = {name: value for name, value in learner.named_parameters() if value.requires_grad}
        if not self.parameters:
            raise ValueError(
                f"{type(learner).__name__} has no parameter with requires_grad=True; there is nothing to train"
            )
        if autocast is not None:
            check_choice("autocast", autocast, AUTOCAST)
        self._module = _EpisodeLoss(learner, objective, autocast is not None)
        self._compiled: Callable[..., tuple[Tensor, Gradients]] | None = None
        self._known_shapes: set[Any] = set()
        dtype = torch.bfloat16 if autocast else next(iter(self.parameters.values())).dtype
        self._tolerance = _TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16])
        if compile and isinstance(learner, HasMetaGradients):
            self._fall_back("it computes its own meta-gradients")
        elif compile:
            self._compiled = _compile(self._functional)

    @property
    def is_compiled(self) -> bool:
        """Whether the next call goes to a compiled graph."""
        return self._compiled is not None

    def __call__(self, episode: Episode) -> tuple[Tensor, Gradients]:
        """The losses of the tasks (B,), a scalar for a learner with `meta_gradients`, and the gradient of their mean.

        Raises:
            ValueError: If the objective does not return one loss per task that depends on the parameters.
        """
        if isinstance(self.learner, HasMetaGradients):
            return _own_gradients(self.learner, self.parameters, episode)
        if self._compiled is not None:
            self._verify_new_shape(episode)
        if self._compiled is None:
            return self._eager(episode)
        losses, gradients = self._compiled(*self._tensors(), episode)
        return losses.detach(), {name: gradients[_PREFIX + name] for name in self.parameters}

    def _eager(self, episode: Episode) -> tuple[Tensor, Gradients]:
        with torch.enable_grad():
            losses = self._module(episode)
            name = type(self.learner).__name__
            if losses.shape != (episode.n_tasks,):
                expected = f"the loss of each task, shape (B,) = ({episode.n_tasks},)"
                raise ValueError(f"the objective must return {expected}; got {tuple(losses.shape)} for {name}")
            if not losses.requires_grad:
                raise ValueError(f"the objective's loss depends on no trainable parameter of {name}")
            parameters = list(self.parameters.values())
            gradients = torch.autograd.grad(losses.mean(), parameters, allow_unused=True, materialize_grads=True)
        return losses.detach(), dict(zip(self.parameters, gradients, strict=True))

    def _functional(self, trainable: Gradients, rest: Gradients, episode: Episode) -> tuple[Tensor, Gradients]:
        def mean_loss(trainable: Gradients) -> tuple[Tensor, Tensor]:
            losses = functional_call(self._module, {**rest, **trainable}, (episode,), strict=True)
            return losses.mean(), losses

        gradients, (_, losses) = grad_and_value(mean_loss, has_aux=True)(trainable)
        return losses, gradients

    def _tensors(self) -> tuple[Gradients, Gradients]:
        """Trainable parameters, and everything else a forward reads; never the module's own Parameter objects."""
        trainable = {_PREFIX + name: value.detach() for name, value in self.parameters.items()}
        rest = {name: value.detach() for name, value in self._module.named_parameters() if name not in trainable}
        rest.update((name, value.detach()) for name, value in self._module.named_buffers())
        return trainable, rest

    def _verify_new_shape(self, episode: Episode) -> None:
        shape = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in pytree.tree_leaves(episode))
        if shape in self._known_shapes:
            return
        self._known_shapes.add(shape)
        problem = self._problem(episode)
        if problem is not None:
            self._fall_back(problem)

    def _problem(self, episode: Episode) -> str | None:
        """Why the compiled step cannot be trusted with episodes of this shape; None if it can."""
        with _same_buffers(self.learner) as changed:
            problem = self._difference(episode, "current")
            if problem is None:
                with _moved(self.parameters.values()):
                    problem = self._difference(episode, "moved")
        return f"a step changes its buffers {changed}" if changed else problem

    def _difference(self, episode: Episode, weights: str) -> str | None:
        assert self._compiled is not None
        with _same_randomness():
            expected = self._eager(episode)  # what is wrong with the learner itself is raised here
        try:
            with _same_randomness(), torch._dynamo.config.patch(recompile_limit=_GRAPHS_PER_LEARNER):
                found = self._compiled(*self._tensors(), episode)
        except Exception as error:  # a compiler can fail in any way; the eager step has just succeeded
            return f"torch.compile failed: {type(error).__name__}: {_first_line(error)}"
        gaps = list(_relative_gaps(found, expected)) if _all_finite(expected) else []
        wrong = [gap for gap in gaps if not gap <= self._tolerance]  # NaN included
        if not wrong:
            return None
        return f"at the {weights} weights the compiled step differs from the eager one by {wrong[0]:.1e} (relative)"

    def _fall_back(self, reason: str) -> None:
        self._compiled = None
        warnings.warn(
            f"{type(self.learner).__name__} runs without torch.compile: {reason}", RuntimeWarning, stacklevel=2
        )


def accumulate(meta_step: MetaStep, episode: Episode, micro_batch_size: int | None = None) -> tuple[Tensor, Gradients]:
    """`meta_step` on an episode cut into pieces of `micro_batch_size` tasks, which bounds memory.

    The gradient is that of the whole up to the order of summation, unless the learner's forward is random or looks
    across tasks.

    Args:
        meta_step: The step.
        episode: B tasks.
        micro_batch_size: Tasks in memory at a time; the last piece may be smaller. None takes all at once.

    Returns:
        The losses of all tasks (B,) and the gradient of their mean.
    """
    size = episode.n_tasks if micro_batch_size is None else check_count("micro_batch_size", micro_batch_size)
    if size >= episode.n_tasks:
        return meta_step(episode)
    losses: list[Tensor] = []
    total: Gradients = {}
    for start in range(0, episode.n_tasks, size):
        piece = episode[start : start + size]
        loss, gradients = meta_step(piece)
        share = piece.n_tasks / episode.n_tasks
        losses.append(loss.expand(piece.n_tasks))
        for name, gradient in gradients.items():
            total[name] = total[name].add(gradient, alpha=share) if name in total else gradient * share
    return torch.cat(losses), total


class _EpisodeLoss(nn.Module):
    """The objective as a module, so that `functional_call` reaches every tensor of the learner."""

    def __init__(self, learner: Learner, objective: Objective, autocast: bool) -> None:
        super().__init__()
        self.learner = learner
        self.objective = objective
        self.autocast = autocast

    def forward(self, episode: Episode) -> Tensor:
        if not self.autocast:
            return self.objective(self.learner, episode)
        # The cache of autocast would hand tensors of one torch.func transform to another.
        with torch.autocast(episode.support.x.device.type, dtype=torch.bfloat16, cache_enabled=False):
            return self.objective(self.learner, episode).float()


def _compile(step: Callable[..., Any]) -> Callable[..., Any]:
    def whole(trainable: Gradients, rest: Gradients, episode: Episode) -> tuple[Tensor, Gradients]:
        return step(trainable, rest, episode)

    # Graphs are kept, and counted against a limit, by code object: each learner gets its own.
    own = types.FunctionType(whole.__code__.replace(), whole.__globals__, whole.__name__, None, whole.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, options={"fallback_random": True})


def _own_gradients(
    learner: HasMetaGradients, parameters: dict[str, nn.Parameter], episode: Episode
) -> tuple[Tensor, Gradients]:
    loss, gradients = learner.meta_gradients(episode)
    expected = {name: tuple(value.shape) for name, value in parameters.items()}
    found = {name: tuple(value.shape) for name, value in gradients.items()}
    if found != expected:
        wrong = sorted(name for name in {**expected, **found} if expected.get(name) != found.get(name))
        first = wrong[0]
        raise ValueError(
            f"{type(learner).__name__}.meta_gradients must give a gradient for every trainable parameter; "
            f"{first} should have shape {expected.get(first, 'absent')}, got {found.get(first, 'absent')}"
        )
    return loss.detach(), {name: gradients[name].detach() for name in parameters}


@contextlib.contextmanager
def _same_randomness() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def _same_buffers(learner: nn.Module) -> Iterator[list[str]]:
    """Put the buffers back after the context, and list those that it changed."""
    changed: list[str] = []
    before = {name: (buffer, buffer._version, buffer.clone()) for name, buffer in learner.named_buffers()}
    try:
        yield changed
    finally:
        for name, (buffer, version, value) in before.items():
            if buffer._version != version:
                changed.append(name)
                buffer.copy_(value)


@contextlib.contextmanager
def _moved(parameters: Any) -> Iterator[None]:
    """Weights a little elsewhere, and back to the bit."""
    parameters = list(parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.02).add_(1e-3)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def _relative_gaps(found: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients]) -> Iterator[float]:
    """Largest difference of each tensor over its largest value; tiny gradients are measured against all of them."""
    scale = max(float(gradient.abs().max()) for gradient in expected[1].values() if gradient.numel())
    yield float((found[0] - expected[0]).abs().max() / expected[0].abs().max().clamp(min=1e-6))
    for name, gradient in expected[1].items():
        if gradient.numel():
            size = max(float(gradient.abs().max()), 1e-2 * scale, 1e-12)
            yield float((found[1][_PREFIX + name] - gradient).abs().max()) / size


def _all_finite(result: tuple[Tensor, Gradients]) -> bool:
    return all(bool(value.isfinite().all()) for value in (result[0], *result[1].values()))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:200]
