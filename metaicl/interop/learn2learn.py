"""learn2learn, really used: its algorithms as learners here, its task sets as distributions, ours as its task sets."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from metaicl.inner_loop.parameters import select_parameters
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
    adapted: frozenset[str]

    def wrap(self, algorithm: Any) -> None:
        """Take learn2learn's algorithm, and note which parameters of its net adapt: those that are not frozen now."""
        self.algorithm = algorithm
        self.adapted = select_parameters(self.net, "*")

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
            all_require_grad(value for name, value in clone.named_parameters() if self._moves(name))
            # Where nobody differentiates further, the graph of the gradients would be built for nothing.
            first_order = self.first_order or not (differentiable or getattr(clone, "adapt_transform", False))
            for _ in range(self.inner_steps):
                clone.adapt(self.task_loss(clone(x), y), first_order=first_order)
        return {name: value for name, value in clone.module.named_parameters() if name in self.adapted}

    def _moves(self, name: str) -> bool:
        """Whether learn2learn has to differentiate with respect to this part of a clone."""
        return not name.startswith("module.") or name.removeprefix("module.") in self.adapted


class L2LMAML(_Learn2Learn):
    """MAML by `learn2learn.algorithms.MAML`: clone and adapt, task by task.

    Args:
        spec: The tasks.
        net: (rows, *x_shape) -> (rows, n_way logits or y_dim means); None builds the net of our MAML. All of its
            trainable parameters are adapted, word vectors too; it must not track running statistics.
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
        options = {"first_order": self.first_order, "allow_unused": True, "allow_nograd": True}
        self.wrap(algorithms.MAML(_net(spec, net), lr=lr, **options))


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
        self.wrap(import_learn2learn().algorithms.MetaSGD(_net(spec, net), lr=lr, first_order=self.first_order))
        for (name, _), rate in zip(self.net.named_parameters(), self.algorithm.lrs, strict=True):
            if name not in self.adapted:  # learn2learn moves everything: with a rate of zero nothing moves
                rate.requires_grad_(False).zero_()

    def _moves(self, name: str) -> bool:
        return True  # learn2learn asks for the gradient of every parameter


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
        kronecker = package.optim.KroneckerTransform(package.nn.KroneckerLinear)
        self.wrap(
            package.algorithms.GBML(
                _net(spec, net),
                transform=kronecker if transform is None else transform,
                lr=lr,
                adapt_transform=bool(adapt_transform),
                first_order=self.first_order,
                allow_unused=True,
                allow_nograd=True,
            )
        )


def _net(spec: TaskSpec, net: nn.Module | None) -> nn.Module:
    return check_net(build_net(spec) if net is None else net)
