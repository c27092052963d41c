"""The meta-step: the loss of each task and the meta-gradient, for any learner, eager or as one compiled graph."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from metaicl.checks import check_choice, check_count
from metaicl.compiled import Gradients, Result, compile_step, find_problem, name_failure
from metaicl.distributed import check_unwrapped
from metaicl.episode import Episode
from metaicl.inner_loop.calling import call_net
from metaicl.inner_loop.parameters import named_tensors
from metaicl.learner import HasMetaGradients, Learner
from metaicl.objectives import Objective, added_to_own, query_loss
from metaicl.second_order import hint_at_ways_out

AUTOCAST = ("bf16",)

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}  # compiled against eager, relative
_PREFIX = "learner."


class MetaStep:
    """The loss of each task of an episode, and the gradient of their mean with respect to the learner's parameters.

    Nothing is updated here. A learner with `meta_gradients` is asked for them; they take the place of `query_loss` in
    the objective, and the gradient of what `WithAuxiliary` adds to it is added to them. Parameters that the objective
    does not reach get a gradient of zeros; those with `requires_grad=False`, which is read once, get none.

    With `compile=True` objective, inner loop and meta-gradient become one graph that takes every tensor, weights too,
    as an argument: one that was traced with the module's own weights would go on using them. Every new shape, such as
    another n_shot or a smaller last micro-batch, costs another graph of some seconds. The first call of each shape
    compares the graph with the eager step at two sets of weights. A learner whose graph differs by more than rounding,
    or that cannot be compiled, is served eagerly, after one RuntimeWarning that names the reason.

    Args:
        learner: Any learner with trainable parameters.
        objective: (learner, episode) -> loss of each task (B,).
        compile: One graph around the whole step.
        autocast: None, or "bf16" for bfloat16 matrix products in the objective.

    Raises:
        TypeError: If the learner is wrapped in DistributedDataParallel.
        ValueError: If nothing can be trained, `autocast` is unknown, or the objective would replace the
            `meta_gradients` of the learner.
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
        check_unwrapped(learner)
        self.learner = learner
        self.parameters = trainable_parameters(learner)
        if autocast is not None:
            check_choice("autocast", autocast, AUTOCAST)
        self._added = added_to_own(learner, objective)
        self._module = _EpisodeLoss(learner, self._added or objective, autocast is not None)
        self._graph: Callable[..., Result] | None = None
        self._known_shapes: set[Any] = set()
        first = next(iter(self.parameters.values()))
        dtype = torch.bfloat16 if autocast else first.dtype
        self._tolerance = _TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16])
        self._own = learner if isinstance(learner, HasMetaGradients) else None
        self._frozen = [name for name, value in self._module.named_parameters() if not value.requires_grad]
        if compile and self._own is not None:
            self._fall_back("it computes its own meta-gradients")
        elif compile:
            self._graph = compile_step(self._functional, first.device)

    @property
    def is_compiled(self) -> bool:
        """Whether the next call goes to a compiled graph."""
        return self._graph is not None

    def __call__(self, episode: Episode) -> Result:
        """The losses of the tasks (B,), a scalar for a learner with `meta_gradients`, and the gradient of their mean.

        Raises:
            RuntimeError: Under `torch.inference_mode()`.
            ValueError: If the objective does not return one loss per task that depends on the parameters.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("training needs gradients, and torch.inference_mode() is on; leave it first")
        if self._own is not None:
            with _autocast(episode) if self._module.autocast else nullcontext():
                own = _own_gradients(self._own, self.parameters, episode)
            return self._with_added(episode, *own)
        if self._graph is not None:
            self._verify_new_shape(episode)
        if self._graph is None:
            return self._eager(episode)
        try:
            return self._compiled(episode)
        except Exception as error:  # the learner changed since its last graph was made, and no graph holds what it is
            found = self._eager(episode)  # a learner that is wrong itself says so here
            self._fall_back(name_failure(error))
            return found

    def replay(self, episode: Episode) -> None:
        """Go through the losses once more, eagerly and without a meta-gradient, for someone who watches."""
        with torch.no_grad():
            if self._own is not None:
                self._own.meta_gradients(episode)
            if self._own is None or self._added is not None:
                self._module(episode)

    def _compiled(self, episode: Episode) -> Result:
        assert self._graph is not None
        # Never the module's own Parameter objects, and the rest read afresh: a learner may put a new tensor in the
        # place of a buffer or of a frozen parameter.
        trainable = {_PREFIX + name: value.detach() for name, value in self.parameters.items()}
        rest = {name: value.detach() for name, value in named_tensors(self._module)[1].items()}
        rest |= {name: self._module.get_parameter(name).detach() for name in self._frozen}
        losses, gradients = self._graph(trainable, rest, episode)
        return losses.detach(), {name: gradients[_PREFIX + name] for name in self.parameters}

    def _with_added(self, episode: Episode, loss: Tensor, gradients: Gradients) -> Result:
        """The learner's own loss and gradients with those of what the objective adds."""
        if self._added is None:
            return loss, gradients
        losses, slopes = self._eager(episode)
        return loss + losses.mean(), {name: value + slopes[name] for name, value in gradients.items()}

    def _eager(self, episode: Episode) -> Result:
        with torch.enable_grad(), hint_at_ways_out():
            losses = self._module(episode)
            name = type(self.learner).__name__
            if not isinstance(losses, Tensor) or losses.shape != (episode.n_tasks,):
                got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                expected = f"the loss of each task, shape (B,) = ({episode.n_tasks},)"
                raise ValueError(f"the objective must return {expected}; got {got} for {name}")
            if not losses.requires_grad:
                raise ValueError(f"the objective's loss depends on no trainable parameter of {name}")
            parameters = list(self.parameters.values())
            gradients = torch.autograd.grad(losses.mean(), parameters, allow_unused=True, materialize_grads=True)
        dense = (value.to_dense() if value.is_sparse else value for value in gradients)
        return losses.detach(), dict(zip(self.parameters, dense, strict=True))

    def _functional(self, trainable: Gradients, rest: Gradients, episode: Episode) -> Result:
        def mean_loss(trainable: Gradients) -> tuple[Tensor, Tensor]:
            losses = call_net(self._module, {**rest, **trainable}, (episode,))
            return losses.mean(), losses

        gradients, (_, losses) = grad_and_value(mean_loss, has_aux=True)(trainable)
        return losses, gradients

    def _verify_new_shape(self, episode: Episode) -> None:
        shape = _shape_of(episode)
        if shape in self._known_shapes:
            return
        self._known_shapes.add(shape)
        graph, eager = (lambda: self._compiled(episode)), (lambda: self._eager(episode))
        problem = find_problem(graph, eager, self.learner, names=self.parameters, tolerance=self._tolerance)
        if problem is not None:
            self._fall_back(problem)

    def _fall_back(self, reason: str) -> None:
        self._graph = None
        warnings.warn(
            f"{type(self.learner).__name__} runs without torch.compile: {reason}", RuntimeWarning, stacklevel=2
        )


