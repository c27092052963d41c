"""Retrieval augmentation of any learner: similar meta-training tasks join the support."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_choice, check_count
from metaicl.episode import Examples
from metaicl.functional import unit_rows
from metaicl.learner import AdaptsInStages, Learner, Prepares, Regularizes, wrapped_learner
from metaicl.learners.retrieval.bank import Found, MemoryBank
from metaicl.learners.retrieval.content import arbitrary_keys, content_ids, ids_in_all_precisions
from metaicl.learners.retrieval.exclusion import Exclusion
from metaicl.learners.retrieval.groups import (
    RetrievalState,
    asking_groups,
    check_switches,
    group_classes,
    ready_made,
    set_log_weights,
    with_groups,
)
from metaicl.learners.retrieval.keys import GroupEncoder, search_keys
from metaicl.learners.retrieval.retriever import Oracle
from metaicl.learners.retrieval.sources import SourceClasses, draw_items, item_classes
from metaicl.mixtures import marginal, rearranged
from metaicl.reading import Reading
from metaicl.spec import TaskSpec
from metaicl.task import TaskDistribution

RETRIEVERS = ("learned", "frozen", "random", "oracle", "none")


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

    The memory is filled by `prepare`, from meta-training tasks only, or is a `bank` of yours. A task never retrieves
    its own rows nor, where the source names classes, rows of its own classes. A query that is among the retrieved rows
    is answered without that set. A class without a support row retrieves nothing.

    `retriever="oracle"` is told what a learner cannot know, and serves as a bound in training and evaluation: what the
    best retrieval would be worth. It retrieves the true class of each group, other rows of it than those of the
    support, or what a function says belongs together. Classes that the memory lacks, such as those of meta-testing in
    a memory of meta-training rows, retrieve nothing by class: give a bank that holds them.

    Args:
        spec: The tasks.
        learner: What is augmented: a learner, or a factory spec -> learner.
        k: Retrieved groups; 0 leaves the wrapped learner alone.
        retriever: "learned" weighs the retrieved groups by a trained similarity, "frozen" by the fixed keys of the
            search; "random" retrieves allowed groups at random (the same ones for the same support), "oracle" those
            that belong to it, both with equal weights; "none" is k = 0.
        weight: The sum of the weights of the retrieved sets, in (0, 1); None learns it.
        n_items: Groups in the memory; None takes 512.
        rows_per_item: Rows kept (and retrieved) per group; None takes 2 for classification and 10 for regression.
        bank: A ready-made memory: values "x" (M, R, *x_shape) and, for regression, "y" (M, R, y_dim), the rows of a
            group; for classification these are of one class. Its `row_ids` and `class_ids` must count as those of
            the tasks do, or be -1. Its items are copied; keys are made by this learner.
        oracle: For retriever "oracle": inputs (..., *x_shape) to codes of what belongs together, in place of the
            source's classes; own classes are then left out as ever.
        encoder: (rows, any) -> (rows, D) for the learned similarity, applied to raw features; None builds an MLP.
        search: "fixed", or "learned": what is retrieved, and not only its weight, follows the learned similarity.
        n_refreshes: How often each key of a learned search is made anew in a training run.
        backend: Search of the memory, see `MemoryBank`.

    Raises:
        TypeError: If the learner is none, or is trained by `meta_gradients` of its own, as `Reptile` is. By `predict`,
            if it answers by anything but a Categorical, a Gaussian or a mixture of these.
        ValueError: If a switch is unknown or without effect, a number is out of range, the learner was built for
            another spec or the bank is for another one, or an oracle has neither classes nor a function. By `prepare`,
            if classes or tasks have fewer than rows_per_item rows, or an oracle needs classes and the source has none.

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
        n_items: int | None = None,
        rows_per_item: int | None = None,
        bank: MemoryBank | None = None,
        oracle: Oracle | None = None,
        encoder: nn.Module | None = None,
        search: str = "fixed",
        n_refreshes: int = 20,
        backend: str = "exact",
    ) -> None:
        """Build the wrapped learner, a memory, empty without a bank, and the similarity."""
        super().__init__(spec)
        self.learner = wrapped_learner(learner, spec)
        self.retriever = check_choice("retriever", retriever, RETRIEVERS)
        check_switches(spec, retriever, search=search, encoder=encoder, oracle=oracle)
        self.k = 0 if retriever == "none" else check_count("k", k, minimum=0)
        self.search, self.n_refreshes = search if self.k else "fixed", check_count("n_refreshes", n_refreshes)
        self.by_class = retriever == "oracle" and oracle is None and self.k > 0
        self.ready_made = bank is not None
        if self.ready_made and (n_items is not None or rows_per_item is not None or not self.k):
            raise ValueError("a ready-made bank has its own n_items and rows_per_item, and is of no use with k = 0")
        self.n_items = check_count("n_items", 512 if n_items is None else n_items, minimum=max(1, self.k))
        rows = (2 if spec.kind == "classification" else 10) if rows_per_item is None else rows_per_item
        self.rows_per_item = check_count("rows_per_item", rows)
        if weight is not None and not 0 < weight < 1:
            raise ValueError(f"weight must be in (0, 1), the share of what is retrieved, or None; got {weight!r}")
        self.weight, self.bank = weight, MemoryBank(backend=backend)
        self.search_keys = search_keys(spec, retriever, oracle)
        self.sources = SourceClasses()
        self.similarity = GroupEncoder(spec, encoder=encoder) if retriever == "learned" and self.k else None
        if self.search == "learned":
            self.register_buffer("refreshed", torch.tensor(0))  # keys made anew so far in this training run
        if self.k and weight is None:
            self.nothing = nn.Parameter(torch.tensor(8.0))
        if self.k and retriever in ("learned", "frozen"):
            self.log_sharpness = nn.Parameter(torch.tensor(2.0))
        own = any(not name.startswith("learner.") for name, _ in self.named_parameters())
        self.traits = replace(self.learner.traits, trainable=own or self.learner.traits.trainable)
        if bank is not None:
            self._fill(*ready_made(bank, spec, like=self.bank.keys))

    def prepare(self, tasks: TaskDistribution, *, seed: int) -> None:
        """Fill the memory with groups of meta-training rows drawn at the address (seed, "memory"), unless it is ready.

        Of the tasks, the classes of the rows are noted that the memory holds.
        """
        if isinstance(self.learner, Prepares):
            self.learner.prepare(tasks, seed=seed)
        if self.by_class and tasks.source_classes is None:
            raise ValueError("retriever 'oracle' needs a source that names classes, or oracle=..., a function")
        self.sources.read(tasks)
        if not self.ready_made:
            groups = draw_items(tasks, self.n_items, rows_per_item=self.rows_per_item, seed=seed, like=self.bank.keys)
            ids = torch.full_like(groups.real, -1, dtype=torch.long) if groups.ids is None else groups.ids
            # Rows without a name are made afresh: a query cannot be among them.
            content = ids_in_all_precisions(groups.x, self.spec).masked_fill((ids < 0)[..., None], -1)
            classes = item_classes(self.sources.of(groups))
            groups = groups.to(dtype=self.bank.keys.dtype)  # rounded after they were named
            self._fill(groups.x, groups.y, ids, classes, content)
        # Only classes of the bank can be found, and those of other splits are nobody's business.
        self.sources.keep(self.bank.class_ids)

    def _fill(self, x: Tensor, y: Tensor, rows: Tensor, classes: Tensor, content: Tensor) -> None:
        """Put groups x (M, R, *x_shape) into the memory, y (M, R, y_dim) for regression, content (M, R, any)."""
        y = y if self.spec.kind == "regression" else self.bank.keys.new_zeros(*x.shape[:2], 0)
        with torch.no_grad():
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            keys = self._keys(x, y, real, self._code(x, y, real), classes.reshape(len(x), -1)[:, 0])
        values = {"x": x, "y": y, "content": content.flatten(1), **self.search_keys.values(x)}
        self.bank.clear()
        self.bank.add(keys, values, rows=rows, classes=classes)

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
            code = self._code(x, y)
        assert code is not None  # a learned search has a similarity
        self.bank.refresh(selected, code)

    def adapt(self, support: Examples) -> RetrievalState:
        """Adapt the wrapped learner to the support alone and to the support with each retrieved group."""
        reading = Reading.of(self.learner)
        augmented, log_weights, content = self._retrieve(reading, support)
        return RetrievalState(reading.learner.adapt(augmented), log_weights, content)

    def adapt_stages(self, support: Examples) -> list[tuple[float | Tensor, RetrievalState]]:
        """The stages of the wrapped learner, where it has some."""
        reading = Reading.of(self.learner)
        if not isinstance(reading.learner, AdaptsInStages):
            return [(1.0, self.adapt(support))]
        augmented, log_weights, content = self._retrieve(reading, support)
        stages = reading.learner.adapt_stages(augmented)
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
        reading = Reading.of(self.learner)
        answers = reading.learner.predict(state.inner, reading.rows(x).repeat_interleave(n_sets, 0))
        own = (content_ids(x, self.spec)[:, :, None, None] == state.content[:, None]).any(-1)  # (B, Q, S)
        log_weights = state.log_weights[:, None].masked_fill(own, -torch.inf)
        log_weights = torch.log_softmax(log_weights, -1)  # set 0 has no retrieved rows, so it always stays
        answers = rearranged(answers, lambda value: value.unflatten(0, (-1, n_sets)).movedim(1, 2))  # (B, Q, S, ...)
        return marginal(answers, log_weights)

    def _retrieve(self, reading: Reading, support: Examples) -> tuple[Examples, Tensor, Tensor]:
        """The support alone and with each retrieved group, axis (B S), log-weights (B, S) and content (B, S, rows)."""
        own = replace(support, x=reading.rows(support.x))
        if self.k == 0:
            return own, support.x.new_zeros(support.n_tasks, 1), support.y.new_zeros(support.n_tasks, 1, 0)
        asking = asking_groups(support, self.spec)  # (B, G, N): rows of each group that looks for its like
        y = support.y if self.spec.kind == "regression" else self.bank.keys.new_zeros(*support.y.shape, 0)
        code = self._code(support.x[:, None], support.y[:, None], asking)
        found = self._find(support, y, asking, code)  # (B, G, k)
        content = self.bank.values["content"][found.index].masked_fill(~found.real[..., None], -1)  # (B, G, k, R)
        content = F.pad(content.transpose(1, 2).flatten(2), (0, 0, 1, 0), value=-1)
        x, y = reading.items(self.bank.values["x"], found.index), self.bank.values["y"][found.index]
        augmented = with_groups(own, x, y, found.real, labeled=self.spec.kind == "classification")
        nothing = self.nothing if self.weight is None else self.weight
        log_weights = set_log_weights(self._scores(code, found), found.real, nothing)
        return augmented, log_weights, content

    def _find(self, support: Examples, y: Tensor, asking: Tensor, code: Tensor | None) -> Found:
        """The k groups (B, G, k) for each asking one; none for a group without rows."""
        classes = group_classes(self.sources.of(support), asking)
        queries = self._keys(support.x[:, None], y[:, None], asking, code, classes).to(self.bank.keys.dtype)
        exclude = self._exclusion(support)
        if self.search == "learned":
            found = self.bank.search(queries, self.k, exclude=exclude)
        else:
            found = self.search_keys.search(self.bank, queries, support.x[:, None], asking, self.k, exclude=exclude)
        real = found.real & asking.any(-1, keepdim=True)
        if self.by_class:
            held = self.bank.class_ids.reshape(len(self.bank), -1)[found.index]  # (B, G, k, R)
            real &= (held == classes[..., None, None]).all(-1) & (classes[..., None] >= 0)
        return found._replace(real=real)

    def _code(self, x: Tensor, y: Tensor, real: Tensor | None = None) -> Tensor | None:
        """What the learned similarity compares, unit vectors (..., D) for groups of rows; None without one."""
        real = x.new_ones(x.shape[: x.ndim - len(self.spec.x_shape)], dtype=torch.bool) if real is None else real
        return None if self.similarity is None else unit_rows(self.similarity(x, y, real))

    def _keys(self, x: Tensor, y: Tensor, real: Tensor, code: Tensor | None, classes: Tensor) -> Tensor:
        """What the search compares, (..., K), for groups with these rows, this code and these classes."""
        if self.by_class:
            return arbitrary_keys(classes, self.bank.keys.dtype)
        if self.search == "learned" and code is not None:
            return code.detach()
        return self.search_keys(x, y, real)

    def _scores(self, code: Tensor | None, found: Found) -> Tensor:
        """Scores (B, G, k) of the groups found, for asking groups with these codes."""
        if self.retriever in ("random", "oracle"):
            return torch.zeros_like(found.score, dtype=self.bank.keys.dtype)
        if code is None:
            scores = found.score.masked_fill(~found.real, 0.0).to(self.bank.keys.dtype)
        else:
            x, y = self.bank.values["x"][found.index], self.bank.values["y"][found.index]
            there = self._code(x, y)  # (B, G, k, D)
            assert there is not None
            scores = (there @ code[..., None])[..., 0]
        return scores * self.log_sharpness.exp()

    def _exclusion(self, support: Examples) -> Exclusion:
        """The rows and classes of a task (B, 1, N), which none of its groups may retrieve. An oracle may: classes."""
        if support.ids is None:
            return Exclusion()
        classes = None if self.by_class else self.sources.of(support)[:, None]
        return Exclusion(rows=support.ids[:, None], classes=classes)
