"""Fast context adaptation: only a small vector that the net reads beside its input is adapted."""

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import vmap

from metaicl.checks import check_count
from metaicl.episode import Examples
from metaicl.functional import answer, masked_mean, output_scale
from metaicl.inner_loop.calling import call_net, try_net
from metaicl.inner_loop.optimizers import InnerOptimizer
from metaicl.inner_loop.parameters import Params, check_inner_loop_module, first_floating, frozen_tensors
from metaicl.inner_loop.supervised import row_loss
from metaicl.inner_loop.unrolling import unroll_tasks
from metaicl.learner import Learner, Traits
from metaicl.learners.gradient.shared import check_checkpoint, check_truncate, choose_optimizer
from metaicl.learners.gradient.support import check_support
from metaicl.nets.modulation import build_context_net
from metaicl.second_order import twice_differentiable
from metaicl.spec import TaskSpec

_CONTEXT = " context"  # a key no parameter can have


class CAVIA(Learner[Tensor]):
    """Learn a net with a context input; a task is a context vector found by gradient descent from zero.

    A task's state is a few numbers, so nothing of the net is copied, and there is little to overfit.

    Args:
        spec: The tasks.
        net: (x (rows, *x_shape), context (context_size,)) -> (rows, n_way logits or y_dim means); None builds one:
            the context is concatenated to vectors and encoded words, and modulates the third block of a Conv4.
            It must not track running statistics.
        context_size: Entries of the context; None takes 5, and 100 for images.
        inner_lr: Step size of the inner loop; None takes 1.
        inner_steps: Updates of the inner loop; None takes 1 for regression and 2 for classification.
        first_order: Drop second derivatives.
        optimizer: Any other update rule of the inner loop, instead of `inner_lr`; see `MAML`.
        truncate: As in `MAML`.
        checkpoint: As in `MAML`.

    Raises:
        TypeError: If a count is no int.
        ValueError: If a setting is out of range or the net cannot be used.

    Reference:
        Zintgraf et al. 2019, arXiv:1810.03642, section 3 and, for images, the FiLM layer of the appendix. Differs:
        a learned output scale for regression; group instead of batch normalization; FiLM's scale starts at one.
    """

    traits = Traits()

    def __init__(
        self,
        spec: TaskSpec,
        *,
        net: nn.Module | None = None,
        context_size: int | None = None,
        inner_lr: float | None = None,
        inner_steps: int | None = None,
        first_order: bool = False,
        optimizer: InnerOptimizer | None = None,
        truncate: int | None = None,
        checkpoint: bool | int = False,
    ) -> None:
        """Check the settings and try the net."""
        super().__init__(spec)
        default_size, default_steps = (100 if spec.x_kind == "image" else 5), (1 if spec.kind == "regression" else 2)
        self.context_size = check_count("context_size", default_size if context_size is None else context_size)
        self.inner_steps = check_count("inner_steps", default_steps if inner_steps is None else inner_steps)
        self.first_order = bool(first_order)
        self.truncate, self.checkpoint = check_truncate(truncate), check_checkpoint(checkpoint)
        self.net = build_context_net(spec, context_size=self.context_size) if net is None else net
        check_inner_loop_module(self.net)
        _check_takes_context(self.net, spec, self.context_size)
        self.declare_nets(self.net)
        self.declare_approximate(self.first_order or self.truncate is not None)
        rule = choose_optimizer(optimizer, inner_lr, default=1.0)
        self.optimizer = rule.bind(self._start(), self.inner_steps)
        self.raw_scale = output_scale(spec)

    def adapt(self, support: Examples) -> Tensor:
        """Contexts (B, context_size)."""
        check_support(self, support)
        shared = frozen_tensors(self.net, ())

        def loss(weights: Params, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
            net = {name: weights[name] for name in shared}
            return masked_mean(row_loss(self.spec, call_net(self.net, net, (x, weights[_CONTEXT])), y), mask, 0)

        fast = unroll_tasks(
            loss, self._start(), (support.x, support.y, support.mask), steps=self.inner_steps, shared=shared,
            optimizer=self.optimizer, first_order=self.first_order, truncate=self.truncate, checkpoint=self.checkpoint,
        )  # fmt: skip
        return fast[_CONTEXT]

    def predict(self, state: Tensor, x: Tensor) -> Distribution:
        """Answer under each task's context."""
        shared = frozen_tensors(self.net, ())

        def one_task(context: Tensor, inputs: Tensor) -> Tensor:
            return call_net(self.net, shared, (inputs, context))

        with twice_differentiable():
            output = vmap(one_task, randomness="different")(state, x)
        return answer(output, self.raw_scale)

    def _start(self) -> dict[str, Tensor]:
        return {_CONTEXT: first_floating(self.net).new_zeros(self.context_size)}


def _check_takes_context(net: nn.Module, spec: TaskSpec, size: int) -> None:
    if next(net.parameters(), None) is None:
        raise ValueError(f"{type(net).__name__} has no parameters to learn")
    parameter = first_floating(net)
    dtype = torch.long if spec.x_kind == "tokens" else parameter.dtype
    x = torch.zeros(2, *spec.x_shape, dtype=dtype, device=parameter.device)
    expected = f"turn x (2, {spec.x_shape}) and a context ({size},) into (2, {spec.output_size})"
    try:
        found = str(tuple(try_net(net, x, parameter.new_zeros(size)).shape))
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"CAVIA's net must {expected}; {type(net).__name__} raised {error}") from error
    if found != str((2, spec.output_size)):
        raise ValueError(f"CAVIA's net must {expected}; {type(net).__name__} gave {found}")