def trainable_parameters(learner: Learner) -> dict[str, nn.Parameter]:
    """The parameters of a learner that want a gradient, by name.

    Raises:
        ValueError: If there is none.
    """
    parameters = {name: value for name, value in learner.named_parameters() if value.requires_grad}
    if not parameters:
        raise ValueError(
            f"{type(learner).__name__} has no parameter with requires_grad=True; there is nothing to train"
        )
    return parameters


def accumulate(meta_step: MetaStep, episode: Episode, micro_batch_size: int | None = None) -> Result:
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
    """The objective as a module, so that `call_net` reaches every tensor of the learner."""

    def __init__(self, learner: Learner, objective: Objective, autocast: bool) -> None:
        super().__init__()
        self.learner = learner
        self.objective = objective
        self.autocast = autocast

    def forward(self, episode: Episode) -> Tensor:
        if not self.autocast:
            return self.objective(self.learner, episode)
        with _autocast(episode):
            losses = self.objective(self.learner, episode)
        return losses.to(torch.promote_types(losses.dtype, torch.float32))


def _autocast(episode: Episode) -> torch.autocast:
    # The cache of autocast would hand tensors of one torch.func transform to another.
    return torch.autocast(episode.support.x.device.type, dtype=torch.bfloat16, cache_enabled=False)


def _own_gradients(learner: HasMetaGradients, parameters: dict[str, nn.Parameter], episode: Episode) -> Result:
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
    # Under autocast what comes out of a product is bfloat16, which is no gradient of a float32 parameter.
    return loss.detach(), {name: gradients[name].detach().to(value.dtype) for name, value in parameters.items()}


def _shape_of(episode: Episode) -> tuple[Any, ...]:
    parts = (episode.support, episode.query)
    leaves = [leaf for part in parts for leaf in (part.x, part.y, part.mask, part.ids)]
    return tuple(None if leaf is None else (leaf.shape, leaf.dtype) for leaf in (*leaves, *episode.latents.values()))
