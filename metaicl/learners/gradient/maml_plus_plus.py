"""MAML++: MAML with a loss at every inner step, rates and normalization per step, and first order to begin with."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count, is_finite_number
from metaicl.episode import Examples
from metaicl.functional import answer, output_scale
from metaicl.inner_loop.answering import call_tasks
from metaicl.inner_loop.factored import Weight
from metaicl.inner_loop.optimizers import SGD, InnerOptimizer
from metaicl.inner_loop.parameters import (
    adapted_tensors,
    check_inner_loop_module,
    dotless,
    frozen_tensors,
)
from metaicl.learner import Learner
from metaicl.learners.gradient.shared import check_checkpoint, choose_adapted, choose_optimizer, linear_layers
from metaicl.learners.gradient.support import unroll_support
from metaicl.nets.backbones import build_net
from metaicl.nets.norm import batch_norms
from metaicl.spec import TaskSpec

_LEAST = 0.03  # of an equal share: the floor of what an early inner step weighs


class MAMLPlusPlus(Learner[dict[str, Weight]]):
    """MAML, made to train more steadily.

    Early in training the query's loss is taken after every inner step, with weights that move towards the last step;
    later it is the last step's alone. Each tensor learns a step size for each inner step. In a net with batch
    normalization, weights and biases of these layers do not adapt but are learned for each inner step. Second
    derivatives are left out at first. The outer loop tells the learner how far training is; without one it does what it
    does at the end.

    Args:
        spec: The tasks.
        net: As in `MAML`.
        inner_lr: Where the step sizes start.
        inner_steps: Updates of the inner loop.
        multi_step_until: Part of the training with losses at every step, in [0, 1].
        first_order_until: Part of the training without second derivatives, in [0, 1]; the paper's 50 of 150 epochs.
            Where a head starts from zeros a first-order gradient hardly reaches the encoder: 0 is better there.
        adapt: As in `MAML`.
        per_step_norm: Learn weights and biases of batch normalization for each inner step, instead of adapting them.
            None: where the net has such layers (`BatchStatNorm`, or torch's without running statistics). The net's
            own serve the first step; an answer after step k uses those of step k.
        factored: As in `MAML`.
        optimizer: Any other update rule of the inner loop, instead of `inner_lr`, such as
            `Adam(Rate(0.01, "tensor", per_step=True))`.
        checkpoint: As in `MAML`.

    Raises:
        TypeError: If a count is no int.
        ValueError: If a setting is out of range, a pattern matches nothing or the net cannot be used; if
            `per_step_norm` is True and there is no batch normalization to learn.

    Reference:
        Antoniou, Edwards & Storkey, 2018, arXiv:1810.09502: multi-step loss, derivative-order annealing, learned
        per-layer per-step rates, per-step batch normalization weights and biases (BNWB); weights of the steps as in
        the authors' code. Differs: rates per tensor, as in the code, and learned as multiples of `inner_lr`, without
        which an outer Adam shakes small ones; parts of the training instead of epochs; no
        running statistics per step (BNRS): the authors' code keeps them, but normalizes by the statistics of the rows
        at hand in training and evaluation alike, as here, so that no answer depends on them. The nets built here use
        group normalization, which has nothing of the kind. Cosine annealing is `TrainConfig(schedule="cosine")`.
    """

    step_weights: Tensor
    first_order: Tensor

    def __init__(
        self,
        spec: TaskSpec,
        *,
        net: nn.Module | None = None,
        inner_lr: float | None = None,
        inner_steps: int = 5,
        multi_step_until: float = 0.1,
        first_order_until: float = 1 / 3,
        adapt: str | Iterable[str] | None = None,
        per_step_norm: bool | None = None,
        factored: bool | None = None,
        optimizer: InnerOptimizer | None = None,
        checkpoint: bool | int = False,
    ) -> None:
        """Check the settings and choose the parameters to adapt."""
        super().__init__(spec)
        default = 0.01 if spec.kind == "regression" else 0.1
        self.inner_steps = check_count("inner_steps", inner_steps)
        self.checkpoint = check_checkpoint(checkpoint)
        self.multi_step_until = _check_part("multi_step_until", multi_step_until)
        self.first_order_until = _check_part("first_order_until", first_order_until)
        self.net = build_net(spec) if net is None else net
        check_inner_loop_module(self.net)
        self.declare_nets(self.net)
        self.norms = _norm_parameters(self.net, per_step_norm)
        self.adapted = choose_adapted(spec, self.net, adapt) - set(self.norms)
        if not self.adapted:
            raise ValueError(f"adapt={adapt!r} leaves only batch normalization; give per_step_norm=False to adapt it")
        later = {name: self.net.get_parameter(name).detach() for name in self.norms if self.inner_steps > 1}
        self.later_norms = nn.ParameterDict(
            {dotless(name): value.repeat(self.inner_steps - 1, 1) for name, value in later.items()}
        )
        rule = choose_optimizer(optimizer, inner_lr, default=default)
        if optimizer is None:
            rule = SGD(replace(rule.rates["lr"], learn="tensor", per_step=True))
        self.optimizer = rule.bind(adapted_tensors(self.net, self.adapted), self.inner_steps)
        self.layers = linear_layers(self.net, spec, self.adapted, self.optimizer, factored)
        self.raw_scale = output_scale(spec)
        self.register_buffer("step_weights", _step_weights(self.inner_steps, 1.0))
        self.register_buffer("first_order", torch.tensor(0.0))

    def at(self, fraction: float) -> None:
        """Weights of the steps and order of the derivatives for this part of the training."""
        fraction = _check_part("fraction", fraction)
        part = fraction / self.multi_step_until if self.multi_step_until else 1.0
        weights, first_order = _step_weights(self.inner_steps, part), float(fraction < self.first_order_until)
        self.step_weights.copy_(weights)  # once nothing can fail any more
        self.first_order.fill_(first_order)

    def adapt(self, support: Examples) -> dict[str, Weight]:
        """Fast weights of every task after the last step, with leading axis B."""
        return self._path(support, whole=False)[-1]

    def adapt_stages(self, support: Examples) -> list[tuple[float | Tensor, dict[str, Weight]]]:
        """Weight and fast weights of every inner step that counts at this part of the training."""
        if not torch.compiler.is_compiling() and float(self.step_weights[-1]) == 1:
            return [(1.0, self.adapt(support))]
        return list(zip(self.step_weights.unbind(), self._path(support, whole=True), strict=True))

    def predict(self, state: dict[str, Weight], x: Tensor) -> Distribution:
        """Answer with each task's fast weights."""
        return answer(call_tasks(self.net, state, frozen_tensors(self.net, self.adapted), x), self.raw_scale)

    def _path(self, support: Examples, *, whole: bool) -> list[dict[str, Weight]]:
        # A compiled graph keeps second order behind a gate; eagerly it is not computed where it does not count.
        gate = self.first_order if torch.compiler.is_compiling() else bool(self.first_order)
        norms = self._step_norms()
        path = unroll_support(
            self, self.net, self.adapted, self.layers, support, steps=self.inner_steps, optimizer=self.optimizer,
            shared={**frozen_tensors(self.net, self.adapted), **norms}, stepwise=tuple(norms), first_order=gate,
            checkpoint=self.checkpoint, whole=whole,
        )  # fmt: skip
        first = self.inner_steps - len(path)
        return [self._with_norms(fast, norms, first + i, len(support)) for i, fast in enumerate(path)]

    def _step_norms(self) -> dict[str, Tensor]:
        """Weights and biases of batch normalization by name, of every inner step (K, channels)."""
        first, later = adapted_tensors(self.net, self.norms), self.later_norms
        return {n: torch.cat([value[None], later[dotless(n)]]) if later else value[None] for n, value in first.items()}

    def _with_norms(
        self, fast: dict[str, Weight], norms: dict[str, Tensor], step: int, n_tasks: int
    ) -> dict[str, Weight]:
        """Fast weights after `step`, and the normalization that belongs to it."""
        now = {name: value[min(step, len(value) - 1)].expand(n_tasks, -1) for name, value in norms.items()}
        return {**fast, **now}


def _norm_parameters(net: nn.Module, per_step_norm: bool | None) -> list[str]:
    """Names of the weights and biases to learn for each step."""
    if per_step_norm is False:
        return []
    trainable = {name for name, value in net.named_parameters() if value.requires_grad}
    wanted = [f"{layer}.{part}" if layer else part for layer in batch_norms(net) for part in ("weight", "bias")]
    found = [name for name in wanted if name in trainable]
    if per_step_norm and not found:
        raise ValueError(
            f"per_step_norm=True found no batch normalization with weights to learn in {type(net).__name__}; "
            "use metaicl.nets.norm.BatchStatNorm"
        )
    return found


def _step_weights(steps: int, part: float) -> Tensor:
    """What the loss after each inner step weighs (K,), `part` of the way through the multi-step phase."""
    if part >= 1:
        return torch.eye(steps)[-1]
    early = max((1 - part) / steps, _LEAST / steps)
    weights = torch.full((steps,), early)
    weights[-1] = 1 - (steps - 1) * early
    return weights


def _check_part(name: str, value: float) -> float:
    if not is_finite_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1]; got {value!r}")
    return float(value)
