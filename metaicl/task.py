"""Task distributions, and episodes addressed by (seed, split, chunk)."""

import contextlib
import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from metaicl.checks import check_choice, check_count, check_episode, check_seed, check_shots
from metaicl.collation import collate
from metaicl.episode import Episode
from metaicl.interruption import ignore_signals
from metaicl.learner import Learner
from metaicl.packing import Packed
from metaicl.spec import TaskSpec

Split = Literal["train", "validation", "test"]
_CHUNKS_PER_MESSAGE, _BYTES_PER_MESSAGE = 16, 2**22  # from a worker

SPLITS: tuple[Split, ...] = get_args(Split)

EVAL_SEED = 20_240_229
"""The address of every evaluation; training seeds never share its stream, because the split differs too."""


class TaskDistribution(ABC):
    """A seeded sampler of tasks. A subclass sets `spec` and writes `sample`.

    Attributes:
        spec: What every task looks like.
        identity: Names of the latents that define a task. `audit_leakage` proves that no value of theirs
            occurs in two splits.
        source_classes: long (rows,), the class of each source row that `Examples.ids` can name; None where
            rows are made afresh. Memory banks use it to keep a task's own classes out.
        class_splits: A subclass with source classes may set it: for each split the classes that it owns, long
            (any,). Learners that give every meta-training class an output read it, and else look into drawn tasks.
        discrete: Whether equal rows occur by right although inputs are no whole numbers (they were, before they were
            scaled). The leakage audit tells such rows apart by their ids alone.
    """

    spec: TaskSpec
    identity: tuple[str, ...] = ()
    source_classes: Tensor | None = None
    discrete: bool = False

    @abstractmethod
    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Draw `n_tasks` tasks at once.

        Args:
            n_tasks: B.
            split: Where the tasks come from; no task of one split occurs in another.
            n_shot: Support rows, per class in classification and per task in regression. In a stream of classes
                (`spec.ordered`) a task has n_way times as many, of classes as they come.
            n_query: Query rows, likewise.
            generator: The only source of randomness.

        Returns:
            An episode with B = n_tasks.
        """

    def references(self) -> Mapping[str, Learner]:
        """The Bayes-optimal and closed-form learners of this family, by name; the best one first."""
        return {}


def derive_seed(*address: str | int) -> int:
    """A 63-bit seed for an address such as (seed, purpose, index); different addresses give different seeds.

    torch's generators on the CPU read the lower 32 bits of a seed: of 10,000 addresses two begin the same stream of
    random numbers with a probability of about one in a hundred.
    """
    digest = hashlib.blake2b("/".join(map(str, address)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def derive_generator(*address: str | int) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*address))


@contextlib.contextmanager
def single_precision() -> Iterator[None]:
    """Float32 as torch's default dtype inside, and as it was afterwards."""
    outside = torch.get_default_dtype()
    if outside == torch.float32:  # the rule, and there is nothing to be done
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(outside)


def check_distribution(tasks: object, name: str = "tasks") -> None:
    """Refuse what is no task distribution with a spec.

    Raises:
        TypeError: Naming what came, with a hint where it is a class of distributions.
    """
    if isinstance(tasks, TaskDistribution):
        spec = getattr(tasks, "spec", None)
        if not isinstance(spec, TaskSpec):
            raise TypeError(f"{name}.spec must be a TaskSpec; {type(tasks).__name__} has {spec!r}")
        return
    if isinstance(tasks, type):
        raise TypeError(f"{name} must be a TaskDistribution; got the class itself: {tasks.__name__}() makes one")
    raise TypeError(f"{name} must be a TaskDistribution; got {type(tasks).__name__}")


def check_is_learner(learner: object) -> None:
    """Refuse what is no learner.

    Raises:
        TypeError: Naming what came, with a hint where it is a class of learners.
    """
    if isinstance(learner, type):
        raise TypeError(f"learner must be a Learner; got the class itself: {learner.__name__}(tasks.spec) makes one")
    if not isinstance(learner, Learner):
        raise TypeError(f"learner must be a Learner; got {type(learner).__name__}")


