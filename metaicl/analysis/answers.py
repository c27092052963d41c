"""What a learner answers at every prefix of a stream, for fresh queries, and how its answers bend with the input."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution

from metaicl.checks import check_count
from metaicl.collation import collate
from metaicl.episode import Episode, Examples
from metaicl.learner import Learner, PredictsPrefixes
from metaicl.prefixes import take_prefix
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream, Split, TaskDistribution, check_distribution, check_is_learner, derive_seed
from metaicl.training import device_of, isolated_randomness, place, training_mode


def as_answers(distribution: Distribution, spec: TaskSpec) -> Tensor:
    """Predicted means (B, Q, y_dim), or class probabilities (B, Q, C), in float64."""
    if spec.kind == "regression":
        return distribution.mean.double()
    if not isinstance(distribution, Categorical):
        raise TypeError(f"a classification answer must be a Categorical; got {type(distribution).__name__}")
    return distribution.logits.double().softmax(-1)


def zero_answer(spec: TaskSpec, x: Tensor) -> Tensor:
    """Zero, or equal probabilities, for every query (B, Q, *x_shape): (B, Q, K)."""
    value = 0.0 if spec.kind == "regression" else 1 / spec.output_size
    return torch.full((*x.shape[:2], spec.output_size), value, dtype=torch.float64, device=x.device)


def real_prefix(examples: Examples) -> Examples:
    """The prefix itself: the state of a reference that has none."""
    return examples


def draw_episodes(
    tasks: TaskDistribution, *, n_shot: int, n_query: int, start: int, stop: int, split: Split, seed: int
) -> Episode:
    """Tasks start .. stop - 1 of the stream (seed, split) in one episode, B = stop - start, numbers in float64.

    Raises:
        TypeError: If `n_shot` is no integer.
        ValueError: If a task has fewer rows than another: a prefix of k rows must mean the same for all.
    """
    n_shot = check_count("n_shot", n_shot)  # a range would draw a number for each chunk
    stop = check_count("stop", stop, minimum=check_count("start", start, minimum=0) + 1)
    stream = EpisodeStream(tasks, seed=seed, split=split, n_shot=n_shot, n_query=n_query)
    episode = collate(list(stream.batches(start, stop, batch_size=stream.chunk_size))).to(dtype=torch.float64)
    for name, part in (("support", episode.support), ("query", episode.query)):
        if not bool(part.real.all()):
            raise ValueError(f"the analysis needs tasks of equally many rows; some rows of {name} are masked")
    return episode


@contextmanager
def still(learner: Learner, seed: int) -> Iterator[None]:
    """Eval mode and randomness of its own, so that looking changes nothing; gradients are left to the caller."""
    with training_mode(learner, False), isolated_randomness(derive_seed(seed, "learner"), device_of(learner)):
        yield


def batches(episode: Episode, size: int) -> Iterator[Episode]:
    """The tasks of an episode, `size` at a time."""
    return (episode[i : i + size] for i in range(0, episode.n_tasks, check_count("batch_size", size)))


def answers_at_prefixes(learner: Learner, stream: Examples, *, batch_size: int, seed: int) -> Tensor:
    """Answers (E, T, K) for every row of streams (E, T) from the rows before it, on the CPU.

    Not every learner can answer from nothing: where row 0 is not finite, zero (or equal probabilities) stands there.
    """
    episode, found = Episode(stream, stream), []
    with still(learner, seed), torch.no_grad():
        for part in batches(episode, batch_size):
            part = place(part, learner)
            found.append(_prefix_answers(learner, part.support).cpu())
    answers = torch.cat(found)
    first, blank = answers[:, :1], zero_answer(learner.spec, stream.x[:, :1])
    answers = torch.cat([torch.where(first.isfinite(), first, blank.cpu()), answers[:, 1:]], 1)
    check_answers(type(learner).__name__, answers)
    return answers


def _prefix_answers(learner: Learner, stream: Examples) -> Tensor:
    """By the learner's own pass over all prefixes, or by adapting to each; the answers may be any distribution."""
    if isinstance(learner, PredictsPrefixes):
        return as_answers(learner.predict_prefixes(stream), learner.spec)
    parts = [learner(take_prefix(stream, k), stream.x[:, k : k + 1]) for k in range(stream.n_rows)]
    return torch.cat([as_answers(part, learner.spec) for part in parts], 1)


