"""Shared by all preparations: what they print, and writing only what differs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from afa.files import write_text, writing

Say = Callable[[str, str], None]
"""Prints one line: a word in the margin, and the text."""


def write_if_new(path: Path, lines: Iterable[str], say: Say, what: str) -> None:
    """Write the lines unless the file holds them already, and say which; `what` describes the content.

    A file of other content, which may be someone's work, is kept beside it as <name>.old.
    """
    text = "".join(f"{line}\n" for line in lines)
    if path.is_file() and path.read_bytes() == text.encode():
        say("kept", f"{path}: {what}")
        return
    former = path.with_name(f"{path.name}.old")
    if path.is_file():
        # A former one that is kept already may be the only copy of someone's work.
        number = 1
        while former.exists():
            number += 1
            former = path.with_name(f"{path.name}.old{number}")
        with writing(former):
            path.replace(former)
        say("rewrote", f"{path}: {what}; the former one is {former.name}")
    else:
        say("wrote", f"{path}: {what}")
    write_text(path, text)


def say_classes(counts: Mapping[str, int], say: Say) -> None:
    """Print the classes with the number of images that show each."""
    say("classes", ", ".join(f"{name} {count:,}" for name, count in counts.items()))


def run_all(work: Callable[[Any], object], tasks: Sequence[Any], name: str, progress: bool) -> None:
    """work(task) of every task in a pool of processes, with a progress bar; the first error ends it.

    A stop loses what is being worked on, and nothing that is done.
    """
    if not tasks:
        return
    workers = min(os.cpu_count() or 1, len(tasks))
    with tqdm(total=len(tasks), desc=name, unit="img", disable=not progress, dynamic_ncols=True) as bar:
        pool = ProcessPoolExecutor(workers)
        try:
            # Some at a time: a task holds the outlines of a whole image, and a copy of each waits in the pool.
            for part in _parts(tasks, 64 * workers):
                for _ in pool.map(work, part, chunksize=8):
                    bar.update()
        finally:
            pool.shutdown(cancel_futures=True)


def _parts(tasks: Iterable[Any], length: int) -> Iterator[list[Any]]:
    iterator = iter(tasks)
    while part := list(islice(iterator, length)):
        yield part


def some(names: Iterable[str], most: int = 3) -> str:
    """'a, b, c and 7 more'."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
