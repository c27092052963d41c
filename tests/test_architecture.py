"""The rules of the house that a machine can hold: layers, cycles, budgets, imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "metaicl"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    0: {
        "spec",
        "episode",
        "collation",
        "packing",
        "checks",
        "functional",
        "mixtures",
        "convex",
        "inner_loop",
        "native",
        "second_order",
        "nets",
        "files",
        "sealed_files",
        "interruption",
        "row_ids",
        "transforms",
    },
    1: {"learner", "reading", "task"},
    2: {"tasks", "learners", "objectives"},
}  # everything else is layer 3, and metaicl/__init__.py stands above all


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import from the defining module by its full name"
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.split(".")[0] == "metaicl"}


def layer(module: str) -> int:
    room = [*module.split("."), ""][1]
    return next((level for level, rooms in LAYERS.items() if room in rooms), 3)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    name = module_name(path)
    if name == "metaicl":
        return
    for target in imported(path):
        assert target != "metaicl", f"{name} imports the package root; import from the defining module"
        assert layer(target) <= layer(name), f"{name} (layer {layer(name)}) imports {target} (layer {layer(target)})"


def test_rooms_that_must_not_know_each_other() -> None:
    families = ("gradient", "metric", "incontext", "retrieval", "reference")
    for path in FILES:
        name = module_name(path)
        for target in imported(path):
            if name.startswith("metaicl.tasks"):
                assert not target.startswith("metaicl.learners"), f"{name} imports {target}"
            if name.startswith("metaicl.learners"):
                assert not target.startswith("metaicl.tasks"), f"{name} imports {target}"
            for family in families:
                if name.startswith(f"metaicl.learners.{family}"):
                    others = tuple(f"metaicl.learners.{other}" for other in families if other != family)
                    assert not target.startswith(others), f"{name} imports {target}"


def test_no_import_cycles() -> None:
    graph = {module_name(path): imported(path) for path in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert done >= set(graph)


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "recipes").glob("*.py"))], ids=lambda p: p.name)
def test_budgets(path: Path) -> None:
    text = path.read_text()
    limit = 300 if path.is_relative_to(PACKAGE) else 200
    assert len(text.splitlines()) <= limit, f"{path.name} has more than {limit} lines"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) else node.body
        if body:
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1
            assert length <= 40, f"{path.name}:{node.lineno} {node.name} has a body of {length} lines"
        positional = [a for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
        assert len(positional) <= 6, (
            f"{path.name}:{node.lineno} {node.name} takes {len(positional)} positional parameters"
        )


def test_there_is_no_utils() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "misc", "common")]


def test_nothing_imports_recipes() -> None:
    for path in FILES:
        assert "recipes" not in {name.split(".")[0] for name in _all_imports(path)}


def _all_imports(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
