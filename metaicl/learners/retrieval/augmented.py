"""Retrieval augmentation of any learner: similar meta-training tasks join the support."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal

from metaicl.checks import check_count
from metaicl.collation import concatenate
from metaicl.episode import Examples
from metaicl.functional import categorical, class_weights, unit_rows
from metaicl.learner import AdaptsInStages, Learner, Prepares, Regularizes
from metaicl.learners.retrieval.bank import MemoryBank
from metaicl.learners.retrieval.keys import GroupEncoder, SearchKeys
from metaicl.spec import TaskSpec
from metaicl.task import TaskDistribution, derive_generator


class RetrievalState(NamedTuple):
    """States of the wrapped learner for S = k + 1 supports per task (axis B S), and their log-weights (B, S)."""

    inner: Any
    log_weights: Tensor


class RetrievalAugmented(Learner[RetrievalState]):
    """Wrap a learner so that it also sees what a memory of meta-training rows holds on similar tasks.

    For each task the k most similar groups of the memory are found (classification: for each class the classes
    of meta-training nearest to it, taken as more rows of that class; regression: the tasks whose rows are distributed
    most alike). The answer is the marginal over what was retrieved,

        p(y | x, S) = w_0 p(y | x, S) + sum_j w_j p(y | x, S + retrieved_j),

    with w a softmax of learned similarities and of a learned score for retrieving nothing, so that the similarity is
    trained end to end. The search itself compares fixed keys, so the index never grows stale.

    The memory is filled by `prepare`, from meta-training tasks only. A task never retrieves its own rows nor, where
    the source names classes, its own classes.

    Args:
        spec: The tasks.
        learner: What is augmented: a learner, or a factory spec -> learner.
        k: Retrieved groups; 0 leaves the wrapped learner alone.
        n_groups: Size of the memory.
        rows_per_group: Rows kept (and retrieved) per group; None takes 2 for classification and 10 for regression.
        encoder: (rows, any) -> (rows, D) for the learned similarity, applied to raw features; None builds an MLP.
        frozen: Weigh by the fixed search keys instead of a learned similarity.
        backend: Search of the memory, "exact" or "faiss".

    Reference:
        The marginal is that of Lewis et al. 2020, arXiv:2005.11401, equation 1 (RAG-sequence), and Guu et al. 2020,
        arXiv:2002.08909, equation 1. Differs: retrieval of labeled groups for a support, and the option of none.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        learner: Learner[Any] | Callable[[TaskSpec], Learner[Any]],
        k: int = 3,
        n_groups: int = 512,
        rows_per_group: int | None = None,
        encoder: nn.Module | None = None,
        frozen: bool = False,
        backend: str = "exact",
    ) -> None:
        """Build the wrapped learner, an empty memory and the similarity."""
        super().__init__(spec)
        self.learner = learner if isinstance(learner, Learner) else learner(spec)
        if self.learner.spec != spec:
            raise ValueError(
                f"the wrapped learner must be built for the same spec; got {self.learner.spec}, not {spec}"
            )
        self.traits = replace(self.learner.traits, trainable=True)
        self.k = check_count("k", k, minimum=0)
        self.n_groups = check_count("n_groups", n_groups, minimum=max(1, k))
        default_rows = 2 if spec.kind == "classification" else 10
        self.rows_per_group = check_count("rows_per_group", default_rows if rows_per_group is None else rows_per_group)
        self.bank = MemoryBank(backend=backend)
        self.search_keys = SearchKeys(spec)
        self.register_buffer("row_classes", torch.empty(0, dtype=torch.long))
        self.similarity = None if frozen or k == 0 else GroupEncoder(spec, encoder=encoder)
        if k:
            self.nothing = nn.Parameter(torch.tensor(8.0))
            self.log_sharpness = nn.Parameter(torch.tensor(2.0))

    def prepare(self, tasks: TaskDistribution, *, seed: int) -> None:
        """Fill the memory with groups of meta-training rows drawn at the address (seed, "memory")."""
        if isinstance(self.learner, Prepares):
            self.learner.prepare(tasks, seed=seed)
        n_way = self.spec.n_way or 1
        rows = tasks.sample(
            -(-self.n_groups // n_way),
            split="train",
            n_shot=self.rows_per_group,
            n_query=1,
            generator=derive_generator(seed, "memory"),
        ).support.to(self.row_classes.device, self.search_keys.frequencies.dtype)
        groups = _by_class(rows, n_way) if self.spec.kind == "classification" else rows
        groups = groups[: self.n_groups]
        ids = torch.full_like(groups.real, -1, dtype=torch.long) if groups.ids is None else groups.ids
        if tasks.source_classes is not None:
            self.row_classes = tasks.source_classes.to(ids.device)
        y = groups.y if self.spec.kind == "regression" else groups.x.new_zeros(*ids.shape, 0)
        keys = self.search_keys(groups.x, y, groups.real)
        self.bank.fill(keys=keys, x=groups.x, y=y, ids=ids, classes=self._classes_of(ids)[:, 0])

    def adapt(self, support: Examples) -> RetrievalState:
        """Adapt the wrapped learner to the support alone and to the support with each retrieved group."""
        augmented, log_weights = self._retrieve(support)
        return RetrievalState(self.learner.adapt(augmented), log_weights)

    def adapt_stages(self, support: Examples) -> list[tuple[float | Tensor, RetrievalState]]:
        """The stages of the wrapped learner, where it has some."""
        if not isinstance(self.learner, AdaptsInStages):
            return [(1.0, self.adapt(support))]
        augmented, log_weights = self._retrieve(support)
        stages = self.learner.adapt_stages(augmented)
        return [(weight, RetrievalState(state, log_weights)) for weight, state in stages]

    def penalty(self, state: RetrievalState) -> Tensor:
        """The penalty of the wrapped learner (B,), mean over the retrieved sets; zero where it has none."""
        n_tasks, n_sets = state.log_weights.shape
        if not isinstance(self.learner, Regularizes):
            return state.log_weights.new_zeros(n_tasks)
        return self.learner.penalty(state.inner).unflatten(0, (n_tasks, n_sets)).mean(1)

    def _retrieve(self, support: Examples) -> tuple[Examples, Tensor]:
        """The support alone and with each retrieved group, axis (B S), and log-weights (B, S)."""
        if self.k == 0:
            return support, support.x.new_zeros(support.n_tasks, 1)
        asking = self._asking_groups(support)  # (B, G, N): rows of each group that looks for its like
        y = support.y if self.spec.kind == "regression" else support.x.new_zeros(*support.y.shape, 0)
        queries = self.search_keys(support.x[:, None], y[:, None], asking).to(self.bank.keys.dtype)
        index, found = self.bank.search(queries, self.k, forbidden=self._forbidden(support)[:, None])  # (B, G, k)
        scores = self._scores(support, asking, queries, index)
        scores = (scores * found).sum(1) / found.sum(1).clamp(min=1)  # a retrieved set has one group per class
        scores = scores.masked_fill(~found.any(1), -torch.inf)
        log_weights = torch.log_softmax(torch.cat([self.nothing.expand(len(scores), 1), scores], 1), 1)
        return self._augment(support, index, found), log_weights

    def predict(self, state: RetrievalState, x: Tensor) -> Distribution:
        """The marginal over the retrieved sets."""
        if self.k == 0:
            return self.learner.predict(state.inner, x)
        n_sets = state.log_weights.shape[1]
        answers = self.learner.predict(state.inner, x.repeat_interleave(n_sets, 0))
        if self.spec.kind == "classification":
            logits = torch.log_softmax(answers.logits, -1).unflatten(0, (-1, n_sets))  # type: ignore[attr-defined]
            return categorical(torch.logsumexp(logits + state.log_weights[:, :, None, None], 1))
        mean, scale = (value.unflatten(0, (-1, n_sets)).movedim(1, 2) for value in (answers.mean, answers.stddev))
        weights = state.log_weights[:, None].expand(*mean.shape[:3])
        return _mixture(weights, mean, scale)

    def _asking_groups(self, support: Examples) -> Tensor:
        if self.spec.kind == "regression":
            return support.real[:, None]
        return class_weights(support.y, self.spec.output_size, support.mask, torch.float32).mT > 0

    def _scores(self, support: Examples, asking: Tensor, queries: Tensor, index: Tensor) -> Tensor:
        if self.similarity is None:
            scores = (self.bank.keys[index] @ queries[..., None])[..., 0]
        else:
            real = torch.ones(index.shape + self.bank.x.shape[1:2], dtype=torch.bool, device=index.device)
            here = self.similarity(support.x[:, None], support.y[:, None], asking)  # (B, G, D)
            there = self.similarity(self.bank.x[index], self.bank.y[index], real)  # (B, G, k, D)
            scores = (unit_rows(there) @ unit_rows(here)[..., None])[..., 0]
        return scores * self.log_sharpness.exp()

    def _augment(self, support: Examples, index: Tensor, found: Tensor) -> Examples:
        n_tasks, n_groups, k = index.shape
        x = self.bank.x[index].transpose(1, 2)  # (B, k, G, R, *x_shape)
        n_rows = x.shape[3]
        if self.spec.kind == "classification":
            labels = torch.arange(n_groups, device=index.device)[None, None, :, None]
            y = labels.expand(n_tasks, k, n_groups, n_rows)
        else:
            y = self.bank.y[index].transpose(1, 2)
        real = found.transpose(1, 2)[..., None].expand(n_tasks, k, n_groups, n_rows)
        # Set 0 is the support alone: its retrieved rows are masked.
        x, y = (torch.cat([value[:, :1], value], 1).flatten(0, 1).flatten(1, 2) for value in (x, y))
        real = F.pad(real.flatten(2), (0, 0, 1, 0), value=False).flatten(0, 1)
        own = Examples(*(value.repeat_interleave(k + 1, 0) for value in (support.x, support.y, support.real)))
        return concatenate(own, Examples(x, y, real))

    def _forbidden(self, support: Examples) -> Tensor:
        """Bool (B, M): groups that hold a row, or are of a class, of the task itself."""
        forbidden = torch.zeros(support.n_tasks, len(self.bank), dtype=torch.bool, device=support.x.device)
        if support.ids is None or not len(self.bank):
            return forbidden
        ids = support.ids.masked_fill(~support.real, -1)
        same_row = (ids[:, :, None] == self.bank.ids.flatten()) & (ids >= 0)[:, :, None]
        forbidden = same_row.any(1).unflatten(1, self.bank.ids.shape).any(2)
        classes = self._classes_of(ids)
        same_class = (classes[:, :, None] == self.bank.classes) & (classes >= 0)[:, :, None]
        return forbidden | same_class.any(1)

    def _classes_of(self, ids: Tensor) -> Tensor:
        known = (ids >= 0) & (ids < len(self.row_classes))
        if not len(self.row_classes):
            return torch.full_like(ids, -1)
        return torch.where(known, self.row_classes[ids.clamp(0, len(self.row_classes) - 1)], -1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "row_classes")
        if saved is not None:  # its length is the source's, not the architecture's
            self.row_classes = torch.empty_like(saved, device=self.row_classes.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _mixture(log_weights: Tensor, mean: Tensor, scale: Tensor) -> Distribution:
    """Mixture over S of diagonal Gaussians: log-weights (B, Q, S), mean and scale (B, Q, S, y_dim)."""
    if mean.shape[-1] > 1:
        parts = Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False)
        return MixtureSameFamily(Categorical(logits=log_weights, validate_args=False), parts, validate_args=False)
    # One output: mix inside, so that the answer has a cumulative distribution and its calibration can be measured.
    weights = Categorical(logits=log_weights[:, :, None], validate_args=False)
    normals = Normal(mean.mT, scale.mT, validate_args=False)
    return Independent(MixtureSameFamily(weights, normals, validate_args=False), 1, validate_args=False)


def _by_class(rows: Examples, n_way: int) -> Examples:
    """Balanced rows (B, C R) as groups (B C, R) of one class each."""
    order = rows.y.argsort(dim=1, stable=True)
    n_rows = rows.n_rows // n_way

    def arrange(leaf: Tensor) -> Tensor:
        index = order.reshape(*order.shape, *(1,) * (leaf.ndim - 2)).expand_as(leaf)
        return leaf.gather(1, index).unflatten(1, (n_way, n_rows)).flatten(0, 1)

    ids = None if rows.ids is None else arrange(rows.ids)
    return Examples(arrange(rows.x), arrange(rows.y), None, ids)
