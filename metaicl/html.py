"""A report as one self-contained page: no scripts, no requests, light and dark."""

import base64
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from metaicl.findings import Findings, Row
from metaicl.html_style import DARK, LIGHT, STYLE_SHEET
from metaicl.plots import COLORS, FAINT, GRAY, INK, STYLE, learner_styles, plot_examples, task_figures
from metaicl.report_text import FOOTNOTES, cells, columns, describe_task, protocol_lines, summary_sentence

_THEME = {INK: "ink", GRAY: "gray", FAINT: "faint", **{color: f"c{i}" for i, color in enumerate(COLORS)}}
_NOTES = {"accuracy": 1, "mse": 1, "difference": 2, "p": 2, "regret": 3, "nll": 4, "ECE": 4, "coverage": 4, "adapt": 5}


def render_page(findings: Findings) -> str:
    """The whole page; the same report gives the same page."""
    sections = [_section(findings, task, i) for i, task in enumerate(findings.tasks)]
    sentences = "".join(f"<p class=lead>{escape(summary_sentence(findings, task))}</p>" for task in findings.tasks)
    card = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in protocol_lines(findings.protocol)
    )
    notes = "".join(f"<li id=note{i}>{escape(note)}</li>" for i, note in enumerate(FOOTNOTES, 1))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>metaicl report</title>'
        f"<style>{_style_sheet()}</style></head><body><main>"
        f"<header><h1>Learners compared</h1>{sentences}</header>"
        f"<details open><summary>Protocol</summary><dl>{card}</dl></details>"
        f"{''.join(sections)}<footer><h2>Notes</h2><ol>{notes}</ol></footer></main></body></html>\n"
    )


def figure_svg(figure: Figure, prefix: str) -> str:
    """An inline SVG whose colors follow the page's theme; `prefix` keeps its ids apart from other figures'."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": prefix}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page has fonts of its own
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for color, name in _THEME.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg


def _section(findings: Findings, task: str, index: int) -> str:
    figures = [
        f"<figure>{figure_svg(figure, f't{index}f{i}')}<figcaption>{escape(caption)}</figcaption></figure>"
        for i, (caption, figure) in enumerate(task_figures(findings, task))
    ]
    parts = [f"<h2>{escape(task)}</h2><p class=what>{escape(describe_task(findings, task))}</p>"]
    parts += [_table(findings, task), _legend(findings, task)]
    parts += [f"<div class=figures>{''.join(figures)}</div>", _examples(findings, task, f"t{index}e")]
    return f"<section>{''.join(parts)}</section>"


def _table(findings: Findings, task: str) -> str:
    rows = findings.rows(task)
    best = findings.best(task)
    head = "".join(f"<th>{_cell(title, _note(title))}</th>" for title in columns(findings, task))
    body = "".join(_line(findings, task, row, row.learner == best) for row in rows)
    notes = "".join(f"<li><b>{escape(row.learner)}</b> {escape(row.note)}</li>" for row in rows if row.note)
    notes = f"<ul class=missing>{notes}</ul>" if notes else ""
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}"


def _line(findings: Findings, task: str, row: Row, best: bool) -> str:
    name, *others = cells(findings, task, row)
    kind = " ".join(
        word for word, holds in (("best", best), (row.role, True), ("missing", row.metrics is None)) if holds
    )
    chip = _chip(learner_styles(findings)[row.learner]) if row.metrics is not None else ""
    inside = "".join(f"<td>{_cell(cell)}</td>" for cell in others)
    return f'<tr class="{kind}"><th scope=row>{chip}{escape(name)}</th>{inside}</tr>'


def _cell(text: str, note: str = "") -> str:
    """An interval goes under its mean, which keeps the table narrow."""
    mean, bracket, ends = text.rpartition(" [")  # the name of a baseline may have some, too
    return f"{escape(mean)}{note}<small>[{escape(ends)}</small>" if bracket else escape(text) + note


def _note(title: str) -> str:
    number = _NOTES.get(title.split()[0])
    return "" if number is None else f"<sup><a href=#note{number}>{number}</a></sup>"


def _legend(findings: Findings, task: str) -> str:
    styles = learner_styles(findings)
    items = [f"<li>{_chip(styles[name])}{escape(name)}</li>" for name in findings.learners(task, finished=True)]
    return f"<ul class=legend>{''.join(items)}</ul>" if items else ""


def _chip(style: Mapping[str, Any]) -> str:
    dash = {"-": "", "--": "5 3", ":": "2 2", "-.": "5 2 1 2"}[style["linestyle"]]
    line = f'stroke="var(--{_THEME[style["color"]]})" stroke-width="3" stroke-dasharray="{dash}"'
    return f'<svg class=chip viewBox="0 0 18 8" aria-hidden="true"><line x1="0" y1="4" x2="18" y2="4" {line}/></svg>'


def _examples(findings: Findings, task: str, prefix: str) -> str:
    cards = findings.tasks[task]["examples"]
    if not cards:
        return ""
    figure = plot_examples(findings, task, legend=False)
    if figure is not None:
        filled = "Filled points are the support, which the learner sees; "
        curve = filled + "hollow ones the query. Lines are the predicted means, bands two standard deviations."
        plane = filled + "pale ones the query; colors are the classes."
        caption = curve if cards[0]["kind"] == "curve" else plane
        body = f"<figure class=across>{figure_svg(figure, prefix)}<figcaption>{caption}</figcaption></figure>"
    else:
        body = "".join(_classes(findings, task, i, card) for i, card in enumerate(cards))
    return f"<h3>Example tasks</h3><div class=examples>{body}</div>"


def _classes(findings: Findings, task: str, index: int, card: Mapping[str, Any]) -> str:
    kind, show = ("images", _images) if card["kind"] == "images" else ("texts", _texts)
    lines = "".join(
        f"<tr><th scope=row>{int(one['label'])}</th><td>{show(one['support'])}</td><td>{show(one['query'])}</td></tr>"
        for one in card["classes"]
    )
    scores = []
    for name in findings.learners(task, finished=True):
        found = findings.of(task, name)[0].sketches
        if index < len(found):
            scores.append(f"{escape(name)} {int(found[index]['right'])}/{int(found[index]['rows'])}")
    right = f"<figcaption>Queries labeled rightly: {', '.join(scores)}.</figcaption>" if scores else ""
    head = "<tr><th>class</th><th>support</th><th>a query</th></tr>"
    return f"<figure class={kind}><table>{head}{lines}</table>{right}</figure>"


def _texts(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _images(images: Sequence[Mapping[str, Any]]) -> str:
    """The images side by side in one PNG."""
    if not images:
        return ""
    arrays = [
        np.frombuffer(base64.b64decode(image["pixels"]), dtype=np.uint8).reshape(image["shape"]) for image in images
    ]
    strip = np.concatenate(arrays, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(strip[..., 0] if strip.shape[-1] == 1 else strip).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{len(images)} images" style="--n:{len(images)}" src="data:image/png;base64,{data}">'


def _style_sheet() -> str:
    light, dark = (";".join(f"--{name}:{color}" for name, color in theme.items()) for theme in (LIGHT, DARK))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{STYLE_SHEET}"
