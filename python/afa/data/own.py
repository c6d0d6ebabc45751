"""Pictures of one's own: a folder of images with a CSV of tags, or with one folder a class. Nothing is written there.

root/tags.csv               image,labels (labels separated by space or ;); images by their path within root, anywhere
                            in it. Pictures without a line are left out. (labels.csv, or the only .csv, will do.)
root/<class>/<image>        without a CSV: the folder is the tag; a folder called background holds pictures of no class
root/{train,val}/<class>/…  the same, split beforehand
root/classes.txt            optional: the classes in the order of their numbers; otherwise they are sorted by name
root/masks/<image>.png      optional, for measuring alone; the same path as the image's. 0 background, 1.. the classes
root/{train,val}.txt        optional: which pictures are which, one a line

Without lists or folders that say so, validation gets the pictures with masks if some have masks and others not, and
otherwise every tenth, chosen by its name: a picture keeps its side when others are added.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from afa.data.lists import IMAGE_FOLDERS, IMAGE_SUFFIXES, files_by_name, read_class_list, read_lines, visible_files
from afa.data.tags import csv_rows, split_labels
from afa.data.transforms import IGNORE
from afa.errors import UserError, did_you_mean

MASKS = "masks"
NO_CLASS = "background"
VALIDATION_SHARE = 0.1


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
    masks: dict[str, Path]
    """Name of the picture -> its mask."""

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
        elif split in ("train", "val"):
            validation = self._validation()
            chosen = [picture for picture in self.pictures if (picture.name in validation) == (split == "val")]
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
            return "the folders train and val"
        masked = self._masked()
        if 0 < len(masked) < len(self.pictures):
            return "the pictures with masks are for validation"
        return f"one picture in {round(1 / VALIDATION_SHARE)}, chosen by its name, is for validation"

    def _masked(self) -> set[str]:
        return {picture.name for picture in self.pictures if picture.name in self.masks}

    def _split_by_folder(self) -> bool:
        tops = {picture.name.partition("/")[0] for picture in self.pictures if "/" in picture.name}
        return tops == {"train", "val"} and all("/" in picture.name for picture in self.pictures)

    def _validation(self) -> set[str]:
        """Names of the pictures that are not for training."""
        names = {picture.name for picture in self.pictures}
        if (self.root / "val.txt").is_file():
            return {picture.name for picture in self._listed("val")}
        if (self.root / "train.txt").is_file():
            return names - {picture.name for picture in self._listed("train")}
        if self._split_by_folder():
            return {name for name in names if name.startswith("val/")}
        masked = self._masked()
        if 0 < len(masked) < len(names):
            return masked
        order = sorted(names, key=_place)
        if len(order) < 2:
            return set()
        return {name for name in order if _place(name) < VALIDATION_SHARE} or {order[0]}

    def _listed(self, split: str) -> list[OwnPicture]:
        path = self.root / f"{split}.txt"
        find = _Finder(self.root, {picture.name: picture.path for picture in self.pictures})
        pictures = {picture.name: picture for picture in self.pictures}
        return [pictures[find(line, f"the list {path}")] for line in dict.fromkeys(read_lines(path))]


def is_own_folder(root: Path) -> bool:
    """Whether the folder is not laid out as VOC's or COCO's, so that it is read as pictures of one's own."""
    return root.is_dir() and not any((root / name).is_dir() for name in ("ImageSets", *IMAGE_FOLDERS))


def read_own_folder(root: Path) -> OwnFolder:
    """List the pictures of `root` and their tags; UserError names the file or line that is wrong."""
    for inside in (*root.iterdir(), *root.glob("VOCdevkit/*")):
        if (inside / "ImageSets").is_dir() or (inside / "JPEGImages").is_dir():
            raise UserError(f"{root} holds a folder in PASCAL VOC layout; set data.root={inside}")
    masks = files_by_name([root / MASKS], (".png",)) if (root / MASKS).is_dir() else {}
    files: dict[str, Path] = {}
    for path in visible_files(root, IMAGE_SUFFIXES):
        name = path.relative_to(root).with_suffix("").as_posix()
        if name.startswith(f"{MASKS}/"):
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
    if table is None:
        source, pictures = "one folder a class", list(_from_folders(root, files))
    else:
        source, pictures = table.name, list(_from_table(root, table, files))
    path = root / "classes.txt"
    found = sorted({label for picture in pictures for label in picture.labels})
    classes = read_class_list(path) if path.is_file() else found
    for label in found:
        if label not in classes:
            raise UserError(
                f"the tag '{label}' of {root} is not in {path}{did_you_mean(label, classes)}; add it there, or remove "
                "that file to take every tag for a class"
            )
    _check_classes(root, source, classes, pictures)
    return OwnFolder(root, source, classes, pictures, len(files) - len(pictures), masks)


