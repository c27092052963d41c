"""Distributional signatures: how a word is distributed says how much it matters, whatever the word is."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count
from metaicl.episode import Examples
from metaicl.functional import categorical, class_weights, ridge_solve
from metaicl.learner import Learner, check_support_labels
from metaicl.learners.metric.embedding import CLASSIFIER
from metaicl.nets.lstm import BidirectionalLSTM
from metaicl.nets.text import masked_softmax
from metaicl.row_ids import look_up
from metaicl.spec import NotServed, TaskSpec
from metaicl.task import TaskDistribution, derive_generator

_COMMON = 1e-5  # epsilon of the general importance
_DRAWN = 256  # tasks whose words are counted where source rows are not known
_PENALTY = 1.0  # lambda of the ridge regression behind the task importance


@runtime_checkable
class HasSourceRows(Protocol):
    """Tasks over labeled rows whose classes are split, such as `TextClasses`."""

    source_classes: Tensor | None
    class_splits: Any

    def rows(self, ids: Tensor) -> Tensor:
        """Inputs (..., *x_shape) of the source rows `ids` (...,)."""
        ...


class SignatureState(NamedTuple):
    """What the support says.

    Attributes:
        words: (B, D, C), ridge weights from mean word vectors to classes: which words point to a class.
        classes: long (B, C), the place of each class among the classes counted by `prepare`; -1 = not among them.
        head: (B, D, C), ridge weights from text vectors to classes.
    """

    words: Tensor
    classes: Tensor
    head: Tensor


class DistributionalSignatures(Learner[SignatureState]):
    """Attention over words, from two numbers for each of them, and a ridge head on the weighted sum of word vectors.

    The numbers are how rare a word is in general, s(w) = eps / (eps + p(w)), and how much it points to one of the
    classes at hand, t(w) = max_c |e_w W_c| with W the ridge regression of labels on mean word vectors of the
    support. A small bidirectional LSTM reads them, and never the words themselves, so that what it learns holds for
    words it has never met.

    p(w) is counted by `prepare` on meta-training rows. A task of meta-training takes its own classes out of the
    count, as new classes will not be in it either; they are found by `Examples.ids`, and where there are none, all stay
    in. Without `prepare` every word is equally rare.

    Args:
        spec: A classification spec with token inputs.
        vectors: Frozen word vectors (vocabulary, D), for instance of `cooccurrence_vectors`; they are scaled to unit
            mean square length over those that are not the origin. None draws random ones.
        dim: D of the random vectors.
        hidden: Size of each direction of the LSTM.
        dropout: Share of the LSTM's outputs that is dropped in training.

    Raises:
        ValueError: If the spec has no token inputs or is no classification spec, or the vectors do not fit it.

    Reference:
        Bao, Wu, Chang & Barzilay, 2020, arXiv:1908.06039, equations 1 to 5, with the settings of their code. Differs:
        no pretrained vectors unless you give some; the ridge head has no offset common to all classes, which the
        softmax would not notice; in meta-training, p(w) needs `ids` to leave the task's own classes out.
    """

    traits = CLASSIFIER

    def __init__(
        self,
        spec: TaskSpec,
        *,
        vectors: Tensor | None = None,
        dim: int = 256,
        hidden: int = 25,
        dropout: float = 0.1,
    ) -> None:
        """Keep the word vectors; build the attention."""
        super().__init__(spec)
        if spec.vocabulary is None:
            raise NotServed(f"DistributionalSignatures needs token inputs; got x_kind {spec.x_kind!r}; use RidgeHead")
        if vectors is None:
            vectors = torch.randn(spec.vocabulary, check_count("dim", dim))
        if vectors.ndim != 2 or len(vectors) != spec.vocabulary:
            raise ValueError(f"vectors must be (vocabulary = {spec.vocabulary}, D); got {tuple(vectors.shape)}")
        if not bool(vectors.isfinite().all()):
            words = int((~vectors.isfinite().all(1)).sum())
            raise ValueError(f"vectors must be finite; got NaN or Inf for {words} words. Give unknown words zeros")
        self.vectors: Tensor
        self.row_classes: Tensor
        self.counts: Tensor
        self.register_buffer("vectors", _unit_length(vectors))
        self.register_buffer("row_classes", torch.empty(0, dtype=torch.long))  # (rows,), place among `counts` or -1
        self.register_buffer("counts", torch.empty(0, spec.vocabulary))  # (classes, vocabulary)
        self.read = BidirectionalLSTM(2, hidden)
        self.score = nn.Sequential(nn.Dropout(dropout), nn.Linear(2 * hidden, 1))
        self.log10_penalty = nn.Parameter(torch.tensor(-1.0))
        self.log10_scale = nn.Parameter(torch.tensor(0.0))

    def prepare(self, tasks: TaskDistribution, *, seed: int) -> None:
        """Count the words of every meta-training class.

        Where the tasks do not tell their source rows, words of meta-training tasks drawn at the address
        (seed, "words") are counted together, and a task cannot leave its own classes out.
        """
        if not isinstance(tasks, HasSourceRows) or tasks.source_classes is None:
            drawn = tasks.sample(_DRAWN, split="train", n_shot=2, n_query=1, generator=derive_generator(seed, "words"))
            counts = torch.bincount(drawn.support.x.flatten(), minlength=self.counts.shape[1])[None]
            self._keep(counts, self.row_classes.new_empty(0))
            return
        owned = torch.as_tensor(tasks.class_splits["train"])
        match = tasks.source_classes[:, None] == owned
        counted = [
            torch.bincount(tasks.rows(match[:, c].nonzero()[:, 0]).flatten(), minlength=self.counts.shape[1])
            for c in range(len(owned))
        ]
        self._keep(torch.stack(counted), torch.where(match.any(1), match.long().argmax(1), -1))

    def adapt(self, support: Examples) -> SignatureState:
        """Two ridge regressions: on mean word vectors for the attention, and on what it attends to."""
        check_support_labels(self.spec, support)
        targets = class_weights(support.y, self.spec.output_size, support.mask, self.vectors.dtype)
        embedded = self.vectors[support.x]  # (B, N, T, D)
        real = (support.x != 0).to(embedded.dtype)
        mean = (embedded * real[..., None]).sum(-2) / real.sum(-1, keepdim=True).clamp(min=1)
        words = ridge_solve(mean, targets, _PENALTY, support.mask)
        classes = self._classes(support)
        texts = self._texts(support.x, words, classes)
        return SignatureState(words, classes, ridge_solve(texts, targets, 10**self.log10_penalty, support.mask))

    def predict(self, state: SignatureState, x: Tensor) -> Distribution:
        """The ridge head on the attended words of each text."""
        return categorical(10**self.log10_scale * (self._texts(x, state.words, state.classes) @ state.head))

    def general_importance(self, tokens: Tensor, classes: Tensor) -> Tensor:
        """s(w) of tokens (B, N, T), with the classes (B, C) taken out of the count: (B, N, T), in (0, 1]."""
        if not len(self.counts):
            return torch.ones(tokens.shape, dtype=self.vectors.dtype, device=tokens.device)
        own = self.counts[classes.clamp(min=0)] * (classes >= 0)[..., None]  # (B, C, vocabulary)
        rest = self.counts.sum(0) - own.sum(1)  # (B, vocabulary)
        share = rest / rest.sum(-1, keepdim=True).clamp(min=1)
        return _COMMON / (_COMMON + share.gather(1, tokens.flatten(1)).unflatten(1, tokens.shape[1:]))

    def task_importance(self, tokens: Tensor, words: Tensor) -> Tensor:
        """t(w) of tokens (B, N, T) under ridge weights (B, D, C): (B, N, T), not negative."""
        flat = self.vectors[tokens.flatten(1)] @ words  # (B, N T, C)
        return flat.abs().amax(-1).unflatten(1, tokens.shape[1:])

    def attention(self, tokens: Tensor, words: Tensor, classes: Tensor) -> Tensor:
        """Weights (B, N, T) of the words of each text; they sum to one, or are all zero where there is no word."""
        signals = [self.general_importance(tokens, classes), self.task_importance(tokens, words)]
        real = (tokens != 0).flatten(0, 1)
        h = self.read(torch.stack(signals, -1).flatten(0, 1), real)
        return masked_softmax(self.score(h)[..., 0], real).unflatten(0, tokens.shape[:2])

    def _keep(self, counts: Tensor, row_classes: Tensor) -> None:
        self.counts, self.row_classes = counts.to(self.counts), row_classes.to(self.row_classes)
        self.counts[:, 0] = 0  # padding is no word

    def _texts(self, tokens: Tensor, words: Tensor, classes: Tensor) -> Tensor:
        weights = self.attention(tokens, words, classes)
        return (weights[..., None, :] @ self.vectors[tokens])[..., 0, :]

    def _classes(self, support: Examples) -> Tensor:
        n_way = self.spec.output_size
        places = look_up(self.row_classes, support)
        label = support.y[..., None] == torch.arange(n_way, device=support.y.device)  # (B, N, C)
        return F.pad(places[..., None].masked_fill(~label, -1), (0, 0, 1, 0), value=-1).amax(1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("row_classes", "counts"):
            saved = state_dict.get(prefix + name)
            if saved is not None:  # their lengths are the source's, not the architecture's
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _unit_length(vectors: Tensor) -> Tensor:
    vectors = vectors.detach().to(torch.get_default_dtype())  # that of what is trained on them
    squares = vectors.square().sum(-1)
    return vectors * ((squares > 0).sum().clamp(min=1) / squares.sum().clamp(min=1e-12)).sqrt()
