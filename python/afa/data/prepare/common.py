"""Helpers for all data sets: output, and writing only changed files."""

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
"""Prints one line: a short heading and the text."""


def write_if_new(path: Path, lines: Iterable[str], say: Say, what: str) -> None:
    """Write the lines unless the file already has this content, and report it; `what` describes the content.

    A file with different content, which may be the user's work, is kept as <name>.old.
    """
    text = "".join(f"{line}\n" for line in lines)
    if path.is_file() and path.read_bytes() == text.encode():
        say("kept", f"{path}: {what}")
        return
    former = path.with_name(f"{path.name}.old")
    if path.is_file():
        # An existing backup may be the only copy of the user's work.
        number = 1
        while former.exists():
            number += 1
            former = path.with_name(f"{path.name}.old{number}")
        with writing(former):
            path.replace(former)
        say("rewrote", f"{path}: {what}; the previous file is {former.name}")
    else:
        say("wrote", f"{path}: {what}")
    write_text(path, text)


def say_classes(counts: Mapping[str, int], say: Say) -> None:
    """Print the number of images per class."""
    say("classes", ", ".join(f"{name} {count:,}" for name, count in counts.items()))


def run_all(work: Callable[[Any], object], tasks: Sequence[Any], name: str, progress: bool) -> None:
    """Run work(task) for every task in a process pool with a progress bar; the first error stops it.

    An interruption loses only the tasks in progress.
    """
    if not tasks:
        return
    workers = min(os.cpu_count() or 1, len(tasks))
    with tqdm(total=len(tasks), desc=name, unit="img", disable=not progress, dynamic_ncols=True) as bar:
        pool = ProcessPoolExecutor(workers)
        try:
            # Submit in batches: a task contains the outlines of an image, and the pool keeps a copy of each.
            for part in _parts(tasks, 64 * workers):
                for _ in pool.map(work, part, chunksize=8):
                    bar.update()
        finally:
            pool.shutdown(cancel_futures=True)


def _parts(tasks: Iterable[Any], length: int) -> Iterator[list[Any]]:
    iterator = iter(tasks)
    while part := list(islice(iterator, length)):
        yield part


def some(names: Iterable[str], max_names: int = 3) -> str:
    """Abbreviate a list: 'a, b, c and 7 more'."""
    names = list(names)
    more = f" and {len(names) - max_names:,} more" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + more
