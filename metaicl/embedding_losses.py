"""Losses on the embeddings of an episode, to be added to the objective of any learner with an `encoder`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from metaicl.checks import check_count, check_positive
from metaicl.collation import concatenate
from metaicl.episode import Episode
from metaicl.functional import class_weights, masked_mean, prototypes, squared_distances
from metaicl.learner import Learner, ReadsEmbeddings
from metaicl.nets.backbones import encode
from metaicl.objectives import Objective, query_loss
from metaicl.reading import Reading


@dataclass(frozen=True)
class WithAuxiliary:
    """An objective plus a weighted auxiliary one: `meta_train(..., objective=WithAuxiliary(ProtoTriplet()))`.

    A learner of the metric family embeds its rows once for `query_loss` and the losses of this module; with others, and
    in a compiled graph, they are embedded once more for each auxiliary loss. A learner with `meta_gradients` of its
    own, such as Baseline, is trained by these and by the slope of what is added.

    Args:
        auxiliary: What is added, (learner, episode) -> (B,); may be a WithAuxiliary itself.
        weight: Its weight, positive.
        objective: What is trained anyway.

    Raises:
        ValueError: If the weight is not positive.
    """

    auxiliary: Objective
    weight: float = 1.0
    objective: Objective = query_loss

    def __post_init__(self) -> None:
        """Check the weight, and take a name by which a run that is resumed knows its objective."""
        check_positive("weight", self.weight)
        object.__setattr__(self, "__qualname__", f"{_name(self.objective)} + {self.weight:g} {_name(self.auxiliary)}")

    def __call__(self, learner: Learner, episode: Episode) -> Tensor:
        """The sum for each task (B,)."""
        if _looks_at_embeddings(self):
            learner, episode = _embedded(learner, episode)
        return self.objective(learner, episode) + self.weight * self.auxiliary(learner, episode)

    @property
    def base(self) -> Objective:
        """The objective without any auxiliary one."""
        return self.objective.base if isinstance(self.objective, WithAuxiliary) else self.objective

    def added(self, learner: Learner, episode: Episode) -> Tensor:
        """The weighted sum of the auxiliary ones (B,)."""
        if _looks_at_embeddings(self):
            learner, episode = _embedded(learner, episode)
        own = self.weight * self.auxiliary(learner, episode)
        return self.objective.added(learner, episode) + own if isinstance(self.objective, WithAuxiliary) else own


@dataclass(frozen=True)
class ProtoTriplet:
    """Proto-Triplet loss: a class mean is nearer to all queries of its class than to any other, by a margin.

    For each class c with mean m_c of the embedded support, in squared distances d per feature,

        max(0, max_{queries z of c} d(m_c, z) - min_{queries z of other classes} d(m_c, z) + margin),

    averaged over the classes that have support rows and queries, where there are queries of others too.

    Args:
        margin: In squared units of an embedding's entries.

    Raises:
        ValueError: If the margin is not positive.

    Reference:
        Mendez-Ruiz et al. 2023, arXiv:2305.09062 (SuSana Distancia). Differs: the formula is our reading of its
        description; distances are squared and divided by D, so that a margin means the same for every encoder.
    """

    margin: float = 1.0

    def __post_init__(self) -> None:
        """Check the margin."""
        check_positive("margin", self.margin)

    def __call__(self, learner: Learner, episode: Episode) -> Tensor:
        """The loss of each task (B,)."""
        embed, n_way, support, query = _embedding_of(learner), learner.spec.output_size, episode.support, episode.query
        rows = embed(support.x)
        means = prototypes(rows, support.y, n_way, support.mask)
        distances = squared_distances(means, embed(query.x)) / rows.shape[-1]  # (B, C, Q)
        own = class_weights(query.y, n_way, query.mask, distances.dtype).mT > 0
        other = ~own & query.real[:, None]
        known = (class_weights(support.y, n_way, support.mask, distances.dtype).sum(1) > 0) & own.any(2) & other.any(2)
        farthest = distances.masked_fill(~own, 0.0).amax(2)  # distances are not negative
        nearest = torch.where(other, distances, math.inf).amin(2)
        hinge = torch.relu(farthest - torch.where(known, nearest, 0.0) + self.margin)
        return masked_mean(hinge, known, 1)


@dataclass(frozen=True)
class NearestNeighborScore:
    """ICNN loss: minus the logarithm of an inter- and intra-class nearest neighbor score of the embedded rows.

    Every row i of the episode, of support and query alike, looks at its k nearest other rows. Their distances are
    scaled to u in [0, 1], from the nearest to the farthest of them, and the row scores lambda_i omega_i gamma_i, where

      - lambda_i: mean over the neighbors of 1 - u for those of its class and of u for the others;
      - omega_i: one minus the variances of u among the neighbors of its class and among the others;
      - gamma_i: share of neighbors of its class, soft: weights are a softmax of minus the squared distances / sqrt(D).

    The loss is -log(mean_i score_i), at least 0, in nats.

    Args:
        k: Neighbors; fewer where there are not so many other rows.

    Raises:
        TypeError: If `k` is no int.
        ValueError: If `k` is below one.

    Reference:
        Mendez-Ruiz et al. 2023, arXiv:2305.09062 (SuSana Distancia). Differs: our reading of its description; soft
        instead of counted shares, so that the share has a derivative too; no exponents on the three factors.
    """

    k: int = 5

    def __post_init__(self) -> None:
        """Check the number."""
        check_count("k", self.k)

    def __call__(self, learner: Learner, episode: Episode) -> Tensor:
        """The loss of each task (B,)."""
        rows = concatenate(episode.support, episode.query)
        embedded = _embedding_of(learner)(rows.x)
        squared = squared_distances(embedded, embedded)
        itself = torch.eye(rows.n_rows, dtype=torch.bool, device=embedded.device)
        hidden = itself | ~rows.real[:, None]  # (B, N, N): what is nobody's neighbor
        nearest, index = torch.where(hidden, math.inf, squared).topk(min(self.k, rows.n_rows - 1), largest=False)
        valid = nearest.isfinite()
        nearest = torch.where(valid, nearest, 0.0)
        same = valid & (rows.y[:, None].expand_as(squared).gather(2, index) == rows.y[..., None])
        unit = _from_nearest_to_farthest(nearest, valid)
        closeness = masked_mean(torch.where(same, 1 - unit, unit), valid, 2)
        steadiness = 1 - _variance(unit, same) - _variance(unit, valid & ~same)
        weights = torch.softmax(torch.where(valid, -nearest / embedded.shape[-1] ** 0.5, -1e30), 2)
        score = closeness * steadiness * (weights * same).sum(2)
        return -(masked_mean(score, rows.mask, 1) + 1e-12).log()


def _from_nearest_to_farthest(nearest: Tensor, valid: Tensor) -> Tensor:
    """Squared distances (B, N, k), ascending, as distances scaled to [0, 1] for each row; 0 where all are equal."""
    distances = (nearest + 1e-12).sqrt()  # finite slope at coincident points
    low = distances[..., :1]
    high = torch.where(valid, distances, low).amax(2, keepdim=True)
    return torch.where(valid, (distances - low) / (high - low + 1e-6), 0.0)


def _variance(values: Tensor, chosen: Tensor) -> Tensor:
    """Variance of the chosen values (B, N, k) along k; 0 where none is chosen."""
    mean = masked_mean(values, chosen, 2)
    return masked_mean((values - mean[..., None]).square(), chosen, 2)


def _looks_at_embeddings(objective: Objective) -> bool:
    """Whether an objective is known to look at inputs by what a learner makes of them alone."""
    if isinstance(objective, WithAuxiliary):
        return _looks_at_embeddings(objective.objective) and _looks_at_embeddings(objective.auxiliary)
    return objective is query_loss or isinstance(objective, ProtoTriplet | NearestNeighborScore)


def _embedded(learner: Learner, episode: Episode) -> tuple[Learner, Episode]:
    """The learner and the episode with its rows embedded, where the learner reads embeddings."""
    reading = Reading.of(learner)
    support, query = (replace(part, x=reading.rows(part.x)) for part in (episode.support, episode.query))
    return reading.learner, Episode(support, query, episode.latents)


def _embedding_of(learner: Learner) -> Callable[[Tensor], Tensor]:
    """How a learner embeds inputs (B, N, *x_shape) as (B, N, D)."""
    encoder = getattr(learner, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"losses on embeddings need a learner with an encoder; {type(learner).__name__} has none")
    if learner.spec.kind != "classification":
        raise ValueError(
            f"losses on embeddings need classes; {type(learner).__name__} was built for {learner.spec.kind}"
        )
    return learner.embed if isinstance(learner, ReadsEmbeddings) else partial(encode, encoder)


def _name(objective: Objective) -> str:
    if hasattr(objective, "__dataclass_fields__") and not isinstance(objective, WithAuxiliary):
        return repr(objective)
    return str(getattr(objective, "__qualname__", type(objective).__name__))
