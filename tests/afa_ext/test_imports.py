"""The reference implementations and the operators share only the checks of their arguments: tests could not find bugs
in shared code."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import afa_ext
from afa_ext import reference

FOLDER = Path(afa_ext.__file__).parent
REFERENCE = FOLDER / "reference"


def imported(file: Path) -> set[str]:
    """The modules that a file of afa_ext imports from: absolute names, without what is imported from them."""
    package = ["afa_ext", *file.parent.relative_to(FOLDER).parts]
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names |= {module} if node.module else {f"{module}.{alias.name}" for alias in node.names}
    return names


def of_afa_ext(file: Path) -> set[str]:
    return {name for name in imported(file) if name.split(".")[0] == "afa_ext"}


@pytest.mark.parametrize("file", sorted(REFERENCE.glob("*.py")), ids=lambda file: file.name)
def test_a_reference_imports_only_checks_and_other_references(file):
    assert {name for name in of_afa_ext(file) if not name.startswith("afa_ext.reference")} <= {"afa_ext._checks"}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("[!_]*.py")), ids=lambda file: file.name)
def test_an_operator_imports_no_reference(file):
    assert not {name for name in of_afa_ext(file) if name.startswith("afa_ext.reference")}


@pytest.mark.parametrize("name", reference.__all__)
def test_a_reference_has_the_signature_of_its_operator(name):
    assert inspect.signature(getattr(reference, name)) == inspect.signature(getattr(afa_ext, name))


def test_checks_do_not_use_the_code_they_check():
    assert of_afa_ext(FOLDER / "_checks.py") <= {"afa_ext._autograd"}
    assert of_afa_ext(FOLDER / "walk.py") >= {"afa_ext._checks", "afa_ext.window", "afa_ext.pair_affinity"}


@pytest.mark.slow
def test_the_references_come_with_the_package():
    code = "import afa_ext; afa_ext.reference.par_refine"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
