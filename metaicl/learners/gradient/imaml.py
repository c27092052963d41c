"""Implicit MAML: the meta-gradient of where the inner loop ends, without its path."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count, check_positive, is_finite_number
from metaicl.episode import Examples
from metaicl.functional import answer, output_scale
from metaicl.inner_loop.answering import call_tasks
from metaicl.inner_loop.implicit import Proximal, implicit_tasks, minimize_tasks
from metaicl.inner_loop.optimizers import InnerOptimizer
from metaicl.inner_loop.parameters import adapted_tensors, check_inner_loop_module, frozen_tensors, refuse_complex
from metaicl.inner_loop.solvers import ConjugateGradient, Solver
from metaicl.inner_loop.supervised import support_loss
from metaicl.inner_loop.unrolling import unroll_tasks
from metaicl.learner import Learner
from metaicl.learners.gradient.maml import choose_inner_lr
from metaicl.learners.gradient.shared import choose_adapted, choose_optimizer, fixed_optimizer
from metaicl.learners.gradient.support import check_support
from metaicl.nets.backbones import build_net
from metaicl.spec import TaskSpec


class IMAML(Learner[dict[str, Tensor]]):
    """Learn initial weights to which an inner loop of any length is tied by a spring.

    The inner loop minimizes loss + proximal / 2 |w - start|^2. Its meta-gradient solves a linear system at the
    solution, so that memory does not grow with the number of steps. It is that of the minimizer: with few inner steps,
    or few iterations of the solver, it is inexact; `metaicl.inner_loop.implicit.diagnose` tells how much.

    Args:
        spec: The tasks.
        net: As in `MAML`; without dropout, which leaves nothing to minimize.
        inner_lr: Step size of the inner loop; None takes MAML's.
        inner_steps: Updates of the inner loop, at most if there is a tolerance.
        optimizer: Any other update rule of the inner loop, with fixed rates, instead of `inner_lr` and of a tolerance;
            the meta-gradient does not ask how the minimum was found.
        proximal: Strength of the pull towards the start; it has to exceed the most negative curvature of the loss.
        solver: None takes five conjugate gradients.
        tolerance: Part of its first slope at which a task's inner loop stops, and relative residual at which its solver
            does; the error of the meta-gradient is bounded by a constant times their sum. 0 makes all steps of both. A
            pair (first, last) tightens geometrically as training goes on: early meta-gradients need not be exact.
        adapt: As in `MAML`.

    Raises:
        TypeError: If a count is no int or `solver` is no Solver.
        ValueError: If a setting is out of range, a pattern matches nothing or the net cannot be used.

    Reference:
        Rajeswaran et al. 2019, arXiv:1909.04630, Algorithms 1 and 2, with the settings of section 4 for Omniglot
        (16 steps, proximal 2, 5 conjugate gradients). The tightening tolerance follows Pedregosa, 2016,
        arXiv:1602.02355. Differs: no damping of the linear system beyond the proximal term.
    """

    tolerance: Tensor

    def __init__(
        self,
        spec: TaskSpec,
        *,
        net: nn.Module | None = None,
        inner_lr: float | None = None,
        inner_steps: int = 16,
        optimizer: InnerOptimizer | None = None,
        proximal: float = 2.0,
        solver: Solver | None = None,
        tolerance: float | tuple[float, float] = 0.0,
        adapt: str | Iterable[str] | None = None,
    ) -> None:
        """Check the settings and choose the parameters to adapt."""
        super().__init__(spec)
        self.inner_steps = check_count("inner_steps", inner_steps)
        self.proximal = check_positive("proximal", proximal)
        if solver is not None and not isinstance(solver, Solver):
            raise TypeError(f"solver must be a Solver, such as ConjugateGradient(5); got {type(solver).__name__}")
        self.solver = ConjugateGradient() if solver is None else solver
        self.tolerances = _check_tolerance(tolerance)
        self.register_buffer("tolerance", torch.tensor(self.tolerances[1]))
        self.net = build_net(spec) if net is None else net
        check_inner_loop_module(self.net)
        _check_deterministic(self.net)
        self.declare_nets(self.net)
        self.declare_approximate()
        self.adapted = choose_adapted(spec, self.net, adapt)
        refuse_complex("IMAML", adapted_tensors(self.net, self.adapted))
        self.inner_lr = choose_inner_lr(spec, inner_lr)
        if optimizer is not None and self.tolerances[0]:
            raise ValueError(
                f"a tolerance needs plain gradient descent; give inner_lr or tolerance=0; got {tolerance!r}"
            )
        rule = choose_optimizer(optimizer, inner_lr, default=self.inner_lr)
        self.optimizer = fixed_optimizer(self, rule, adapted_tensors(self.net, self.adapted))
        self.raw_scale = output_scale(spec)

    def at(self, fraction: float) -> None:
        """Tighten the tolerance as training goes on."""
        first, last = self.tolerances
        if first != last:
            self.tolerance.fill_(first * (last / first) ** fraction)

    def adapt(self, support: Examples) -> dict[str, Tensor]:
        """The regularized solution of every task, with leading axis B."""
        check_support(self, support)
        start = adapted_tensors(self.net, self.adapted)
        frozen, data = frozen_tensors(self.net, self.adapted), (support.x, support.y, support.mask)
        problem = Proximal(support_loss(self.spec, self.net, {}), self.proximal)
        begin, rest = ({name: value.detach() for name, value in part.items()} for part in (start, frozen))
        settings = {"steps": self.inner_steps, "shared": rest}
        if self.tolerances[0]:
            solution = minimize_tasks(problem, begin, data, lr=self.inner_lr, tolerance=self.tolerance, **settings)
        else:
            objective = problem.objective(begin)
            solution = unroll_tasks(objective, begin, data, optimizer=self.optimizer, first_order=True, **settings)
        return implicit_tasks(
            problem, solution, start, data, shared=frozen, solver=self.solver, tolerance=self.tolerance
        )

    def predict(self, state: dict[str, Tensor], x: Tensor) -> Distribution:
        """Answer with each task's solution."""
        return answer(call_tasks(self.net, state, frozen_tensors(self.net, self.adapted), x), self.raw_scale)


def _check_tolerance(tolerance: float | tuple[float, float]) -> tuple[float, float]:
    pair = tolerance if isinstance(tolerance, tuple) else (tolerance, tolerance)
    if len(pair) != 2 or not all(is_finite_number(value) and 0 <= value < 1 for value in pair):
        raise ValueError(f"tolerance must be in [0, 1), or a pair (first, last) of such numbers; got {tolerance!r}")
    if pair[0] < pair[1] or (pair[0] > 0 and pair[1] == 0):
        raise ValueError(f"tolerance must fall from its first to its last value, both > 0; got {tolerance!r}")
    return float(pair[0]), float(pair[1])


def _check_deterministic(net: nn.Module) -> None:
    random = [name or type(layer).__name__ for name, layer in net.named_modules() if _drops(layer)]
    if random:
        raise ValueError(
            f"an implicit gradient needs an inner loss that is the same at every call; {type(net).__name__} has "
            f"dropout in {random[:5]}. Set its p to 0, or use MAML"
        )


def _drops(layer: nn.Module) -> bool:
    if isinstance(layer, nn.RNNBase):
        return layer.dropout > 0
    return isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0
