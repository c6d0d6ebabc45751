"""Generated blocks of a Markdown page, each between two marker comments."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path


def _marks(tool: str, name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by tools/{tool} -->", f"<!-- end of {name} -->"


def _pattern(tool: str, name: str) -> re.Pattern[str]:
    start, end = _marks(tool, name)
    return re.compile(f"{re.escape(start)}\n(.*?)\n?{re.escape(end)}", re.DOTALL)


def block_of(page: Path, tool: str, name: str) -> str:
    """The text of the page's block `name`; exits with an error if there is none."""
    found = _pattern(tool, name).search(page.read_text(encoding="utf-8"))
    if found is None:
        start, end = _marks(tool, name)
        sys.exit(f"{page.name} has no block between '{start}' and '{end}'")
    return found.group(1)


def write_blocks(page: Path, tool: str, blocks: Mapping[str, str]) -> None:
    """Replace the text of each block in `blocks`, which maps names to texts."""
    before = after = page.read_text(encoding="utf-8")
    for name, text in blocks.items():
        block_of(page, tool, name)
        start, end = _marks(tool, name)
        new = f"{start}\n{text}\n{end}".replace("\\", r"\\")  # a template, in which a backslash is doubled
        after = _pattern(tool, name).sub(new, after)
    if after != before:
        page.write_text(after, encoding="utf-8")


def stale_blocks(page: Path, tool: str, blocks: Mapping[str, str]) -> list[str]:
    """Names of the page's blocks that differ from `blocks`."""
    return [name for name, text in blocks.items() if block_of(page, tool, name) != text]
