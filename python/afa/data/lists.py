"""What a data folder in PASCAL VOC's layout lists: its splits, classes and image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afa.data.classes import VOC_CLASSES
from afa.data.transforms import IGNORE
from afa.errors import UserError, did_you_mean

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


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
        raise UserError(f"the split list {path} does not exist: {there}; set data.train_split or data.val_split")
    names = [stem_of(line.split()[0]) for line in read_lines(path)]
    if not names:
        raise UserError(f"the split list {path} is empty; it must hold one image name a line")
    return names


def read_classes(root: Path) -> list[str]:
    path = root / "classes.txt"
    if not path.is_file():
        return list(VOC_CLASSES)
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
    folder = root / "JPEGImages"
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist; data.root must be a folder in PASCAL VOC layout")
    # One listing instead of a look per name and suffix, which takes long on network disks.
    files = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES}
    for name in names:
        if name not in files:
            raise UserError(
                f"the image '{name}' of {split_list(root, split)} is not in "
                f"{folder} "
                f"(looked for {name} with {', '.join(IMAGE_SUFFIXES)}); add it or take it out of the list"
            )
    return [files[name] for name in names]
