"""The one exception a user's mistake ends in, and the helper that suggests what was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Colors and the like of a terminal, as torch has them in its messages."""


class UserError(Exception):
    """Bad input: one sentence naming the file or key, what was expected, what came and what to do.

    The command line prints the sentence alone and exits 2; a traceback would only hide it.
    """


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the option nearest to `word`, or nothing when none is near."""
    by_folded = {option.casefold(): option for option in options}
    near = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.5)
    return f"; did you mean '{by_folded[near[0]]}'?" if near else ""


def printable(text: str) -> str:
    """The text for a terminal: control characters, such as a file name may hold, and undecodable bytes are escaped."""
    text = _ESCAPE_SEQUENCE.sub("", text)
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else c.encode("unicode_escape").decode() for c in text)
