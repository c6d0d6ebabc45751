"""Pictures of one's own: a folder of images with a CSV of tags, or with one folder per class. Nothing is written there.

root/tags.csv               image,labels (labels separated by space or ;); images by their path within root, anywhere
                            in it. Pictures without a line are left out. (labels.csv, or the only .csv, will do.)
root/<class>/<image>        without a CSV: the folder is the tag; a folder called background holds pictures of no class
root/{train,val}/<class>/…  the same, split beforehand; valid and validation mean val, and test is left out unless there
                            is no val
root/classes.txt            optional: the classes in the order of their numbers; otherwise they are sorted by name
root/masks/<image>.png      optional, only for evaluation; the same path as the image's. 0 background, 1.. the classes
root/{train,val}.txt        optional: which pictures are which, one per line

Without lists or folders that say so, validation gets the pictures with masks if some have masks and others not, and
otherwise every tenth, chosen by its name: a picture keeps its side when others are added.
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
"""Names of folders that are splits and no classes, in small letters -> the split."""


@dataclass(frozen=True)
class OwnPicture:
    """One tagged picture; `name` is its path within the folder, without the suffix."""

    name: str
    path: Path
    labels: tuple[str, ...]


@dataclass(frozen=True)
class OwnFolder:
    """What a folder of one's own pictures holds."""

    root: Path
    source: str
    """Where the tags come from, in words."""
    classes: list[str]
    pictures: list[OwnPicture]
    untagged: int
    """Pictures that the CSV leaves out."""
    masks: Mapping[str, Path]
    """Name of the picture -> its mask."""
    mask_folder: Path
    mask_files: int
    """Files in the mask folder, of any kind."""
    splits: Mapping[str, str]
    """Folder of the root -> the split it holds, when all pictures lie in such folders."""
    notes: list[str]
    """What a user should know, one sentence each."""

    def counts(self) -> dict[str, int]:
        """Class -> number of pictures that show it."""
        counts = Counter(label for picture in self.pictures for label in set(picture.labels))
        return {name: counts[name] for name in self.classes}

    def split(self, split: str) -> list[OwnPicture]:
        """The pictures of 'train', 'val', 'all', or of the list root/<split>.txt; UserError when there are none."""
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
                f"there is no split '{split}' in {self.root}: 'train', 'val' and 'all' are made as needed, any other "
                f"needs a list {self.root / split}.txt{did_you_mean(split, ('train', 'val', 'all'))}"
            )
        if not chosen:
            raise UserError(
                f"the split '{split}' of {self.root} is empty: {len(self.pictures)} tagged pictures are too few to "
                "train on some and measure on others; add pictures"
            )
        return chosen

    def how_split(self) -> str:
        """What decides between training and validation, in words."""
        lists = [name for name in ("train", "val") if (self.root / f"{name}.txt").is_file()]
        if lists:
            return " and ".join(f"{name}.txt" for name in lists)
        if self._split_by_folder():
            left_out = [folder for folder, split in self.splits.items() if split == "test"]
            note = f" ({' and '.join(left_out)} is left out)" if left_out and "val" in self.splits.values() else ""
            return f"the folders {' and '.join(f for f in self.splits if f not in left_out or not note)}{note}"
        masked = self._masked()
        if 0 < len(masked) < len(self.pictures):
            return "the pictures with masks are for validation"
        return f"one picture in {round(1 / VALIDATION_SHARE)}, chosen by its name, is for validation"

    def _masked(self) -> set[str]:
        return {picture.name for picture in self.pictures if picture.name in self.masks}

    def _split_by_folder(self) -> bool:
        """Whether folders tell training from validation; a folder train on its own does not."""
        return len({*self.splits.values()}) > 1

    def _folder_split(self, name: str) -> str:
        return self.splits[name.partition("/")[0]]

    def _left_out(self) -> set[str]:
        """Names of the pictures of a folder test, which are neither for training nor for validation."""
        listed = any((self.root / f"{split}.txt").is_file() for split in ("train", "val"))
        if listed or not {"val", "test"}.issubset(self.splits.values()):
            return set()
        return {picture.name for picture in self.pictures if self._folder_split(picture.name) == "test"}

    def _validation(self) -> set[str]:
        """Names of the pictures that are not for training."""
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
    """Whether the folder is not laid out as VOC's or COCO's, so that it is read as pictures of one's own."""
    return root.is_dir() and not any((root / name).is_dir() for name in ("ImageSets", *IMAGE_FOLDERS))


def read_own_split(root: Path, split: str) -> TaggedPictures:
    """The pictures of one split with their tags."""
    folder = read_own_folder(root)
    pictures = folder.split(split)
    tags = torch.tensor([[float(name in picture.labels) for name in folder.classes] for picture in pictures])
    names, paths = [picture.name for picture in pictures], [picture.path for picture in pictures]
    return TaggedPictures(folder.classes, names, paths, tags, folder.masks, folder.mask_folder, folder.notes)


