"""Reader for the user's own images: a folder with a CSV of tags, or with one folder per class. Writes nothing.

root/tags.csv               image,labels (labels separated by spaces or ;); images are given by their path relative to
                            root. Images without a row are not used. (labels.csv or a single other .csv also works.)
root/<class>/<image>        without a CSV: the folder name is the tag; a folder called background has images of no class
root/{train,val}/<class>/…  the same with an existing split; valid and validation mean val; test is ignored if there is
                            a val folder
root/classes.txt            optional: the classes in index order; default: sorted by name
root/masks/<image>.png      optional, for evaluation: a mask at the image's relative path. 0 background, 1.. the classes
root/{train,val}.txt        optional: lists of the training and validation images, one per line

Without such lists or folders, the images with masks are used for validation if only some images have masks. Otherwise
about every tenth image is selected by a hash of its name, so that an image keeps its split when others are added.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from afa.data.class_names import check_class_list, class_name, is_background
from afa.data.listing import IMAGE_SUFFIXES, PictureFinder, files_by_name, visible_files
from afa.data.readers.common import TaggedPictures
from afa.data.readers.tags import csv_rows, read_lines, split_labels
from afa.data.readers.voc import IMAGE_FOLDERS, read_class_list
from afa.errors import UserError, did_you_mean
from afa.files import is_output

MASKS = "masks"
VALIDATION_SHARE = 0.1
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Lower-case folder name -> split, for folders that are splits and not classes."""


@dataclass(frozen=True)
class OwnPicture:
    """One tagged image; `name` is its relative path without the suffix."""

    name: str
    path: Path
    labels: tuple[str, ...]


@dataclass(frozen=True)
class OwnFolder:
    """The contents of a folder with the user's own images."""

    root: Path
    source: str
    """Description of the tag source."""
    classes: list[str]
    pictures: list[OwnPicture]
    untagged: int
    """Number of images without a row in the CSV."""
    masks: Mapping[str, Path]
    """Image name -> mask."""
    mask_folder: Path
    mask_files: int
    """Number of files of any type in the mask folder."""
    splits: Mapping[str, str]
    """Top-level folder -> split, if all images are in split folders."""
    notes: list[str]
    """Notes for the user, one sentence each."""

    def counts(self) -> dict[str, int]:
        """Class -> number of images with its tag."""
        counts = Counter(label for picture in self.pictures for label in set(picture.labels))
        return {name: counts[name] for name in self.classes}

    def split(self, split: str) -> list[OwnPicture]:
        """The images of 'train', 'val', 'all', or of the list root/<split>.txt; UserError if there are none."""
        if split == "all":
            chosen = self.pictures
        elif (self.root / f"{split}.txt").is_file():
            chosen = self._listed(split)
        elif split == "test" and split in self.splits.values():
            chosen = [picture for picture in self.pictures if self._folder_split(picture.name) == split]
        elif split in ("train", "val"):
            validation = self._validation()
            test = self._left_out()
            chosen = [
                picture
                for picture in self.pictures
                if (picture.name in validation) == (split == "val") and picture.name not in test
            ]
        else:
            raise UserError(
                f"there is no split '{split}' in {self.root}; use 'train', 'val' or 'all', or add a list "
                f"{self.root / split}.txt{did_you_mean(split, ('train', 'val', 'all'))}"
            )
        if not chosen:
            raise UserError(
                f"the split '{split}' of {self.root} is empty: {len(self.pictures)} tagged images are too few for "
                "training and validation; add images"
            )
        return chosen

    def how_split(self) -> str:
        """Describe how images are split into training and validation."""
        lists = [name for name in ("train", "val") if (self.root / f"{name}.txt").is_file()]
        if lists:
            return " and ".join(f"{name}.txt" for name in lists)
        if self._split_by_folder():
            left_out = [folder for folder, split in self.splits.items() if split == "test"]
            note = f" ({' and '.join(left_out)} is ignored)" if left_out and "val" in self.splits.values() else ""
            return f"the folders {' and '.join(f for f in self.splits if f not in left_out or not note)}{note}"
        masked = self._masked()
        if 0 < len(masked) < len(self.pictures):
            return "images with masks are used for validation"
        return f"about one in {round(1 / VALIDATION_SHARE)} images, selected by name, is used for validation"

    def _masked(self) -> set[str]:
        return {picture.name for picture in self.pictures if picture.name in self.masks}

    def _split_by_folder(self) -> bool:
        """Whether folders define the split; a single train folder does not."""
        return len({*self.splits.values()}) > 1

    def _folder_split(self, name: str) -> str:
        return self.splits[name.partition("/")[0]]

    def _left_out(self) -> set[str]:
        """Names of the images in an ignored test folder."""
        listed = any((self.root / f"{split}.txt").is_file() for split in ("train", "val"))
        if listed or not {"val", "test"}.issubset(self.splits.values()):
            return set()
        return {picture.name for picture in self.pictures if self._folder_split(picture.name) == "test"}

    def _validation(self) -> set[str]:
        """Names of the images that are not used for training."""
        names = {picture.name for picture in self.pictures}
        if (self.root / "val.txt").is_file():
            return {picture.name for picture in self._listed("val")}
        if (self.root / "train.txt").is_file():
            return names - {picture.name for picture in self._listed("train")}
        if self._split_by_folder():
            held = "val" if "val" in self.splits.values() else "test"
            return {name for name in names if self._folder_split(name) == held}
        masked = self._masked()
        if 0 < len(masked) < len(names):
            return masked
        order = sorted(names, key=_place)
        if len(order) < 2:
            return set()
        return {name for name in order if _place(name) < VALIDATION_SHARE} or {order[0]}

    def _listed(self, split: str) -> list[OwnPicture]:
        path = self.root / f"{split}.txt"
        find = _Find(self.root, {picture.name: picture.path for picture in self.pictures})
        pictures = {picture.name: picture for picture in self.pictures}
        return [pictures[find(line, f"the list {path}")] for line in dict.fromkeys(read_lines(path))]


