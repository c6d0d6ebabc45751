"""Listing of image folders, and lookup of images by the names in tables and lists."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from afa.files import is_output

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def visible_files(folder: Path, suffixes: Sequence[str] | None = None) -> Iterator[Path]:
    """Yield the files with one of the lower-case suffixes (None: all) in the folder and its subfolders, in order.

    Hidden files and folders (with a leading dot) and output folders of `afa` are skipped. Links to folders are followed
    unless they form a loop.
    """
    yield from _visible(folder, suffixes, ())


def _visible(folder: Path, suffixes: Sequence[str] | None, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    try:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir(), entry.is_file()) for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name, _, is_file in found:
        if is_file and not name.startswith(".") and (suffixes is None or _suffix(name) in suffixes):
            yield folder / name
    for name, is_dir, _ in found:
        if is_dir and not name.startswith(".") and not is_output(folder / name):
            yield from _visible(folder / name, suffixes, (*above, identity))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def files_by_name(folders: Iterable[Path], suffixes: Sequence[str]) -> dict[str, Path]:
    """Map the relative path without suffix to the file, for all visible files.

    If two files have the same key, the earlier folder wins, then the first by name.
    """
    # One listing, because a lookup per name and suffix is slow on network disks.
    found: dict[str, Path] = {}
    for folder in folders:
        for path in visible_files(folder, suffixes):
            found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return found


def stem_of(name: str) -> str:
    """The name of an image without folder and suffix. Published lists contain names, file names and paths."""
    return without_suffix(name.replace("\\", "/").rpartition("/")[2])


def without_suffix(name: str) -> str:
    """The name without its image suffix, if it has one."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES else name


class PictureFinder:
    """Finds the image that a line of a table or list refers to.

    A line contains an image's relative path, with or without suffix, or its file name. Unicode forms (NFC, NFD) are
    treated as equal, because file systems differ in which they store.
    """

    def __init__(self, pictures: Mapping[str, Path]) -> None:
        self._exact: dict[str, str] = {}
        self._names: dict[str, list[str]] = {}
        for name, path in pictures.items():
            self._exact.setdefault(_key(name), name)
            suffix = path.suffix
            for key in {_key(name + suffix), _key(path.name), _key(path.stem)}:
                self._names.setdefault(key, []).append(name)

    def find(self, text: str) -> list[str]:
        """Names that match `text`: none, one, or several if it is ambiguous."""
        key = _key(text.strip().replace("\\", "/").removeprefix("./"))
        return [self._exact[key]] if key in self._exact else self._names.get(key, [])


def _key(text: str) -> str:
    return unicodedata.normalize("NFC", text)
