"""Retrieval augmentation of any learner: similar meta-training tasks join the support."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_choice, check_count
from metaicl.collation import concatenate
from metaicl.episode import Examples
from metaicl.functional import class_weights, unit_rows
from metaicl.learner import AdaptsInStages, Learner, Prepares, Regularizes, wrapped_learner
from metaicl.learners.retrieval.bank import MemoryBank
from metaicl.learners.retrieval.content import content_ids
from metaicl.learners.retrieval.exclusion import Exclusion
from metaicl.learners.retrieval.keys import GroupEncoder, RandomKeys, SearchKeys
from metaicl.learners.retrieval.sources import SourceClasses, draw_items
from metaicl.mixtures import marginal, rearranged
from metaicl.spec import TaskSpec
from metaicl.task import TaskDistribution

RETRIEVERS = ("learned", "frozen", "random", "none")
SEARCHES = ("fixed", "learned")


class RetrievalState(NamedTuple):
    """What `predict` needs.

    Attributes:
        inner: States of the wrapped learner for S = k + 1 supports per task (axis B S).
        log_weights: Log-weights of the sets (B, S).
        content: long (B, S, rows), `content_ids` of the retrieved rows; -1 where a row cannot be one that is asked.
    """

    inner: Any
    log_weights: Tensor
    content: Tensor


class RetrievalAugmented(Learner[RetrievalState]):
    """Wrap a learner so that it also sees what a memory of meta-training rows holds on similar tasks.

    For each task the k most similar groups of the memory are found (classification: for each class the classes
    of meta-training nearest to it, taken as more rows of that class; regression: the tasks whose rows are distributed
    most alike). The answer is the marginal over what was retrieved,

        p(y | x, S) = w_0 p(y | x, S) + sum_j w_j p(y | x, S + retrieved_j),

    with w a softmax of learned similarities and of a learned score for retrieving nothing, so that the similarity is
    trained end to end. By default the search itself compares fixed keys, so that the index never grows stale. With
    `search="learned"` it compares what the similarity is made of: a few keys of the memory are made anew before each
    update, all of them `n_refreshes` times in a training run.

    The memory is filled by `prepare`, from meta-training tasks only. A task never retrieves its own rows nor, where
    the source names classes, its own classes. Where it names rows but no classes, a query that is among the retrieved
    rows is answered without that set.

    Args:
        spec: The tasks.
        learner: What is augmented: a learner, or a factory spec -> learner.
        k: Retrieved groups; 0 leaves the wrapped learner alone.
        retriever: "learned" weighs the retrieved groups by a trained similarity, "frozen" by the fixed keys of the
            search; "random" retrieves allowed groups at random (the same ones for the same support) with equal
            weights; "none" is k = 0.
        weight: The sum of the weights of the retrieved sets, in (0, 1); None learns it.
        n_items: Groups in the memory.
        rows_per_item: Rows kept (and retrieved) per group; None takes 2 for classification and 10 for regression.
        encoder: (rows, any) -> (rows, D) for the learned similarity, applied to raw features; None builds an MLP.
        search: "fixed", or "learned": what is retrieved, and not only its weight, follows the learned similarity.
        n_refreshes: How often each key of a learned search is made anew in a training run.
        backend: Search of the memory, see `MemoryBank`.

    Raises:
        TypeError: If the learner is none, or is trained by `meta_gradients` of its own, as `Reptile` is. By `predict`,
            if it answers by anything but a Categorical, a Gaussian or a mixture of these.
        ValueError: If a switch is unknown or without effect, a number is out of range, or the learner was built for
            another spec. By `prepare`, if classes or tasks have fewer than rows_per_item rows.

    Reference:
        The marginal is that of Lewis et al. 2020, arXiv:2005.11401, equation 1 (RAG-sequence), and Guu et al. 2020,
        arXiv:2002.08909, equation 1. Differs: retrieval of labeled groups for a support, and the option of none.
    """

    refreshed: Tensor

    def __init__(
        self,
        spec: TaskSpec,
        *,
        learner: Learner[Any] | Callable[[TaskSpec], Learner[Any]],
        k: int = 3,
        retriever: str = "learned",
        weight: float | None = None,
        n_items: int = 512,
        rows_per_item: int | None = None,
        encoder: nn.Module | None = None,
        search: str = "fixed",
        n_refreshes: int = 20,
        backend: str = "exact",
    ) -> None:
        """Build the wrapped learner, an empty memory and the similarity."""
        super().__init__(spec)
        self.learner = wrapped_learner(learner, spec)
        self.retriever = check_choice("retriever", retriever, RETRIEVERS)
        if encoder is not None and retriever != "learned":
            raise ValueError(f"an encoder goes with retriever 'learned' alone; got one for {retriever!r}")
        if check_choice("search", search, SEARCHES) == "learned" and retriever != "learned":
            raise ValueError(f"search 'learned' goes with retriever 'learned' alone; got {retriever!r}")
        self.k = 0 if retriever == "none" else check_count("k", k, minimum=0)
        self.search, self.n_refreshes = search if self.k else "fixed", check_count("n_refreshes", n_refreshes)
        self.n_items = check_count("n_items", n_items, minimum=max(1, self.k))
        default_rows = 2 if spec.kind == "classification" else 10
        self.rows_per_item = check_count("rows_per_item", default_rows if rows_per_item is None else rows_per_item)
        if weight is not None and not 0 < weight < 1:
            raise ValueError(f"weight must be in (0, 1), the share of what is retrieved, or None; got {weight!r}")
        self.weight = weight
        self.bank = MemoryBank(backend=backend)
        self.search_keys = RandomKeys(spec) if retriever == "random" else SearchKeys(spec)
        self.sources = SourceClasses()
        self.similarity = GroupEncoder(spec, encoder=encoder) if retriever == "learned" and self.k else None
        if self.search == "learned":
            self.register_buffer("refreshed", torch.tensor(0))  # keys made anew so far in this training run
        if self.k and weight is None:
            self.nothing = nn.Parameter(torch.tensor(8.0))
        if self.k and retriever != "random":
            self.log_sharpness = nn.Parameter(torch.tensor(2.0))
        own = any(not name.startswith("learner.") for name, _ in self.named_parameters())
        self.traits = replace(self.learner.traits, trainable=own or self.learner.traits.trainable)

    def prepare(self, tasks: TaskDistribution, *, seed: int) -> None:
        """Fill the memory with groups of meta-training rows drawn at the address (seed, "memory")."""
        if isinstance(self.learner, Prepares):
            self.learner.prepare(tasks, seed=seed)
        self.sources.read(tasks)
        groups = draw_items(tasks, self.n_items, rows_per_item=self.rows_per_item, seed=seed, like=self.bank.keys)
        ids = torch.full_like(groups.real, -1, dtype=torch.long) if groups.ids is None else groups.ids
        y = groups.y if self.spec.kind == "regression" else self.bank.keys.new_zeros(*ids.shape, 0)
        classes = self.sources.of(groups)
        # A query of the same task can be among these rows only if rows are named and own classes cannot be kept out.
        content = content_ids(groups.x, self.spec).masked_fill((ids < 0) | (classes >= 0), -1)
        self.bank.clear()
        with torch.no_grad():
            code = self._code(groups.x, groups.y, groups.real)
        keys = self._keys(groups.x, y, groups.real, code)
        self.bank.add(keys, {"x": groups.x, "y": y, "content": content}, rows=ids, classes=classes[:, 0])
        # Only classes of the bank can be found, and those of other splits are nobody's business.
        self.sources.keep(self.bank.class_ids)

    def at(self, fraction: float) -> None:
        """Make some keys of a learned search anew, in turns: all of them `n_refreshes` times in a training run."""
        if self.search == "fixed" or not len(self.bank):
            return
        due, done = int(fraction * self.n_refreshes * len(self.bank)), int(self.refreshed)
        self.refreshed.fill_(due)
        if due < done:  # another training run begins
            self.refresh_keys()
        elif due > done:
            self.refresh_keys(torch.arange(max(done, due - len(self.bank)), due) % len(self.bank))

    def refresh_keys(self, selected: Tensor | None = None) -> None:
        """Make keys of a learned search anew, as the encoder is now; a training run leaves some that are a bit older.

        Args:
            selected: long (any,) item numbers, all of them different, or bool (M,); None takes all.
        """
        if self.search == "fixed":
            return
        selected = torch.arange(len(self.bank)) if selected is None else selected
        selected = selected.to(self.bank.keys.device)
        x, y = self.bank.values["x"][selected], self.bank.values["y"][selected]
        with torch.no_grad():
            code = self._code(x, y, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
        assert code is not None  # a learned search has a similarity
        self.bank.refresh(selected, code)

    def adapt(self, support: Examples) -> RetrievalState:
        """Adapt the wrapped learner to the support alone and to the support with each retrieved group."""
        augmented, log_weights, content = self._retrieve(support)
        return RetrievalState(self.learner.adapt(augmented), log_weights, content)

    def adapt_stages(self, support: Examples) -> list[tuple[float | Tensor, RetrievalState]]:
        """The stages of the wrapped learner, where it has some."""
        if not isinstance(self.learner, AdaptsInStages):
            return [(1.0, self.adapt(support))]
        augmented, log_weights, content = self._retrieve(support)
        stages = self.learner.adapt_stages(augmented)
        return [(weight, RetrievalState(state, log_weights, content)) for weight, state in stages]

    def penalty(self, state: RetrievalState) -> Tensor:
        """The penalty of the wrapped learner (B,), mean over the retrieved sets; zero where it has none."""
        n_tasks, n_sets = state.log_weights.shape
        if not isinstance(self.learner, Regularizes):
            return state.log_weights.new_zeros(n_tasks)
        return self.learner.penalty(state.inner).unflatten(0, (n_tasks, n_sets)).mean(1)

    def predict(self, state: RetrievalState, x: Tensor) -> Distribution:
        """The marginal over the retrieved sets."""
        if self.k == 0:
            return self.learner.predict(state.inner, x)
        n_sets = state.log_weights.shape[1]
        answers = self.learner.predict(state.inner, x.repeat_interleave(n_sets, 0))
        own = (content_ids(x, self.spec)[:, :, None, None] == state.content[:, None]).any(-1)  # (B, Q, S)
        log_weights = state.log_weights[:, None].masked_fill(own, -torch.inf)
        log_weights = torch.log_softmax(log_weights, -1)  # set 0 has no retrieved rows, so it always stays
        answers = rearranged(answers, lambda value: value.unflatten(0, (-1, n_sets)).movedim(1, 2))  # (B, Q, S, ...)
        return marginal(answers, log_weights)

    def _retrieve(self, support: Examples) -> tuple[Examples, Tensor, Tensor]:
        """The support alone and with each retrieved group, axis (B S), log-weights (B, S) and content (B, S, rows)."""
        if self.k == 0:
            return support, support.x.new_zeros(support.n_tasks, 1), support.y.new_zeros(support.n_tasks, 1, 0)
        asking = self._asking_groups(support)  # (B, G, N): rows of each group that looks for its like
        y = support.y if self.spec.kind == "regression" else self.bank.keys.new_zeros(*support.y.shape, 0)
        code = self._code(support.x[:, None], support.y[:, None], asking)
        queries = self._keys(support.x[:, None], y[:, None], asking, code).to(self.bank.keys.dtype)
        found = self.bank.search(queries, self.k, exclude=self._exclusion(support))  # (B, G, k)
        scores = self._scores(code, queries, found.index)
        count = found.real.sum(1)
        scores = (scores * found.real).sum(1) / count.clamp(min=1)  # a retrieved set has one group per class
        scores = scores.masked_fill(count == 0, -torch.inf)
        content = self.bank.values["content"][found.index].masked_fill(~found.real[..., None], -1)  # (B, G, k, R)
        content = F.pad(content.transpose(1, 2).flatten(2), (0, 0, 1, 0), value=-1)
        return self._augment(support, found.index, found.real), self._log_weights(scores), content

    def _log_weights(self, scores: Tensor) -> Tensor:
        """Log-weights (B, S) of nothing and of the retrieved sets with these scores (B, k), -inf for an empty set."""
        if self.weight is None:
            return torch.log_softmax(torch.cat([self.nothing.expand(len(scores), 1), scores], 1), 1)
        empty = scores.isneginf().all(1, keepdim=True)
        kept = scores.new_full((len(scores), 1), math.log1p(-self.weight)).masked_fill(empty, 0.0)
        among = torch.log_softmax(scores.masked_fill(empty, 0.0), 1) + math.log(self.weight)
        return torch.cat([kept, among.masked_fill(empty, -torch.inf)], 1)

    def _code(self, x: Tensor, y: Tensor, real: Tensor) -> Tensor | None:
        """What the learned similarity compares, unit vectors (..., D) for groups of rows; None without one."""
        return None if self.similarity is None else unit_rows(self.similarity(x, y, real))

    def _keys(self, x: Tensor, y: Tensor, real: Tensor, code: Tensor | None) -> Tensor:
        """What the search compares, (..., K), for groups with these rows and this code."""
        if self.search == "learned" and code is not None:
            return code.detach()
        return self.search_keys(x, y, real)

    def _scores(self, code: Tensor | None, queries: Tensor, index: Tensor) -> Tensor:
        """Scores (B, G, k) of the groups `index`, for asking groups with these codes and search keys."""
        if self.retriever == "random":
            return queries.new_zeros(index.shape)
        if code is None:
            scores = (self.bank.keys[index] @ queries[..., None])[..., 0]
        else:
            x, y = self.bank.values["x"][index], self.bank.values["y"][index]
            there = self._code(x, y, torch.ones(x.shape[:4], dtype=torch.bool, device=index.device))  # (B, G, k, D)
            assert there is not None
            scores = (there @ code[..., None])[..., 0]
        return scores * self.log_sharpness.exp()

    def _asking_groups(self, support: Examples) -> Tensor:
        if self.spec.kind == "regression":
            return support.real[:, None]
        return class_weights(support.y, self.spec.output_size, support.mask, torch.float32).mT > 0

    def _augment(self, support: Examples, index: Tensor, found: Tensor) -> Examples:
        n_tasks, n_groups, k = index.shape
        x = self.bank.values["x"][index].transpose(1, 2)  # (B, k, G, R, *x_shape)
        n_rows = x.shape[3]
        if self.spec.kind == "classification":
            labels = torch.arange(n_groups, device=index.device)[None, None, :, None]
            y = labels.expand(n_tasks, k, n_groups, n_rows)
        else:
            y = self.bank.values["y"][index].transpose(1, 2)
        real = found.transpose(1, 2)[..., None].expand(n_tasks, k, n_groups, n_rows)
        # Set 0 is the support alone: its retrieved rows are masked.
        x, y = (torch.cat([value[:, :1], value], 1).flatten(0, 1).flatten(1, 2) for value in (x, y))
        real = F.pad(real.flatten(2), (0, 0, 1, 0), value=False).flatten(0, 1)
        own = Examples(*(value.repeat_interleave(k + 1, 0) for value in (support.x, support.y, support.real)))
        return concatenate(own, Examples(x, y, real))

    def _exclusion(self, support: Examples) -> Exclusion:
        """The rows and classes of a task (B, 1, N), which none of its groups may retrieve."""
        if support.ids is None:
            return Exclusion()
        return Exclusion(rows=support.ids[:, None], classes=self.sources.of(support)[:, None])