def is_own_folder(root: Path) -> bool:
    """Whether the folder is in neither VOC nor COCO layout, so that it is read as the user's own images."""
    return root.is_dir() and not any((root / name).is_dir() for name in ("ImageSets", *IMAGE_FOLDERS))


def read_own_split(root: Path, split: str) -> TaggedPictures:
    """The images of one split with their tags."""
    folder = read_own_folder(root)
    pictures = folder.split(split)
    tags = torch.tensor([[float(name in picture.labels) for name in folder.classes] for picture in pictures])
    names, paths = [picture.name for picture in pictures], [picture.path for picture in pictures]
    return TaggedPictures(folder.classes, names, paths, tags, folder.masks, folder.mask_folder, folder.notes)


def read_own_folder(root: Path) -> OwnFolder:
    """List the images of `root` and their tags; UserError for an invalid file or line."""
    for inside in (*root.iterdir(), *root.glob("VOCdevkit/*")):
        if (inside / "ImageSets").is_dir() or (inside / "JPEGImages").is_dir():
            raise UserError(f"{root} contains a folder in PASCAL VOC layout; set data.root={inside}")
    mask_folders, mask_folder = _mask_folders(root)
    files: dict[str, Path] = {}
    for path in visible_files(root, IMAGE_SUFFIXES):
        name = path.relative_to(root).with_suffix("").as_posix()
        if root / name.partition("/")[0] in mask_folders:
            continue
        if name in files:
            raise UserError(f"{files[name]} and {path} have the same name except for the suffix; rename one of them")
        files[name] = path
    if not files:
        raise UserError(
            f"the folder {root} contains no images ({', '.join(IMAGE_SUFFIXES)}) and is not in PASCAL VOC layout "
            "(no ImageSets/Segmentation); set data.root to a folder with images"
        )
    table = _find_table(root)
    splits = _split_folders(root, files)
    if table is None:
        source, pictures = "one folder per class", list(_from_folders(root, files, splits))
    else:
        source, pictures = table.name, list(_from_table(root, table, files))
    path = root / "classes.txt"
    found = sorted({label for picture in pictures for label in picture.labels})
    classes = read_class_list(path) if path.is_file() else found
    for label in found:
        if label not in classes:
            raise UserError(
                f"the tag '{label}' of {root} is not in {path}{did_you_mean(label, classes)}; add it there, or remove "
                "that file to make every tag a class"
            )
    check_class_list(classes, f"{root} ({source})")
    if not pictures:
        raise UserError(f"{root} ({source}) has no tagged images; add at least one")
    masks = files_by_name(mask_folders, (".png",))
    count, notes = _mask_notes(mask_folder, masks, files) if mask_folders else (0, [])
    if not mask_folders and mask_folder.is_dir():
        notes = [f"{mask_folder} contains output of `afa`, so it is not used as ground-truth masks"]
    return OwnFolder(
        root, source, classes, pictures, len(files) - len(pictures), masks, mask_folder, count, splits, notes
    )


def other_files(root: Path) -> dict[str, int]:
    """Suffix -> number of visible files that are skipped because they are neither images, tables nor lists."""
    known = (*IMAGE_SUFFIXES, ".csv", ".txt")
    found = Counter(path.suffix.lower() for path in visible_files(root))
    return {suffix or "no suffix": count for suffix, count in sorted(found.items()) if suffix not in known}


def _mask_folders(root: Path) -> tuple[list[Path], Path]:
    """All mask folders (case-insensitive), and the one that is used."""
    named = [path for path in sorted(root.iterdir()) if path.name.casefold() == MASKS and path.is_dir()]
    folders = [path for path in named if not is_output(path)]
    if len(folders) > 1:
        raise UserError(f"{folders[0]} and {folders[1]} differ only in case; put all masks in {root / MASKS}")
    return folders, folders[0] if folders else root / MASKS


