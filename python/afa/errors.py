"""The exception for user errors, and helpers for its messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Terminal escape sequences such as colors, which some messages of torch contain."""


class UserError(Exception):
    """Invalid user input. The message is one sentence: the file or key, what was expected, what was found, what to do.

    The command line prints only the message, without a traceback, and exits with status 2.
    """


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the option closest to `word`, or an empty string if none is close."""
    by_folded = {option.casefold(): option for option in options}
    near = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.5)
    return f"; did you mean '{by_folded[near[0]]}'?" if near else ""


def printable(text: str) -> str:
    """Escape control characters and undecodable bytes, which file names can contain, for printing to a terminal."""
    text = _ESCAPE_SEQUENCE.sub("", text)
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """The message of another library's exception in one line of at most 200 characters."""
    text = " ".join(printable(" ".join(str(error).split())).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
