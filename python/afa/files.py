"""Files written whole or not at all, deleted out of sight, marked as output, and told apart."""

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
"""A file of this name marks a folder that `afa` writes: its pictures are no input."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written by the caller; it takes the name `path` when the block
    succeeds.

    A reader sees the old file or the whole new one, never half of it, and a failure leaves nothing behind.
    The temporary name keeps the suffix, since Pillow and NumPy choose the format by it, and is short, so that every
    name that fits into its folder can be written. UserError when the file can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(4)}.tmp{path.suffix[:100]}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            # Without this a power cut may keep the new name and lose the bytes.
            flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """An OSError inside becomes a UserError that says what could not be written and why."""
    try:
        yield
    except OSError as error:
        raise UserError(cannot_write(path, error)) from error


def cannot_write(path: str | Path, error: OSError) -> str:
    """The sentence for a file or folder that can't be written."""
    return f"{path} can't be written: {error.strerror or error}; give a place that can be written and has space left"


def check_writable(folder: str | Path, what: str) -> Path:
    """Make the folder and write a short file in it; UserError, naming `what` (an option, say), when that fails.

    To be called before long work.
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
        raise UserError(f"{what} {folder} can't be written: {reason}; give a folder that can be written") from error
    return folder


def check_space(folder: str | Path, needed: int, what: str) -> None:
    """UserError when the disk of `folder`, which exists, has fewer than `needed` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{what} in {folder} need about {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free; "
            "make room or give another folder"
        )


def remove_tree(path: str | Path) -> None:
    """Delete a file or folder: renamed out of sight first, so that a stop on the way never leaves half of it under its
    name. What an earlier stop left of others beside it goes as well. Nothing happens when it isn't there."""
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
    """Make the folder if it isn't there, and mark it as written by `afa`, so that no command takes its pictures for
    input."""
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OUTPUT_MARK).touch()


def is_output(folder: Path) -> bool:
    """Whether `afa` wrote this folder: it bears the mark, or is what `afa predict` wrote before there was one."""
    return (folder / OUTPUT_MARK).is_file() or (folder.name == "predictions" and (folder / "masks").is_dir())


def flush(path: Path) -> None:
    """Wait until what was written to a file, or the names in a folder, would outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    """Digest of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` at once or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, content: str) -> None:
    """Write `content` as UTF-8 to `path` at once or not at all. A file name's bytes that are not UTF-8 are escaped."""
    write_bytes(path, content.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON (see `to_json`)."""
    write_text(path, to_json(content, indent=2) + "\n")


def to_json(content: Any, indent: int | None = None) -> str:
    """`content` as JSON. NaN (a class absent everywhere) and infinity become null, which every JSON reader takes."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
