"""The inner loop of supervised learners on a support: by a kernel where one serves, or else by the engine."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaicl.episode import Examples
from metaicl.inner_loop.answering import call_by_engine
from metaicl.inner_loop.factored import LinearLayers, NotFactorable, Weight
from metaicl.inner_loop.loop import Loss
from metaicl.inner_loop.optimizers import InnerOptimizer
from metaicl.inner_loop.parameters import Params, adapted_tensors, check_precision
from metaicl.inner_loop.perceptrons import Problem, Supervised, adapt_and_answer, descend, find_problem
from metaicl.inner_loop.supervised import support_loss
from metaicl.inner_loop.unrolling import unroll_path
from metaicl.learner import Learner, check_support_labels
from metaicl.spec import TaskSpec

_SMALL = 1 << 11  # weights that can be factored


def check_support(learner: Learner[Any], support: Examples) -> None:
    """Refuse masked rows where a net normalizes by the statistics of all rows, float16 made since, wrong labels.

    Raises:
        ValueError: If there is a mask and the learner is transductive, a parameter is float16, or a label no class.
    """
    check_support_labels(learner.spec, support)
    if support.mask is not None and learner.traits.transductive:
        raise ValueError("a net with batch statistics cannot leave masked rows out; give supports of equal length")
    check_precision(learner)


def unroll_support(
    learner: Learner[Any],
    net: nn.Module,
    adapted: Collection[str],
    layers: LinearLayers | None,
    support: Examples,
    *,
    steps: int,
    shared: Mapping[str, Tensor],
    **options: Any,
) -> list[dict[str, Weight]]:
    """`unroll_path` on a support, with linear layers factored where they can be.

    Args:
        learner: Whose tasks and support these are.
        net: What adapts.
        adapted: Names of the parameters that adapt.
        layers: What `linear_layers` found.
        support: B tasks.
        steps: Of the inner loop.
        shared: Tensors of the net that do not adapt.
        options: More arguments of `unroll_path`.

    Raises:
        NotFactorable: If the net uses its layers otherwise than on rows of zeros, and factors are required. Where they
            are not, its weights are formed.
    """
    check_support(learner, support)
    chosen = layers.choose(support.n_rows, steps) if layers else {}
    # A compiled graph of factors is faster still than a kernel; their operators one by one are not.
    if not chosen or (layers and not layers.required and not torch.compiler.is_compiling()):
        kernel = _Kernel.find(learner.spec, net, adapted, support, steps=steps, shared=shared, **options)
        if kernel is not None:
            return descend(kernel.problem, kernel.path)
    run = partial(
        unroll_path, support_loss(learner.spec, net, {}), adapted_tensors(net, adapted),
        (support.x, support.y, support.mask), steps=steps, shared=shared, **options,
    )  # fmt: skip
    if not layers or layers.required:
        return run(layers=chosen)
    try:
        return run(layers=chosen)
    except NotFactorable:
        return run()


def has_own(learner: Learner[Any], owner: type, *methods: str) -> bool:
    """Whether these methods of a learner are those of `owner`, with no others put in their place."""
    as_made = not any(name in learner.__dict__ for name in methods)
    return as_made and all(getattr(type(learner), name) is getattr(owner, name) for name in methods)


def answer_at_once(
    learner: Learner[Any],
    net: nn.Module,
    adapted: Collection[str],
    layers: LinearLayers | None,
    support: Examples,
    x: Tensor,
    **options: Any,
) -> Tensor | None:
    """What the net answers (B, Q, outputs) to x after `unroll_support`, by one kernel; None where there is none.

    Args:
        learner: As in `unroll_support`, like all that follow.
        net: What adapts.
        adapted: Names of the parameters that adapt.
        layers: What `linear_layers` found.
        support: B tasks.
        x: Inputs (B, Q, ...).
        options: All the rest.
    """
    if layers and not _prefers_kernel(layers, support, options["steps"]):
        return None
    kernel = _Kernel.find(learner.spec, net, adapted, support, **options)
    if kernel is None:  # whoever serves then checks the support
        return None
    check_support(learner, support)
    return adapt_and_answer(kernel.problem, x, partial(kernel.answers, x))


def _prefers_kernel(layers: LinearLayers, support: Examples, steps: int) -> bool:
    """Whether a kernel that adapts and answers at once is faster than factors."""
    if not layers.choose(support.n_rows, steps):
        return True
    # One graph of factors is as fast from 64 hidden units on, and twice as fast with 180.
    return not layers.required and (layers.weights <= _SMALL or not torch.compiler.is_compiling())


class _Kernel(NamedTuple):
    """An inner loop for the kernels of `metaicl.inner_loop.perceptrons`, and the same by the engine."""

    problem: Problem
    net: nn.Module
    loss: Loss
    adapted: Collection[str]
    data: Supervised
    options: dict[str, Any]

    @classmethod
    def find(
        cls,
        spec: TaskSpec,
        net: nn.Module,
        adapted: Collection[str],
        support: Examples,
        *,
        checkpoint: bool | int = False,
        stepwise: Collection[str] = (),
        **options: Any,
    ) -> "_Kernel | None":
        """The same for `unroll_path` with these options; None where there is no kernel."""
        if stepwise or checkpoint not in (False, True):  # a kernel keeps the weights of every step, and no activations
            return None
        if (spec.kind == "regression") != support.y.is_floating_point():  # kernels tell the loss from the dtype
            return None
        data = (support.x, support.y, support.mask)
        settings = {name: value for name, value in options.items() if name != "shared"}
        problem = find_problem(net, adapted, data, outputs=spec.output_size, **settings)
        return None if problem is None else cls(problem, net, support_loss(spec, net, {}), adapted, data, options)

    def path(self, params: Params, optimizer: InnerOptimizer) -> list[dict[str, Tensor]]:
        """The fast weights by the engine, from this start and by this rule."""
        start, rest = self._split(params)
        settings = {**self.options, "optimizer": optimizer, "shared": {**self.options["shared"], **rest}}
        return unroll_path(self.loss, start, self.data, **settings)

    def answers(self, x: Tensor, params: Params, optimizer: InnerOptimizer) -> Tensor:
        """What the last of these answer."""
        return call_by_engine(self.net, self.path(params, optimizer)[-1], self._split(params)[1], x)

    def _split(self, params: Params) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        adapted = {name: value for name, value in params.items() if name in self.adapted}
        return adapted, {name: value for name, value in params.items() if name not in adapted}
