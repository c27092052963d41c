"""Model-agnostic meta-learning, and by choice of the adapted parameters ANIL and BOIL."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count, check_positive
from metaicl.episode import Examples
from metaicl.functional import answer, output_scale
from metaicl.inner_loop.answering import call_tasks
from metaicl.inner_loop.factored import Weight
from metaicl.inner_loop.optimizers import InnerOptimizer
from metaicl.inner_loop.parameters import adapted_tensors, check_inner_loop_module, frozen_tensors
from metaicl.learner import Learner, Traits
from metaicl.learners.gradient.shared import (
    check_checkpoint,
    check_truncate,
    choose_adapted,
    choose_optimizer,
    linear_layers,
)
from metaicl.learners.gradient.support import answer_at_once, has_own, unroll_support
from metaicl.nets.backbones import build_net
from metaicl.spec import TaskSpec


class MAML(Learner[dict[str, Weight]]):
    """Learn initial weights from which a few gradient steps on the support suffice.

    The inner loss is cross-entropy for classification and mean squared error for regression, as in the paper.
    Regression answers with a Gaussian around the net's output whose scale (one per output) is a meta-parameter.

    Args:
        spec: The tasks.
        net: (rows, *x_shape) -> (rows, n_way logits or y_dim means); None builds one from the spec.
            It must not track running statistics.
        inner_lr: Step size of gradient descent in the inner loop; None takes the paper's, see `choose_inner_lr`.
        inner_steps: Updates of the inner loop.
        first_order: Drop second derivatives (FOMAML).
        optimizer: Any other update rule of the inner loop, such as `metaicl.inner_loop.Adam(0.01)` or one with learned
            rates, `SGD(Rate(0.01, "tensor"))`. It is copied; give it instead of `inner_lr`.
        adapt: Shell-style patterns of the parameters to adapt. None adapts all but word vectors. With the nets built
            here "head.*" gives ANIL and "encoder.*" gives BOIL.
        truncate: Second derivatives in the last so many steps only. None: in all.
        checkpoint: Compute segments of so many steps once more in the backward pass, to save memory in long inner
            loops; True is 1. See `metaicl.inner_loop.unroll_tasks`.
        factored: Keep the fast weights of linear layers as W_0 plus factors and never form them, which is exact.
            None: where that is cheaper, which is in layers wider than rows of the support times inner steps. A net
            that a kernel serves (`metaicl.inner_loop.perceptrons`) is factored in compiled steps only, and there if
            its matrices have more than 2,048 numbers.

    Raises:
        TypeError: If a count is no int or `optimizer` is no InnerOptimizer.
        ValueError: If a setting is out of range, a pattern matches nothing or the net cannot be used; if factors are
            asked for where they cannot be had.

    Reference:
        Finn, Abbeel & Levine, 2017, arXiv:1703.03400. ANIL: Raghu et al. 2020, arXiv:1909.09157.
        BOIL: Oh et al. 2021, arXiv:2008.08882. Differs: a learned output scale for regression; group instead of
        batch normalization in the nets built here.
    """

    traits = Traits()

    def __init__(
        self,
        spec: TaskSpec,
        *,
        net: nn.Module | None = None,
        inner_lr: float | None = None,
        inner_steps: int = 1,
        first_order: bool = False,
        optimizer: InnerOptimizer | None = None,
        adapt: str | Iterable[str] | None = None,
        truncate: int | None = None,
        checkpoint: bool | int = False,
        factored: bool | None = None,
    ) -> None:
        """Check the settings and choose the parameters to adapt."""
        super().__init__(spec)
        self.inner_steps = check_count("inner_steps", inner_steps)
        self.first_order = bool(first_order)
        self.truncate, self.checkpoint = check_truncate(truncate), check_checkpoint(checkpoint)
        self.net = build_net(spec) if net is None else net
        check_inner_loop_module(self.net)
        self.declare_nets(self.net)
        self.declare_approximate(self.first_order or self.truncate is not None)
        self.adapted = choose_adapted(spec, self.net, adapt)
        if net is None and "head.weight" not in self.adapted:
            self.net.get_submodule("head").reset_parameters()  # type: ignore[operator]  # a linear layer of build_net
        self.optimizer = choose_optimizer(optimizer, inner_lr, default=choose_inner_lr(spec, None)).bind(
            adapted_tensors(self.net, self.adapted), self.inner_steps
        )
        self.layers = linear_layers(self.net, spec, self.adapted, self.optimizer, factored)
        self.raw_scale = output_scale(spec)

    def forward(self, support: Examples, x: Tensor) -> Distribution:
        """Adapt and predict in one call, where a kernel serves the net without giving weights out between."""
        if has_own(self, MAML, "adapt", "predict"):
            output = answer_at_once(self, self.net, self.adapted, self.layers, support, x, **self._inner_loop)
            if output is not None:
                return answer(output, self.raw_scale)
        return super().forward(support, x)

    def adapt(self, support: Examples) -> dict[str, Weight]:
        """Fast weights of every task: the adapted parameters, or their factors, with leading axis B."""
        return unroll_support(self, self.net, self.adapted, self.layers, support, **self._inner_loop)[-1]

    def predict(self, state: dict[str, Weight], x: Tensor) -> Distribution:
        """Answer with each task's fast weights."""
        output = call_tasks(self.net, state, frozen_tensors(self.net, self.adapted), x)
        return answer(output, self.raw_scale)

    @property
    def _inner_loop(self) -> dict[str, Any]:
        return {
            "steps": self.inner_steps, "optimizer": self.optimizer, "first_order": self.first_order,
            "truncate": self.truncate, "checkpoint": self.checkpoint, "whole": False,
            "shared": frozen_tensors(self.net, self.adapted),
        }  # fmt: skip


