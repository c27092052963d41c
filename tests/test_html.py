import json
import re
from html.parser import HTMLParser

import pytest
import torch

from metaicl.comparison import compare
from metaicl.html import figure_svg, render_page
from metaicl.html_style import DARK, LIGHT
from metaicl.learners.reference.simple import Constant, NearestNeighbors
from metaicl.plots import plot_cost
from metaicl.report import Report
from metaicl.spec import NotServed, TaskSpec
from metaicl.tasks.functions import Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.tasks.rows import ArrayClasses

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def images():
    rows = torch.rand(6 * 6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    spec = TaskSpec("classification", (1, 8, 8), "image", n_way=2)
    labels = torch.arange(6).repeat_interleave(6)
    splits = {"train": [0, 1], "validation": [2, 3], "test": [4, 5]}
    return ArrayClasses(spec, rows, labels=labels, class_splits=splits, class_names=list("abcdef"))


def refuses(spec):
    raise NotServed("only <b>bold</b> tasks & others")


@pytest.fixture(scope="module")
def report():
    learners = {"constant": Constant, "<script>alert(1)</script>": NearestNeighbors, "refuses": refuses}
    tasks = {"images": images(), "waves": Sinusoid(), "plane & co": GaussianClasses(dim=2)}
    return compare(learners, tasks, n_shot=2, n_query=2, n_episodes=25, shots=(1,), progress=False)


@pytest.fixture(scope="module")
def page(report):
    return render_page(report)


def test_brackets_in_a_name_stay_with_it():
    learners = {"constant": Constant, "neighbor [1]": NearestNeighbors}
    sizes = {"n_shot": 1, "n_query": 2, "n_episodes": 3}
    found = compare(learners, Sinusoid(), baseline="neighbor [1]", references=False, progress=False, **sizes)
    page = render_page(found)
    assert re.search(r"<th>difference to neighbor \[1\]<sup>.{,40}</sup><small>\[95 %\]</small></th>", page)


def test_the_page_is_well_formed_and_ids_are_unique(page):
    parsed = Page(page)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    inner = {link[1:] for link in parsed.links if link.startswith("#")}
    assert inner <= set(parsed.ids)


def test_the_page_asks_for_nothing_and_runs_nothing(page):
    parsed = Page(page)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in parsed.links)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert not re.search(r"@import|url\((?!#)", page)


def test_names_and_messages_are_escaped(page):
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "only &lt;b&gt;bold&lt;/b&gt; tasks &amp; others" in page
    assert "plane &amp; co" in page


def test_the_page_shows_tables_figures_pictures_and_notes(page):
    parsed = Page(page)
    assert parsed.tags.count("section") == 3
    assert parsed.tags.count("img") == 3 * 2 * 2  # tasks, classes, support and query
    assert page.count("<figcaption>") >= 3 * 3
    assert "Queries labeled rightly" in page
    assert "crossed bootstrap" in page


def test_colors_follow_the_theme(report, page):
    svg = figure_svg(plot_cost(report, "waves"), "x")
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert "var(--c0)" in svg
    assert LIGHT.keys() == DARK.keys()
    assert "prefers-color-scheme:dark" in page


def test_the_same_report_gives_the_same_page(report, page):
    assert render_page(report) == page


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colors_stand_out_from_the_paper(theme):
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for name, color in theme.items():
        least = {"paper": 1.0, "panel": 1.0, "faint": 1.2, "ink": 12.0, "gray": 4.5}.get(name, 2.8)
        assert contrast(color, theme["paper"]) >= least, name


def test_a_report_read_back_runs_nothing_and_draws_what_was_not_finite(report, tmp_path):
    report.to_json(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    for result in stored["results"]:
        for sketch in result["sketches"]:
            if "scale" in sketch:
                sketch["scale"] = [None] * len(sketch["scale"])
    (tmp_path / "report.json").write_text(json.dumps(stored))
    assert "<svg" in render_page(Report.from_json(tmp_path / "report.json"))
    texts = json.dumps(stored).replace('"right": ', '"right": "<script>1</script>", "was": ')
    (tmp_path / "report.json").write_text(texts)
    with pytest.raises(ValueError, match="invalid literal for int"):
        render_page(Report.from_json(tmp_path / "report.json"))
