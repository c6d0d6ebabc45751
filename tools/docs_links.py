"""Hook of mkdocs: on the site, links to files outside docs/ point to the repository.

The pages can then link to code and to the README as on a code host. A link to a file that does not exist is an error.
The address of the repository is $REPOSITORY_URL; without it, such links become plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
"""A link in Markdown, but not an image: its text and its target."""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def replaced(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path or target.startswith("mailto:"):
            return match[0]
        file = (folder / path).resolve()
        if file.is_relative_to(ROOT / "docs"):
            return match[0]  # mkdocs checks it
        if not file.exists():
            raise PluginError(f"{page.file.src_uri} links to {target}, which does not exist")
        repository = os.environ.get("REPOSITORY_URL")
        if not repository:
            return str(text)
        kind = "tree" if file.is_dir() else "blob"
        return f"[{text}]({repository}/{kind}/main/{file.relative_to(ROOT)}{'#' * bool(anchor)}{anchor})"

    parts = re.split(r"(^```.*?^```[^\S\n]*$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(replaced, part) for part in parts)
