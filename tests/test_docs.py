"""The pages: every Python block runs, every public name has its place, every link and number of checks is right."""

import ast
import importlib
import re
import sys
import types
from pathlib import Path

import pytest

import metaicl
import metaicl.learners
import metaicl.tasks
from metaicl.run_directory import CHANGEABLE
from metaicl.testing import LEARNER_CHECKS, TASK_CHECKS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the line on which its code starts."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)), found[1]) for found in BLOCK.finditer(text)]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An empty module, known to Python by its name, in an empty folder without cached downloads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAICL_DATA", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "page", types.ModuleType("page"))
    return sys.modules["page"]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_in_order(page: Path, module: types.ModuleType) -> None:
    for line, code in blocks(page):
        # Empty lines in front make the line numbers of a traceback those of the page.
        exec(compile("\n" * line + code, str(page), "exec"), module.__dict__)


def test_the_pages_that_teach_have_blocks() -> None:
    for name in ("tutorial", "contract", "data", "report", "reliability", "learn2learn"):
        assert len(blocks(ROOT / "docs" / f"{name}.md")) >= 3, name


@pytest.mark.parametrize("package", [metaicl, metaicl.learners, metaicl.tasks], ids=lambda package: package.__name__)
def test_every_public_name_is_on_an_api_page(package: types.ModuleType) -> None:
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")]
    listed = [name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]
    assert len(listed) == len(set(listed))
    modules = {name: importlib.import_module(name) for name in listed}
    for name in package.__all__:
        value = getattr(package, name)
        assert value.__module__ in modules, f"{name} is defined in {value.__module__}, which no API page shows"
        assert getattr(modules[value.__module__], name) is value


def test_the_contract_page_names_every_check() -> None:
    text = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert listed == [*LEARNER_CHECKS, *TASK_CHECKS]


def test_the_recipes_page_names_every_recipe() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+\.py)` \|", text, re.MULTILINE)) == {
        p.name for p in (ROOT / "recipes").glob("*.py")
    }


def test_the_reliability_page_names_what_a_resumed_run_may_change() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)=", text, re.MULTILINE) == list(CHANGEABLE)


def test_every_page_is_in_the_navigation_and_every_relative_link_leads_somewhere() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation, page.name
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_citation_names_the_version_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    assert version is not None
    assert f'version: "{version[1]}"' in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{version[1]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_fields_of_named_tuples_are_attributes() -> None:
    """The builder of the pages finds no arguments in a NamedTuple, and refuses those that a docstring names."""
    for path in (ROOT / "metaicl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "NamedTuple" for base in node.bases):
                assert "Args:" not in (ast.get_docstring(node) or ""), f"{path.name}: {node.name} has Attributes"
