"""Amortized Bayesian meta-learning: a learned prior over weights, and a few steps from it to each task's posterior."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import vmap

from metaicl.checks import check_count, check_positive
from metaicl.episode import Examples
from metaicl.functional import answer, learned_positive, masked_mean, output_scale
from metaicl.inner_loop.calling import call_net
from metaicl.inner_loop.optimizers import InnerOptimizer
from metaicl.inner_loop.parameters import (
    Params,
    adapted_tensors,
    check_inner_loop_module,
    frozen_tensors,
)
from metaicl.inner_loop.supervised import check_rows
from metaicl.inner_loop.unrolling import unroll_tasks
from metaicl.learner import Learner, Traits
from metaicl.learners.gradient.shared import check_checkpoint, check_truncate, choose_adapted, choose_optimizer
from metaicl.learners.gradient.support import check_support
from metaicl.mixtures import marginal
from metaicl.nets.backbones import build_net
from metaicl.nets.low_rank import low_rank_copy
from metaicl.second_order import twice_differentiable
from metaicl.spec import TaskSpec
from metaicl.task import derive_generator

_SCALE = "log_scale "  # before a parameter's name: the logarithm of its standard deviation
_READ = "read "  # before the name of a tensor that the inner loss reads and does not adapt
_RAW = " raw scale"  # a name that no parameter can have


class Posterior(NamedTuple):
    """A diagonal Gaussian over the weights of each task.

    Attributes:
        weights: Means by name, log standard deviations by "log_scale " and name; leading axis B.
        n_rows: Real support rows (B,).
    """

    weights: dict[str, Tensor]
    n_rows: Tensor


class AmortizedBayes(Learner[Posterior]):
    """Learn a Gaussian prior over weights from which a few steps of variational inference suffice.

    A task's posterior starts at the prior (means: the net's parameters; scales: parameters of their own) and descends
    the negative log-likelihood per support row plus `kl_weight` KL(posterior | prior) per support row. Answers mix
    the net's answers under weights drawn from the posterior, so they widen where the support leaves the weights open.
    The outer loss gets the same KL term from `penalty`.

    In train mode draws are reparametrized and come from torch's default generator; in eval mode they are fixed by
    construction and shared by all tasks, so that an answer is a function of support and input.

    Args:
        spec: The tasks.
        net: (rows, *x_shape) -> (rows, n_way logits or y_dim means); None builds one from the spec.
            It must not track running statistics.
        rank: Put the posterior on low-rank factors of the net's linear layers instead (LoRA); the net is copied, and
            its own weights become meta-parameters that all tasks share.
        adapt: Shell-style patterns of the parameters with a posterior; the rest is shared. None takes all but word
            vectors, or with `rank` the factors.
        inner_lr: Step size of the inner loop; None takes .02 for regression and .1 for classification. In regression
            it multiplies gradients of the bound times the squared output scale, which are those of half the squared
            error: a step is as long as one of MAML with half the rate, wherever training takes the scale.
        inner_steps: Updates of the inner loop; 0 answers by the prior.
        optimizer: Any other update rule of the inner loop, for means and logarithms of scales alike, instead of
            `inner_lr`; see `MAML`.
        truncate: As in `MAML`.
        checkpoint: As in `MAML`.
        n_samples: Draws of the weights in each inner step.
        n_predictions: Draws that an answer mixes.
        prior_scale: Start of the prior's standard deviations.
        kl_weight: Factor on both KL terms; 1 gives the evidence bounds, and then asks for a wider prior: plain steps
            are stable while inner_lr * kl_weight (in regression times the squared output scale) < 2 * rows *
            prior_scale^2.
        first_order: Drop second derivatives.

    Raises:
        TypeError: If a count is no int.
        ValueError: If a setting is out of range, a pattern matches nothing or the net cannot be used.

    Reference:
        Ravi & Beatson, 2019, "Amortized Bayesian meta-learning" (ICLR), Algorithms 1 and 2. Low-rank factors: Zhang
        et al. 2025 (ABMLL). Differs: the outer likelihood is that of the query, not of support and query, and its KL
        is shared out over support rows; inner steps on the bound times the squared scale of regression answers; no
        hyper-prior on the prior; `kl_weight` (theirs down-weights the inner KL); plain draws instead of local
        reparametrization; group normalization; in ABMLL the scales are low-rank products too.
    """

    traits = Traits()

    def __init__(
        self,
        spec: TaskSpec,
        *,
        net: nn.Module | None = None,
        rank: int | None = None,
        adapt: str | Iterable[str] | None = None,
        inner_lr: float | None = None,
        inner_steps: int = 5,
        optimizer: InnerOptimizer | None = None,
        truncate: int | None = None,
        checkpoint: bool | int = False,
        n_samples: int = 2,
        n_predictions: int = 10,
        prior_scale: float = 0.01,
        kl_weight: float = 1e-3,
        first_order: bool = False,
    ) -> None:
        """Check the settings and choose the parameters that get a posterior."""
        super().__init__(spec)
        self.inner_steps = check_count("inner_steps", inner_steps, minimum=0)
        self.n_samples = check_count("n_samples", n_samples)
        self.n_predictions = check_count("n_predictions", n_predictions)
        self.kl_weight = check_positive("kl_weight", kl_weight)
        self.first_order = bool(first_order)
        self.truncate, self.checkpoint = check_truncate(truncate), check_checkpoint(checkpoint)
        self.net, factors = build_net(spec) if net is None else net, None
        check_inner_loop_module(self.net)
        if rank is not None:
            self.net, factors = low_rank_copy(self.net, rank=rank)
        self.declare_nets(self.net)
        self.declare_approximate(self.first_order or self.truncate is not None)
        self.adapted = choose_adapted(spec, self.net, factors if adapt is None else adapt)
        log_scale = math.log(check_positive("prior_scale", prior_scale))
        means = adapted_tensors(self.net, self.adapted)
        self.log_scales = nn.ParameterList([torch.full_like(value, log_scale) for value in means.values()])
        rule = choose_optimizer(optimizer, inner_lr, default=0.02 if spec.kind == "regression" else 0.1)
        self.optimizer = rule.bind(self.prior(), max(1, self.inner_steps))
        self.raw_scale = output_scale(spec)

    def adapt(self, support: Examples) -> Posterior:
        """Posteriors after `inner_steps` steps from the prior."""
        check_support(self, support)
        noise = self._noise("adapt", len(support), self.inner_steps, self.n_samples)
        if self._noise_dim is None:  # all tasks share it
            noise = {name: value.expand(len(support), *value.shape) for name, value in noise.items()}
        weights = unroll_tasks(
            self._bound, self.prior(), (support.x, support.y, support.real), step_data=(noise,), shared=self._read(),
            steps=self.inner_steps, optimizer=self.optimizer, first_order=self.first_order, truncate=self.truncate,
            checkpoint=self.checkpoint,
        )  # fmt: skip
        return Posterior(weights, support.real.sum(1))

    def predict(self, state: Posterior, x: Tensor) -> Distribution:
        """A mixture over draws from each task's posterior."""
        noise, frozen = self._noise("predict", len(x), self.n_predictions), frozen_tensors(self.net, self.adapted)

        def one_task(weights: Params, inputs: Tensor, noise: Params) -> Tensor:
            return self._outputs(weights, noise, frozen, inputs)

        with twice_differentiable():
            over_tasks = vmap(one_task, in_dims=(0, 0, self._noise_dim), randomness="different")
            return mixture(over_tasks(state.weights, x, noise).transpose(1, 2), self.raw_scale)

    def penalty(self, state: Posterior) -> Tensor:
        """`kl_weight` KL(posterior | prior) per support row (B,), in nats per row; training adds it to the loss."""
        divergence = vmap(gaussian_kl, in_dims=(0, None))(state.weights, self.prior())
        return self.kl_weight * divergence / state.n_rows.clamp(min=1)

    def prior(self) -> dict[str, Tensor]:
        """The prior's means by name, and log standard deviations by "log_scale " and name."""
        means = adapted_tensors(self.net, self.adapted)
        return {**means, **{_SCALE + name: value for name, value in zip(means, self.log_scales, strict=True)}}

    def _bound(self, weights: Params, x: Tensor, y: Tensor, real: Tensor, noise: Params) -> Tensor:
        """What the inner loop minimizes on one task; `weights` name what `_read` names too.

        In nats per row; in regression times the squared scale of the answers. A step of fixed size on nats would shrink
        and grow with the scale while that is learned.
        """
        rest = {name.removeprefix(_READ): value for name, value in weights.items() if name.startswith(_READ)}
        frozen = {name: value for name, value in rest.items() if name not in (*weights, _RAW)}
        outputs = self._outputs(weights, noise, frozen, x)  # (S, N, ...)
        check_rows(self.spec, outputs[0], y)
        rows = row_nll(outputs, y.expand(len(outputs), *y.shape), rest.get(_RAW))
        prior = {name: value for name, value in rest.items() if name in weights}
        divergence = gaussian_kl(weights, prior) / real.sum().clamp(min=1)
        bound = masked_mean(rows.mean(0), real, 0) + self.kl_weight * divergence
        return bound * learned_positive(rest[_RAW]).square().mean() if _RAW in rest else bound

    def _read(self) -> dict[str, Tensor]:
        """What the inner loss reads beside the weights: the rest of the net, the prior and the output scale."""
        scale = {} if self.raw_scale is None else {_RAW: self.raw_scale}
        tensors = {**frozen_tensors(self.net, self.adapted), **self.prior(), **scale}
        return {_READ + name: value for name, value in tensors.items()}

    def _outputs(self, weights: Params, noise: Params, frozen: Params, x: Tensor) -> Tensor:
        """Outputs (S, N, ...) of one task under S draws; noise (S, ...)."""

        def one_draw(noise: Params) -> Tensor:
            drawn = {name: weights[name] + weights[_SCALE + name].exp() * value for name, value in noise.items()}
            return call_net(self.net, {**frozen, **drawn}, (x,))

        return vmap(one_draw, randomness="different")(dict(noise))

    @property
    def _noise_dim(self) -> int | None:
        return 0 if self.training else None

    def _noise(self, purpose: str, n_tasks: int, *leading: int) -> dict[str, Tensor]:
        """Standard normal numbers (B, *leading, ...) in train mode; fixed ones (*leading, ...) in eval mode."""
        means = adapted_tensors(self.net, self.adapted)
        if self.training:
            return {name: value.new_empty(n_tasks, *leading, *value.shape).normal_() for name, value in means.items()}
        generator = derive_generator("amortized bayes", purpose)
        return {name: torch.randn(*leading, *v.shape, generator=generator).to(v) for name, v in means.items()}


