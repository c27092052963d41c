"""Self-supervision by rotation labels, beside any learner of images with an encoder."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_positive
from metaicl.episode import Examples
from metaicl.functional import masked_mean
from metaicl.learner import AdaptsInStages, Learner, Prepares, Regularizes, wrapped_learner
from metaicl.nets.backbones import encode, encoder_dim
from metaicl.spec import NotServed, TaskSpec
from metaicl.task import TaskDistribution


class RotationState(NamedTuple):
    """The state of the wrapped learner, and the weighted loss of the rotation labels (B,); zero in eval mode."""

    inner: Any
    loss: Tensor


class RotationLabels(Learner[RotationState]):
    """Train the encoder of a learner to tell, too, by how much each support image was turned.

    In train mode every support image is shown at 0, 90, 180 and 270 degrees, a linear head on the embedding says which
    it is, and `query_loss` adds the weighted cross-entropy as this learner's penalty. In eval mode nothing of it is
    left, and answers are always those of the wrapped learner. The head is a part of the learner, so optimizers,
    checkpoints and worker processes see it as any other.

    Args:
        spec: Classification or regression of square images.
        learner: A learner with an `encoder`, or a factory spec -> learner.
        weight: Of the rotation loss.

    Raises:
        TypeError: If the learner has no encoder, or is trained by `meta_gradients` of its own, as `Baseline` is.
        ValueError: If the inputs are no square images, the weight is not positive, or the learner was built for another
            spec.

    Reference:
        Gidaris et al. 2019, arXiv:1906.05186, section 3 (rotation prediction as auxiliary loss of few-shot learning).
        Differs: a linear head; only the support is turned.
    """

    def __init__(
        self, spec: TaskSpec, *, learner: Learner[Any] | Callable[[TaskSpec], Learner[Any]], weight: float = 1.0
    ) -> None:
        """Build the head on the learner's encoder."""
        super().__init__(spec)
        if spec.x_kind != "image" or spec.x_shape[1] != spec.x_shape[2]:
            raise NotServed(f"rotation labels need square images; got {spec.x_kind} inputs {spec.x_shape}")
        self.learner = wrapped_learner(learner, spec)
        if not isinstance(getattr(self.learner, "encoder", None), nn.Module):
            raise TypeError(f"rotation labels need a learner with an encoder; {type(self.learner).__name__} has none")
        self.traits = self.learner.traits
        self.weight = check_positive("weight", weight)
        self.head = nn.Linear(encoder_dim(self.encoder, spec), 4)

    @property
    def encoder(self) -> nn.Module:
        """The encoder of the wrapped learner."""
        encoder = self.learner.encoder
        assert isinstance(encoder, nn.Module)  # __init__ holds it
        return encoder

    def prepare(self, tasks: TaskDistribution, *, seed: int) -> None:
        """Prepare the wrapped learner, where it has to be."""
        if isinstance(self.learner, Prepares):
            self.learner.prepare(tasks, seed=seed)

    def adapt(self, support: Examples) -> RotationState:
        """The wrapped learner's state."""
        return RotationState(self.learner.adapt(support), self._loss(support))

    def adapt_stages(self, support: Examples) -> Sequence[tuple[float | Tensor, RotationState]]:
        """The stages of the wrapped learner, where it has some."""
        if not isinstance(self.learner, AdaptsInStages):
            return [(1.0, self.adapt(support))]
        loss = self._loss(support)
        return [(weight, RotationState(state, loss)) for weight, state in self.learner.adapt_stages(support)]

    def predict(self, state: RotationState, x: Tensor) -> Distribution:
        """The wrapped learner's answer."""
        return self.learner.predict(state.inner, x)

    def penalty(self, state: RotationState) -> Tensor:
        """The rotation loss (B,) in nats, with what the wrapped learner adds itself."""
        own = self.learner.penalty(state.inner) if isinstance(self.learner, Regularizes) else 0.0
        return state.loss + own

    def _loss(self, support: Examples) -> Tensor:
        if not self.training:
            return torch.zeros(support.n_tasks, device=support.x.device, dtype=self.head.weight.dtype)
        turned = torch.cat([support.x.rot90(turn, (-2, -1)) for turn in range(4)], 1)  # (B, 4 N, *x_shape)
        labels = torch.arange(4, device=turned.device).repeat_interleave(support.n_rows).expand(support.n_tasks, -1)
        logits = self.head(encode(self.encoder, turned))
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").unflatten(0, labels.shape)
        mask = None if support.mask is None else support.mask.repeat(1, 4)
        return self.weight * masked_mean(losses, mask, 1)
