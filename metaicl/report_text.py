"""The tables of a report, as cells and as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from metaicl.findings import Findings, Row
from metaicl.number_text import interval_text, memory_text, number, seconds_text
from metaicl.statistics import Interval

FOOTNOTES = (
    "Intervals are 95 %, by a crossed bootstrap that resamples seeds and episodes independently, with Student tails "
    "for small numbers of seeds. They cover another draw of training runs and test episodes; where seeds "
    "is n/a (1 seed), or fixed for a learner that draws nothing, another draw of episodes only. They end at the bounds "
    "of their metric; where a bounded one is the same on all episodes, they are exact ones over episodes.",
    "Differences are paired on the same seeds and episodes. p-values are two-sided, bootstrapped and Holm-corrected "
    "over the differences to the baseline of one table, or over all pairs where no baseline was named beforehand.",
    "Regret is how much worse a learner is than the first reference on the same episodes; positive is worse.",
    "nll is in nats per query row, mse in squared units of the targets. Calibration error is the mean gap between "
    "promise and frequency over all query rows, of the confidence in 15 bins (ECE) or of central prediction intervals.",
    "Seconds are per task, the median over batches, and hold for the batch size, device and threads named above.",
    "Memory is the most that adapting to one batch and answering it held on top of what was there before; on a CPU it "
    "is resident memory, which does not see what the allocator had kept from earlier work.",
)
"""What the columns mean; shown under every report."""

_TITLE_LENGTH = 32  # of a name, in characters
_LISTED = 4  # names in a sentence
_TITLES = {"accuracy": "accuracy", "mse": "mse", "nll": "nll", "brier": "Brier"}


def columns(findings: Findings, task: str) -> list[str]:
    """Titles of the table of a task distribution, the learner first and the note last."""
    metric, baseline = findings.metric(task), findings.baseline(task)
    reference = findings.reference(task)
    error = "ECE" if metric == "accuracy" else "coverage error"
    titles = ["learner", f"{_TITLES[metric]} [95 %]", "nll", error]
    titles += [f"difference to {_fitting(baseline, 'baseline')} [95 %]", "p"] if baseline is not None else []
    titles += [f"regret to {_fitting(reference, 'reference')}"] if reference is not None else []
    titles += ["train", "adapt", "predict", "memory", "parameters", "transductive", "seeds"]
    return titles


def cells(findings: Findings, task: str, row: Row) -> list[str]:
    """One line of the table, as many cells as `columns`."""
    metric, baseline = findings.metric(task), findings.baseline(task)
    told = row.role == "learner" or row.learner.endswith("(reference)")
    name = row.learner if told else f"{row.learner} (reference)"
    width = len(columns(findings, task))
    if row.metrics is None:
        return [name, row.status, *["-"] * (width - 2)]
    found = [name, interval_text(row.metrics[metric]), number(row.metrics["nll"].mean)]
    found.append("-" if row.calibration is None else number(row.calibration.error))
    if baseline is not None:
        found += ["baseline", ""] if row.learner == baseline else _difference(row.difference)
    if findings.reference(task) is not None:
        found.append("-" if row.regret is None else interval_text(row.regret, signed=True))
    found += [seconds_text(row.train_seconds), seconds_text(row.adapt_seconds), seconds_text(row.predict_seconds)]
    found.append(memory_text(row.peak_memory_bytes))
    found += [f"{row.parameters:,}", "yes" if row.transductive else "no"]
    return [*found, row.seeds_text]


def render_text(findings: Findings) -> str:
    """The protocol, a table per task distribution, and what the columns mean."""
    parts = ["PROTOCOL", *(f"  {name}: {value}" for name, value in protocol_lines(findings.protocol))]
    for task in findings.tasks:
        rows = findings.rows(task)
        parts += ["", f"{task.upper()}  {describe_task(findings, task)}", ""]
        parts += _aligned([columns(findings, task), *(cells(findings, task, row) for row in rows)])
        parts += [f"  {row.learner}: {row.note}" for row in rows if row.note]
    return "\n".join([*parts, "", *(f"({i}) {note}" for i, note in enumerate(FOOTNOTES, 1))])


def protocol_lines(protocol: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The protocol card as (name, text)."""
    return [(name.replace("_", " "), _plain(value)) for name, value in protocol.items()]


