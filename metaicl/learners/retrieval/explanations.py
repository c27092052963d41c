"""Answers from what explains other points: retrieve explanations, read them in sets, weigh the answers of the sets."""

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_choice, check_count
from metaicl.episode import Examples
from metaicl.functional import categorical, unit_rows
from metaicl.learner import Learner, Traits
from metaicl.learners.retrieval.bank import MemoryBank
from metaicl.learners.retrieval.content import arbitrary_keys, content_ids
from metaicl.learners.retrieval.exclusion import Exclusion
from metaicl.mixtures import marginal
from metaicl.nets.counting import CountingReader
from metaicl.spec import NotServed, TaskSpec
from metaicl.task import TaskDistribution, derive_generator

RETRIEVERS = ("none", "learned", "frozen", "random", "oracle")
CONDITIONINGS = ("concatenate", "mean")

_KEY_SIZE = 64
_SHARPNESS = 10.0
_GAIN = 5.0  # twenty weights have to move further in an update than thousands of shared ones do
_N_ROWS = 512  # of a memory of rows without explanations


class PlaceBag(nn.Module):
    """Unit keys (..., K) of token rows (..., T): a weighted sum of fixed random vectors, one weight for each place.

    A token that occurs c times in a row counts log(1 + c) in all. With equal weights, rows are alike that hold the same
    tokens, at any place. Learned weights find out which places tell what belongs together.

    Args:
        spec: Token inputs.
        learned: Train the weights.
    """

    vectors: Tensor

    def __init__(self, spec: TaskSpec, *, learned: bool) -> None:
        """Draw the vectors, the same ones every time."""
        super().__init__()
        assert spec.vocabulary is not None  # the learner holds it
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("vectors", torch.randn(spec.vocabulary, _KEY_SIZE, generator=generator))
        self.log_weights = nn.Parameter(torch.zeros(spec.x_shape[0])) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        """Keys of rows x."""
        times = (x[..., None] == x[..., None, :]).sum(-1).to(self.vectors.dtype)
        weights = (x != 0) * times.log1p() / times
        if self.log_weights is not None:
            weights = weights * (_GAIN * self.log_weights).exp()
        return unit_rows((weights[..., None, :] @ self.vectors[x])[..., 0, :])


