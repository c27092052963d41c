"""ES-MAML: the meta-gradient from function values alone, by evolution strategies."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import vmap

from metaicl.checks import check_count, check_positive
from metaicl.episode import Episode, Examples
from metaicl.functional import answer, masked_mean
from metaicl.inner_loop.calling import call_net
from metaicl.inner_loop.factored import Weight
from metaicl.inner_loop.optimizers import InnerOptimizer
from metaicl.inner_loop.parameters import Params, frozen_tensors
from metaicl.inner_loop.supervised import support_loss
from metaicl.inner_loop.unrolling import unroll
from metaicl.learner import Traits
from metaicl.learners.gradient.maml import choose_inner_lr
from metaicl.learners.gradient.shared import PlainDescent, choose_optimizer
from metaicl.learners.gradient.support import check_support
from metaicl.objectives import query_loss
from metaicl.second_order import twice_differentiable
from metaicl.spec import TaskSpec


class ESMAML(PlainDescent):
    """Learn initial weights by perturbing them, adapting, and asking the query how it went.

    The meta-gradient is that of the loss smoothed by a Gaussian of width `sigma`, estimated by pairs of opposite
    perturbations: mean of (f(w + sigma e) - f(w - sigma e)) e / (2 sigma), where f adapts and evaluates. Nothing is
    differentiated through the inner loop, which may be long. Its noise grows with the number of parameters: a small
    net and many pairs suit it. The scale of regression answers comes after the inner loop: it is not perturbed, and its
    gradient is the exact one of the smoothed loss, over the same perturbations of the weights.

    Perturbations come from torch's default generator, which `outer_loop` seeds for each update and puts back.

    Args:
        spec: The tasks.
        net: (rows, *x_shape) -> (rows, n_way logits or y_dim means); None builds one from the spec.
            It must not track running statistics.
        inner_lr: Step size of the inner loop.
        inner_steps: Updates of the inner loop.
        optimizer: Any other update rule of the inner loop, with fixed rates, instead of `inner_lr`.
        adapt: As in `MAML`.
        n_pairs: Pairs of opposite perturbations for each task; every pair adapts twice.
        sigma: Width of the perturbations, in units of the weights.
        chunk_size: Pairs that adapt at a time, None: all. Changes the numbers by rounding only. What it bounds is the
            memory of adaptations; perturbed weights of all pairs and tasks are held, some three sets for each.

    Raises:
        TypeError: If a count is no int.
        ValueError: If a setting is out of range or the net cannot be used.

    Reference:
        Song et al. 2020, arXiv:1910.01215, Algorithms 1 and 2 and the antithetic estimator of section 3. Differs: the
        inner loop descends the exact gradient of the support's loss, which supervised tasks offer, where the paper
        estimates it by evolution strategies too; rewards are losses and are not standardized; every task of a
        meta-batch has its own perturbations.
    """

    traits = Traits()

    def __init__(
        self,
        spec: TaskSpec,
        *,
        net: nn.Module | None = None,
        inner_lr: float | None = None,
        inner_steps: int = 1,
        optimizer: InnerOptimizer | None = None,
        adapt: str | Iterable[str] | None = None,
        n_pairs: int = 32,
        sigma: float = 0.05,
        chunk_size: int | None = None,
    ) -> None:
        """Check the settings."""
        rule = choose_optimizer(optimizer, inner_lr, default=choose_inner_lr(spec, None))
        super().__init__(spec, net=net, optimizer=rule, adapt=adapt)
        self.inner_steps = check_count("inner_steps", inner_steps)
        self.n_pairs = check_count("n_pairs", n_pairs)
        self.sigma = check_positive("sigma", sigma)
        self.chunk_size = None if chunk_size is None else check_count("chunk_size", chunk_size)

    def adapt(self, support: Examples) -> dict[str, Weight]:
        """Fast weights of every task: the adapted parameters with leading axis B."""
        return self.descend(support, self.inner_steps)

    def meta_gradients(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        """The query's loss at the unperturbed weights (scalar, nats per row), and the estimated gradient."""
        check_support(self, episode.support)
        trainable = {name: value.detach() for name, value in self.net.named_parameters() if value.requires_grad}
        n_tasks, shape, learned = episode.n_tasks, (self.n_pairs, episode.n_tasks), self.raw_scale
        with torch.no_grad():
            noise = {name: _normal(value, shape) for name, value in trainable.items()}
            plus, minus = (
                self._losses({n: v + sign * self.sigma * noise[n] for n, v in trainable.items()}, episode)
                for sign in (1, -1)
            )
            slopes = (plus - minus) / (2 * self.sigma * self.n_pairs * n_tasks)
            found = {f"net.{name}": torch.tensordot(slopes.to(value), value, 2) for name, value in noise.items()}
            loss = query_loss(self, episode).mean()
        if learned is not None and learned.requires_grad:
            with torch.enable_grad():
                smoothed = (plus + minus).mean() / 2
            found["raw_scale"] = torch.autograd.grad(smoothed, learned)[0]
        return loss, found

    def _losses(self, weights: Params, episode: Episode) -> Tensor:
        """The query's losses (P, B) after adapting from weights with leading axes (P, B); a function of the scale."""
        frozen = {name: value for name, value in frozen_tensors(self.net, ()).items() if name not in weights}
        support, query = episode.support, episode.query

        def one(weights: Params, x: Tensor, y: Tensor, mask: Tensor | None, inputs: Tensor) -> Tensor:
            rest = {**frozen, **{name: value for name, value in weights.items() if name not in self.adapted}}
            start = {name: value for name, value in weights.items() if name in self.adapted}
            loss, data = support_loss(self.spec, self.net, rest), (x, y, mask)
            fast = unroll(loss, start, data, optimizer=self.optimizer, steps=self.inner_steps, first_order=True)
            return call_net(self.net, {**rest, **fast}, (inputs,))

        mask_dim = None if support.mask is None else 0
        with twice_differentiable():
            over_tasks = vmap(one, in_dims=(0, 0, 0, mask_dim, 0), randomness="different")
            over_pairs = vmap(
                over_tasks, in_dims=(0, None, None, None, None), randomness="different", chunk_size=self.chunk_size
            )
            output = over_pairs(weights, support.x, support.y, support.mask, query.x)
        with torch.enable_grad():
            log_prob = answer(output, self.raw_scale).log_prob(query.y)
            mask = None if query.mask is None else query.mask.expand_as(log_prob)
            return masked_mean(-log_prob, mask, 2)


def _normal(like: Tensor, leading: tuple[int, ...]) -> Tensor:
    return torch.randn(*leading, *like.shape, dtype=like.dtype, device=like.device)