def describe_task(findings: Findings, task: str) -> str:
    """One line: what the tasks are and on how many episodes they were judged."""
    card = findings.tasks[task]
    spec = card["spec"]
    per = f"{spec['n_way']}-way, per class" if spec["kind"] == "classification" else "regression, per task"
    shape = "x".join(map(str, spec["x_shape"]))
    fingerprint = next((e.fingerprint for r in findings.results if r.task == task for e in r.evaluations.values()), "")
    episodes = next((e.n_episodes for r in findings.results if r.task == task for e in r.evaluations.values()), 0)
    judged = f"{episodes} episodes, fingerprint {fingerprint[:12]}" if episodes else "nothing finished"
    rows = f"{card['n_shot']} shot and {card['n_query']} query rows of {spec['x_kind']} {shape}"
    rows += ", prequential" * bool(card.get("prequential"))  # cards of before do not say
    return f"{per} {rows}; {judged}"


def summary_sentence(findings: Findings, task: str) -> str:
    """The finding in one sentence, no stronger than the intervals allow."""
    rows = {row.learner: row for row in findings.rows(task) if row.metrics is not None and row.role == "learner"}
    if not rows:
        return f"On {task}, no learner finished."
    metric = findings.metric(task)
    sign = 1 if metric == "accuracy" else -1
    ranked = sorted(rows, key=lambda name: -sign * findings.values(task, name).mean())
    best = ranked[0]
    lead = f"On {task}, {best} has the best {metric}, {interval_text(findings.interval(task, best))}"
    if len(ranked) == 1:
        return f"{lead}."
    family = findings.differences(task, baseline=best)
    gaps = {name: family[name, best] for name in ranked[1:] if (name, best) in family}
    p_values = {name: one.p for name, one in gaps.items()}
    unknown = [name for name in ranked[1:] if p_values.get(name) is None]
    tied = [name for name, p in p_values.items() if p is not None and p >= 0.05]
    # A mean is over all seeds that a learner finished, a difference over those that both did.
    better = [name for name, p in p_values.items() if p is not None and p < 0.05 and sign * gaps[name].mean > 0]
    shared = "on the seeds that both finished (paired, Holm-corrected p < 0.05)"
    parts = [f"it is behind {_listed(better)} {shared}"] if better else []
    parts += [f"the data do not separate it from {_listed(tied)} (paired, Holm-corrected p ≥ 0.05)"] if tied else []
    parts += [f"there are too few seeds or episodes to compare it with {_listed(unknown)}"] if unknown else []
    if not parts:
        return f"{lead}, ahead of every other learner (paired, Holm-corrected p < 0.05)."
    return f"{lead}; {', and '.join(parts)}."


def _difference(found: Interval | None) -> list[str]:
    if found is None:
        return ["-", "-"]
    return [interval_text(found, signed=True), "n/a" if found.p is None else f"{found.p:.2g}"]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [f"  {text[0]}", "  " + "  ".join("-" * width for width in widths), *(f"  {line}" for line in text[1:])]


def _fitting(name: str, role: str) -> str:
    """A name for the title of a column, or what stands for one that would widen it; the rows say which it is."""
    return name if len(name) <= _TITLE_LENGTH else f"the {role}"


def _listed(names: Sequence[str]) -> str:
    if len(names) > _LISTED + 1:
        return f"{', '.join(names[:_LISTED])} and {len(names) - _LISTED} others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        nested = any(isinstance(item, Mapping) for item in value.values())
        parts = [f"{name}{':' if nested else ''} {_plain(item)}" for name, item in value.items() if item is not None]
        return ("; " if nested else ", ").join(parts) or "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "-"
    return "-" if value is None else str(value)
