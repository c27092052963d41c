"""Class-incremental evaluation: classes arrive one after the other, and the answer is over all seen so far."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from metaicl.checks import check_choice, check_count, check_seed
from metaicl.episode import Examples
from metaicl.learner import Learner, Merges, Updates
from metaicl.plots import figure_with_panels
from metaicl.statistics import Array, Interval, interval, paired
from metaicl.task import SPLITS, Split, derive_generator, derive_seed
from metaicl.tasks.classes import ClassEpisodes
from metaicl.training import device_of, dtype_of, isolated_randomness, training_mode

_AT_ONCE = 500  # test rows answered together


@dataclass(frozen=True)
class IncrementalCurve:
    """Accuracy over all classes seen so far, as classes arrive.

    Args:
        checkpoints: Numbers of classes seen, K of them.
        accuracy: (S, K), stream orders by checkpoints, in [0, 1].
        n_clients: Clients among which the rows were dealt.
        orders: The seed of each stream order.
    """

    checkpoints: tuple[int, ...]
    accuracy: Array
    n_clients: int
    orders: tuple[int, ...]

    def interval(self, n_classes: int) -> Interval:
        """Mean and 95 % interval over stream orders, after `n_classes` classes."""
        return interval(self._column(n_classes), bounds=(0, 1))

    def difference(self, other: "IncrementalCurve", n_classes: int) -> Interval:
        """The interval of this accuracy minus the other's, in the same stream orders.

        Raises:
            ValueError: If they were measured in different ones.
        """
        if self.orders != other.orders:
            raise ValueError(f"both curves must be of the same stream orders; got {self.orders} and {other.orders}")
        return interval(paired(self._column(n_classes), other._column(n_classes)), bounds=(-1, 1))

    def _column(self, n_classes: int) -> Array:
        if n_classes not in self.checkpoints:
            raise ValueError(f"n_classes must be one of the checkpoints {self.checkpoints}; got {n_classes}")
        return self.accuracy[:, [self.checkpoints.index(n_classes)]]


def incremental_accuracy(
    learner: Learner[Any],
    train: Tensor,
    test: Tensor,
    *,
    checkpoints: Sequence[int],
    orders: Sequence[int] = (0, 1, 2),
    n_clients: int = 1,
    n_holders: int = 2,
    classes_per_round: int = 1,
) -> IncrementalCurve:
    """Stream classes to a learner with `update`, and ask about all of them at every checkpoint.

    An order (one for each seed) says in which order the classes come; labels are their places in it. In each round
    some new classes arrive. With several clients each class goes to some of them, who share its rows at random, so that
    clients overlap in classes and never in rows. Every client updates a state of its own, and at a checkpoint the
    states are merged. The learner is in eval mode and runs without gradients; what it draws comes from an address of
    the order.

    Args:
        learner: One with `update`, and with `merge` for several clients. Its answer may be over more classes than were
            seen; those are left out.
        train: Rows to learn from, classes by rows (K, N, *x_shape).
        test: Rows to be judged on, (K, T, *x_shape).
        checkpoints: Numbers of classes, increasing, at most K.
        orders: A seed for each stream order.
        n_clients: Clients.
        n_holders: How many clients hold rows of a class, where there are so many.
        classes_per_round: Classes that arrive together.

    Raises:
        FloatingPointError: If an answer is NaN.
        TypeError: If the learner lacks a method, rows are no tensor, or a count is no int.
        ValueError: If an order comes twice, shapes, checkpoints or counts do not fit each other, or the learner answers
            over fewer classes than it has seen.
    """
    if not isinstance(learner, Updates):
        raise TypeError(f"a stream of classes needs a learner with update; {type(learner).__name__} has none")
    if check_count("n_clients", n_clients) > 1 and not isinstance(learner, Merges):
        raise TypeError(f"{n_clients} clients need a learner with merge; {type(learner).__name__} has none")
    n_holders = check_count("n_holders", n_holders)
    classes_per_round = check_count("classes_per_round", classes_per_round)
    found = _checked_checkpoints(checkpoints, train, test)
    orders = _checked_orders(orders)
    rows = []
    for seed in orders:
        draws = isolated_randomness(derive_seed(seed, "incremental"), device_of(learner))
        with training_mode(learner, False), draws, torch.no_grad():
            stream = _Stream(learner, train, test, seed=seed, n_clients=n_clients, n_holders=min(n_holders, n_clients))
            rows.append(list(stream.accuracies(found, classes_per_round)))
    return IncrementalCurve(found, np.array(rows), n_clients, orders)


def plot_curves(curves: Mapping[str, IncrementalCurve], *, title: str = "Classes one by one") -> Figure:
    """Accuracy against the number of classes seen, by name.

    Bands are 95 % intervals over stream orders. They have no width where all orders agree: what a few equal numbers
    leave possible is told by `IncrementalCurve.interval`, and would cover everything else.
    """
    with figure_with_panels(width=6.4, height=4.0) as (figure, axes):
        for name, curve in curves.items():
            found = [curve.interval(n) for n in curve.checkpoints]
            (line,) = axes.plot(curve.checkpoints, [one.mean for one in found], "o-", markersize=3.5, label=name)
            agree = np.ptp(curve.accuracy, axis=0) == 0
            ends = [(one.mean, one.mean) if same else one.ends for one, same in zip(found, agree, strict=True)]
            low, high = zip(*(pair or (one.mean, one.mean) for one, pair in zip(found, ends, strict=True)), strict=True)
            axes.fill_between(curve.checkpoints, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axes.set(title=title, xlabel="classes seen", ylabel="accuracy over all of them", ylim=(0, 1.02))
        axes.legend(fontsize=9)
    return figure


def rows_by_class(tasks: ClassEpisodes, *, split: Split, n_rows: int, seed: int = 0) -> Tensor:
    """Rows of every class of a split, drawn without replacement: (K, n_rows, *x_shape).

    Args:
        tasks: Classes of labelled rows.
        split: Whose classes.
        n_rows: Rows per class.
        seed: Which rows, and their order.

    Raises:
        ValueError: If a class has fewer rows.
    """
    n_rows = check_count("n_rows", n_rows)
    check_choice("split", split, SPLITS)
    picked = []
    for label in tasks.class_splits[split].tolist():
        ids = (tasks.source_classes == label).nonzero()[:, 0]
        if len(ids) < n_rows:
            name = tasks.class_names[label]
            raise ValueError(f"asked for {n_rows} rows per class; class {name!r} has {len(ids)}")
        picked.append(ids[torch.randperm(len(ids), generator=derive_generator(seed, "rows", label))[:n_rows]])
    return tasks.rows(torch.stack(picked))


class _Stream:
    """One stream order: who gets which rows when, and the states of the clients."""

    def __init__(self, learner: Any, train: Tensor, test: Tensor, *, seed: int, n_clients: int, n_holders: int) -> None:
        self.generator = derive_generator(seed, "stream of classes")
        order = torch.randperm(len(train), generator=self.generator)
        device, dtype = device_of(learner), dtype_of(learner) if train.is_floating_point() else None
        self.train, self.test = (rows[order].to(device=device, dtype=dtype) for rows in (train, test))
        self.learner, self.n_holders, self.seed = learner, n_holders, seed
        nothing = Examples(
            self.train[:1, :1], self._labels(0, 1)[:, :1], torch.zeros(1, 1, dtype=torch.bool).to(device)
        )
        self.states = [learner.adapt(nothing) for _ in range(n_clients)]

    def accuracies(self, checkpoints: Sequence[int], classes_per_round: int) -> Iterator[float]:
        """Learn class by class; the accuracy at each checkpoint."""
        seen = 0
        for checkpoint in checkpoints:
            while seen < checkpoint:
                stop = min(seen + classes_per_round, checkpoint)
                self._learn(seen, stop)
                seen = stop
            yield self._judge(seen)

    def _learn(self, start: int, stop: int) -> None:
        x = self.train[start:stop].flatten(0, 1)[None]
        y = self._labels(start, stop)
        owner = self._owners(stop - start)
        for client in range(len(self.states)):
            mine = (owner == client).nonzero()[:, 0].to(x.device)
            if not len(mine):
                continue
            try:
                self.states[client] = self.learner.update(self.states[client], Examples(x[:, mine], y[:, mine]))
            except ValueError as error:  # labels out of its range, most likely
                name = type(self.learner).__name__
                raise ValueError(
                    f"{name} does not take the classes up to {stop}: {error}. Build it for as many, by spec.with_n_way"
                ) from error

    def _owners(self, n_classes: int) -> Tensor:
        """The client of every row of a round, long (rows,)."""
        n_rows, clients = self.train.shape[1], len(self.states)
        chosen = torch.rand(n_classes, clients, generator=self.generator).argsort(1)[:, : self.n_holders]
        which = torch.randint(self.n_holders, (n_classes, n_rows), generator=self.generator)
        return chosen.gather(1, which).flatten()

    def _judge(self, seen: int) -> float:
        state = self.states[0] if len(self.states) == 1 else self.learner.merge(self.states)
        x, y, right = self.test[:seen].flatten(0, 1), self._labels(0, seen, self.test), 0
        for start in range(0, len(x), _AT_ONCE):
            logits = self.learner.predict(state, x[None, start : start + _AT_ONCE]).logits
            if logits.shape[-1] < seen:
                raise ValueError(
                    f"{seen} classes were seen, and {type(self.learner).__name__} answers over {logits.shape[-1]}; "
                    "build it for as many, by spec.with_n_way"
                )
            if bool(logits[..., :seen].isnan().any()):
                name = type(self.learner).__name__
                raise FloatingPointError(f"{name} answers NaN after {seen} classes of stream order {self.seed}")
            right += int((logits[..., :seen].argmax(-1) == y[:, start : start + _AT_ONCE]).sum())
        return right / len(x)

    def _labels(self, start: int, stop: int, rows: Tensor | None = None) -> Tensor:
        rows = self.train if rows is None else rows
        return torch.arange(start, stop, device=rows.device).repeat_interleave(rows.shape[1])[None]


def _checked_orders(orders: Sequence[int]) -> tuple[int, ...]:
    if isinstance(orders, (int, np.integer)) or not len(orders):
        raise ValueError(f"orders must be at least one seed, in a sequence; got {orders!r}")
    found = tuple(check_seed(seed) for seed in orders)
    if len(set(found)) < len(found):
        raise ValueError(f"orders must be different seeds; got {found}")
    return found


def _checked_checkpoints(checkpoints: Sequence[int], train: Tensor, test: Tensor) -> tuple[int, ...]:
    for name, rows in (("train", train), ("test", test)):
        if not isinstance(rows, Tensor):
            raise TypeError(f"{name} must be a tensor, classes by rows; got {type(rows).__name__}")
    fits = train.ndim >= 3 and len(train) == len(test) and train.shape[2:] == test.shape[2:]
    if not (fits and train.shape[1] and test.ndim == train.ndim and test.shape[1]):
        raise ValueError(
            "train and test must be classes by rows (K, N, *x_shape) and (K, T, *x_shape), N and T at least 1; "
            f"got {tuple(train.shape)} and {tuple(test.shape)}"
        )
    if isinstance(checkpoints, int):
        raise TypeError(f"checkpoints must be a sequence of numbers of classes; got {checkpoints}")
    found = tuple(check_count("checkpoints", checkpoint) for checkpoint in checkpoints)
    if not found or list(found) != sorted(set(found)) or found[-1] > len(train):
        raise ValueError(f"checkpoints must increase and end at most at the {len(train)} classes; got {found}")
    return found