def _mask_notes(folder: Path, masks: Mapping[str, Path], pictures: Iterable[str]) -> tuple[int, list[str]]:
    """The number of files in the mask folder, and notes about files that match no image."""
    everything = list(visible_files(folder))
    others = Counter(path.suffix.lower() or "no suffix" for path in everything if path.suffix.lower() != ".png")
    notes = []
    if others:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(others.items()))
        notes.append(f"{sum(others.values()):,} files in {folder} are not .png and are not used as masks: {kinds}")
    strangers = sorted(masks.keys() - set(pictures))
    if strangers:
        shown = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        notes.append(
            f"{len(strangers):,} mask files in {folder} match no image ({shown}): a mask needs the relative path of "
            "its image, with the suffix .png"
        )
    return len(everything), notes


def _split_folders(root: Path, files: Mapping[str, Path]) -> dict[str, str]:
    """Folder -> split, if all top-level folders are splits; UserError if only some of them are."""
    tops = sorted({name.partition("/")[0] for name in files if "/" in name})
    splits = {top: SPLITS[top.casefold()] for top in tops if top.casefold() in SPLITS}
    if "train" not in splits.values():
        return {}
    others = [top for top in tops if top not in splits]
    loose = [name for name in files if "/" not in name]
    if not others and not loose:
        return splits if len(splits) > 1 or all(name.count("/") > 1 for name in files) else {}
    if len(splits) > 1 and _find_table(root) is None:
        raise UserError(
            f"{root} contains the split folders {', '.join(splits)} and other images ({(others + loose)[0]}); "
            "move these into one of the splits, or out of the folder"
        )
    return {}


def _find_table(root: Path) -> Path | None:
    for name in ("tags.csv", "labels.csv"):
        if (root / name).is_file():
            return root / name
    tables = sorted(path for path in root.iterdir() if path.suffix.lower() == ".csv" and path.is_file())
    if len(tables) > 1:
        raise UserError(
            f"{root} has several CSV files ({', '.join(path.name for path in tables)}); "
            "rename the one with the tags to tags.csv"
        )
    return tables[0] if tables else None


class _Find:
    """Finds the image for a line of a CSV or list; UserError if there is no match or more than one."""

    def __init__(self, root: Path, files: Mapping[str, Path]) -> None:
        self.root = root
        self.files = files
        self.finder = PictureFinder(files)

    def __call__(self, text: str, where: str) -> str:
        names = self.finder.find(text)
        if len(names) > 1:
            raise UserError(
                f"'{text}' in {where} is ambiguous ({names[0]} or {names[1]}); write its path relative to {self.root}"
            )
        if not names:
            if (self.root / text.replace("\\", "/").removeprefix("./")).is_file():
                raise UserError(
                    f"'{text}' in {where} is not a supported image type ({', '.join(IMAGE_SUFFIXES)}); convert it"
                )
            hint = did_you_mean(text, [path.relative_to(self.root).as_posix() for path in self.files.values()])
            raise UserError(f"the image '{text}' in {where} is not in {self.root}{hint}; add it or remove the line")
        return names[0]


def _from_table(root: Path, table: Path, files: Mapping[str, Path]) -> Iterator[OwnPicture]:
    find = _Find(root, files)
    rows = list(csv_rows(table))
    listed = root / "classes.txt"
    known = read_class_list(listed) if listed.is_file() else []
    # If any line uses semicolons, spaces in all lines are part of the names.
    semicolons = any(";" in text for _, text, _ in rows)
    seen: dict[str, str] = {}
    for image, text, where in rows:
        name = find(image, where)
        if name in seen:
            raise UserError(f"{where} tags '{image}' a second time (after {seen[name]}); keep one line per image")
        seen[name] = where
        whole = semicolons and not known and text and ";" not in text
        labels = split_labels(text, {class_name(text, where)} if whole else known, where)
        yield OwnPicture(name, files[name], tuple(labels))


def _from_folders(root: Path, files: Mapping[str, Path], splits: Mapping[str, str]) -> Iterator[OwnPicture]:
    for name, path in files.items():
        parts = name.split("/")[1:] if splits else name.split("/")
        if len(parts) < 2:
            raise UserError(
                f"the image {path} has no tag: there is no {root / 'tags.csv'} (lines of image,labels), and the image "
                "is not in a folder named after its class; add one or the other"
            )
        label = class_name(parts[0], f"the folder {path.parents[len(parts) - 2]}")
        yield OwnPicture(name, path, () if is_background(label) else (label,))


def _place(name: str) -> float:
    """A number in [0, 1) that depends only on the name."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64
