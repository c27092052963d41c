"""Inner loops by the `higher` package, with any of its differentiable optimizers, behind our learner contract."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from metaicl.inner_loop.optimizers import InnerOptimizer
from metaicl.inner_loop.parameters import select_parameters
from metaicl.interop.task_loop import TaskLoopLearner, all_require_grad, check_net
from metaicl.learners.gradient.maml import choose_inner_lr
from metaicl.nets.backbones import build_net
from metaicl.spec import TaskSpec

MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]

_IGNORED_BY_HIGHER = ("maximize", "decoupled_weight_decay", "capturable")


class HigherMAML(TaskLoopLearner):
    """MAML whose inner loop is any optimizer that `higher` can differentiate through, task by task.

    Args:
        spec: The tasks.
        net: (rows, *x_shape) -> (rows, n_way logits or y_dim means); None builds the net of our MAML. It must not
            track running statistics, nor have forward hooks, which higher does not call. LSTMs and other nets that
            `vmap` cannot serve are welcome.
        inner_lr: Step size of gradient descent in the inner loop; None takes that of our MAML.
        optimizer: Makes the inner optimizer from the parameters to adapt, for instance
            `lambda parameters: torch.optim.Adam(parameters, lr=0.01)`; it starts afresh for every task. Give it instead
            of `inner_lr`.
        inner_steps: Updates of the inner loop.
        first_order: Take inner gradients as constants.
        adapt: Shell-style patterns of the parameters to adapt; None adapts all but word vectors, as in our MAML.

    Raises:
        ImportError: If higher is not installed.
        TypeError, ValueError: If a setting is out of range, a pattern matches nothing, the net cannot be used, or
            higher does not know the optimizer or one of its options.

    Reference:
        Grefenstette et al. 2019, arXiv:1910.01727, on Finn, Abbeel & Levine, 2017, arXiv:1703.03400.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        net: nn.Module | None = None,
        inner_lr: float | None = None,
        optimizer: MakeOptimizer | None = None,
        inner_steps: int = 1,
        first_order: bool = False,
        adapt: str | Iterable[str] | None = None,
    ) -> None:
        """Check the settings, the optimizer by making one."""
        super().__init__(spec, inner_steps=inner_steps, first_order=first_order)
        self._net = check_net(build_net(spec) if net is None else net)
        _check_no_hooks(self._net)
        self.adapted = select_parameters(self._net, adapt)
        if isinstance(optimizer, InnerOptimizer):
            raise TypeError(
                f"optimizer must make a torch.optim.Optimizer, which higher takes over; got metaicl's own "
                f"{type(optimizer).__name__}, which is for metaicl.MAML"
            )
        if optimizer is not None and inner_lr is not None:
            raise ValueError(
                f"give inner_lr or an optimizer, which has its own rate, not both; got inner_lr={inner_lr}"
            )
        self.inner_lr, self.optimizer = choose_inner_lr(spec, inner_lr), optimizer
        probe = self._make_optimizer()
        if not isinstance(probe, torch.optim.Optimizer):
            raise TypeError(f"optimizer must make a torch.optim.Optimizer; got {type(probe).__name__}")
        _import_higher().get_diff_optim(probe, self._net.parameters())
        _check_options(probe)

    @property
    def net(self) -> nn.Module:
        """The net that is adapted; left alone."""
        return self._net

    def adapt_task(self, x: Tensor, y: Tensor, *, differentiable: bool) -> dict[str, Tensor]:
        """Fast weights of one task; see `TaskLoopLearner.adapt_task`."""
        context = _import_higher().innerloop_ctx(
            self._net, self._make_optimizer(), copy_initial_weights=False, track_higher_grads=differentiable
        )
        with warnings.catch_warnings():
            # higher remarks on RMSprop and Rprop whenever it makes one; once, at construction, is enough.
            warnings.filterwarnings("ignore", message="Differentiable R")
            with context as (patched, inner):
                all_require_grad(patched.parameters())
                for _ in range(self.inner_steps):
                    loss = self.task_loss(patched(x), y)
                    inner.step(loss, grad_callback=_detach if self.first_order else None)
                names = (name for name, _ in self._net.named_parameters())
                fast = dict(zip(names, patched.fast_params, strict=True))
        return {name: value for name, value in fast.items() if name in self.adapted}

    def _make_optimizer(self) -> torch.optim.Optimizer:
        parameters = [value for name, value in self._net.named_parameters() if name in self.adapted]
        if self.optimizer is None:
            return torch.optim.SGD(parameters, lr=self.inner_lr)
        return self.optimizer(parameters)


def _import_higher() -> ModuleType:
    try:
        import higher
    except ImportError as error:
        raise ImportError("HigherMAML needs higher: pip install higher") from error
    return higher


def _check_no_hooks(net: nn.Module) -> None:
    hooked = [name or type(m).__name__ for name, m in net.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    if hooked:
        raise ValueError(
            f"higher would not call the forward hooks of {hooked[:5]}, which torch.nn.utils.weight_norm works by too; "
            "take torch.nn.utils.parametrizations and methods instead, or MAML"
        )


def _check_options(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        ignored = [option for option in _IGNORED_BY_HIGHER if group.get(option)]
        if ignored:
            raise ValueError(f"higher would ignore the option {ignored[0]} of {type(optimizer).__name__}; leave it out")


def _detach(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if gradient is None else gradient.detach() for gradient in gradients]
