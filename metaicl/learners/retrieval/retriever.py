"""Which items of a memory belong to an input: by fixed keys, by learned codes, at random, or by an oracle."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metaicl.checks import check_choice, check_count
from metaicl.functional import unit_rows
from metaicl.learners.retrieval.bank import Found, MemoryBank
from metaicl.learners.retrieval.content import arbitrary_keys, content_ids, ids_in_all_precisions
from metaicl.learners.retrieval.exact_search import best_in_order
from metaicl.learners.retrieval.exclusion import Exclusion
from metaicl.learners.retrieval.words import SKETCH, bag_values, bags, search_bags, sketches, word_weights
from metaicl.nets.backbones import MLP
from metaicl.nets.text_features import inverse_document_frequencies
from metaicl.spec import TaskSpec

RETRIEVERS = ("learned", "frozen", "random", "oracle")

Oracle = Callable[[Tensor], Tensor]
"""Inputs (..., *x_shape) to codes (..., K) whose inner products say what belongs together."""

_SHARPNESS = 10.0


class Retrieved(NamedTuple):
    """What was retrieved for each query, best first.

    Attributes:
        index: long (B, Q, k), item numbers; 0 where `real` is False.
        score: (B, Q, k), logits of p(item | query) up to a constant; 0 where `real` is False. A learned score has a
            gradient; those of random retrieval are all alike.
        real: bool (B, Q, k), False where fewer than k items are allowed.
    """

    index: Tensor
    score: Tensor
    real: Tensor


class Retriever(nn.Module):
    """A memory bank and what is compared in it.

    The keys of the bank are fixed features of inputs: unit word counts weighted by inverse document frequency for
    tokens, unit vectors for other inputs, and the mean of such rows for an item of several. Beyond 1,024 words the keys
    are sketches of that size, so that a bank needs 4 kB for each item; they propose k + 256 items, which are then
    compared by all words (of the best five by all words, at least 98 in 100 are found among 8,192 headlines). "frozen"
    takes the items whose features are most alike. "learned" lets these propose candidates and ranks them by the cosine
    of codes, which an encoder makes from the keys of query and items at every call: the index never grows stale, and
    the scores have a gradient. "random" takes arbitrary items, the same ones for the same input. "oracle" compares the
    codes of a function that is given.

    Args:
        spec: The inputs.
        mode: "learned", "frozen", "random" or "oracle".
        encoder: (rows, K) -> (rows, any) for learned codes of keys, K = 1,024 for tokens; None builds a linear map for
            tokens and an MLP for other inputs, of size 64.
        n_candidates: Items that fixed keys propose to a learned ranking; None ranks the whole bank.
        weighs: The scores are used as weights, so that their sharpness is trained.
        oracle: For mode "oracle".
        backend: Search of the bank.

    Raises:
        ValueError: If the mode is unknown, or "oracle" and no function given, or the other way round; or if an
            encoder is given for another mode than "learned".
    """

    importance: Tensor

    def __init__(
        self,
        spec: TaskSpec,
        *,
        mode: str,
        encoder: nn.Module | None = None,
        n_candidates: int | None = None,
        weighs: bool = True,
        oracle: Oracle | None = None,
        backend: str = "exact",
    ) -> None:
        """Start with an empty bank; `fill` gives it items."""
        super().__init__()
        self.spec, self.mode, self.oracle = spec, check_choice("retriever", mode, RETRIEVERS), oracle
        if (mode == "oracle") != (oracle is not None):
            raise ValueError(f"an oracle goes with retriever 'oracle' alone; got {oracle!r} for {mode!r}")
        if encoder is not None and mode != "learned":
            raise ValueError(f"an encoder goes with retriever 'learned' alone; got one for {mode!r}")
        self.n_candidates = None if n_candidates is None else check_count("n_candidates", n_candidates)
        self.bank = MemoryBank(backend=backend)
        self.has_sketches = spec.vocabulary is not None and spec.vocabulary > SKETCH
        size = SKETCH if spec.x_kind == "tokens" else math.prod(spec.x_shape)
        self.register_buffer("importance", torch.ones(spec.vocabulary or size))
        if mode == "learned":
            plain = nn.Linear(size, 64, bias=False) if spec.x_kind == "tokens" else MLP((size, 64, 64))
            self.encoder = plain if encoder is None else encoder
        if weighs and mode in ("learned", "frozen"):
            self.log_sharpness = nn.Parameter(torch.tensor(_SHARPNESS).log())

    def fill(self, x: Tensor, values: Mapping[str, Tensor], *, classes: Tensor | None = None) -> None:
        """Replace the content of the bank. The word importances are fitted to it, once and for all that comes later.

        Args:
            x: (M, R, *x_shape), the rows of each item, from which its key is made.
            values: Name -> (M, ...), what is retrieved.
            classes: long (M,), source class of each item, -1 = none; or (M, R), of each of its rows.
        """
        self.bank.clear()
        if self.spec.x_kind == "tokens":
            self.importance.copy_(inverse_document_frequencies(x.flatten(0, 1), len(self.importance)))
        self.grow(x, values, classes=classes)

    def grow(self, x: Tensor, values: Mapping[str, Tensor], *, classes: Tensor | None = None) -> None:
        """Append items; nothing is fitted or trained. Arguments as in `fill`."""
        rows = ids_in_all_precisions(x, self.spec).flatten(1)  # before they are rounded to that of the learner
        x, values = self._cast(x), {name: self._cast(value) for name, value in values.items()}
        with torch.no_grad():
            keys = self._search_keys(x, "key")
            if self.has_sketches:
                values = {**values, **bag_values(x, self.importance)}
        self.bank.add(keys, values, rows=rows, classes=classes)

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.importance.dtype) if value.is_floating_point() else value

    def forward(self, x: Tensor, k: int, *, classes: Tensor | None = None) -> Retrieved:
        """The k items for each input, never one that holds the input itself or a copy of it.

        Args:
            x: (B, Q, *x_shape).
            k: How many.
            classes: long (B, any), source classes that a task may not retrieve; -1 means nothing.
        """
        exclude = Exclusion(
            rows=content_ids(x, self.spec)[..., None], classes=None if classes is None else classes[:, None]
        )
        queries = self._search_keys(x[:, :, None], "query")
        if self.mode != "learned":
            found = self._search(x, queries, k, exclude)
            score = found.score.masked_fill(~found.real, 0.0).to(queries.dtype)
            sharpness = {"random": 0.0, "frozen": 0.0, "oracle": _SHARPNESS}[self.mode]
            if hasattr(self, "log_sharpness"):
                sharpness = self.log_sharpness.exp()
            return Retrieved(found.index, score * sharpness, found.real)
        n_candidates = len(self.bank) if self.n_candidates is None else min(self.n_candidates, len(self.bank))
        found = self._search(x, queries, max(n_candidates, k), exclude)
        score = (self.codes(queries) @ self.codes(self.bank.keys).mT).gather(-1, found.index)
        best = best_in_order(score.detach().masked_fill(~found.real, -torch.inf), k).index
        index, real, score = (value.gather(-1, best) for value in (found.index, found.real, score))
        sharpness = self.log_sharpness.exp() if hasattr(self, "log_sharpness") else _SHARPNESS
        return Retrieved(index, (score * sharpness).masked_fill(~real, 0.0), real)

    def keys(self, x: Tensor) -> Tensor:
        """Fixed unit keys (..., K) of items x (..., R, *x_shape)."""
        if self.spec.x_kind == "tokens":
            return sketches(x.flatten(-2), word_weights(x, self.importance).flatten(-2), len(self.importance))
        rows = unit_rows(x.flatten(x.ndim - len(self.spec.x_shape)).to(self.importance.dtype))
        return unit_rows(rows.mean(-2))

    def codes(self, keys: Tensor) -> Tensor:
        """Learned unit codes (..., any) of fixed keys (..., K)."""
        return unit_rows(self.encoder(keys.flatten(0, -2)).unflatten(0, keys.shape[:-1]))

    def _search(self, x: Tensor, queries: Tensor, k: int, exclude: Exclusion) -> Found:
        """The k items whose fixed features are most like inputs x (B, Q, *x_shape) with these keys (B, Q, K)."""
        whole_bank = self.mode == "learned" and k >= len(self.bank)  # then its order is of no use
        if not self.has_sketches or self.mode not in ("frozen", "learned") or whole_bank:
            return self.bank.search(queries, k, exclude=exclude)
        whole = bags(x, word_weights(x[..., None, :], self.importance)[..., 0, :], len(self.importance))
        return search_bags(self.bank, queries, whole, k, exclude=exclude)

    def _search_keys(self, x: Tensor, role: str) -> Tensor:
        """What the bank compares, (..., K), for items or queries x (..., R, *x_shape)."""
        first = x.select(x.ndim - len(self.spec.x_shape) - 1, 0)
        if self.mode == "random":
            ids = content_ids(first, self.spec)
            if role == "key":  # copies of a row are different items
                ids = ids ^ torch.arange(len(self.bank), len(self.bank) + len(ids), device=ids.device)
            return arbitrary_keys(~ids if role == "query" else ids, self.importance.dtype)
        if self.oracle is not None:
            return self.oracle(first).to(self.importance.dtype)
        return self.keys(x)
