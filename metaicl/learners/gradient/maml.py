"""Model-agnostic meta-learning, and by choice of the adapted parameters ANIL and BOIL."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call

from metaicl.checks import check_count, check_positive
from metaicl.episode import Examples
from metaicl.functional import categorical, gaussian, masked_mean, positive
from metaicl.inner_loop import Params, call_tasks, check_inner_loop_module, select_parameters, unroll_tasks
from metaicl.learner import Learner, Traits
from metaicl.nets.backbones import build_net
from metaicl.spec import TaskSpec


class MAML(Learner[dict[str, Tensor]]):
    """Learn initial weights from which a few gradient steps on the support suffice.

    The inner loss is cross-entropy for classification and mean squared error for regression, as in the paper.
    Regression answers with a Gaussian around the net's output whose scale (one per output) is a meta-parameter.

    Args:
        spec: The tasks.
        net: (rows, *x_shape) -> (rows, n_way logits or y_dim means); None builds one from the spec.
            It must not track running statistics.
        inner_lr: Step size of the inner loop.
        inner_steps: Updates of the inner loop.
        first_order: Drop second derivatives (FOMAML).
        adapt: Shell-style patterns of the parameters to adapt. None adapts all but word vectors. With the nets built
            here "head.*" gives ANIL and "encoder.*" gives BOIL.

    Raises:
        TypeError: If a count is no int.
        ValueError: If a setting is out of range, a pattern matches nothing or the net cannot be used.

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
        adapt: str | Iterable[str] | None = None,
    ) -> None:
        """Check the settings and choose the parameters to adapt."""
        super().__init__(spec)
        self.inner_lr = check_positive("inner_lr", default_inner_lr(spec) if inner_lr is None else inner_lr)
        self.inner_steps = check_count("inner_steps", inner_steps)
        self.first_order = bool(first_order)
        self.net = build_net(spec) if net is None else net
        check_inner_loop_module(self.net)
        self.declare_nets(self.net)
        self.adapted = select_parameters(self.net, adapt)
        if net is None and "head.weight" not in self.adapted:
            self.net.get_submodule("head").reset_parameters()  # type: ignore[operator]  # a linear layer of build_net
        if spec.kind == "regression":
            self.raw_scale = nn.Parameter(torch.zeros(spec.output_size))

    def adapt(self, support: Examples) -> dict[str, Tensor]:
        """Fast weights of every task: the adapted parameters with leading axis B."""
        if support.mask is not None and self.traits.transductive:
            raise ValueError("a net with batch statistics cannot leave masked rows out; give supports of equal length")
        start = {name: value for name, value in self.net.named_parameters() if name in self.adapted}
        frozen = self._frozen()

        def loss(weights: Params, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
            output = functional_call(self.net, {**frozen, **weights}, (x,), strict=True)
            return masked_mean(self._row_loss(output, y), mask, 0)

        data = (support.x, support.y, support.mask)
        return unroll_tasks(loss, start, data, lr=self.inner_lr, steps=self.inner_steps, first_order=self.first_order)

    def predict(self, state: dict[str, Tensor], x: Tensor) -> Distribution:
        """Answer with each task's fast weights."""
        output = call_tasks(self.net, state, self._frozen(), x)
        if self.spec.kind == "classification":
            return categorical(output)
        return gaussian(output, positive(self.raw_scale))

    def _frozen(self) -> dict[str, Tensor]:
        named = {name: value for name, value in self.net.named_parameters() if name not in self.adapted}
        return {**named, **{name: value.clone() for name, value in self.net.named_buffers()}}

    def _row_loss(self, output: Tensor, y: Tensor) -> Tensor:
        if self.spec.kind == "classification":
            return F.cross_entropy(output, y, reduction="none")
        return (output - y).square().mean(-1)


def default_inner_lr(spec: TaskSpec) -> float:
    """The paper's rates: .01 for regression, .4 for classification (Omniglot)."""
    return 0.01 if spec.kind == "regression" else 0.4
