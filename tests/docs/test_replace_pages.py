"""docs/replace/: the checks at the end of the pages run, and their links are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "replace"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.md"))}
BLOCKS = {name: re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE) for name, page in PAGES.items()}


def _anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_checks_run(name: str) -> None:
    assert BLOCKS[name]
    for number, code in enumerate(BLOCKS[name]):
        exec(compile(code, f"docs/replace/{name}, block {number}", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("name", PAGES)
def test_linked_files_and_headings_exist(name: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[name]) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = FOLDER / path if path else FOLDER / name
        assert target.is_file(), link
        assert not anchor or anchor in _anchors(target.read_text(encoding="utf-8")), link


def test_index_lists_every_page() -> None:
    listed = re.findall(r"^\|.*\]\((.*\.md)\) \|$", PAGES["index.md"], re.MULTILINE)
    assert sorted([*listed, "index.md"]) == sorted(PAGES)