def read_own_folder(root: Path) -> OwnFolder:
    """List the pictures of `root` and their tags; UserError names the file or line that is wrong."""
    for inside in (*root.iterdir(), *root.glob("VOCdevkit/*")):
        if (inside / "ImageSets").is_dir() or (inside / "JPEGImages").is_dir():
            raise UserError(f"{root} holds a folder in PASCAL VOC layout; set data.root={inside}")
    mask_folders, mask_folder = _mask_folders(root)
    files: dict[str, Path] = {}
    for path in visible_files(root, IMAGE_SUFFIXES):
        name = path.relative_to(root).with_suffix("").as_posix()
        if root / name.partition("/")[0] in mask_folders:
            continue
        if name in files:
            raise UserError(f"{files[name]} and {path} have one name but for the suffix; rename one of them")
        files[name] = path
    if not files:
        raise UserError(
            f"the folder {root} holds no picture ({', '.join(IMAGE_SUFFIXES)}) and is not in PASCAL VOC layout "
            "(no ImageSets/Segmentation); set data.root to a folder with pictures"
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
        raise UserError(f"{root} ({source}) tags no picture")
    masks = files_by_name(mask_folders, (".png",))
    count, notes = _mask_notes(mask_folder, masks, files) if mask_folders else (0, [])
    if not mask_folders and mask_folder.is_dir():
        notes = [f"{mask_folder} holds what `afa` wrote and not the truth, so it is not read as masks"]
    return OwnFolder(
        root, source, classes, pictures, len(files) - len(pictures), masks, mask_folder, count, splits, notes
    )


def other_files(root: Path) -> dict[str, int]:
    """Suffix -> number of visible files that are neither pictures nor tables nor lists, and so are left out."""
    known = (*IMAGE_SUFFIXES, ".csv", ".txt")
    found = Counter(path.suffix.lower() for path in visible_files(root))
    return {suffix or "no suffix": count for suffix, count in sorted(found.items()) if suffix not in known}


def _mask_folders(root: Path) -> tuple[list[Path], Path]:
    """The folders of masks, in any capitals, and the one that is read."""
    named = [path for path in sorted(root.iterdir()) if path.name.casefold() == MASKS and path.is_dir()]
    folders = [path for path in named if not is_output(path)]
    if len(folders) > 1:
        raise UserError(f"{folders[0]} and {folders[1]} differ only in capitals; put all masks in {root / MASKS}")
    return folders, folders[0] if folders else root / MASKS


def _mask_notes(folder: Path, masks: Mapping[str, Path], pictures: Iterable[str]) -> tuple[int, list[str]]:
    """How many files lie in the folder of masks, and what is wrong with those that are no picture's mask."""
    everything = list(visible_files(folder))
    others = Counter(path.suffix.lower() or "no suffix" for path in everything if path.suffix.lower() != ".png")
    notes = []
    if others:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(others.items()))
        notes.append(f"{sum(others.values()):,} files in {folder} are not .png and are not read as masks: {kinds}")
    strangers = sorted(masks.keys() - set(pictures))
    if strangers:
        shown = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        notes.append(
            f"{len(strangers):,} mask files in {folder} belong to no picture ({shown}): a mask has the path of its "
            "picture, with the suffix .png"
        )
    return len(everything), notes


def _split_folders(root: Path, files: Mapping[str, Path]) -> dict[str, str]:
    """Folder -> split, when the root's folders are splits; UserError when only some of them are."""
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
            f"{root} holds the split folders {', '.join(splits)} beside other pictures ({(others + loose)[0]}); "
            "move those into one of the splits, or out of the folder"
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
            "call the one that holds the tags tags.csv"
        )
    return tables[0] if tables else None


class _Find:
    """The name of the one picture that a line of a CSV or list means; UserError when there is none, or are several."""

    def __init__(self, root: Path, files: Mapping[str, Path]) -> None:
        self.root = root
        self.files = files
        self.finder = PictureFinder(files)

    def __call__(self, text: str, where: str) -> str:
        names = self.finder.find(text)
        if len(names) > 1:
            raise UserError(f"'{text}' of {where} may be {names[0]} or {names[1]}; write its path within {self.root}")
        if not names:
            if (self.root / text.replace("\\", "/").removeprefix("./")).is_file():
                raise UserError(
                    f"'{text}' of {where} is no kind of picture that can be read ({', '.join(IMAGE_SUFFIXES)}); "
                    "convert it"
                )
            hint = did_you_mean(text, [path.relative_to(self.root).as_posix() for path in self.files.values()])
            raise UserError(f"the picture '{text}' of {where} is not in {self.root}{hint}; add it or remove the line")
        return names[0]


def _from_table(root: Path, table: Path, files: Mapping[str, Path]) -> Iterator[OwnPicture]:
    find = _Find(root, files)
    rows = list(csv_rows(table))
    listed = root / "classes.txt"
    known = read_class_list(listed) if listed.is_file() else []
    # Where one line separates by semicolons, the spaces of all others are part of the names.
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
                f"the picture {path} has no tag: there is no {root / 'tags.csv'} (lines of image,labels), and it is "
                "not in a folder named after its class; add one or the other"
            )
        label = class_name(parts[0], f"the folder {path.parents[len(parts) - 2]}")
        yield OwnPicture(name, path, () if is_background(label) else (label,))


def _place(name: str) -> float:
    """A number in [0, 1) that depends only on the name."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64
