"""Reptile: move the initial weights toward the adapted ones."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from metaicl.checks import check_count
from metaicl.collation import concatenate
from metaicl.episode import Episode, Examples
from metaicl.functional import masked_mean
from metaicl.inner_loop.factored import Weight
from metaicl.inner_loop.optimizers import InnerOptimizer
from metaicl.inner_loop.parameters import Params, adapted_tensors, frozen_tensors
from metaicl.inner_loop.supervised import support_loss
from metaicl.inner_loop.unrolling import unroll_tasks
from metaicl.learner import Traits
from metaicl.learners.gradient.shared import PlainDescent, choose_optimizer
from metaicl.learners.gradient.support import check_support
from metaicl.spec import TaskSpec


class Reptile(PlainDescent):
    """Learn initial weights without differentiating through the inner loop.

    Training joins support and query, as the paper trains on all rows of a task, and takes `inner_steps` steps of SGD
    on minibatches of them; the meta-gradient is initial minus adapted weights, mean over tasks. An outer
    `torch.optim.SGD(lr=e)` is the paper's update with outer step e; Adam, which rescales it, works too. The query's
    labels stay inside `meta_gradients`: `adapt` descends on the whole support it is given, without chance.

    What does not adapt (the output scale, word vectors) follows the gradient of the query's negative log-likelihood
    at weights adapted to the support alone. That is also the loss reported.

    Args:
        spec: The tasks.
        net: (rows, *x_shape) -> (rows, n_way logits or y_dim means); None builds one from the spec.
            It must not track running statistics.
        inner_lr: Step size of the inner loop; None takes .02 for regression and .1 for classification.
        inner_steps: Minibatches per task in training.
        optimizer: Any other update rule of the inner loop, with fixed rates, instead of `inner_lr`; that of the paper's
            experiments is `Adam(0.001, betas=(0.0, 0.999))`.
        adapt: As in `MAML`.
        batch_rows: Rows of a minibatch. They are drawn without replacement until all were seen.
        adapt_steps: Steps of `adapt`; None takes `inner_steps`. The paper takes about ten times as many.

    Raises:
        TypeError: If a count is no int.
        ValueError: If a setting is out of range or the net cannot be used.

    Reference:
        Nichol, Achiam & Schulman, 2018, arXiv:1803.02999, Algorithm 2. Differs: by default SGD, as in their analysis,
        instead of Adam with beta1 = 0 in the inner loop; a learned output scale for regression; group normalization.
    """

    traits = Traits()

    def __init__(
        self,
        spec: TaskSpec,
        *,
        net: nn.Module | None = None,
        inner_lr: float | None = None,
        inner_steps: int = 5,
        optimizer: InnerOptimizer | None = None,
        adapt: str | Iterable[str] | None = None,
        batch_rows: int = 10,
        adapt_steps: int | None = None,
    ) -> None:
        """Check the settings."""
        default = 0.02 if spec.kind == "regression" else 0.1
        super().__init__(spec, net=net, optimizer=choose_optimizer(optimizer, inner_lr, default=default), adapt=adapt)
        self.inner_steps = check_count("inner_steps", inner_steps)
        self.batch_rows = check_count("batch_rows", batch_rows)
        self.adapt_steps = check_count("adapt_steps", inner_steps if adapt_steps is None else adapt_steps)

    def adapt(self, support: Examples) -> dict[str, Weight]:
        """Fast weights of every task after full-batch descent on the support."""
        return self.descend(support, self.adapt_steps)

    def meta_gradients(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        """The query's loss after adapting to the support (scalar, nats per row), and Reptile's direction."""
        check_support(self, episode.support)
        with torch.no_grad():
            start = adapted_tensors(self.net, self.adapted)
            ends = self._train(start, concatenate(episode.support, episode.query))
            found = {f"net.{name}": (value - ends[name]).mean(0) for name, value in start.items()}
            state = self.adapt(episode.support)
        rest = {name: p for name, p in self.named_parameters() if p.requires_grad and name not in found}
        with torch.enable_grad():
            log_prob = self.predict(state, episode.query.x).log_prob(episode.query.y)
            loss = masked_mean(-log_prob, episode.query.mask, 1).mean()
            if rest:
                values = torch.autograd.grad(loss, list(rest.values()), allow_unused=True, materialize_grads=True)
                found.update(zip(rest, values, strict=True))
        return loss.detach(), found

    def _train(self, start: dict[str, Tensor], rows: Examples) -> dict[str, Tensor]:
        """Weights of every task, leading axis B, after SGD on minibatches."""
        loss = support_loss(self.spec, self.net, frozen_tensors(self.net, self.adapted))

        def on_batch(weights: Params, x: Tensor, y: Tensor, places: Tensor, drawn: Tensor) -> Tensor:
            return loss(weights, x[places], y[places], drawn)

        batches = minibatches(rows.real, n_batches=self.inner_steps, n_rows=self.batch_rows)
        return unroll_tasks(
            on_batch, start, (rows.x, rows.y), step_data=batches, optimizer=self.optimizer,
            steps=self.inner_steps, first_order=True,
        )  # fmt: skip


def minibatches(real: Tensor, *, n_batches: int, n_rows: int) -> tuple[Tensor, Tensor]:
    """Rows of each minibatch, drawn from torch's default generator.

    Every task shuffles its real rows once and goes round them; a masked row is never drawn, and a task with fewer real
    rows than a minibatch holds has smaller ones.

    Args:
        real: bool (B, N).
        n_batches: Minibatches per task.
        n_rows: Rows of a minibatch.

    Returns:
        Rows, long (B, n_batches, min(n_rows, N)), and which of them the minibatch holds, bool of that shape.
    """
    width = min(n_rows, real.shape[1])
    order = (torch.rand(real.shape, device=real.device) + 2 * ~real).argsort(1)
    n_real = real.sum(1)[:, None, None]
    size = n_real.clamp(max=width)
    column = torch.arange(width, device=real.device)
    places = (torch.arange(n_batches, device=real.device)[:, None] * size + column) % n_real.clamp(min=1)
    return order.gather(1, places.flatten(1)).view_as(places), (column < size).expand_as(places)
