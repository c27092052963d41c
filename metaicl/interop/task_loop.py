"""What the gradient learners of other libraries share: they adapt one task after the other."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count
from metaicl.episode import Examples
from metaicl.functional import answer, masked_mean, output_scale
from metaicl.inner_loop.calling import call_net
from metaicl.inner_loop.parameters import check_no_running_statistics, check_precision, frozen_tensors
from metaicl.inner_loop.supervised import row_loss
from metaicl.learner import Learner, check_support_labels
from metaicl.second_order import twice_differentiable
from metaicl.spec import TaskSpec


class TaskLoopLearner(Learner[dict[str, Tensor]]):
    """A gradient learner whose inner loop another library runs, in a Python loop over tasks.

    Losses, the default net and the learned output scale are those of `metaicl.learners.gradient.maml.MAML`. Slower
    than the batched inner loop, but it serves nets that `vmap` cannot, such as those that branch on the numbers they
    see. State is a dict of fast weights with leading axis B. A subclass writes `adapt_task`.

    Args:
        spec: The tasks.
        inner_steps: Updates of the inner loop.
        first_order: Drop second derivatives.
    """

    def __init__(self, spec: TaskSpec, *, inner_steps: int, first_order: bool) -> None:
        """Check the settings; the subclass brings the net."""
        super().__init__(spec)
        self.inner_steps = check_count("inner_steps", inner_steps)
        self.first_order = bool(first_order)
        self.raw_scale = output_scale(spec)

    @property
    @abstractmethod
    def net(self) -> nn.Module:
        """The net that is adapted; left alone."""

    @abstractmethod
    def adapt_task(self, x: Tensor, y: Tensor, *, differentiable: bool) -> dict[str, Tensor]:
        """Fast weights of one task.

        Args:
            x: Its real rows (N, *x_shape).
            y: Their targets.
            differentiable: Whether an outer loop will differentiate the result; gradients are enabled in any case.
        """

    def adapt(self, support: Examples) -> dict[str, Tensor]:
        """Fast weights of every task, with leading axis B. Works under `no_grad` and `inference_mode` too."""
        check_support_labels(self.spec, support)
        differentiable = torch.is_grad_enabled()
        tasks = []
        with torch.inference_mode(False), torch.enable_grad(), twice_differentiable():
            for x, y, real in zip(support.x, support.y, support.real, strict=True):
                # Absent, not masked: a batch normalization must not see the row either.
                rows = (x, y) if support.mask is None else (x[real], y[real])
                # A tensor of inference mode takes part in a graph only as a copy.
                x, y = (part.clone() if part.is_inference() else part for part in rows)
                with _copied_buffers(self.net):
                    fast = self.adapt_task(x, y, differentiable=differentiable)
                tasks.append(fast if differentiable else {name: value.detach() for name, value in fast.items()})
        return {name: torch.stack([fast[name] for fast in tasks]) for name in tasks[0]}

    def predict(self, state: dict[str, Tensor], x: Tensor) -> Distribution:
        """Answer with each task's fast weights, again task by task."""
        outputs = []
        with twice_differentiable():
            for i, inputs in enumerate(x):
                fast = {name: value[i] for name, value in state.items()}
                weights = {**frozen_tensors(self.net, fast), **fast}
                outputs.append(call_net(self.net, weights, (inputs,)))
        return answer(torch.stack(outputs), self.raw_scale)

    def task_loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The inner loss of one task (scalar): mean cross-entropy in nats, or mean squared error."""
        rows = row_loss(self.spec, output, y)
        return masked_mean(rows, torch.ones_like(rows, dtype=torch.bool), 0)  # no row at all gives 0, not NaN


def check_net(net: nn.Module) -> nn.Module:
    """The net, once it is known to have parameters, none of them a buffer too, no running statistics and no float16.

    Raises:
        ValueError: If it is otherwise.
    """
    if not isinstance(net, nn.Module) or next(net.parameters(), None) is None:
        raise ValueError(f"net must be an nn.Module with parameters to adapt; got {type(net).__name__}")
    known = set(map(id, net.parameters()))
    twice = [name for name, value in net.named_buffers() if id(value) in known]
    if twice:
        raise ValueError(f"buffers that are parameters too would not adapt with them here; take MAML. Got {twice[:5]}")
    check_no_running_statistics(net)
    check_precision(net)
    return net


def all_require_grad(parameters: Iterable[Tensor]) -> None:
    """Let an inner loop differentiate clones of frozen weights; the weights themselves stay frozen."""
    for parameter in parameters:
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.requires_grad_()


@contextmanager
def _copied_buffers(net: nn.Module) -> Iterator[None]:
    """Copies in the places of all buffers, for what runs inside and may write into them."""
    held = [(module._buffers, name) for module in net.modules() for name in module._buffers]
    own = [buffers[name] for buffers, name in held]
    copies = {id(value): None if value is None else value.clone() for value in own}  # one in two places stays one
    try:
        for (buffers, name), value in zip(held, own, strict=True):
            buffers[name] = copies[id(value)]
        yield
    finally:
        for (buffers, name), value in zip(held, own, strict=True):
            buffers[name] = value