class HoldsMAML(Learner[dict[str, Weight]], ABC):
    """A learner that is a MAML, its `maml`, with an optimizer of its own; a subclass writes `make_optimizer`.

    Args:
        spec: The tasks.
        net: As in `MAML`.
        inner_lr: Step size of the inner loop, or where learned ones start; None takes MAML's.
        inner_steps: Updates of the inner loop; None takes `default_steps`.
        first_order: As in `MAML`.
        adapt: As in `MAML`.
        truncate: As in `MAML`.
        checkpoint: As in `MAML`.

    Raises:
        TypeError, ValueError: As `MAML`.
    """

    default_steps: ClassVar[int] = 1

    def __init__(
        self,
        spec: TaskSpec,
        *,
        net: nn.Module | None = None,
        inner_lr: float | None = None,
        inner_steps: int | None = None,
        first_order: bool = False,
        adapt: str | Iterable[str] | None = None,
        truncate: int | None = None,
        checkpoint: bool | int = False,
    ) -> None:
        """Build the MAML inside."""
        super().__init__(spec)
        self.maml = MAML(
            spec, net=net, optimizer=self.make_optimizer(choose_inner_lr(spec, inner_lr)),
            inner_steps=self.default_steps if inner_steps is None else inner_steps, first_order=first_order,
            adapt=adapt, truncate=truncate, checkpoint=checkpoint,
        )  # fmt: skip
        self.traits = self.maml.traits

    @staticmethod
    @abstractmethod
    def make_optimizer(lr: float) -> InnerOptimizer:
        """The update rule of the inner loop, not bound to any weights yet."""

    def forward(self, support: Examples, x: Tensor) -> Distribution:
        """Adapt and predict in one call, as the MAML inside does."""
        return self.maml(support, x) if has_own(self, HoldsMAML, "adapt", "predict") else super().forward(support, x)

    def adapt(self, support: Examples) -> dict[str, Weight]:
        """Fast weights of every task, with leading axis B."""
        return self.maml.adapt(support)

    def predict(self, state: dict[str, Weight], x: Tensor) -> Distribution:
        """Answer with each task's fast weights."""
        return self.maml.predict(state, x)


def choose_inner_lr(spec: TaskSpec, inner_lr: float | None) -> float:
    """`inner_lr`, or for None the rates of MAML's paper: .01 for regression, .4 for classification (Omniglot).

    Raises:
        ValueError: If it is no finite number > 0.
    """
    if inner_lr is None:
        return 0.01 if spec.kind == "regression" else 0.4
    return check_positive("inner_lr", inner_lr)
