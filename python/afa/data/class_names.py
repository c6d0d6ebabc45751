"""Validation of class names from folders, CSV, XML, class lists and model files."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from afa.errors import UserError

BACKGROUND = "background"
MAX_CLASSES = 254
"""A mask is 8-bit: 0 is background and 255 is ignored."""

# A name with one of these is nearly always a list of names with another separator.
_SEPARATORS = {
    **{",": "a comma", ";": "a semicolon", "|": "a vertical bar", "\t": "a tab", '"': "a double quote"},
    **{"[": "a bracket", "]": "a bracket", "{": "a brace", "}": "a brace"},
}
_QUOTES = "'`\u2018\u2019\u201c\u201d"
_MISSING = frozenset({"nan", "<na>", "none", "null", "n/a", "#n/a"})
"""What pandas and spreadsheets write for an empty cell."""
_JOINERS = "\u200c\u200d"
"""Invisible, but part of the spelling inside words of Persian and of Indic scripts."""


def class_name(text: str, where: str) -> str:
    """Return the name in Unicode NFC with single spaces; UserError, prefixed with `where`, if it is invalid."""
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        raise UserError(f"{where}: the class name {text!a} contains bytes that are not UTF-8; rename it")
    for character in text:
        if character in _SEPARATORS:
            raise UserError(
                f"{where}: the class name '{text}' contains {_SEPARATORS[character]} ({character!r}); separate labels "
                "with spaces or semicolons, and don't use quotes or brackets in names"
            )
    name = " ".join(unicodedata.normalize("NFC", text).split())
    for position, character in enumerate(name):
        inside = 0 < position < len(name) - 1
        invisible = unicodedata.category(character) in ("Cc", "Cf", "Co", "Cn")
        if invisible and not (inside and character in _JOINERS):
            shown = unicodedata.name(character, "unnamed")
            raise UserError(
                f"{where}: the class name {name!a} contains the invisible character U+{ord(character):04X} "
                f"({shown}); remove it"
            )
    if not name:
        raise UserError(f"{where}: a class name is empty; give every class a name")
    if name[0] in _QUOTES or name[-1] in _QUOTES:
        raise UserError(f"{where}: the class name '{name}' starts or ends with a quote; remove the quotes")
    if name.casefold() in _MISSING:
        raise UserError(
            f"{where}: '{name}' means a missing value and can't be a class; for an image without classes, leave the "
            f"labels empty or use {BACKGROUND}"
        )
    return name


def is_background(name: str) -> bool:
    """Whether the name means 'no class': background in any case, with or without surrounding underscores."""
    return unicodedata.normalize("NFKC", name).strip(" _").casefold() == BACKGROUND


def check_class_list(names: Iterable[str], where: str) -> list[str]:
    """Validate a list of class names and return it in order; UserError for invalid names, duplicates, or a bad
    length.
    """
    classes = [class_name(name, where) for name in names]
    if not 1 <= len(classes) <= MAX_CLASSES:
        raise UserError(f"{where} must list 1 to {MAX_CLASSES} classes, got {len(classes)}")
    seen: dict[str, str] = {}
    for name in classes:
        if is_background(name):
            raise UserError(f"{where} lists '{name}', but background is always class 0; remove it")
        key = unicodedata.normalize("NFKC", name).casefold()
        other = seen.get(key)
        if other == name:
            raise UserError(f"{where} lists the class '{name}' twice; keep one")
        if other is not None:
            raise UserError(
                f"the classes '{other}' and '{name}' of {where} differ only in case or Unicode form; use one spelling"
            )
        seen[key] = name
    return classes


def difference(before: Sequence[str], now: Sequence[str]) -> str | None:
    """Describe how the classes of the data differ from those of a run; None if names and order are the same."""
    if list(before) == list(now):
        return None
    gone = [name for name in before if name not in now]
    new = [name for name in now if name not in before]
    if not gone and not new:
        return f"the order was {', '.join(before)} and is now {', '.join(now)}"
    parts = [f"lacks {', '.join(gone)}"] * bool(gone) + [f"adds {', '.join(new)}"] * bool(new)
    return f"the data now {' and '.join(parts)}"
