"""Demonstration retrieval: labeled rows of many tasks, fetched for each query and read in context."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_choice, check_count
from metaicl.episode import Examples
from metaicl.learner import AdaptsInStages, Learner, Prepares, Regularizes, wrapped_learner
from metaicl.learners.retrieval.bank import BACKENDS
from metaicl.learners.retrieval.contrastive import pretrain_codes
from metaicl.learners.retrieval.groups import read_beside
from metaicl.learners.retrieval.retriever import RETRIEVERS, Oracle, Retriever
from metaicl.learners.retrieval.sources import SourceClasses, draw_items, item_classes
from metaicl.mixtures import marginal, rearranged
from metaicl.reading import Reading
from metaicl.spec import TaskSpec
from metaicl.task import TaskDistribution

_N_CANDIDATES = 4096


class DemonstrationState(NamedTuple):
    """What adapting leaves: the support, to be read beside each demonstration.

    Attributes:
        support: (B, N) rows.
        classes: long (B, N), source classes that the task may not retrieve; -1 = nothing.
        stage: Which stage of a reader with `adapt_stages` answers; -1 is the last, and everyone's.
    """

    support: Examples
    classes: Tensor
    stage: int = -1


class DemonstrationRetrieval(Learner[DemonstrationState]):
    """Retrieve k labeled demonstrations for each query, let a learner read each beside the support, mix its answers.

        p(y | x, S) = p(none | x) p(y | x, S) + sum_j p(z_j | x) p(y | x, S + z_j)

    The probabilities are a softmax of retrieval scores and of a learned score for using no demonstration, so that a
    learned retriever is trained end to end through the marginal. The memory holds demonstrations of many tasks, each a
    row or a few rows of one task with their labels; labels must mean the same wherever a task occurs. Knowledge about
    tasks is kept in rows, not in weights: `remember` adds rows of tasks that were never trained on, and they are used
    at once.

    The memory is filled by `prepare` from meta-training tasks only. A query never retrieves a demonstration that holds
    the query itself or a copy of it, nor, where the source names classes, meta-training rows of its task's own classes.

    Args:
        spec: The tasks.
        learner: Who reads: a learner, or a factory spec -> learner.
        k: Demonstrations per query; 0 reads the support alone.
        retriever: "learned" (an encoder of query and demonstrations, trained), "frozen" (fixed keys), "random",
            "oracle" or "none" (as k = 0). What "learned" ranks are the 4,096 items that fixed keys propose.
        n_items: Demonstrations in the memory.
        rows_per_item: Rows of a demonstration.
        encoder: See `Retriever`.
        oracle: For retriever "oracle": inputs (..., *x_shape) to codes of what belongs together.
        pretraining_steps: Updates of contrastive pre-training of a learned retriever in `prepare`, see
            `pretrain_codes`.
        backend: Search of the memory.

    Raises:
        ValueError: If a switch is unknown or without effect, or the learner was built for another spec. By `prepare`,
            if classes or tasks have fewer than rows_per_item rows.
        TypeError: If the learner is none, or is trained by `meta_gradients` of its own, as `Reptile` is. By `predict`,
            if the reader answers by anything but a Categorical, a Gaussian or a mixture of these.

    Reference:
        Mueller et al., 2023, "Meta-training with demonstration retrieval for efficient few-shot learning", Findings of
        ACL, section 3; the marginal is that of Lewis et al. 2020, arXiv:2005.11401. Differs: answers are no token
        sequences; the option of no demonstration; both sides of the encoder are trained, and nothing grows stale.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        learner: Learner[Any] | Callable[[TaskSpec], Learner[Any]],
        k: int = 5,
        retriever: str = "learned",
        n_items: int = 1024,
        rows_per_item: int = 4,
        encoder: nn.Module | None = None,
        oracle: Oracle | None = None,
        pretraining_steps: int = 0,
        backend: str = "exact",
    ) -> None:
        """Build the reader and an empty memory."""
        super().__init__(spec)
        self.learner = wrapped_learner(learner, spec)
        self.traits = replace(self.learner.traits, trainable=True)
        check_choice("retriever", retriever, (*RETRIEVERS, "none"))
        check_choice("backend", backend, BACKENDS)
        self.k = 0 if retriever == "none" else check_count("k", k, minimum=0)
        self.n_items = check_count("n_items", n_items, minimum=max(1, self.k))
        self.rows_per_item = check_count("rows_per_item", rows_per_item)
        self.pretraining_steps = check_count("pretraining_steps", pretraining_steps, minimum=0)
        if retriever != "learned" and (encoder is not None or pretraining_steps):
            raise ValueError(f"encoder and pretraining_steps go with retriever 'learned' alone; got {retriever!r}")
        if retriever != "oracle" and oracle is not None:
            raise ValueError(f"an oracle goes with retriever 'oracle' alone; got {oracle!r} for {retriever!r}")
        self.sources = SourceClasses()
        if self.k:
            self.retriever = Retriever(
                spec, mode=retriever, encoder=encoder, n_candidates=_N_CANDIDATES, oracle=oracle, backend=backend
            )
            self.nothing = nn.Parameter(torch.tensor(-2.0))
        self.pretraining_losses: list[float] = []

    def prepare(self, tasks: TaskDistribution, *, seed: int) -> None:
        """Fill the memory with meta-training rows drawn at the address (seed, "memory"), and pre-train."""
        if isinstance(self.learner, Prepares):
            self.learner.prepare(tasks, seed=seed)
        if not self.k:
            return
        self.sources.read(tasks)
        items = draw_items(
            tasks,
            self.n_items,
            rows_per_item=self.rows_per_item,
            seed=seed,
            like=self.retriever.importance,
        )
        self.retriever.fill(items.x, {"x": items.x, "y": items.y}, classes=item_classes(self.sources.of(items)))
        self.sources.keep(self.retriever.bank.class_ids)  # those of other splits are nobody's business
        if self.pretraining_steps and self.retriever.mode == "learned":
            self.pretraining_losses = pretrain_codes(self.retriever, tasks, steps=self.pretraining_steps, seed=seed)

    def remember(self, examples: Examples) -> None:
        """Add demonstrations, the real rows of axis B in groups of `rows_per_item`; nothing is trained.

        Rows of classes that were not in the memory count as rows without a class: tasks of these classes find them.

        Raises:
            ValueError: If there is no memory, or the rows do not come in such groups.
        """
        if not self.k:
            raise ValueError("remember needs a learner with a memory; this one retrieves nothing")
        if examples.n_rows % self.rows_per_item or not bool(examples.real.all()):
            raise ValueError(
                f"remember needs real rows in groups of rows_per_item = {self.rows_per_item}; got {examples.n_rows} "
                "rows per task" + ("" if bool(examples.real.all()) else ", some of them masked")
            )
        examples = examples.to(self.retriever.importance.device, self.retriever.importance.dtype)
        fold = (-1, self.rows_per_item)
        x, y, classes = (
            value.unflatten(1, fold).flatten(0, 1) for value in (examples.x, examples.y, self.sources.of(examples))
        )
        self.retriever.grow(x, {"x": x, "y": y}, classes=item_classes(classes))

    def adapt(self, support: Examples) -> DemonstrationState:
        """Keep the support; it is read beside each demonstration."""
        return DemonstrationState(support, self.sources.of(support))

    def adapt_stages(self, support: Examples) -> list[tuple[float | Tensor, DemonstrationState]]:
        """The stages of the reader, where it has some; what it reads is adapted to once for every stage."""
        state = self.adapt(support)
        if not isinstance(self.learner, AdaptsInStages):
            return [(1.0, state)]
        weights = [weight for weight, _ in self.learner.adapt_stages(support)]
        return [(weight, state._replace(stage=stage)) for stage, weight in enumerate(weights)]

    def penalty(self, state: DemonstrationState) -> Tensor:
        """The penalty (B,) of the reader for what it learns from the support alone; zero where it has none."""
        if not isinstance(self.learner, Regularizes):
            return state.support.x.new_zeros(state.support.n_tasks, dtype=torch.get_default_dtype())
        return self.learner.penalty(self.learner.adapt(state.support))

    def predict(self, state: DemonstrationState, x: Tensor) -> Distribution:
        """The marginal over no demonstration and the k retrieved ones."""
        support = state.support
        if not self.k:
            return _read(self.learner, support, x, state.stage)
        n_tasks, n_queries = x.shape[:2]
        found = self.retriever(x, self.k, classes=state.classes)
        # An absent demonstration has a finite score, so that its gradient is finite, and no weight.
        scores = found.score.masked_fill(~found.real, -1e4)
        log_weights = torch.log_softmax(torch.cat([self.nothing.expand_as(scores[..., :1]), scores], -1), -1)
        reading = Reading.of(self.learner)
        contexts = self._contexts(reading, support, found.index, found.real)  # axis (B Q S)
        asked = reading.rows(x).flatten(0, 1).repeat_interleave(self.k + 1, 0)[:, None]
        answers = _read(reading.learner, contexts, asked, state.stage)
        shape = (n_tasks, n_queries, self.k + 1)
        return marginal(rearranged(answers, lambda value: value.reshape(*shape, *value.shape[2:])), log_weights)

    def _contexts(self, reading: Reading, support: Examples, index: Tensor, real: Tensor) -> Examples:
        """The support alone and with each demonstration, axis (B Q S), S = k + 1."""
        values = self.retriever.bank.values
        n_queries, n_sets = index.shape[1], self.k + 1
        shown = F.pad(index, (1, 0))  # set 0 has no demonstration: its rows are masked
        x, y = (value.flatten(0, 2) for value in (reading.items(values["x"], shown), values["y"][shown]))
        read = F.pad(real, (1, 0), value=False).flatten()[:, None].expand(-1, self.rows_per_item)
        own = replace(support, x=reading.rows(support.x))
        return read_beside(own, n_queries * n_sets, x, y.to(own.y.dtype), read)


def _read(learner: Learner[Any], contexts: Examples, x: Tensor, stage: int) -> Distribution:
    if stage < 0 or not isinstance(learner, AdaptsInStages):
        return learner(contexts, x)
    return learner.predict(learner.adapt_stages(contexts)[stage][1], x)
