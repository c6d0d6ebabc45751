"""The folder of a run: file names, locking, and archiving of earlier runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from afa.errors import UserError
from afa.files import OUTPUT_MARK, check_writable, flush, mark_output, writing

CONFIG = "config.yaml"
LOG = "log.jsonl"
CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
"""Labels of a few training images at the end of each phase."""
BEST = "best"
"""The best weights so far, if train.keep_best is set."""
TENSORBOARD = "tensorboard"
TRAINING_FILES = (CHECKPOINTS, LOG, TENSORBOARD, SNAPSHOTS, BEST, CONFIG)
"""Files that training writes. A run with checkpoints can be resumed."""

MODEL = "model.safetensors"
"""Written last: its presence means that training is finished."""
EVALUATION = "evaluation"
"""Label maps of an unfinished evaluation."""
METRICS, SAMPLES, REPORT = "metrics.json", "samples.npz", "report.html"
CLASS_TABLE, IMAGE_TABLE, CONFUSION = "metrics.csv", "images.csv", "confusion.csv"
EVALUATION_FILES = (METRICS, SAMPLES, CLASS_TABLE, IMAGE_TABLE, CONFUSION, REPORT)
"""Files that evaluation writes."""
RESULT_FILES = (MODEL, EVALUATION, *EVALUATION_FILES)

LOCK = ".lock"
PREVIOUS = "previous"
"""Folder with a numbered subfolder for each earlier run."""
_MOVING = ".moving"


@contextmanager
def lock_run(run: str | Path) -> Iterator[None]:
    """Lock the run's folder, creating it if necessary; UserError if it can't be written or another process has locked
    it.

    The operating system releases the lock when the process ends. Folders created here are removed if they are still
    empty at the end.
    """
    made = [folder for folder in (Path(run), *Path(run).parents) if not folder.exists()]
    run = check_writable(run, "the run's folder")
    lock = FileLock(run / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process is using the run's folder {run}; wait until it has finished, or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise UserError(f"can't lock the run's folder {run} ({error}); choose a folder on another disk") from error
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
    """Raise UserError if the folder can't be written or is locked by another process. Call it before long work."""
    with lock_run(run):
        pass


def put_aside(run: Path, names: Sequence[str]) -> Path | None:
    """Move the existing files among `names` to run/previous/<number>, so that old files can't be mistaken for new ones.

    Returns the new folder, or None if there was nothing to move. An interrupted move leaves files in
    run/previous/.moving: the next call completes the move, and `bring_back` undoes it.
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
    """Undo an interrupted `put_aside`."""
    moving = run / PREVIOUS / _MOVING
    if not moving.is_dir():
        return
    with writing(run):
        for path in moving.iterdir():
            if not (run / path.name).exists():
                os.replace(path, run / path.name)
        if not any(moving.iterdir()):
            moving.rmdir()
