"""The layers of python/afa: modules import only from lower layers, and the base of each layer stays light."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "python" / "afa"
LAYERS = (
    ("errors", "files", "run", "machine", "distributed"),
    ("config",),
    ("data",),
    ("model",),
    ("labeling",),
    ("evaluation",),
    ("training",),
    ("report", "app"),
    ("commands",),
)
"""From the bottom to the top."""
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))
PARTS = [path for path in FILES if path.parent != ROOT or path.stem in LEVELS]


def imports(path: Path) -> Iterator[str]:
    """Absolute names of all modules of afa that a file imports, also inside functions."""
    package = ["afa", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "afa")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.split(".")[0] != "afa":
                continue
            for alias in node.names:
                name = f"{module}.{alias.name}"
                inner = ROOT.joinpath(*name.split(".")[1:])
                yield name if inner.is_dir() or inner.with_suffix(".py").is_file() else module


def layer(module: str) -> str:
    """'afa.data.classes' -> 'data'."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", PARTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = layer(".".join(["afa", *path.relative_to(ROOT).with_suffix("").parts]))
    for module in imports(path):
        other = layer(module)
        assert other in LEVELS, f"{path} imports {module}, which is in no layer"
        lower = LEVELS[other] < LEVELS[own]
        same = other == own or LEVELS[own] == 0 == LEVELS[other]
        assert lower or same, f"{path} imports {module}, but {other} is above {own}"


def test_every_module_is_in_a_layer() -> None:
    names = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
    assert names == set(LEVELS) | {"__init__", "__main__"}


def test_no_module_imports_itself_in_a_circle() -> None:
    """There are no import cycles, also inside a layer."""
    names = {path: ".".join(["afa", *path.relative_to(ROOT).with_suffix("").parts]) for path in FILES}
    modules = {name.removesuffix(".__init__"): path for path, name in names.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name in done:
            return
        for other in imports(modules[name]):
            if other in modules and other != name:
                visit(other, (*above, name))
        done.add(name)

    for name in modules:
        visit(name, ())


def test_names_of_a_runs_files_are_in_one_place() -> None:
    from afa.run import CONFIG, EVALUATION_FILES, LOG, MODEL

    for path in FILES:
        if path.name == "run.py" and path.parent == ROOT:
            continue
        text = path.read_text(encoding="utf-8")
        strings = {
            node.value
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        found = strings & {CONFIG, LOG, MODEL, *EVALUATION_FILES}
        assert not found, f"{path} spells out {found}; take the name from afa.run"
