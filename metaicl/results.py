"""One learner, one seed, one task distribution: what a comparison is made of, and how it is stored."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from metaicl.checks import check_choice
from metaicl.evaluation import Evaluation
from metaicl.metrics import Calibration

Role = Literal["learner", "reference"]
Status = Literal["finished", "failed", "not served"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one learner with one seed on one task distribution.

    Args:
        task: Name of the task distribution.
        learner: Name of the learner.
        role: "learner", or "reference" for what `tasks.references()` gave.
        status: "finished", "failed" (it diverged or ran out of memory) or "not served" (it is not for such tasks).
        reason: Why, where it did not finish.
        seed: What initial parameters and training episodes were drawn from; None for a learner that draws nothing
            (a closed form, or an instance that came trained).
        evaluations: By number of shots; empty where it did not finish.
        train_seconds: Wall-clock seconds of training; None where nothing was trained here.
        steps: Updates done.
        budget: The training configuration by field, the seed left out.
        history: `step`, `seconds` and `loss` of the training, for curves.
        sketches: For each example task of the report, the learner's predictions, see `metaicl.gallery`.
    """

    task: str
    learner: str
    role: Role = "learner"
    status: Status = "finished"
    reason: str = ""
    seed: int | None = None
    evaluations: Mapping[int, Evaluation] = field(default_factory=dict)
    train_seconds: float | None = None
    steps: int | None = None
    budget: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, list[float | None]] = field(default_factory=dict)
    sketches: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Check that a finished result has something to show, and that the others say why not."""
        check_choice("Result.role", self.role, ("learner", "reference"))
        check_choice("Result.status", self.status, ("finished", "failed", "not served"))
        if (self.status == "finished") != bool(self.evaluations):
            raise ValueError(f"a Result has evaluations exactly when it is finished; {self.learner!r} is {self.status}")
        if (self.status == "finished") == bool(self.reason):
            raise ValueError(
                f"a Result has a reason exactly when it is not finished; {self.learner!r} has {self.reason!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers survive exactly."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "evaluations"}
        evaluations = {str(shots): _from_evaluation(one) for shots, one in self.evaluations.items()}
        return plain | {"sketches": list(self.sketches), "evaluations": evaluations}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Result":
        """The inverse of `to_dict`.

        Raises:
            ValueError: If a field is missing or unknown.
        """
        try:
            evaluations = {int(shots): _to_evaluation(one) for shots, one in plain["evaluations"].items()}
            return cls(**{**plain, "evaluations": evaluations, "sketches": tuple(plain["sketches"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no stored result: {type(error).__name__}: {error}") from error


def json_ready(value: Any) -> Any:
    """Plain lists, dicts and numbers: NaN and infinity become None, what JSON does not know becomes text.

    Arrays and tensors become lists, those of one number without axes that number.
    """
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _from_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    metrics = {name: values.tolist() for name, values in evaluation.metrics.items()}
    found = evaluation.calibration
    plain = {name: getattr(evaluation, name) for name in evaluation.__dataclass_fields__}
    return plain | {"metrics": metrics, "calibration": None if found is None else asdict(found)}


def _to_evaluation(plain: Mapping[str, Any]) -> Evaluation:
    metrics = {name: np.asarray(values, dtype=np.float64) for name, values in plain["metrics"].items()}
    found = plain["calibration"]
    if found is not None:
        found = Calibration(found["kind"], *(tuple(found[name]) for name in ("promised", "observed", "count")))
    return Evaluation(**{**plain, "metrics": metrics, "calibration": found})
