"""Proto-MAML: a linear head that starts as the prototypical network of the support, then everything adapts."""

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import vmap

from metaicl.checks import check_count
from metaicl.episode import Examples
from metaicl.functional import categorical, masked_mean, prototypes
from metaicl.inner_loop.calling import call_net
from metaicl.inner_loop.optimizers import InnerOptimizer
from metaicl.inner_loop.parameters import (
    Params,
    adapted_tensors,
    beyond_word_vectors,
    check_inner_loop_module,
    first_floating,
    frozen_tensors,
)
from metaicl.inner_loop.supervised import row_loss
from metaicl.inner_loop.unrolling import unroll_tasks
from metaicl.learner import Learner, Traits
from metaicl.learners.gradient.shared import check_checkpoint, check_truncate, choose_adapted, choose_optimizer
from metaicl.learners.gradient.support import check_support
from metaicl.nets.backbones import build_encoder, encoder_dim
from metaicl.second_order import twice_differentiable
from metaicl.spec import TaskSpec

_WEIGHT, _BIAS = " head.weight", " head.bias"  # keys no parameter can have


class ProtoMAML(Learner[dict[str, Tensor]]):
    """Fine-tune encoder and head on the support, from a head that already classifies by nearest prototype.

    Logits start as 2 c_k'f - |c_k|^2, which is -|f - c_k|^2 up to what all classes share. The meta-gradient flows
    through this initialization into the encoder, in first-order training too.

    Args:
        spec: A classification spec.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec. It must not track running statistics.
        inner_lr: Step size of the inner loop; None takes .01.
        inner_steps: Updates of the inner loop; 0 leaves a prototypical network without temperature.
        first_order: Drop second derivatives, as the paper's experiments do (fo-Proto-MAML).
        adapt: Patterns of the encoder's parameters to adapt beside the head; as in `MAML`. None leaves an encoder of
            nothing but word vectors as it is.
        optimizer: Any other update rule of the inner loop, instead of `inner_lr`; see `MAML`.
        truncate: As in `MAML`, where `first_order` is False.
        checkpoint: As in `MAML`.

    Raises:
        TypeError: If a count is no int.
        ValueError: If a setting is out of range, the encoder cannot be used, or the spec is a regression spec; MAML
            serves those.

    Reference:
        Triantafillou et al. 2020, arXiv:1903.03096, section 3 (Proto-MAML). Differs: group instead of batch
        normalization in the encoder built here; word vectors do not adapt.
    """

    traits = Traits(kinds=("classification",), instead=(("regression", "MAML"),))

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        inner_lr: float | None = None,
        inner_steps: int = 5,
        first_order: bool = True,
        adapt: str | Iterable[str] | None = None,
        optimizer: InnerOptimizer | None = None,
        truncate: int | None = None,
        checkpoint: bool | int = False,
    ) -> None:
        """Check the settings and the encoder."""
        super().__init__(spec)
        self.inner_steps = check_count("inner_steps", inner_steps, minimum=0)
        self.first_order = bool(first_order)
        self.truncate, self.checkpoint = check_truncate(truncate), check_checkpoint(checkpoint)
        self.encoder = build_encoder(spec) if encoder is None else encoder
        check_inner_loop_module(self.encoder)
        dim = encoder_dim(self.encoder, spec)
        self.declare_nets(self.encoder)
        self.declare_approximate(self.first_order or self.truncate is not None)
        trainable = any(parameter.requires_grad for parameter in self.encoder.parameters())
        only_words = adapt is None and trainable and not beyond_word_vectors(self.encoder)  # then the head adapts alone
        self.adapted = frozenset[str]() if only_words else choose_adapted(spec, self.encoder, adapt)
        like = first_floating(self.encoder)
        head = {_WEIGHT: like.new_empty(spec.output_size, dim), _BIAS: like.new_empty(spec.output_size)}
        rule = choose_optimizer(optimizer, inner_lr, default=0.01)
        self.optimizer = rule.bind({**adapted_tensors(self.encoder, self.adapted), **head}, max(1, self.inner_steps))

    def adapt(self, support: Examples) -> dict[str, Tensor]:
        """Fast weights of every task, leading axis B: the encoder's by name, and the head's (C, D) and (C,)."""
        check_support(self, support)
        start = adapted_tensors(self.encoder, self.adapted)
        frozen = frozen_tensors(self.encoder, self.adapted)

        def loss(weights: Params, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
            return masked_mean(row_loss(self.spec, self._logits(weights, x), y), mask, 0)

        return unroll_tasks(
            loss, start, (support.x, support.y, support.mask), own=self._head(support), steps=self.inner_steps,
            shared=frozen, optimizer=self.optimizer, first_order=self.first_order, truncate=self.truncate,
            checkpoint=self.checkpoint,
        )  # fmt: skip

    def predict(self, state: dict[str, Tensor], x: Tensor) -> Distribution:
        """Answer with each task's encoder and head."""
        frozen = frozen_tensors(self.encoder, self.adapted)

        def one_task(weights: Params, inputs: Tensor) -> Tensor:
            return self._logits({**frozen, **weights}, inputs)

        with twice_differentiable():
            return categorical(vmap(one_task, randomness="different")(state, x))

    def _head(self, support: Examples) -> dict[str, Tensor]:
        """Weight (B, C, D) and bias (B, C) that classify by nearest prototype."""
        tensors = {**adapted_tensors(self.encoder, self.adapted), **frozen_tensors(self.encoder, self.adapted)}

        def one_task(x: Tensor, y: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
            centers = prototypes(call_net(self.encoder, tensors, (x,)), y, self.spec.output_size, mask)
            return {_WEIGHT: 2 * centers, _BIAS: -centers.square().sum(-1)}

        in_dims = (0, 0, None if support.mask is None else 0)
        with twice_differentiable():
            return vmap(one_task, in_dims=in_dims, randomness="different")(support.x, support.y, support.mask)

    def _logits(self, weights: Params, x: Tensor) -> Tensor:
        encoder = {name: value for name, value in weights.items() if name not in (_WEIGHT, _BIAS)}
        return F.linear(call_net(self.encoder, encoder, (x,)), weights[_WEIGHT], weights[_BIAS])
