"""RAML: prototypes read the tokens of a query and of the passages retrieved for it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_choice, check_count
from metaicl.episode import Examples
from metaicl.functional import categorical, masked_mean, prototypes, squared_distances
from metaicl.learner import Learner, Traits, check_support_labels
from metaicl.learners.retrieval.bank import BACKENDS
from metaicl.learners.retrieval.retriever import RETRIEVERS, Retriever
from metaicl.learners.retrieval.sources import SourceClasses, draw_items
from metaicl.nets.backbones import build_encoder, encode, encoder_dim
from metaicl.nets.fusion import FusionHead
from metaicl.nets.text import HasTokenStates
from metaicl.spec import TaskSpec
from metaicl.task import TaskDistribution

_PASSAGE_BIAS = -2.0  # k passages hold k times the tokens of the query, and should not drown it from the start


class RAMLState(NamedTuple):
    """What adapting leaves.

    Attributes:
        prototypes: (B, C, D).
        classes: long (B, any), source classes that the task may not retrieve; -1 = nothing.
    """

    prototypes: Tensor
    classes: Tensor


class RAML(Learner[RAMLState]):
    """Few-shot classification with retrieved passages: class prototypes attend to the query's tokens and theirs.

    The support is encoded alone and averaged over tokens and shots into one prototype per class. Each query retrieves
    k passages from a memory of meta-training rows. The token states of the query and of its passages are laid side by
    side, and the prototypes attend to all of them at once: the prototype decides which retrieved tokens to read. Each
    prototype's reading becomes one logit.

    The memory is filled by `prepare` with rows of meta-training classes only, or has `passages` of yours. Of the former
    a task never retrieves rows of its own classes where the support names source rows (`Examples.ids`), so that
    meta-training is as hard as testing, where no class of the task is in the memory. No query retrieves itself or a
    copy of itself.

    Args:
        spec: A classification spec. Tokens are read one by one; an input of another kind counts as one token.
        encoder: (rows, *x_shape) -> (rows, D), best with `states` (see `metaicl.nets.text.HasTokenStates`), such
            as a bag of words; without it an input is one token, its embedding. None builds one from the spec.
        k: Passages per query; 0 reads the query alone.
        retriever: "frozen" (fixed TF-IDF keys), "learned" (a learned ranking of what the fixed keys propose; its
            log-probability is added to the attention to the passage), "random" or "none" (as k = 0).
        n_items: Rows of the memory, at most; None takes 8,192.
        passages: A memory of your own, (M, *x_shape), in place of rows of meta-training classes: another corpus, read
            by the same splitter into the same ids. Their classes are unknown, so only copies of a query are left out;
            that nothing in them gives test classes away is up to you.
        n_candidates: Passages that the fixed keys propose to a learned ranking.
        heads: Attention heads; must divide D.
        fusion: "attention", or "mean": the reading is the mean token, the same for every prototype.
        residual: Add the logits of a prototypical network on the query alone, and start from them: the reading starts
            with a weight of zero. Without it the reading decides alone.
        support_passages: Support rows retrieve passages too, which join the prototypes with a learned share.
        backend: Search of the memory.

    Raises:
        TypeError: If the passages are no tensor of token ids, or of numbers, as the spec has them.
        ValueError: If the spec is a regression spec, or a switch is unknown or without effect, or passages do not fit
            the spec.

    Reference:
        Li et al., 2023, arXiv:2309.04979, section 3. Differs: meta-training rows instead of Wikipedia, where no
        `passages` are given; query and passage are encoded apart and laid side by side, which is the same for encoders
        without context; one attention block from scratch instead of a pretrained one, so the linear layer reads the
        product of the reading and its prototype, a similarity from the start; a learned bias on the attention to all
        passages; the learned retriever, `residual` and the temperature.
    """

    traits = Traits(kinds=("classification",), instead=(("regression", "RetrievalAugmented"),))

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        k: int = 5,
        retriever: str = "frozen",
        n_items: int | None = None,
        passages: Tensor | None = None,
        n_candidates: int = 64,
        heads: int = 1,
        fusion: str = "attention",
        residual: bool = True,
        support_passages: bool = False,
        backend: str = "exact",
    ) -> None:
        """Build encoder and fusion, and a memory, empty without passages."""
        super().__init__(spec)
        check_choice("retriever", retriever, [mode for mode in RETRIEVERS if mode != "oracle"] + ["none"])
        self.k = 0 if retriever == "none" else check_count("k", k, minimum=0)
        if passages is not None and (n_items is not None or not self.k):
            raise ValueError("passages are a memory of their own size, and of no use with k = 0; give no n_items")
        self.n_items = check_count("n_items", 8192 if n_items is None else n_items, minimum=max(1, self.k))
        n_candidates = check_count("n_candidates", n_candidates)
        check_choice("backend", backend, BACKENDS)
        self.encoder = build_encoder(spec) if encoder is None else encoder
        self.declare_nets(self.encoder)
        size = encoder_dim(self.encoder, spec)
        one_token = not self.k and not isinstance(self.encoder, HasTokenStates)  # then there is nothing to choose from
        self.fusion = FusionHead(size, heads=heads, pool="mean" if one_token else fusion, start_at_zero=residual)
        start = torch.tensor(float(size)).log() / -2
        self.log_temperature = nn.Parameter(start) if residual else None
        self.support_share = nn.Parameter(torch.tensor(-2.0)) if support_passages and self.k else None
        self.sources = SourceClasses()
        if self.k:
            self.passage_bias = nn.Parameter(torch.tensor(_PASSAGE_BIAS))
            self.retriever = Retriever(
                spec, mode=retriever, n_candidates=n_candidates, weighs=retriever == "learned", backend=backend
            )
        self.ready_made = passages is not None
        if passages is not None:
            rows = _checked(passages, spec)
            self.retriever.fill(rows[:, None], {"x": rows})

    def prepare(self, tasks: TaskDistribution, *, seed: int) -> None:
        """Fill a memory without passages with meta-training rows drawn at the address (seed, "memory")."""
        if not self.k or self.ready_made:
            return
        self.sources.read(tasks)
        rows = draw_items(tasks, self.n_items, rows_per_item=1, seed=seed, like=self.retriever.importance)
        self.retriever.fill(rows.x, {"x": rows.x[:, 0]}, classes=self.sources.of(rows)[:, 0])
        self.sources.keep(self.retriever.bank.class_ids)  # no other class can be found

    def adapt(self, support: Examples) -> RAMLState:
        """Prototypes of the support, and the classes it may not retrieve."""
        check_support_labels(self.spec, support)
        classes = self.sources.of(support)
        embeddings = encode(self.encoder, support.x)
        if self.support_share is not None:
            passages, _, real = self._passages(support.x, classes)
            theirs = encode(self.encoder, passages.flatten(1, 2)).unflatten(1, passages.shape[1:3])
            share = self.support_share.sigmoid() * real.any(-1, keepdim=True)
            embeddings = (1 - share) * embeddings + share * masked_mean(theirs, real, 2)
        return RAMLState(prototypes(embeddings, support.y, self.spec.output_size, support.mask), classes)

    def predict(self, state: RAMLState, x: Tensor) -> Distribution:
        """What the prototypes read in each query and its passages, as logits."""
        states, seen = self._states(x)  # (B, Q, T, D), (B, Q, T)
        bias = torch.zeros_like(states[..., 0])
        if self.k:
            passages, log_weights, real = self._passages(x, state.classes)
            more, read = self._states(passages.flatten(1, 2))
            more, read = (part.unflatten(1, passages.shape[1:3]) for part in (more, read))  # (B, Q, k, T, ...)
            states = torch.cat([states, more.flatten(2, 3)], 2)
            seen = torch.cat([seen, (read & real[..., None]).flatten(2)], 2)
            bias = torch.cat([bias, log_weights[..., None].expand(read.shape).flatten(2)], 2)
        logits = self.fusion(state.prototypes, states, seen, bias)
        if self.log_temperature is not None:
            distances = squared_distances(encode(self.encoder, x), state.prototypes)
            logits = logits - distances * self.log_temperature.exp()
        return categorical(logits)

    def _passages(self, x: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Passages (B, Q, k, *x_shape), what is added to the attention to each, and which are real (B, Q, k).

        That is a learned number for all passages and, of a learned ranking, the log of k times their probability.
        """
        found = self.retriever(x, self.k, classes=classes)
        log_weights = self.passage_bias.expand_as(found.score)
        if self.retriever.mode == "learned":
            # An absent passage is seen by nobody; a finite score keeps its gradient finite.
            log_shares = torch.log_softmax(found.score.masked_fill(~found.real, -1e4), -1)
            n_real = found.real.sum(-1, keepdim=True).clamp(min=1).to(log_shares.dtype)
            log_weights = log_weights + log_shares + n_real.log()
        return self.retriever.bank.values["x"][found.index], log_weights, found.real

    def _states(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Token states (B, N, T, D) of inputs x (B, N, *x_shape), and which tokens are no padding."""
        rows = x.flatten(0, 1)
        if isinstance(self.encoder, HasTokenStates):
            states, seen = self.encoder.states(rows), rows != 0
        else:
            states = self.encoder(rows)[:, None]
            seen = torch.ones(states.shape[:2], dtype=torch.bool, device=x.device)
        return states.unflatten(0, x.shape[:2]), seen.unflatten(0, x.shape[:2])


def _checked(passages: Tensor, spec: TaskSpec) -> Tensor:
    """The passages, once they are known to look like inputs of the spec."""
    kind = "token ids, long" if spec.x_kind == "tokens" else "floating point"
    if not isinstance(passages, Tensor) or passages.is_floating_point() == (spec.x_kind == "tokens"):
        got = passages.dtype if isinstance(passages, Tensor) else type(passages).__name__
        raise TypeError(f"passages must be a tensor, {kind}; got {got}")
    if passages.ndim != 1 + len(spec.x_shape) or passages.shape[1:] != spec.x_shape or not len(passages):
        wanted = ", ".join(["M", *map(str, spec.x_shape)])
        raise ValueError(f"passages must be ({wanted}), M >= 1; got {tuple(passages.shape)}")
    if spec.vocabulary is not None and not 0 <= int(passages.min()) <= int(passages.max()) < spec.vocabulary:
        found = f"{int(passages.min())} .. {int(passages.max())}"
        raise ValueError(f"token ids of passages must be in [0, {spec.vocabulary}); got {found}")
    return passages.long() if spec.x_kind == "tokens" else passages.to(torch.get_default_dtype())