def answers_at_length(learner: Learner, episode: Episode, length: int, *, batch_size: int, seed: int) -> Tensor:
    """Answers (E, Q, K) for the query of each episode from the first `length` support rows, on the CPU."""
    found = []
    with still(learner, seed), torch.no_grad():
        for part in batches(episode, batch_size):
            part = place(part, learner)
            distribution = learner(take_prefix(part.support, length), part.query.x)
            found.append(as_answers(distribution, learner.spec).cpu())
    answers = torch.cat(found)
    check_answers(type(learner).__name__, answers)
    return answers


def sensitivities(learner: Learner, episode: Episode, length: int, *, batch_size: int, seed: int) -> Tensor:
    """Derivatives of the answer by the query's own input after `length` support rows: (E, Q, D, K), on the CPU.

    Zero where an answer does not depend smoothly on its input.

    Raises:
        ValueError: If inputs are tokens, or answers depend on the other queries, so that a sum over queries mixes them.
    """
    if learner.spec.x_kind == "tokens":
        raise ValueError("a sensitivity needs inputs that are numbers; got tokens")
    if learner.traits.transductive:
        raise ValueError(f"{type(learner).__name__} is transductive: its answer has no derivative by one input alone")
    found = []
    with still(learner, seed):
        for part in batches(episode, batch_size):
            part = place(part, learner)
            with torch.no_grad():
                state = learner.adapt(take_prefix(part.support, length))

            def answer(x: Tensor, state: Any = state) -> Tensor:
                return as_answers(learner.predict(state, x), learner.spec)

            found.append(slopes(answer, part.query.x))
    return torch.cat(found)


def slopes(answer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Derivatives (B, Q, D, K) of a function of inputs (B, Q, *x_shape) that answers each from itself alone."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_(True)
        out = answer(x)
        columns = []
        for k in range(out.shape[-1]):
            slope = None
            if out.requires_grad:
                (slope,) = torch.autograd.grad(out[..., k].sum(), x, retain_graph=True, allow_unused=True)
            columns.append(torch.zeros_like(x) if slope is None else slope)
    return torch.stack([column.flatten(2) for column in columns], -1).double().cpu()


def check_answers(name: str, answers: Tensor) -> None:
    """Refuse answers (E, T, K) that are NaN or infinite.

    Raises:
        FloatingPointError: Naming who gave them, episode and row.
    """
    bad = ~torch.isfinite(answers).all(-1)
    if bool(bad.any()):
        task, row = bad.nonzero()[0].tolist()
        raise FloatingPointError(f"{name} answers NaN or infinity in episode {task}, row {row}")


def check_learners(learner: Learner | Sequence[Learner], tasks: TaskDistribution) -> list[Learner]:
    """The learners as a list, one for each training seed.

    Raises:
        TypeError: If one is no learner, or tasks is no distribution.
        ValueError: If there is none, or one was built for other tasks.
    """
    check_distribution(tasks)
    learners = [learner] if isinstance(learner, (Learner, type)) else list(learner)
    if not learners:
        raise ValueError("learner must be a Learner or several trained alike; got an empty sequence")
    for one in learners:
        check_is_learner(one)
        ours, theirs = shape_of(one.spec), shape_of(tasks.spec)
        if ours != theirs:
            raise ValueError(
                f"{type(one).__name__} was built for (kind, inputs, outputs) = {ours}; the tasks have {theirs}"
            )
    return learners


def shape_of(spec: TaskSpec) -> tuple[str, tuple[int, ...], int]:
    """What a learner has to share with the tasks it is asked about: kind, shape of an input, size of an answer."""
    return spec.kind, spec.x_shape, spec.output_size