class ExplanationRetrieval(Learner[Tensor]):
    """Answer a query by explanations of other points that a retriever brings.

    The C k points of a memory that are most like the query are cut into k sets of C, best first. A reader answers
    for each set, and the answer is their marginal,

        p(y | x) = sum_j w_j p(y | x, E_j),    w = softmax_j (s sum_{i in E_j} key(x) . key(x_i)),

    so that the loss trains the retriever, too. The memory is filled by `prepare`: with what `tasks.training_points()`
    gives (x, y, explanations, index) where the tasks have it, otherwise with labeled rows of meta-training tasks, each
    explained by its label. A query never finds its own row nor a copy of it. The support is not read: what a task
    needs to know is in the memory, and nothing else is learned at test time.

    Keys in the memory are constants for the gradient, made anew `n_refreshes` times in a training run. For the first
    share `frozen_until` of it the retriever is left as it starts.

    Args:
        spec: Token inputs, classification.
        retriever: "none", the reader sees x alone; "frozen", most tokens in common; "learned", likewise with a trained
            weight for each place; "random"; "oracle", points of the same hidden task, which the first token names.
        n_sets: k.
        set_size: C.
        conditioning: "concatenate", the reader sees x and the C explanations at once (TextCat); "mean", it sees x with
            one at a time and its features are averaged (H-mean).
        reader: (R, T) and S sets (R, S, C, E) to features (R, S, D); None builds a `CountingReader`.
        explanation_length: E, where the reader is built here.
        dim: D, likewise.
        depth: Layers of the reader, likewise.
        n_refreshes: How often the keys of the memory are made anew in a training run.
        frozen_until: Share of the training run in which the retriever is not trained.
        backend: Search of the memory.

    Raises:
        ValueError: If the inputs are no tokens, a number is out of range or a name unknown; or, for the reader that is
            built here, if an input is a single token or the vocabulary has no token for every label.

    Reference:
        Hase & Bansal 2021, arXiv:2102.02201, section 5. Differs: reader and retriever are trained from scratch, and
        the retriever compares weighted bags of tokens in place of sentence embeddings; by default fewer explanations
        (4 sets of 2, there 6 of 6 or 4 of 4) and half as many refreshes (there five in each of 20 epochs).
    """

    traits = Traits(kinds=("classification",), instead=(("regression", "RetrievalAugmented"),), reads_support=False)
    retriever_open: Tensor
    refreshed: Tensor

    def __init__(
        self,
        spec: TaskSpec,
        *,
        retriever: str = "learned",
        n_sets: int = 4,
        set_size: int = 2,
        conditioning: str = "concatenate",
        reader: nn.Module | None = None,
        explanation_length: int = 5,
        dim: int = 64,
        depth: int = 2,
        n_refreshes: int = 50,
        frozen_until: float = 0.1,
        backend: str = "exact",
    ) -> None:
        """Build the reader, an empty memory and the keys."""
        super().__init__(spec)
        if spec.vocabulary is None:
            raise NotServed(f"ExplanationRetrieval needs token inputs (x_kind 'tokens'); got {spec.x_kind!r}")
        if not 0 <= frozen_until <= 1:
            raise ValueError(f"frozen_until must be in [0, 1]; got {frozen_until}")
        self.retriever = check_choice("retriever", retriever, RETRIEVERS)
        self.conditioning = check_choice("conditioning", conditioning, CONDITIONINGS)
        self.n_sets, self.set_size = check_count("n_sets", n_sets), check_count("set_size", set_size)
        self.explanation_length = check_count("explanation_length", explanation_length)
        self.n_refreshes, self.frozen_until = check_count("n_refreshes", n_refreshes), frozen_until
        if reader is None:
            _check_readable(spec, retriever)
            reader = CountingReader(spec.vocabulary, spec.x_shape[0], explanation_length, dim=dim, depth=depth)
        self.reader = reader
        nothing = torch.zeros(1, 1, 1, explanation_length, dtype=torch.long)
        with torch.no_grad():
            size = self.reader(nothing.new_zeros(1, *spec.x_shape), nothing).shape[2]
        self.head = nn.Linear(size, spec.output_size)
        self.bank = MemoryBank(backend=backend)
        self.place_bag = PlaceBag(spec, learned=retriever == "learned")
        self.log_sharpness = nn.Parameter(torch.tensor(_SHARPNESS).log(), requires_grad=retriever == "learned")
        self.register_buffer("retriever_open", torch.tensor(True))
        self.register_buffer("refreshed", torch.tensor(0))

    def prepare(self, tasks: TaskDistribution, *, seed: int) -> None:
        """Fill the memory with the explained points of the training set, or with labeled rows.

        Raises:
            ValueError: If the explanations have another length or tokens beyond the vocabulary, or an oracle is asked
                for an index that x does not show.
        """
        if self.retriever == "none":
            return
        training_points = getattr(tasks, "training_points", None)
        if training_points is None:
            x, explanations, index = self._labeled_rows(tasks, seed)
        else:
            points = training_points()
            x, explanations, index = points.x, points.explanations, points.index
        if explanations.shape[1] != self.explanation_length:
            raise ValueError(
                f"explanation_length must be that of the tasks, {explanations.shape[1]}; got {self.explanation_length}"
            )
        if isinstance(self.reader, CountingReader) and int(explanations.max()) >= self.reader.vectors.num_embeddings:
            raise ValueError(
                f"explanations must hold tokens below the vocabulary, {self.reader.vectors.num_embeddings}; got "
                f"{int(explanations.max())}"
            )
        if self.retriever == "oracle" and not bool((x[:, 0] == index).all()):
            raise ValueError("the oracle reads the index of a task in the first token of x, and these tasks hide it")
        x, explanations, index = (value.to(self.head.weight.device) for value in (x, explanations, index))
        self.bank.clear()
        with torch.no_grad():
            keys = self.keys(x, "memory")
        self.bank.add(keys, {"x": x, "explanations": explanations}, rows=content_ids(x, self.spec), tasks=index)

    def at(self, fraction: float) -> None:
        """Open the retriever for training after the share `frozen_until`; make new keys when it is time."""
        self.retriever_open.fill_(fraction >= self.frozen_until)
        due = int(fraction * self.n_refreshes)
        if self.retriever == "learned" and int(self.refreshed) != due:
            self.refreshed.fill_(due)
            with torch.no_grad():
                self.bank.refresh(torch.arange(len(self.bank)), self.keys(self.bank.values["x"], "memory"))

    def adapt(self, support: Examples) -> Tensor:
        """Nothing (B, 0): the support is not read."""
        return self.head.weight.new_zeros(support.n_tasks, 0)

    def predict(self, state: Tensor, x: Tensor) -> Distribution:
        """The marginal over the sets."""
        n_tasks, n_query = x.shape[:2]
        if self.retriever == "none":
            empty = x.new_zeros(n_tasks * n_query, 1, 0, self.explanation_length)
            return categorical(self.head(self.reader(x.flatten(0, 1), empty)[:, 0]).unflatten(0, (n_tasks, n_query)))
        explanations, real, scores = self.retrieve(x)
        features = self._read(x, explanations, real)
        known = real.any(-1)
        scores = scores.masked_fill(~known & known.any(-1, keepdim=True), -torch.inf)
        return marginal(categorical(self.head(features)), scores.log_softmax(-1))

    def retrieve(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is found for inputs x (B, Q, T).

        Returns:
            Explanations long (B, Q, k, C, E), zeros where there is none; bool (B, Q, k, C), which are real; scores of
            the sets (B, Q, k), zero for random and oracle retrieval.
        """
        queries = self.keys(x, "query")
        exclude = Exclusion(rows=content_ids(x, self.spec)[..., None])
        index, _, real = self.bank.search(queries, self.n_sets * self.set_size, exclude=exclude)
        if self.retriever == "oracle":
            real = real & (self.bank.task_ids[index] == x[..., :1])
        explanations = self.bank.values["explanations"][index] * real[..., None]
        scores = (self.bank.keys[index] @ queries[..., None])[..., 0] * real
        scores = scores if self.retriever in ("learned", "frozen") else torch.zeros_like(scores)
        sets = (self.n_sets, self.set_size)
        scores = self.log_sharpness.exp() * scores.unflatten(-1, sets).sum(-1)
        scores = torch.where(self.retriever_open, scores, scores.detach())
        return explanations.unflatten(2, sets), real.unflatten(-1, sets), scores

    def keys(self, x: Tensor, role: str) -> Tensor:
        """What the memory compares, (..., K), for rows x (..., T) of the "memory" or a "query"."""
        dtype = self.head.weight.dtype
        if self.retriever == "oracle":
            return arbitrary_keys(x[..., 0], dtype, size=_KEY_SIZE)
        if self.retriever == "random":  # arbitrary, and the same for the same row
            ids = content_ids(x, self.spec)
            return arbitrary_keys(~ids if role == "query" else ids, dtype)
        return self.place_bag(x)

    def _read(self, x: Tensor, explanations: Tensor, real: Tensor) -> Tensor:
        """Features (B, Q, k, D) of each input with each set."""
        rows, said = x.flatten(0, 1), explanations.flatten(0, 1)
        if self.conditioning == "concatenate":
            return self.reader(rows, said).unflatten(0, x.shape[:2])
        features = (
            self.reader(rows, said.flatten(1, 2)[:, :, None]).unflatten(1, real.shape[2:]).unflatten(0, x.shape[:2])
        )
        weights = (real | ~real.any(-1, keepdim=True)).to(features.dtype)[..., None]  # without any, x alone
        return (features * weights).sum(-2) / weights.sum(-2)

    def _labeled_rows(self, tasks: TaskDistribution, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (M, T), explanations (M, E) that give their label, and no hidden task (M,)."""
        size = -(-_N_ROWS // self.spec.output_size)
        rows = tasks.sample(
            size, split="train", n_shot=1, n_query=1, generator=derive_generator(seed, "memory")
        ).support
        x, y = rows.x[rows.real], rows.y[rows.real]
        explanations = torch.nn.functional.pad(y[:, None] + 1, (0, self.explanation_length - 1))
        return x, explanations, torch.full_like(y, -1)


def _check_readable(spec: TaskSpec, retriever: str) -> None:
    """Hold that a `CountingReader` can read inputs, and labels as explanations: those of tasks that give no others."""
    if spec.x_shape[0] < 2:
        raise ValueError(
            f"a CountingReader needs inputs of at least 2 tokens; got x_shape={spec.x_shape}. Give a reader"
        )
    if retriever != "none" and spec.output_size >= (spec.vocabulary or 0):
        raise ValueError(
            f"labels are told as tokens 1 .. n_way={spec.output_size}, so vocabulary must be at least "
            f"{spec.output_size + 1}; got {spec.vocabulary}. Give a reader with a larger one"
        )
