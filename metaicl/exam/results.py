"""Running a list of named checks and reporting every failure at once."""

import site
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaicl.checks import check_choice
from metaicl.exam.randomness import private_randomness

_PACKAGE = str(Path(__file__).parents[1])


class CheckError(AssertionError):
    """Some checks failed, or one that was expected to fail passed.

    Attributes:
        failures: What went wrong, by the name of the check.
    """

    def __init__(self, subject: str, failures: Mapping[str, str], note: str = "") -> None:
        """Put all failures into one message."""
        self.subject, self.failures, self.note = subject, dict(failures), note
        lines = [f"{subject} fails {len(failures)} of its checks"]
        lines += [f"  [{name}] {message}" for name, message in failures.items()]
        super().__init__("\n".join([*lines, note] if note else lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the constructor's arguments, so that test runners can send it between processes."""
        return type(self), (self.subject, self.failures, self.note)


class LearnerCheckError(CheckError):
    """A learner does not keep the contract of `metaicl.learner.Learner`."""


class TaskCheckError(CheckError):
    """A task distribution does not keep the contract of `metaicl.task.TaskDistribution`."""


@dataclass(frozen=True)
class Exam:
    """Named checks of one kind of subject.

    Args:
        error: What to raise.
        checks: Functions of a case, by name; each raises where the property does not hold.
        optional: Checks that run only when asked for by name.
        gate: A check without which the others have no meaning.
    """

    error: type[CheckError]
    checks: Mapping[str, Callable[[Any], None]]
    optional: tuple[str, ...] = ()
    gate: str | None = None

    def select(self, names: Iterable[str] | None, expected: Mapping[str, str]) -> list[str]:
        """The checks to run, in order.

        Raises:
            ValueError: If a name is unknown, or a failure is expected of a check that is not run.
        """
        wanted = None if names is None else {check_choice("checks", name, self.checks) for name in names}
        chosen = [n for n in self.checks if (n not in self.optional if wanted is None else n in wanted)]
        for name in expected:
            check_choice("expected_failures", name, chosen)
        return chosen

    def sit(self, subject: str, case: Any, names: Iterable[str], expected: Mapping[str, str]) -> None:
        """Run the checks, each on a fresh copy of `case`.

        Raises:
            CheckError: With every failure, if there is one.
        """
        failures: dict[str, str] = {}
        note = ""
        for name in names:
            message = self.run(name, case)
            if message is not None and name not in expected:
                failures[name] = message
                if name == self.gate:
                    note = "  The other checks were not run: they need this one."
                    break
            elif message is None and name in expected:
                failures[name] = f"was expected to fail ({expected[name]}) but passes; drop it from expected_failures"
        if failures:
            raise self.error(subject, failures, note)

    def run(self, name: str, case: Any) -> str | None:
        """What is wrong with the case in the eyes of one check; None if nothing is."""
        try:
            with private_randomness():
                self.checks[name](case.fresh())
        except Exception as error:  # whatever a foreign class raises is a finding, and the other checks go on
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if not frame.filename.startswith((_PACKAGE, *site.getsitepackages()))]
            if isinstance(error, AssertionError) and not own:
                return str(error)  # a check's own words
            return f"raised {type(error).__name__}: {error} ({_place((own or frames)[-1])})"
        return None


def _place(frame: traceback.FrameSummary) -> str:
    return f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
