"""README.md and docs/: examples run, links are valid, and statements about afa_ext are correct."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import afa_ext

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "README.md",
    "docs/operators.md",
    "docs/kernels.md",
    "docs/backbones.md",
    "docs/own_data.md",
    "docs/evaluation.md",
    "docs/recipe.md",
    "docs/evidence.md",
    "docs/export.md",
    "docs/faq.md",
    "docs/index.md",
    "docs/second_stage.md",
    "docs/par_from_scratch.md",
    "docs/contributing.md",
)
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
OPERATORS = PAGES["docs/operators.md"]
EXAMPLES = {name: re.findall(r"```python\n(.*?)```", page, re.DOTALL) for name, page in PAGES.items()}
SECTIONS = dict(re.findall(r"^### `(\w+)`\n+(.*)$", OPERATORS, re.MULTILINE))
"""The first line under each operator's heading."""


@pytest.mark.parametrize(("name", "number"), [(name, i) for name in PAGES for i in range(len(EXAMPLES[name]))])
def test_example_runs(name, number):
    # The first example of docs/operators.md defines the variables of the others.
    blocks = {EXAMPLES[name][0]: 0} if name == "docs/operators.md" else {}
    blocks[EXAMPLES[name][number]] = number
    variables: dict[str, object] = {}
    for code, i in blocks.items():
        exec(compile(code, f"{name} example {i}", "exec"), variables)


def test_there_is_an_example_of_par_refine():
    assert any("par_refine" in example for example in EXAMPLES["README.md"])


@pytest.mark.parametrize("tool", [["update_tables"], ["kernel_report", "--formulas"]], ids=lambda tool: tool[0])
def test_tables_are_those_of_the_tools(tool):
    command = [sys.executable, "-m", f"tools.{tool[0]}", *tool[1:], "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", PAGES)
def test_linked_files_and_headings_exist(name):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[name]) if "://" not in link]
    assert links
    headings = re.findall(r"^#+ (.*)$", PAGES[name], re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for link in links:
        path, _, anchor = link.partition("#")
        assert ((ROOT / name).parent / path).exists(), link
        assert path or anchor in anchors, link


def test_every_public_name_has_a_section_and_a_row():
    rows = re.findall(r"^\| `(\w+)` \|", OPERATORS.partition("## Common to all")[0], re.MULTILINE)
    assert sorted(SECTIONS) == sorted(rows) == sorted(afa_ext.__all__)


@pytest.mark.parametrize("name", SECTIONS)
def test_section_begins_with_the_signature(name):
    signature = inspect.signature(getattr(afa_ext, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    signature = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
    assert SECTIONS[name] == f"`{name}{signature}`"