class EpisodeStream(Dataset[Episode]):
    """An endless, addressed sequence of tasks: chunk `i` is a pure function of (seed, split, i).

    Whoever asks gets the same episodes: any batch size, any number of workers, before and after a resume. Distributions
    sample with float32 as torch's default dtype, whatever it is outside: `torch.rand` draws other numbers in float64.

    Args:
        tasks: The distribution.
        seed: Which stream.
        split: Which tasks.
        n_shot: Support rows per class (or per task in regression); a pair (low, high) draws one value
            for each chunk, both ends included.
        n_query: Query rows, likewise per class or per task.
        chunk_size: Tasks sampled together. It is part of the address.

    Raises:
        TypeError: If a count is no int.
        ValueError: If a count or the seed is out of range, or the split is unknown.
    """

    def __init__(
        self,
        tasks: TaskDistribution,
        *,
        seed: int,
        split: Split,
        n_shot: int | tuple[int, int],
        n_query: int,
        chunk_size: int = 25,
    ) -> None:
        """Check the address; nothing is sampled yet."""
        check_distribution(tasks)
        self.tasks = tasks
        self.seed = check_seed(seed)
        self.split: Split = check_choice("split", split, SPLITS)  # type: ignore[assignment]  # one of SPLITS
        self.n_shot = check_shots(n_shot)
        self.n_query = check_count("n_query", n_query)
        self.chunk_size = check_count("chunk_size", chunk_size)

    def __getitem__(self, index: int) -> Episode:
        """Chunk `index`: an episode with B = chunk_size, every value of it checked against the spec.

        Raises:
            ValueError: If the distribution gives something else, naming chunk and task.
            TypeError: Likewise, of a dtype.
        """
        index = check_count("index", index, minimum=0)
        with single_precision():
            return self._chunk(index)

    def _chunk(self, index: int) -> Episode:
        generator = derive_generator(self.seed, self.split, index)
        low, high = self.n_shot
        n_shot = low if low == high else int(torch.randint(low, high + 1, (), generator=generator))
        where = f"chunk {index} of {type(self.tasks).__name__} (seed {self.seed}, split {self.split!r})"
        try:
            episode = self.tasks.sample(
                self.chunk_size, split=self.split, n_shot=n_shot, n_query=self.n_query, generator=generator
            )
        except Exception as error:
            error.add_note(f"raised while sampling {where}")
            raise
        if not isinstance(episode, Episode) or episode.n_tasks != self.chunk_size:
            got = f"{episode.n_tasks} tasks" if isinstance(episode, Episode) else type(episode).__name__
            raise ValueError(f"{where} must be an Episode of n_tasks = {self.chunk_size} tasks; got {got}")
        try:
            check_episode(episode, self.tasks.spec)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None
        return _without_graph(episode)

    def try_largest(self) -> None:
        """Sample one task with as many shots as any chunk may have, so that a split that cannot give it is named early.

        Raises:
            ValueError: As the distribution raises it.
        """
        generator = derive_generator(self.seed, self.split, "largest")
        with single_precision():
            self.tasks.sample(1, split=self.split, n_shot=self.n_shot[1], n_query=self.n_query, generator=generator)

    def batches(self, start: int, stop: int, *, batch_size: int, workers: int = 0) -> Iterator[Episode]:
        """Tasks start .. stop - 1 in batches of `batch_size`, the last one smaller.

        Args:
            start: First task.
            stop: One past the last task.
            batch_size: B of each batch; it changes nothing but the cut.
            workers: Processes that sample ahead; 0 samples here.
        """
        batch_size = check_count("batch_size", batch_size)
        stop = check_count("stop", stop, minimum=check_count("start", start, minimum=0))
        pending: list[Episode] = []
        for chunk in self._pieces(start, stop, workers):
            pending.append(chunk)
            while sum(map(len, pending)) >= batch_size:
                joined = collate(pending) if len(pending) > 1 else pending[0]
                yield joined[:batch_size]
                pending = [joined[batch_size:]] if len(joined) > batch_size else []
        if pending:
            yield collate(pending)

    def chunks(self, start: int, stop: int, *, workers: int = 0) -> Iterator[Episode]:
        """Chunks start .. stop - 1, sampled here or ahead in `workers` processes."""
        if check_count("workers", workers, 0) == 0 or start == stop:
            yield from (self[index] for index in range(start, stop))
            return
        first = self[start]
        yield first
        # Sending costs per message: small chunks travel together.
        size = max(1, min(_CHUNKS_PER_MESSAGE, _BYTES_PER_MESSAGE // max(len(Packed.pack([first]).content), 1)))
        with warnings.catch_warnings():  # the caller asked for so many, be there a core for each or not
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                _Messages(self),
                batch_size=None,
                sampler=[range(i, min(i + size, stop)) for i in range(start + 1, stop, size)],
                num_workers=workers,
                worker_init_fn=_ignore_signals,
                generator=torch.Generator(),  # it would draw the seed of its workers from the global one
            )
            messages = iter(loader)
        for message in messages:
            yield from message.unpack()

    def _pieces(self, start: int, stop: int, workers: int) -> Iterator[Episode]:
        if start == stop:
            return
        size = self.chunk_size
        first, last = start // size, -(-stop // size)
        for index, chunk in zip(range(first, last), self.chunks(first, last, workers=workers), strict=True):
            yield chunk[max(start - index * size, 0) : min(stop - index * size, size)]


def _without_graph(episode: Episode) -> Episode:
    """The episode as data: a net that labels its rows leaves a graph, which can neither be copied nor sent."""
    parts = (episode.support, episode.query)
    leaves = [leaf for part in parts for leaf in (part.x, part.y)] + list(episode.latents.values())
    return pytree.tree_map(torch.detach, episode) if any(leaf.requires_grad for leaf in leaves) else episode


def _ignore_signals(worker: int) -> None:
    """The parent still needs its workers to end an update."""
    ignore_signals()


class _Messages(Dataset[Packed]):
    """What a worker is asked for: a range of chunks."""

    def __init__(self, stream: EpisodeStream) -> None:
        self.stream = stream

    def __getitem__(self, indices: range) -> Packed:
        return Packed.pack([self.stream[index] for index in indices])


def episodes(
    tasks: TaskDistribution, *, seed: int, split: Split, start: int, stop: int, n_shot: int, n_query: int
) -> Iterator[Episode]:
    """Tasks start .. stop - 1 of the stream (seed, split), one at a time (B = 1).

    The shortest way to look at episodes; training and evaluation use `EpisodeStream`.
    """
    stream = EpisodeStream(tasks, seed=seed, split=split, n_shot=n_shot, n_query=n_query)
    return stream.batches(start, stop, batch_size=1)
