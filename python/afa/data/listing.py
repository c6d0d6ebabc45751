"""The one rule for listing a folder of pictures, and the way from a name in a table to its picture."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from afa.files import is_output

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def visible_files(folder: Path, suffixes: Sequence[str] | None = None) -> Iterator[Path]:
    """The files with one of the lower-case suffixes (None: all) in the folder and below it, in order.

    Files and folders hidden by a leading dot are left out, and so are folders that `afa` wrote its output to. Links to
    folders are followed, but no loop of links.
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
    """Path within its folder, without the suffix -> file, of all visible files; of two with one name that of the
    earlier folder, and in a folder the first by name."""
    # One listing instead of a look per name and suffix, which takes long on network disks.
    found: dict[str, Path] = {}
    for folder in folders:
        for path in visible_files(folder, suffixes):
            found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return found


def stem_of(name: str) -> str:
    """The bare name of an image given as a name, file name or path, as published split lists give all three."""
    return without_suffix(name.replace("\\", "/").rpartition("/")[2])


def without_suffix(name: str) -> str:
    """The name without the suffix of a picture, if it has one."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES else name


class PictureFinder:
    """Names of the pictures that a line of a table or a list may mean.

    A line gives a picture's path within its folder, with or without the suffix, or its bare file name. Unicode forms
    (NFC, NFD) are alike, since file systems differ in which they keep.
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
        """The names that `text` may mean: none, one, or several of which it can't tell."""
        key = _key(text.strip().replace("\\", "/").removeprefix("./"))
        return [self._exact[key]] if key in self._exact else self._names.get(key, [])


def _key(text: str) -> str:
    return unicodedata.normalize("NFC", text)
