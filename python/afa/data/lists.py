"""What a data folder in PASCAL VOC's layout lists: its splits, classes and image files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from afa.data.classes import VOC_CLASSES
from afa.data.transforms import IGNORE
from afa.errors import UserError, did_you_mean

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
IMAGE_FOLDERS = ("JPEGImages", "train2014", "val2014", "images/train2014", "images/val2014")
"""Of VOC, and of COCO 2014 as it unpacks; all that are there are looked through."""
MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")
"""VOC's own masks come before those made from SBD."""


def read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as UTF-8 text ({error}); mend or replace it") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def stem_of(name: str) -> str:
    """The bare name of an image given as a name, file name or path, as published split lists give all
    three."""
    name = name.replace("\\", "/").rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES else name


def split_list(root: Path, split: str) -> Path:
    return root / "ImageSets" / "Segmentation" / f"{split}.txt"


def read_split(root: Path, split: str) -> list[str]:
    path = split_list(root, split)
    if not root.is_dir():
        raise UserError(
            f"the data folder {root} does not exist (looked for {path}); "
            "set data.root=FOLDER to a folder in PASCAL VOC layout, or set data.embedded=true to "
            "have the embedded data "
            "set made there, as `afa train demo` does"
        )
    if not path.is_file():
        lists = sorted(file.stem for file in path.parent.glob("*.txt"))
        there = f"the lists there are {', '.join(lists)}{did_you_mean(split, lists)}" if lists else "no list is there"
        coco = any((root / name).is_dir() for name in IMAGE_FOLDERS[1:])
        raise UserError(
            f"the split list {path} does not exist: {there}; set data.train_split or data.val_split, or make the lists "
            f"of a fresh download: afa prepare {'coco' if coco else 'voc'} {root}"
        )
    names = [stem_of(line.split()[0]) for line in read_lines(path)]
    if not names:
        raise UserError(f"the split list {path} is empty; it must hold one image name a line")
    return names


def read_classes(root: Path) -> list[str]:
    path = root / "classes.txt"
    return read_class_list(path) if path.is_file() else list(VOC_CLASSES)


def read_class_list(path: Path) -> list[str]:
    """The names in a classes.txt, checked."""
    classes = read_lines(path)
    if not 1 <= len(classes) < IGNORE:
        raise UserError(f"{path} must name 1 to {IGNORE - 1} classes, one a line, and names {len(classes)}")
    for position, name in enumerate(classes):
        if name in classes[:position]:
            raise UserError(f"{path} names the class '{name}' twice; keep one")
        if name.lower() == "background":
            raise UserError(f"{path} names '{name}', but background is always class 0; take that line out")
    return classes


def find_images(root: Path, names: Sequence[str], split: str) -> list[Path]:
    folders = [root / name for name in IMAGE_FOLDERS if (root / name).is_dir()]
    if not folders:
        raise UserError(
            f"the image folder {root / IMAGE_FOLDERS[0]} does not exist; "
            "data.root must be a folder in PASCAL VOC layout"
        )
    files = files_by_name(folders, IMAGE_SUFFIXES)
    for name in names:
        if name not in files:
            raise UserError(
                f"the image '{name}' of {split_list(root, split)} is not in {' or '.join(map(str, folders))} "
                f"(looked for {name} with {', '.join(IMAGE_SUFFIXES)}); add it or take it out of the list"
            )
    return [files[name] for name in names]


def files_by_name(folders: Iterable[Path], suffixes: Sequence[str]) -> dict[str, Path]:
    """Path within its folder, without the suffix -> file, of all visible files down to the bottom; of two with one
    name that of the earlier folder, and in a folder the first by name."""
    # One listing instead of a look per name and suffix, which takes long on network disks.
    found: dict[str, Path] = {}
    for folder in folders:
        for path in visible_files(folder, suffixes):
            found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return found


def visible_files(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """The files with one of the lower-case suffixes down to the bottom, in order, but for those hidden by a dot; links
    to folders are followed."""
    for place, inside, files in os.walk(folder, followlinks=True):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield Path(place, name)
