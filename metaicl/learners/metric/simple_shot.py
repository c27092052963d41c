"""Nearest centroids of centered and normalized features of a pretrained encoder."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_choice, check_count, check_positive
from metaicl.episode import Episode, Examples
from metaicl.functional import (
    categorical,
    masked_mean,
    present_classes,
    prototypes,
    squared_distances,
    unit_rows,
    without_absent,
)
from metaicl.learner import check_support_labels
from metaicl.learners.metric.pretraining import PretrainedLearner
from metaicl.spec import TaskSpec
from metaicl.task import TaskDistribution, derive_generator

FEATURES = ("CL2N", "L2N", "UN")


class Centroids(NamedTuple):
    """What a support leaves.

    Attributes:
        center: Mean feature of meta-training rows (B, 1, D), zero where features are not centered.
        means: Class means (B, C, D) of the transformed features.
        present: bool (B, C), which classes have a real row.
    """

    center: Tensor
    means: Tensor
    present: Tensor


class SimpleShot(PretrainedLearner[Centroids]):
    """Classify by the nearest class mean after simple transformations of a pretrained encoder's features.

    Features are centered on the mean of meta-training rows and scaled to length one ("CL2N"), only scaled ("L2N"), or
    left alone ("UN"). The mean is that of the present encoder over rows that `prepare` has kept. A temperature,
    which no decision depends on, is trained on the query loss while the encoder is held fixed.

    Args:
        spec: A classification spec.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec.
        features: "CL2N", "L2N" or "UN".
        n_mean_rows: Meta-training rows kept for the mean.
        temperature: Start of the learned factor on squared distances; None takes 10, and 1 / sqrt(D) for "UN".

    Raises:
        TypeError: If a count is no int.
        ValueError: If a setting is out of range, or the spec is a regression spec; RidgeHead serves those. `adapt` with
            "CL2N" before `prepare`.

    Reference:
        Wang et al. 2019, arXiv:1911.04623, section 3. Differs: the mean is of a sample of the meta-training rows;
        probabilities, where the paper only decides.
    """

    mean_rows: Tensor

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        features: str = "CL2N",
        n_mean_rows: int = 256,
        temperature: float | None = None,
    ) -> None:
        """Check the settings; rows for the mean wait for `prepare`."""
        super().__init__(spec, encoder=encoder)
        self.features = check_choice("features", features, FEATURES)
        self.n_mean_rows = check_count("n_mean_rows", n_mean_rows)
        default = self.feature_dim**-0.5 if features == "UN" else 10.0
        start = check_positive("temperature", default if temperature is None else temperature)
        self.log_temperature = nn.Parameter(torch.tensor(start).log())
        dtype = torch.long if spec.x_kind == "tokens" else torch.get_default_dtype()
        self.register_buffer("mean_rows", torch.zeros(0, *spec.x_shape, dtype=dtype))

    def prepare(self, tasks: TaskDistribution, *, seed: int) -> None:
        """See `PretrainedLearner.prepare`; keep meta-training rows drawn at the address (seed, "mean")."""
        super().prepare(tasks, seed=seed)
        if self.features != "CL2N":
            return
        n_tasks = -(-self.n_mean_rows // self.spec.output_size)
        generator = derive_generator(seed, "mean")
        drawn = tasks.sample(n_tasks, split="train", n_shot=1, n_query=1, generator=generator).support
        self.mean_rows = drawn.x[drawn.real][: self.n_mean_rows].to(self.mean_rows)

    def adapt(self, support: Examples) -> Centroids:
        """Class means of transformed features."""
        check_support_labels(self.spec, support)
        return self._centroids(self.embed(support.x), support)

    def predict(self, state: Centroids, x: Tensor) -> Distribution:
        """Softmax over negative squared distances."""
        return self._answer(state, self.embed(x))

    def training_losses(self, episode: Episode) -> Tensor:
        """Cross-entropy over meta-training classes, plus the query loss as a function of the temperature (B,)."""
        losses = super().training_losses(episode)
        if self.classifier is None or episode.support.ids is None or episode.query.ids is None:
            return losses
        support, query = episode.support, episode.query
        with torch.no_grad():
            state = self.adapt(support)
            features = self.embed(query.x)
        return losses + masked_mean(-self._answer(state, features).log_prob(query.y), query.mask, 1)

    def _centroids(self, features: Tensor, support: Examples) -> Centroids:
        center = features.new_zeros(len(features), 1, features.shape[-1])
        if self.features == "CL2N":
            if not len(self.mean_rows):
                raise ValueError("CL2N needs the mean of meta-training rows; call prepare(tasks, seed=...) first")
            center = center + self.encoder(self.mean_rows).mean(0)
        about = support.y, self.spec.output_size, support.mask
        return Centroids(center, prototypes(self._transform(features - center), *about), present_classes(*about))

    def _answer(self, state: Centroids, features: Tensor) -> Distribution:
        distances = squared_distances(self._transform(features - state.center), state.means)
        return categorical(without_absent(-distances * self.log_temperature.exp(), state.present))

    def _transform(self, centered: Tensor) -> Tensor:
        return centered if self.features == "UN" else unit_rows(centered)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "mean_rows")
        if saved is not None:  # how many there are is a setting of who saved them
            self.mean_rows = self.mean_rows.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
