"""What every task of a distribution looks like: the first argument of every learner."""

import operator
from dataclasses import dataclass, replace
from typing import Literal, SupportsIndex

import numpy as np

Kind = Literal["regression", "classification"]
XKind = Literal["vector", "image", "tokens"]


class NotServed(ValueError):
    """Tasks that a learner is not made for, such as images for one that reads tokens.

    A comparison lists such a learner as not served and goes on; any other error in building one ends it.
    """


@dataclass(frozen=True)
class TaskSpec:
    """What every task of a distribution looks like; learners are built from it.

    Args:
        kind: "regression" or "classification".
        x_shape: Shape of one input: (D,) for vectors, (channels, height, width) for images, (T,) for tokens.
        x_kind: "vector", "image" or "tokens".
        y_dim: Outputs of a regression task.
        n_way: Classes of a classification task.
        ordered: The rows are a stream (dynamical systems, languages), not a set.
        vocabulary: Number of token ids, padding (id 0) included; for token inputs only.

    Raises:
        TypeError: If a size is no integer, or `ordered` no bool.
        ValueError: If the fields contradict each other.
    """

    kind: Kind
    x_shape: tuple[int, ...]
    x_kind: XKind = "vector"
    y_dim: int | None = None
    n_way: int | None = None
    ordered: bool = False
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        """Check that the fields fit each other."""
        if isinstance(self.x_shape, int):
            raise TypeError(f"TaskSpec.x_shape must be a tuple, the shape of one row; got {self.x_shape}")
        if any(isinstance(size, bool) or not isinstance(size, SupportsIndex) for size in self.x_shape):
            raise TypeError(f"TaskSpec.x_shape must be integers; got {self.x_shape}")
        object.__setattr__(self, "x_shape", tuple(operator.index(size) for size in self.x_shape))
        if not isinstance(self.ordered, (bool, np.bool_)):
            raise TypeError(f"TaskSpec.ordered must be True or False; got {self.ordered!r}")
        object.__setattr__(self, "ordered", bool(self.ordered))
        if self.kind not in ("regression", "classification"):
            raise ValueError(f"TaskSpec.kind must be 'regression' or 'classification'; got {self.kind!r}")
        for name in ("n_way", "y_dim", "vocabulary"):
            self._check_size(name)
        ranks = {"vector": 1, "image": 3, "tokens": 1}
        if self.x_kind not in ranks:
            raise ValueError(f"TaskSpec.x_kind must be one of {sorted(ranks)}; got {self.x_kind!r}")
        if len(self.x_shape) != ranks[self.x_kind] or min(self.x_shape) < 1:
            raise ValueError(
                f"TaskSpec.x_shape must have {ranks[self.x_kind]} positive sizes for {self.x_kind}; got {self.x_shape}"
            )
        if self.kind == "regression" and (self.n_way is not None or self.y_dim is None or self.y_dim < 1):
            raise ValueError(
                f"a regression TaskSpec needs y_dim >= 1 and no n_way; got y_dim={self.y_dim}, n_way={self.n_way}"
            )
        if self.kind == "classification" and (self.y_dim is not None or self.n_way is None or self.n_way < 2):
            raise ValueError(
                f"a classification TaskSpec needs n_way >= 2 and no y_dim; got n_way={self.n_way}, y_dim={self.y_dim}"
            )
        if self.vocabulary is not None and self.vocabulary < 1:
            raise ValueError(f"TaskSpec.vocabulary must be an int >= 1; got {self.vocabulary}")
        if (self.x_kind == "tokens") != (self.vocabulary is not None):
            raise ValueError(
                "TaskSpec.vocabulary goes with x_kind 'tokens', which needs one, and with no other; "
                f"got {self.vocabulary} for {self.x_kind!r}"
            )

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, SupportsIndex):
            raise TypeError(f"TaskSpec.{name} must be an int or None; got {value!r} ({type(value).__name__})")
        object.__setattr__(self, name, operator.index(value))

    @property
    def output_size(self) -> int:
        """Numbers a head needs to name an answer: n_way logits or y_dim means."""
        size = self.n_way if self.kind == "classification" else self.y_dim
        assert size is not None  # __post_init__ holds it
        return size

    @property
    def shapes(self) -> dict[str, object]:
        """What a learner has to be built for: kind and shapes of rows and answers, not how rows are drawn."""
        names = ("kind", "x_kind", "x_shape", "vocabulary", "n_way", "y_dim")
        return {name: getattr(self, name) for name in names}

    def with_n_way(self, n_way: int) -> "TaskSpec":
        """The same task with another number of classes."""
        return replace(self, n_way=n_way)
