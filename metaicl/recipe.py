"""What every recipe shares: a command line made from a dataclass, criteria, and a verdict that hides no miss."""

import argparse
import dataclasses
import io
import json
import operator
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from metaicl.files import atomic_write
from metaicl.number_text import minutes_text
from metaicl.results import json_ready
from metaicl.statistics import LEVEL, Array, interval, intervals, paired
from metaicl.versions import versions


def option(default: Any, help: str) -> Any:
    """A field of a `RecipeConfig` with the text that `--help` shows."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """The options that every recipe has.

    A recipe adds its own fields, in SMOKE their values for a smoke run, and in PAPER those of the published scale,
    where there is one: it then has the option `--paper`.
    """

    SMOKE: ClassVar[Mapping[str, Any]] = {}
    PAPER: ClassVar[Mapping[str, Any]] = {}

    out: Path = option(Path("runs"), "folder for results.json and whatever else the recipe writes")
    seed: int = option(0, "first seed; seeds count up from it")
    smoke: bool = option(False, "a run of seconds that proves the recipe works, and nothing else")
    paper: bool = option(False, "the published scale, meant for a GPU")

    @property
    def comparison(self) -> Path:
        """Where `compare` keeps its runs; those of a smoke run lie apart, so both may share `out`."""
        return self.out / ("comparison-smoke" if self.smoke else "comparison")


Config = TypeVar("Config", bound=RecipeConfig)


@dataclass(frozen=True)
class Criterion:
    """One measurable part of a claim.

    Args:
        name: What is measured, with its unit.
        value: What came out.
        comparison: ">", ">=" or "<=".
        bound: What it is held against.
        ci: 95 % interval of the value, where there is one.
        reference: The published or the exact value beside ours, where there is one.
    """

    name: str
    value: float
    comparison: Literal[">", ">=", "<="]
    bound: float
    ci: tuple[float, float] | None = None
    reference: float | None = None

    @property
    def held(self) -> bool:
        """Whether the value is on the right side of the bound; NaN never is."""
        compare = {">": operator.gt, ">=": operator.ge, "<=": operator.le}[self.comparison]
        return bool(compare(self.value, self.bound))  # one of NumPy has no JSON


def ratio_criterion(
    name: str, ours: Array, theirs: Array, comparison: Literal[">", ">=", "<="], bound: float
) -> Criterion:
    """A criterion on mean(ours) / mean(theirs), with an interval that uses that both saw the same episodes.

    Args:
        name: What is compared.
        ours: Positive values, seeds by episodes (S, E).
        theirs: On the same episodes, (S, E) or (1, E).
        comparison: As in `Criterion`.
        bound: On the ratio.
    """
    reference = float(np.mean(theirs))
    ratio = float(np.mean(ours)) / reference
    ends = interval(paired(ours, ratio * np.asarray(theirs))).ends  # linearized about the ratio (delta method)
    ci = None if ends is None else (ratio + ends[0] / reference, ratio + ends[1] / reference)
    return Criterion(name, ratio, comparison, bound, ci=ci)


def gain_criterion(name: str, more: Array, less: Array) -> Criterion:
    """A criterion that the mean of more - less is above zero with its whole 95 % interval: the lower end is judged.

    Args:
        name: What is gained.
        more: Values, seeds by episodes (S, E).
        less: On the same episodes, (S, E) or (1, E).
    """
    found = interval(paired(more, less))
    return Criterion(f"{name}, lower end", found.mean if found.low is None else found.low, ">", 0.0, ci=found.ends)


def best_gain_criterion(name: str, more: Mapping[str, Array], less: Array) -> tuple[str, Criterion]:
    """A criterion that the mean of at least one of several is above `less`: the highest of all lower ends is judged.

    Whoever looks for the best of many finds one above by chance. So the intervals are those of 1 - .05 / n, n the
    number of candidates (Bonferroni): where none is better, the criterion is held in at most 5 % of all studies.

    Args:
        name: What is gained; the name of the candidate that is judged is put before it.
        more: Values by candidate, seeds by episodes (S, E).
        less: On the same episodes, (S, E) or (1, E).

    Returns:
        The candidate that is judged, and the criterion.
    """
    found = intervals([paired(values, less) for values in more.values()], level=1 - (1 - LEVEL) / len(more))
    lows = {one: gap.mean if gap.low is None else gap.low for one, gap in zip(more, found, strict=True)}
    best = max(lows, key=lambda one: lows[one])
    ends = found[list(more).index(best)].ends
    return best, Criterion(f"{best} {name}, lower end for the best of {len(more)}", lows[best], ">", 0.0, ci=ends)


@dataclass(frozen=True)
class RecipeResult:
    """What a recipe ends in.

    Args:
        recipe: File name without suffix.
        claim: The claim, in a sentence.
        config: The settings of the run.
        criteria: What decides; after a smoke run nothing does.
        reported: More that was measured, JSON-ready; it is stored and decides nothing.
        seconds: Wall-clock seconds of the run, which `run` fills in. A run that continues an earlier one took longer.
    """

    recipe: str
    claim: str
    config: RecipeConfig
    criteria: Sequence[Criterion]
    reported: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def verdict(self) -> str:
        """Either "held", "missed" or, after a smoke run, "smoke"."""
        if self.config.smoke:
            return "smoke"
        return "held" if all(criterion.held for criterion in self.criteria) else "missed"

    def as_dict(self) -> dict[str, Any]:
        """The content of results.json."""
        criteria = [
            {
                "name": criterion.name,
                "value": criterion.value,
                "ci": criterion.ci,
                "reference": criterion.reference,
                "bound": f"{criterion.comparison} {criterion.bound:g}",
                "held": criterion.held,
            }
            for criterion in self.criteria
        ]
        record = {
            "recipe": self.recipe,
            "claim": self.claim,
            "config": dataclasses.asdict(self.config),
            "versions": versions(),
            "criteria": criteria,
            "reported": dict(self.reported),
            "seconds": self.seconds,
            "verdict": self.verdict,
        }
        return cast(dict[str, Any], json_ready(record))

    def __str__(self) -> str:
        """A table of the criteria and the verdict."""
        rows = [("criterion", "measured", "95 % interval", "reference", "bound", "")]
        for c in self.criteria:
            interval = "-" if c.ci is None else f"[{c.ci[0]:.4g}, {c.ci[1]:.4g}]"
            reference = "-" if c.reference is None else f"{c.reference:.4g}"
            rows.append(
                (
                    c.name,
                    f"{c.value:.4g}",
                    interval,
                    reference,
                    f"{c.comparison} {c.bound:g}",
                    "held" if c.held else "MISSED",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        minutes = "" if self.seconds is None else f" ({minutes_text(self.seconds)})"
        return "\n".join([self.claim, "", *lines, "", f"verdict: {self.verdict}{minutes}"])


def run(main: Callable[[Config], RecipeResult], config_class: type[Config], argv: Sequence[str] | None = None) -> None:
    """The command line of a recipe: parse, run, write results.json (and a line of results.jsonl), print the table.

    A smoke run leaves the results.json of a run that decided something alone and writes results-smoke.json.

    Args:
        main: Turns a config into a result.
        config_class: Its fields become options.
        argv: Arguments; None takes those of the process.
    """
    config = parse(config_class, argv, description=sys.modules[main.__module__].__doc__)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where there is no superscript two, a question mark will do
    config.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        result = main(config)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was finished is kept in {config.out}", file=sys.stderr)
        raise SystemExit(130) from None
    except FileNotFoundError as error:
        if not getattr(config, "download", True) and not getattr(config, "data", True):  # asked for no data at all
            raise SystemExit(f"{error}. On this command line: --data FOLDER, or --download") from None
        raise
    result = dataclasses.replace(result, seconds=round(time.monotonic() - start, 1))
    record, file = result.as_dict(), config.out / "results.json"
    if config.smoke and _decided(file):
        file = config.out / "results-smoke.json"
    atomic_write(file, json.dumps(record, indent=2, allow_nan=False).encode())
    with (config.out / "results.jsonl").open("a") as history:
        history.write(json.dumps(record, allow_nan=False) + "\n")
    print(result)
    print(f"written: {file}")


def parse(config_class: type[Config], argv: Sequence[str] | None = None, *, description: str | None = None) -> Config:
    """Build a config from the command line; `--smoke` and `--paper` bring their values where nothing else was said."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = get_type_hints(config_class)  # text in a file with `from __future__ import annotations`
    for item in dataclasses.fields(config_class):
        if item.name == "paper" and not config_class.PAPER:
            continue
        flag = f"--{item.name.replace('_', '-')}"
        text = f"{item.metadata.get('help', '')} (default: {_show(item.default)})".replace("%", "%%")
        parser.add_argument(flag, default=None, help=text, **_reads(hints[item.name]))
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if given.get("smoke") and given.get("paper"):
        parser.error("--smoke and --paper exclude each other")
    scale = config_class.SMOKE if given.get("smoke") else config_class.PAPER if given.get("paper") else {}
    return config_class(**{**scale, **given})


def _reads(hint: Any) -> dict[str, Any]:
    """How the command line reads a value of this type: a plain one, one or None, one of a Literal, or a tuple."""
    if get_origin(hint) in (UnionType, Union):
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is tuple:
        return {"nargs": "+", **_reads(get_args(hint)[0])}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint), "type": type(get_args(hint)[0])}
    return {"type": hint}


def _decided(file: Path) -> bool:
    """Whether a result is there that is not a smoke run's."""
    try:
        return bool(json.loads(file.read_text())["verdict"] != "smoke")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