def gaussian_kl(weights: Params, prior: Params) -> Tensor:
    """KL(weights | prior) of two diagonal Gaussians in the format of `Posterior.weights`, in nats: a scalar."""
    total = []
    for name in (name for name in prior if not name.startswith(_SCALE)):
        ratio = weights[_SCALE + name] - prior[_SCALE + name]
        shift = (weights[name] - prior[name]) * (-prior[_SCALE + name]).exp()
        total.append((0.5 * ((2 * ratio).exp() + shift.square() - 1) - ratio).sum())
    return torch.stack(total).sum()


def row_nll(outputs: Tensor, y: Tensor, raw_scale: Tensor | None) -> Tensor:
    """Negative log-likelihood of targets y in nats, without the axis of outputs (..., N, C) or (..., N, y_dim)."""
    if raw_scale is None:
        return F.cross_entropy(outputs.movedim(-1, 1), y, reduction="none")
    scale = learned_positive(raw_scale)
    return (0.5 * ((y - outputs) / scale).square() + scale.log() + 0.5 * math.log(2 * math.pi)).sum(-1)


def mixture(outputs: Tensor, raw_scale: Tensor | None) -> Distribution:
    """An equal mixture of the answers to S draws: outputs (B, Q, S, C) or (B, Q, S, y_dim), batch shape (B, Q)."""
    return marginal(answer(outputs, raw_scale), outputs.new_zeros(outputs.shape[:-1]))
