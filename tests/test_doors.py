"""The rooms of the package and the doors between them, held shut by reading every import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "retex_cli"

COMMON = {"allocator", "errors", "progress"}
MATHS = {"merging", "offsets", "signatures"}
#: Room or file of the package -> what of the package it may import, beside itself; "" is ``retex_cli/__init__.py``.
DOORS: dict[str, set[str]] = {
    "": {*COMMON, "commands"},
    "__main__": {"cli"},
    "allocator": set(),
    "errors": set(),
    "progress": set(),
    "parallel": set(),
    "workspace": {"errors"},
    "cli": {*COMMON, "", "workspace", "commands"},
    "commands": {*COMMON, "", "parallel", "workspace", *MATHS, "evaluation", "serving", "io", "models"},
    **dict.fromkeys(MATHS, COMMON),
    "evaluation": {*COMMON, "models"},
    "serving": {*COMMON, "models"},
    "models": {*COMMON, "parallel", "io"},
    "io": COMMON,
}
HEAVY = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "constriction"}
#: Imported by ``retex --help`` and by every usage error: nothing heavy while they load.
LIGHT = ("__init__", "__main__", "errors", "progress", "workspace", "cli/", "merging/table")


def room_of(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module by its full name, with its line; of ``from retex_cli import x`` also ``retex_cli.x``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide which door is used"
            module = node.module or ""
            if module == "retex_cli":
                rooms = [alias.name for alias in node.names if alias.name in DOORS]
                yield from ((f"retex_cli.{name}", node.lineno) for name in rooms)
                if len(rooms) < len(node.names):
                    yield module, node.lineno
            else:
                yield module, node.lineno


def without_lazy(tree: ast.Module) -> ast.Module:
    """The module without what does not run at import: function bodies and ``if TYPE_CHECKING`` blocks."""

    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    return Cut().visit(tree)


def shut_doors_used(room: str, text: str) -> list[str]:
    used = []
    for module, line in imports(ast.parse(text)):
        if module == "click" or module.startswith("click."):
            used.append(f"line {line}: typer brings its own click, {module} is another one")
        if module.split(".")[0] != "retex_cli":
            continue
        target = [*module.split("."), ""][1]
        if target != room and target not in DOORS[room]:
            used.append(f"line {line}: {room or '__init__'} -> {target or '__init__'}")
    return used


def heavy_at_import(text: str) -> set[str]:
    return {module.split(".")[0] for module, _ in imports(without_lazy(ast.parse(text)))} & HEAVY


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_no_shut_door_is_used(file: Path) -> None:
    assert shut_doors_used(room_of(file), file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("start", LIGHT)
def test_what_starts_fast_imports_nothing_heavy(start: str) -> None:
    files = [file for file in FILES if str(file.relative_to(SOURCE)).startswith(start)]
    assert files
    for file in files:
        assert heavy_at_import(file.read_text(encoding="utf-8")) == set(), file


@pytest.mark.parametrize(
    ("room", "text"),
    [
        ("io", "from retex_cli.merging.table import METHODS"),
        ("merging", "import retex_cli.io.checkpoint"),
        ("offsets", "def f():\n    from retex_cli import models"),
        ("cli", "from retex_cli.io.checkpoint import open_checkpoint"),
        ("errors", "from retex_cli import __version__"),
        ("evaluation", "from retex_cli.io import checkpoint"),
        ("cli", "import click"),
        ("cli", "from click.testing import CliRunner"),
    ],
)
def test_a_shut_door_is_seen(room: str, text: str) -> None:
    assert len(shut_doors_used(room, text)) == 1


def test_an_open_door_is_not() -> None:
    text = "from retex_cli import __version__\nfrom retex_cli.commands.merge import run\nimport typer"
    assert shut_doors_used("cli", text) == []


def test_only_what_runs_at_import_is_heavy() -> None:
    assert heavy_at_import("import torch") == {"torch"}
    assert heavy_at_import("class A:\n    import numpy.random") == {"numpy"}
    assert heavy_at_import("def f():\n    import torch\nif TYPE_CHECKING:\n    import numpy") == set()
