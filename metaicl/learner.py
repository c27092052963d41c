"""The contract of every learner: adapt to a support, then predict for new inputs."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from typing_extensions import TypeVar

from metaicl.checks import check_labels
from metaicl.episode import Episode, Examples
from metaicl.nets.norm import mixes_rows
from metaicl.spec import Kind, NotServed, TaskSpec
from metaicl.transforms import in_a_transform

State = TypeVar("State", default=Any)  # so that a plain `Learner` is no unknown type to strict checkers


@dataclass(frozen=True)
class Traits:
    """What a learner declares about itself; `check_learner` proves it and reports print it.

    Args:
        transductive: An answer may depend on the other queries.
        order_sensitive: An answer may depend on the order of the support.
        kinds: The task kinds it serves.
        instead: For a kind it does not serve, the name of a learner that does, as (kind, name) pairs.
        trainable: There is something to meta-train; False for closed-form and from-scratch references.
        approximate: The meta-gradient is meant to be another than the slope of the query loss: first order, implicit.
        reads_support: An answer depends on the support; False for a learner that finds in the query and its memory all
            that it needs.
    """

    transductive: bool = False
    order_sensitive: bool = False
    kinds: tuple[Kind, ...] = ("regression", "classification")
    instead: tuple[tuple[Kind, str], ...] = ()
    trainable: bool = True
    approximate: bool = False
    reads_support: bool = True


_METHODS = (
    "adapt", "predict", "update", "merge", "predict_prefixes", "prepare", "meta_gradients", "penalty", "at",
    "adapt_stages", "prefix_stages",
)  # fmt: skip


class Learner(nn.Module, ABC, Generic[State]):
    """A learner that learns to learn. A subclass writes `adapt` and `predict`, nothing else.

    State is a return value and a pytree of tensors with leading axis B; the module itself is left alone.

    Args:
        spec: What the tasks look like.

    Raises:
        TypeError: If `spec` is not a TaskSpec.
        NotServed: If the learner does not serve `spec.kind`; the message names one that does. A subclass that reads
            some inputs only raises the same.
    """

    traits = Traits()

    def __init__(self, spec: TaskSpec) -> None:
        """Keep the spec, once it is known to be one that this learner serves."""
        super().__init__()
        if not isinstance(spec, TaskSpec):
            raise TypeError(f"{type(self).__name__}(spec) must be a TaskSpec, for instance tasks.spec; got {spec!r}")
        if spec.kind not in self.traits.kinds:
            served = " and ".join(self.traits.kinds)
            other = dict(self.traits.instead).get(spec.kind)
            hint = f"; use {other} instead" if other else ""
            raise NotServed(f"{type(self).__name__} serves {served}, not {spec.kind}{hint}")
        self.spec = spec

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a number or a module under the name of a method of the contract: having the name declares it."""
        super().__init_subclass__(**options)
        for name, value in vars(cls).items():
            _check_method(cls, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Likewise for attributes of one learner."""
        _check_method(type(self), name, value)
        super().__setattr__(name, value)

    def declare_approximate(self, approximate: bool = True) -> None:
        """Declare that the meta-gradient is not the slope of the query loss, if it is not."""
        self.traits = replace(self.traits, approximate=approximate)

    def declare_nets(self, *nets: nn.Module) -> None:
        """Declare the learner transductive if one of its nets mixes the rows it is given (batch statistics).

        Raises:
            TypeError: If one is no module.
        """
        for net in nets:
            if not isinstance(net, nn.Module):
                hint = (
                    "FrozenFeatures makes one of any function"
                    if not isinstance(net, type)
                    else f"call it: {net.__name__}()"
                )
                raise TypeError(f"the encoder or net of {type(self).__name__} must be a module; got {net!r}; {hint}")
        if any(mixes_rows(net) for net in nets):
            self.traits = replace(self.traits, transductive=True)

    @abstractmethod
    def adapt(self, support: Examples) -> State:
        """Learn from the support (B, N rows): fast weights, prototypes, a cache, an index."""

    @abstractmethod
    def predict(self, state: State, x: Tensor) -> Distribution:
        """Answer for inputs x (B, Q, *x_shape).

        Returns:
            A distribution with batch shape (B, Q): over class indices, or over targets (y_dim,).
        """

    def forward(self, support: Examples, x: Tensor) -> Distribution:
        """Adapt and predict in one call.

        Raises:
            TypeError: If labels of the support are no integers (B, N).
            ValueError: If one is none of the spec's classes.
        """
        if not check_support_labels(self.spec, support):
            return self.predict(self.adapt(support), x)
        _checked.support = support
        try:
            state = self.adapt(support)
        finally:
            _checked.support = None
        return self.predict(state, x)


class _Checked(threading.local):
    """The support whose labels `forward` has looked at, so that its `adapt` does not do it again."""

    support: Examples | None = None


_checked = _Checked()


def check_support_labels(spec: TaskSpec, support: Examples) -> bool:
    """Check the labels of a classification, unless `forward` just did; values cannot be looked at in transforms.

    Returns:
        Whether the labels are known to be classes.

    Raises:
        TypeError: If labels are not long (B, N).
        ValueError: If a label is none of the spec's classes.
    """
    if spec.kind != "classification" or torch.compiler.is_compiling() or in_a_transform():
        return False
    if _checked.support is not support:
        check_labels("support.y", support, spec.output_size)
    return True


def _check_method(owner: type, name: str, value: Any) -> None:
    if name in _METHODS and (isinstance(value, (nn.Module, Tensor)) or not callable(value)):
        raise TypeError(
            f"{name} is a method of the contract of learners; {owner.__name__} has a {type(value).__name__} of that "
            "name. Give it another one"
        )


@runtime_checkable
class PredictsPrefixes(Protocol):
    """A learner with a fast way to predict every row of a stream from the rows before it."""

    def predict_prefixes(self, examples: Examples) -> Distribution:
        """Row t of the answer (B, N) predicts y_t from rows 0 .. t-1 and x_t."""
        ...


@runtime_checkable
class Updates(Protocol):
    """A learner that can learn more without starting over."""

    def update(self, state: Any, examples: Examples) -> Any:
        """The state after `examples` too; equals adapting on all rows at once."""
        ...


@runtime_checkable
class Merges(Protocol):
    """A learner whose states, learned apart, can be joined: clients that share no row."""

    def merge(self, states: Sequence[Any]) -> Any:
        """The state after the rows of all `states`; equals adapting on all of them at once."""
        ...


@runtime_checkable
class Prepares(Protocol):
    """A learner with work to do once before training, such as building a memory bank."""

    def prepare(self, tasks: Any, *, seed: int) -> None:
        """Read what is needed from meta-training tasks, and only from those."""
        ...


@runtime_checkable
class HasMetaGradients(Protocol):
    """A learner whose outer step is no gradient of a loss (Reptile, evolution strategies)."""

    def meta_gradients(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to report (scalar) and a gradient for every trainable parameter.

        Both are means over the tasks of the episode: micro-batches and processes are averaged by their numbers of
        tasks.
        """
        ...


@runtime_checkable
class Regularizes(Protocol):
    """A learner whose training loss has a term that no prediction shows, such as a divergence from a prior."""

    def penalty(self, state: Any) -> Tensor:
        """A term for each task (B,), in nats per row; `query_loss` adds it while the learner is in train mode."""
        ...


@runtime_checkable
class FollowsTraining(Protocol):
    """A learner whose training changes with its progress. The outer loop tells it before each update."""

    def at(self, fraction: float) -> None:
        """Take the settings of this part of the training, in [0, 1); a function of nothing else.

        What a compiled step should see goes into buffers.
        """
        ...


@runtime_checkable
class AdaptsInStages(Protocol):
    """A learner that is trained on what it answers during adaptation too, such as after every inner step."""

    def adapt_stages(self, support: Examples) -> Sequence[tuple[float | Tensor, Any]]:
        """Weights and states, the last state last; in train mode `query_loss` sums the weighted losses."""
        ...


@runtime_checkable
class ReadsEmbeddings(Protocol):
    """A learner that looks at inputs through an embedding of single rows; what is read often is then embedded once."""

    def embed(self, x: Tensor) -> Tensor:
        """Embedded rows (B, N, D) of inputs x (B, N, *x_shape)."""
        ...

    def on_embeddings(self) -> Learner[Any]:
        """This learner, weights and all, for inputs that are embedded already."""
        ...


def wrapped_learner(learner: Learner[Any] | Callable[[TaskSpec], Learner[Any]], spec: TaskSpec) -> Learner[Any]:
    """The learner that another learner wraps: itself, or what a factory spec -> learner builds.

    Raises:
        TypeError: If it is neither, or if the learner is trained by `meta_gradients` of its own. The wrapper is trained
            by its query loss, so that rule would be lost.
        ValueError: If it was built for another spec.
    """
    if not isinstance(learner, Learner):
        if not callable(learner):
            raise TypeError(f"learner must be a learner or a factory spec -> learner; got {learner!r}")
        learner = learner(spec)
        if not isinstance(learner, Learner):
            raise TypeError(f"learner must be a learner or a factory spec -> learner; the factory gave {learner!r}")
    if learner.spec != spec:
        raise ValueError(f"the wrapped learner must be built for the same spec; got {learner.spec}, not {spec}")
    if isinstance(learner, HasMetaGradients):
        raise TypeError(
            f"a wrapped learner is trained by the query loss; {type(learner).__name__} is trained by its own "
            "meta_gradients, which would be lost. Wrap a learner that is trained by its query loss, such as ProtoNet"
        )
    return learner