def other_files(root: Path) -> dict[str, int]:
    """Suffix -> number of files that are neither pictures nor tables nor lists, and so are left out."""
    known = (*IMAGE_SUFFIXES, ".csv", ".txt")
    found = Counter(path.suffix.lower() for path in root.rglob("*") if path.is_file() and path.name[0] != ".")
    return {suffix or "no suffix": count for suffix, count in sorted(found.items()) if suffix not in known}


def _check_classes(root: Path, source: str, classes: list[str], pictures: list[OwnPicture]) -> None:
    if not 1 <= len(classes) < IGNORE:
        raise UserError(f"{root} ({source}) must name 1 to {IGNORE - 1} classes, and names {len(classes)}")
    folded: dict[str, str] = {}
    for name in classes:
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise UserError(f"the tags '{other}' and '{name}' of {root} differ in capitals alone; write both alike")
    if not pictures:
        raise UserError(f"{root} ({source}) tags no picture")


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


class _Finder:
    """Name of the picture that a line of a CSV or list means: its path within the root, with or without the suffix,
    or its bare file name where only one picture has it."""

    def __init__(self, root: Path, files: dict[str, Path]) -> None:
        self.root = root
        self.files = files
        self.names: dict[str, list[str]] = {}
        for name, path in files.items():
            for key in {name, path.relative_to(root).as_posix(), path.name, path.stem}:
                self.names.setdefault(key, []).append(name)

    def __call__(self, text: str, where: str) -> str:
        key = text.replace("\\", "/").removeprefix("./")
        if key in self.files:
            return key
        names = self.names.get(key, [])
        if len(names) > 1:
            raise UserError(f"'{text}' of {where} may be {names[0]} or {names[1]}; write its path within {self.root}")
        if not names:
            if (self.root / key).is_file():
                raise UserError(
                    f"'{text}' of {where} is no kind of picture that can be read ({', '.join(IMAGE_SUFFIXES)}); "
                    "convert it"
                )
            hint = did_you_mean(key, [path.relative_to(self.root).as_posix() for path in self.files.values()])
            raise UserError(f"the picture '{text}' of {where} is not in {self.root}{hint}; add it or take the line out")
        return names[0]


def _from_table(root: Path, table: Path, files: dict[str, Path]) -> Iterator[OwnPicture]:
    find = _Finder(root, files)
    rows = list(csv_rows(table))
    listed = root / "classes.txt"
    known = read_class_list(listed) if listed.is_file() else []
    # Where one line separates by semicolons, the spaces of all others are part of the names.
    semicolons = any(";" in text for _, text, _ in rows)
    seen: dict[str, str] = {}
    for image, text, where in rows:
        name = find(image, where)
        if name in seen:
            raise UserError(f"{where} tags '{image}' a second time (after {seen[name]}); keep one line an image")
        seen[name] = where
        labels = split_labels(text, {text} if semicolons and not known else known)
        yield OwnPicture(name, files[name], tuple(labels))


def _from_folders(root: Path, files: dict[str, Path]) -> Iterator[OwnPicture]:
    tops = {name.partition("/")[0] for name in files if "/" in name}
    split = tops == {"train", "val"}
    for name, path in files.items():
        parts = name.split("/")[1:] if split else name.split("/")
        if len(parts) < 2:
            raise UserError(
                f"the picture {path} has no tag: there is no {root / 'tags.csv'} (lines of image,labels), and it does "
                "not lie in a folder named after its class; add one or the other"
            )
        yield OwnPicture(name, path, () if parts[0] == NO_CLASS else (parts[0],))


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
