"""learn2learn, really used: its algorithms as learners here, its task sets as distributions, ours as its task sets."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from metaicl.interop.l2l_package import import_learn2learn
from metaicl.interop.l2l_tasks import TasksetDistribution
from metaicl.interop.l2l_taskset import EpisodeTaskset, to_taskset
from metaicl.interop.task_loop import TaskLoopLearner, all_require_grad, check_net
from metaicl.learners.gradient.maml import choose_inner_lr
from metaicl.nets.backbones import build_net
from metaicl.spec import TaskSpec

__all__ = [
    "L2LGBML",
    "L2LMAML",
    "EpisodeTaskset",
    "L2LMetaSGD",
    "TasksetDistribution",
    "import_learn2learn",
    "to_taskset",
]


class _Learn2Learn(TaskLoopLearner):
    """What the three algorithms share: clone, adapt, read the fast weights off the clone."""

    algorithm: Any

    @property
    def net(self) -> nn.Module:
        """The net that is adapted; left alone."""
        return self.algorithm.module

    def adapt_task(self, x: Tensor, y: Tensor, *, differentiable: bool) -> dict[str, Tensor]:
        """Fast weights of one task; see `TaskLoopLearner.adapt_task`."""
        with warnings.catch_warnings():
            # The package looks at .grad of tensors that are no leaves, which torch remarks on.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            clone = self.algorithm.clone()
            all_require_grad(clone.parameters())
            # Where nobody differentiates further, the graph of the gradients would be built for nothing.
            first_order = self.first_order or not (differentiable or getattr(clone, "adapt_transform", False))
            for _ in range(self.inner_steps):
                clone.adapt(self.task_loss(clone(x), y), first_order=first_order)
        return dict(clone.module.named_parameters())


class L2LMAML(_Learn2Learn):
    """MAML by `learn2learn.algorithms.MAML`: clone and adapt, task by task.

    Args:
        spec: The tasks.
        net: (rows, *x_shape) -> (rows, n_way logits or y_dim means); None builds the net of our MAML. All of its
            parameters are adapted; it must not track running statistics.
        inner_lr: Step size of the inner loop; None takes that of our MAML.
        inner_steps: Updates of the inner loop.
        first_order: Drop second derivatives.

    Raises:
        ImportError: If learn2learn is not installed.
        TypeError, ValueError: If a setting is out of range or the net cannot be used.

    Reference:
        Arnold et al. 2020, arXiv:2008.12284, on Finn, Abbeel & Levine, 2017, arXiv:1703.03400.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        net: nn.Module | None = None,
        inner_lr: float | None = None,
        inner_steps: int = 1,
        first_order: bool = False,
    ) -> None:
        """Wrap the net in learn2learn's algorithm."""
        super().__init__(spec, inner_steps=inner_steps, first_order=first_order)
        lr = choose_inner_lr(spec, inner_lr)
        algorithms = import_learn2learn().algorithms
        self.algorithm = algorithms.MAML(_net(spec, net), lr=lr, first_order=self.first_order, allow_unused=True)


class L2LMetaSGD(_Learn2Learn):
    """Meta-SGD by `learn2learn.algorithms.MetaSGD`: a learned step size for every weight.

    Args:
        spec: The tasks.
        net: As in `L2LMAML`.
        inner_lr: Start of every step size.
        inner_steps: Updates of the inner loop.
        first_order: Drop second derivatives.

    Raises:
        ImportError: If learn2learn is not installed.
        TypeError, ValueError: If a setting is out of range or the net cannot be used.

    Reference:
        Arnold et al. 2020, arXiv:2008.12284, on Li et al. 2017, arXiv:1707.09835.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        net: nn.Module | None = None,
        inner_lr: float | None = None,
        inner_steps: int = 1,
        first_order: bool = False,
    ) -> None:
        """Wrap the net in learn2learn's algorithm."""
        super().__init__(spec, inner_steps=inner_steps, first_order=first_order)
        lr = choose_inner_lr(spec, inner_lr)
        self.algorithm = import_learn2learn().algorithms.MetaSGD(_net(spec, net), lr=lr, first_order=self.first_order)


class L2LGBML(_Learn2Learn):
    """Gradient-based meta-learning with learned gradient transforms, by `learn2learn.algorithms.GBML`.

    Args:
        spec: The tasks.
        transform: Makes the module that transforms the gradient of a parameter, or returns None to leave it plain:
            any of `learn2learn.optim`, such as `ModuleTransform(learn2learn.nn.Scale)` or `MetaCurvatureTransform`.
            None takes Kronecker-factored linear maps, which start as the identity.
        net: As in `L2LMAML`.
        inner_lr: Step size of the inner loop; None takes that of our MAML.
        inner_steps: Updates of the inner loop.
        first_order: Drop second derivatives.
        adapt_transform: Adapt the transforms in the inner loop too, from the second step on. Not with `first_order`,
            under which learn2learn frees a graph that it still needs.

    Raises:
        ImportError: If learn2learn is not installed.
        TypeError, ValueError: If a setting is out of range or the net cannot be used.

    Reference:
        Arnold et al. 2020, arXiv:2008.12284, on Arnold et al. 2019, arXiv:1910.13603 (Kronecker factors) and
        Park & Oliva, 2019, arXiv:1902.03356 (meta-curvature).
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        transform: Callable[[nn.Parameter], nn.Module | None] | None = None,
        net: nn.Module | None = None,
        inner_lr: float | None = None,
        inner_steps: int = 1,
        first_order: bool = False,
        adapt_transform: bool = False,
    ) -> None:
        """Wrap net and transforms in learn2learn's algorithm."""
        super().__init__(spec, inner_steps=inner_steps, first_order=first_order)
        lr = choose_inner_lr(spec, inner_lr)
        if adapt_transform and first_order:
            raise ValueError("adapt_transform and first_order do not go together in learn2learn; leave one out")
        package = import_learn2learn()
        self.algorithm = package.algorithms.GBML(
            _net(spec, net),
            transform=package.optim.KroneckerTransform(package.nn.KroneckerLinear) if transform is None else transform,
            lr=lr,
            adapt_transform=bool(adapt_transform),
            first_order=self.first_order,
            allow_unused=True,
        )


def _net(spec: TaskSpec, net: nn.Module | None) -> nn.Module:
    return check_net(build_net(spec) if net is None else net)
