"""Reader for PASCAL VOC's folder layout, also used for COCO: split lists, classes and image files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from afa.data.class_names import check_class_list
from afa.data.classes import VOC_CLASSES
from afa.data.listing import IMAGE_SUFFIXES, PictureFinder, files_by_name, stem_of, without_suffix
from afa.data.readers.common import TaggedPictures
from afa.data.readers.tags import read_lines, read_tags
from afa.errors import UserError, did_you_mean

IMAGE_FOLDERS = ("JPEGImages", "train2014", "val2014", "images/train2014", "images/val2014")
"""Image folders of VOC and COCO 2014; all existing ones are searched."""
MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")
"""VOC's own masks take precedence over those made from SBD."""


def read_voc_split(root: Path, split: str) -> TaggedPictures:
    """The images of one split list with their tags; UserError for an invalid file or line."""
    # List the folder once, because looking up each file is slow on network disks.
    pictures = _pictures(root)
    names = read_split(root, split, pictures)
    classes = read_classes(root)
    tags = read_tags(root, names, classes, pictures)
    masks = files_by_name([root / name for name in MASK_FOLDERS], (".png",))
    return TaggedPictures(
        classes, names, find_images(root, names, split, pictures), tags, masks, root / MASK_FOLDERS[0]
    )


def split_list(root: Path, split: str) -> Path:
    """Path of a split list, whether or not it exists."""
    return root / "ImageSets" / "Segmentation" / f"{split}.txt"


def read_split(root: Path, split: str, pictures: Mapping[str, Path] | None = None) -> list[str]:
    """The unique names in a split list, for `find_images`; pictures: all images in the folder."""
    path = split_list(root, split)
    if not root.is_dir():
        raise UserError(
            f"the data folder {root} does not exist (expected {path}); "
            "set data.root=FOLDER to a folder in PASCAL VOC layout, or set data.embedded=true to "
            "generate the demo data set there, as `afa train demo` does"
        )
    if not path.is_file():
        lists = sorted(file.stem for file in path.parent.glob("*.txt"))
        there = (
            f"the existing lists are {', '.join(lists)}{did_you_mean(split, lists)}" if lists else "there are no lists"
        )
        coco = any((root / name).is_dir() for name in IMAGE_FOLDERS[1:])
        raise UserError(
            f"the split list {path} does not exist: {there}; set data.train_split or data.val_split, or create the "
            f"lists of a new download with afa prepare {'coco' if coco else 'voc'} {root}"
        )
    finder = PictureFinder(_pictures(root) if pictures is None else pictures)
    names = list(dict.fromkeys(listed_name(line, finder) for line in read_lines(path)))
    if not names:
        raise UserError(f"the split list {path} is empty; it must have one image name per line")
    return names


def listed_name(line: str, finder: PictureFinder) -> str:
    """The image for a line of a split list: a name (possibly with spaces or folders), a file name, or a path, which can
    be followed by the path of the mask."""
    first = line.split()[0]
    for text in (line, first, _below_folder(line), _below_folder(first)):
        found = finder.find(text)
        if len(found) == 1:
            return found[0]
    for text in (line, first):
        found = finder.find(stem_of(text))
        if len(found) == 1:
            return found[0]
    return stem_of(first)


def _below_folder(text: str) -> str:
    """Strip the image folder and the suffix from a path such as /JPEGImages/sub/a.jpg."""
    text = text.replace("\\", "/").lstrip("/")
    for folder in IMAGE_FOLDERS:
        text = text.removeprefix(f"{folder}/")
    return without_suffix(text)


def read_classes(root: Path) -> list[str]:
    """The foreground classes of classes.txt, or VOC's if there is no such file."""
    path = root / "classes.txt"
    return read_class_list(path) if path.is_file() else list(VOC_CLASSES)


def read_class_list(path: Path) -> list[str]:
    """Read and check the names in a classes.txt."""
    return check_class_list(read_lines(path), str(path))


def find_images(root: Path, names: Sequence[str], split: str, pictures: Mapping[str, Path] | None = None) -> list[Path]:
    """The image file of every name; pictures: all images in the folder."""
    folders = _image_folders(root)
    if not folders:
        raise UserError(
            f"the image folder {root / IMAGE_FOLDERS[0]} does not exist; "
            "data.root must be a folder in PASCAL VOC layout"
        )
    files = _pictures(root) if pictures is None else pictures
    for name in names:
        if name not in files:
            raise UserError(
                f"the image '{name}' of {split_list(root, split)} is not in {' or '.join(map(str, folders))} "
                f"(searched for {name} with {', '.join(IMAGE_SUFFIXES)}); add it or remove it from the list"
            )
    return [files[name] for name in names]


def _image_folders(root: Path) -> list[Path]:
    return [root / name for name in IMAGE_FOLDERS if (root / name).is_dir()]


def _pictures(root: Path) -> Mapping[str, Path]:
    return files_by_name(_image_folders(root), IMAGE_SUFFIXES)
