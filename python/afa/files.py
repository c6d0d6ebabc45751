"""File helpers: atomic writes, safe deletion, output marks and checksums."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from afa.errors import UserError

OUTPUT_MARK = ".afa-output"
"""A file with this name marks an output folder of `afa`, so that its images are not used as input."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path for the caller to write; it is renamed to `path` if the block succeeds.

    Readers see either the old file or the complete new one, and a failure leaves nothing behind. The temporary name
    keeps the suffix, because Pillow and NumPy choose the format by it, and is short, so that any valid name for `path`
    works. Raises UserError if the file can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(4)}.tmp{path.suffix[:100]}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            # safetensors 0.8 makes files that only their owner can read.
            temporary.chmod(mode)
            # Without this, a power failure could keep the new name but lose the content.
            flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Convert an OSError in the block to a UserError with the path and the reason."""
    try:
        yield
    except OSError as error:
        raise UserError(cannot_write(path, error)) from error


def cannot_write(path: str | Path, error: OSError) -> str:
    """The message for a file or folder that can't be written."""
    return f"{path} can't be written: {error.strerror or error}; choose a writable location with free space"


def check_writable(folder: str | Path, what: str) -> Path:
    """Create the folder and write a small test file in it. Call it before long work.

    Raises UserError if that fails; `what` describes the folder in the message, for example the name of an option.
    """
    folder = Path(folder)
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{what} {folder} can't be written: {reason}; choose a writable folder") from error
    return folder


def check_space(folder: str | Path, needed: int, what: str) -> None:
    """Raise UserError if the disk of the existing `folder` has less than `needed` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{what} in {folder} need about {needed / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free; "
            "free some space or choose another folder"
        )


def remove_tree(path: str | Path) -> None:
    """Delete a file or folder if it exists.

    It is renamed first, so that an interruption never leaves a partial folder under its name. Leftovers of earlier
    interruptions in the same folder are deleted too.
    """
    path = Path(path)
    if path.is_symlink() or path.exists():
        hidden = path.with_name(f".{secrets.token_hex(4)}.trash")
        with writing(path):
            os.replace(path, hidden)
    for trash in path.parent.glob(".*.trash"):
        if trash.is_dir() and not trash.is_symlink():
            shutil.rmtree(trash, ignore_errors=True)
        else:
            trash.unlink(missing_ok=True)


def mark_output(folder: str | Path) -> None:
    """Create the folder if necessary and mark it as output of `afa`, so that no command uses its images as input."""
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OUTPUT_MARK).touch()


def is_output(folder: Path) -> bool:
    """Whether `afa` wrote this folder: it has the mark, or is an unmarked output of an older `afa predict`."""
    return (folder / OUTPUT_MARK).is_file() or (folder.name == "predictions" and (folder / "masks").is_dir())


def flush(path: Path) -> None:
    """Flush a file's content or a folder's entries to disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_bytes(path: str | Path, content: bytes) -> None:
    """Atomically write `content` to `path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, content: str) -> None:
    """Atomically write `content` to `path` as UTF-8. Bytes of file names that are not UTF-8 are escaped."""
    write_bytes(path, content.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON (see `to_json`)."""
    write_text(path, to_json(content, indent=2) + "\n")


def to_json(content: Any, indent: int | None = None) -> str:
    """Convert `content` to JSON. NaN (a class without pixels) and infinity become null, which is valid JSON."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
