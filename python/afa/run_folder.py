"""The folder of a run has one owner at a time, and nothing of an earlier run is ever deleted to make room."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from afa.errors import UserError
from afa.files import OUTPUT_MARK, check_writable, flush, mark_output, writing

LOCK = ".lock"
PREVIOUS = "previous"
_MOVING = ".moving"


@contextmanager
def lock_run(run: str | Path) -> Iterator[None]:
    """Hold the run's folder, made if need be; UserError when it can't be written or another process holds it.

    The operating system lets go of the lock however the process ends. Folders that were made here and are still empty
    at the end go again.
    """
    made = [folder for folder in (Path(run), *Path(run).parents) if not folder.exists()]
    run = check_writable(run, "the run's folder")
    lock = FileLock(run / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process is working in the run's folder {run}; wait until it has ended, or give another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise UserError(f"the run's folder {run} can't be locked ({error}); give a folder on another disk") from error
    try:
        mark_output(run)
        yield
    finally:
        if made and {LOCK, OUTPUT_MARK}.issuperset(path.name for path in run.iterdir()):
            for name in (LOCK, OUTPUT_MARK):
                (run / name).unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()
        lock.release()


def check_run(run: str | Path) -> None:
    """UserError when the folder can't be written or is held by another process; to be called before long work."""
    with lock_run(run):
        pass


def put_aside(run: Path, names: Sequence[str]) -> Path | None:
    """Move what is there of `names` to run/previous/<number>, so that no old file passes for a new one; returns that
    folder, or None when nothing was there.

    A stop on the way leaves part of it in run/previous/.moving: the next call completes the move, and `bring_back`
    undoes it.
    """
    moving = run / PREVIOUS / _MOVING
    old = [run / name for name in names if (run / name).exists()]
    if not old and not moving.is_dir():
        return None
    with writing(run / PREVIOUS):
        moving.mkdir(parents=True, exist_ok=True)
        for path in old:
            os.replace(path, moving / path.name)
        numbers = [int(path.name) for path in moving.parent.iterdir() if path.name.isdigit()]
        target = moving.with_name(str(max(numbers, default=0) + 1))
        os.replace(moving, target)
        flush(target.parent)
    return target


def bring_back(run: Path) -> None:
    """Undo a `put_aside` that was stopped on its way: the run is again what it was before."""
    moving = run / PREVIOUS / _MOVING
    if not moving.is_dir():
        return
    with writing(run):
        for path in moving.iterdir():
            if not (run / path.name).exists():
                os.replace(path, run / path.name)
        if not any(moving.iterdir()):
            moving.rmdir()
