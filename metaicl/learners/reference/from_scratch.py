"""Training a fresh net on each support: what a learner without meta-learning does."""

from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count, check_positive
from metaicl.episode import Examples
from metaicl.functional import categorical, gaussian
from metaicl.inner_loop.answering import call_tasks
from metaicl.inner_loop.parameters import adapted_tensors, frozen_tensors, select_parameters
from metaicl.inner_loop.supervised import support_loss
from metaicl.inner_loop.unrolling import unroll_tasks
from metaicl.learner import Learner, Traits, check_support_labels
from metaicl.learners.reference.simple import mean_and_scale
from metaicl.nets.backbones import build_net
from metaicl.spec import TaskSpec


class FromScratch(Learner[dict[str, Tensor]]):
    """Gradient descent on the support from one random initialization, for many more steps than MAML takes.

    Args:
        spec: The tasks.
        net: (rows, *x_shape) -> (rows, outputs); None builds the one MAML would use.
        lr: Step size; None takes .02 for regression and .1 for classification.
        steps: Updates on each support.

    Reference:
        The "random init" baseline of Finn, Abbeel & Levine, 2017, arXiv:1703.03400, figure 2.
    """

    traits = Traits(trainable=False)

    def __init__(
        self, spec: TaskSpec, *, net: nn.Module | None = None, lr: float | None = None, steps: int = 100
    ) -> None:
        """Freeze the random start: it is no meta-parameter."""
        super().__init__(spec)
        self.net = build_net(spec) if net is None else net
        self.adapted = select_parameters(self.net, None)
        self.net.requires_grad_(False)
        default = 0.02 if spec.kind == "regression" else 0.1
        self.lr = check_positive("lr", default if lr is None else lr)
        self.steps = check_count("steps", steps)

    def adapt(self, support: Examples) -> dict[str, Tensor]:
        """The trained weights of every task, and for regression the scale of their residuals."""
        check_support_labels(self.spec, support)
        start, frozen = adapted_tensors(self.net, self.adapted), frozen_tensors(self.net, self.adapted)
        loss, data = support_loss(self.spec, self.net, frozen), (support.x, support.y, support.mask)
        fast = unroll_tasks(loss, start, data, lr=self.lr, steps=self.steps, first_order=True)
        if self.spec.kind == "classification":
            return fast
        residual = support.y - call_tasks(self.net, fast, frozen, support.x)
        return {**fast, _SCALE: mean_and_scale(residual, support.mask).scale}

    def predict(self, state: dict[str, Tensor], x: Tensor) -> Distribution:
        """Answer with each task's net."""
        weights = {name: value for name, value in state.items() if name != _SCALE}
        output = call_tasks(self.net, weights, frozen_tensors(self.net, self.adapted), x)
        return categorical(output) if self.spec.kind == "classification" else gaussian(output, state[_SCALE])


_SCALE = " scale"  # a key no parameter can have
