"""PASCAL VOC 2012 with SBD: the list train_aug, image-level tags, and optionally the masks of its training images.

train_aug is the set of images segmented in VOC or SBD (Hariharan et al., ICCV 2011), without VOC's val: 10,582 images.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from afa.data.classes import IGNORE, VOC_CLASSES
from afa.data.listing import PictureFinder, files_by_name, stem_of
from afa.data.prepare.common import Say, run_all, say_classes, some, write_if_new
from afa.data.readers.tags import read_lines, xml_labels
from afa.data.readers.voc import listed_name, split_list
from afa.data.visualize import save_mask
from afa.errors import UserError

VOC_URL = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
SBD_URL = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz"
SBD_PAGE = "http://home.bharathh.info/pubs/codes/SBD/download.html"
PICTURES, TRAIN, VAL, TRAIN_AUG = 17_125, 1_464, 1_449, 10_582
LIST = "train_aug"


def prepare_voc(
    devkit: Path, *, sbd: Path | None = None, train_masks: bool = False, progress: bool = True, say: Say
) -> Path:
    """Write ImageSets/Segmentation/train_aug.txt and tags.csv to the VOC2012 folder at or below `devkit`; returns it.

    SBD is searched in `sbd`, or in and next to the devkit. An existing folder SegmentationClassAug of masks or an
    existing train_aug.txt or trainaug.txt also works. train_masks: also write SBD's masks of training images as
    SegmentationClassAug/<name>.png, which training never reads.

    Raises UserError with the missing files and their download locations.
    """
    root = _find_root(devkit)
    train, val = _check_voc(root, say)
    source = _find_sbd(root, devkit, sbd)
    pictures = files_by_name([root / "JPEGImages"], (".jpg",))
    _write_list(root, source, train, val, pictures, say)
    names = sorted({*train, *val, *(source.names if source else ())})
    _write_tags(root, names, source, progress, say)
    if source is None:
        raise UserError(
            f"{root} is ready with VOC's own {len(train):,} training images (data.train_split=train), but the list "
            f"{LIST} of {TRAIN_AUG:,} needs SBD: download benchmark.tgz (1.4 GB, {SBD_URL}, or from {SBD_PAGE}), "
            f"unpack it next to {root} or give --sbd FOLDER, and run this command again"
        )
    if train_masks:
        _write_masks(root, source, set(val), progress, say)
    return root


def _find_root(devkit: Path) -> Path:
    if not devkit.is_dir():
        raise UserError(f"no such folder: {devkit}; {_get_voc()}")
    for root in (devkit, devkit / "VOC2012", devkit / "VOCdevkit" / "VOC2012"):
        if any((root / name).is_dir() for name in ("JPEGImages", "Annotations", "ImageSets")):
            return root
    raise UserError(f"{devkit} does not contain VOC 2012 (no VOC2012/JPEGImages); {_get_voc()}")


def _get_voc() -> str:
    return f"download VOCtrainval_11-May-2012.tar (2 GB, {VOC_URL}), unpack it and give the folder VOCdevkit"


def _check_voc(root: Path, say: Say) -> tuple[list[str], list[str]]:
    """VOC's own train and val names; UserError lists all missing files."""
    missing = []
    for folder, suffix, full in (
        ("JPEGImages", ".jpg", PICTURES),
        ("Annotations", ".xml", PICTURES),
        ("SegmentationClass", ".png", TRAIN + VAL),
    ):
        count = len(files_by_name([root / folder], (suffix,)))
        if count:
            say("found", f"{root / folder}: {count:,} of {full:,} files")
        else:
            missing.append(f"{folder}/*{suffix}")
    lists = {}
    for split, full in (("train", TRAIN), ("val", VAL)):
        path = split_list(root, split)
        if path.is_file():
            finder = PictureFinder(files_by_name([root / "JPEGImages"], (".jpg",)))
            lists[split] = [listed_name(line, finder) for line in read_lines(path)]
            say("found", f"{path}: {len(lists[split]):,} of {full:,} names")
        else:
            missing.append(str(path.relative_to(root)))
    if missing:
        raise UserError(f"VOC 2012 in {root} lacks {', '.join(missing)}; {_get_voc()}")
    return lists["train"], lists["val"]


@dataclass(frozen=True)
class _Segmented:
    """Images segmented in addition to VOC's own train and val."""

    where: Path
    names: list[str]
    matrices: Path | None
    """SBD's folder of .mat files, if it exists."""


def _find_sbd(root: Path, devkit: Path, given: Path | None) -> _Segmented | None:
    places = [given] if given is not None else [root, root.parent, devkit, devkit.parent, root.parent.parent]
    for place in places:
        for folder in (
            place,
            place / "dataset",
            *(place / name / "dataset" for name in ("benchmark_RELEASE", "SBD", "sbd")),
            *(place / name / "benchmark_RELEASE" / "dataset" for name in ("SBD", "sbd", "benchmark")),
        ):
            if (folder / "cls").is_dir() and all((folder / f"{name}.txt").is_file() for name in ("train", "val")):
                names = [stem_of(line) for name in ("train", "val") for line in read_lines(folder / f"{name}.txt")]
                return _Segmented(folder, names, folder / "cls")
    if given is not None:
        raise UserError(
            f"--sbd {given} does not contain SBD (dataset/cls, dataset/train.txt and dataset/val.txt of "
            f"benchmark_RELEASE); download benchmark.tgz ({SBD_URL}, or from {SBD_PAGE}) and unpack it"
        )
    masks = files_by_name([root / "SegmentationClassAug"], (".png",))
    if masks:
        return _Segmented(root / "SegmentationClassAug", list(masks), None)
    for name in (LIST, "trainaug"):
        path = split_list(root, name)
        if path.is_file():
            return _Segmented(path, [stem_of(line.split()[0]) for line in read_lines(path)], None)
    return None


def _write_list(
    root: Path, source: _Segmented | None, train: list[str], val: list[str], pictures: dict[str, Path], say: Say
) -> None:
    names = sorted({*train, *(source.names if source else ())} - set(val))
    absent = [name for name in [*names, *val] if name not in pictures]
    if absent:
        raise UserError(
            f"{len(absent):,} listed images are not in {root / 'JPEGImages'} ({some(absent)}); {_get_voc()}"
        )
    if source is None:
        return
    say("found", f"{source.where}: {len(source.names):,} segmented images")
    path = split_list(root, LIST)
    note = "" if len(names) == TRAIN_AUG else f" (the complete list has {TRAIN_AUG:,})"
    if path.is_file() and {stem_of(line.split()[0]) for line in read_lines(path)} == set(names):
        say("kept", f"{path}: {len(names):,} names{note}")
    else:
        write_if_new(path, names, say, f"{len(names):,} names{note}")


def _write_tags(root: Path, names: list[str], source: _Segmented | None, progress: bool, say: Say) -> None:
    """Write tags.csv from the annotations, or from SBD's segmentation if an image has no annotation."""

    def labels_of(name: str) -> list[str]:
        path = root / "Annotations" / f"{name}.xml"
        if path.is_file():
            return xml_labels(path)
        if source is not None and source.matrices is not None and (source.matrices / f"{name}.mat").is_file():
            found = np.unique(read_sbd(source.matrices / f"{name}.mat"))
            return [VOC_CLASSES[number - 1] for number in found if 0 < number < IGNORE]
        raise UserError(f"the image '{name}' has no annotation {path}; {_get_voc()}")

    rows = ["image,labels"]
    counts = dict.fromkeys(VOC_CLASSES, 0)
    with ThreadPoolExecutor(8) as pool:
        found = tqdm(pool.map(labels_of, names), total=len(names), desc="tags", unit="img", disable=not progress)
        for name, labels in zip(names, found, strict=True):
            for label in labels:
                if label not in VOC_CLASSES:
                    raise UserError(f"unknown VOC class '{label}' in the annotation of '{name}' in {root}")
            shown = [label for label in VOC_CLASSES if label in labels]
            for label in shown:
                counts[label] += 1
            rows.append(f"{name},{' '.join(shown)}")
    write_if_new(root / "tags.csv", rows, say, f"the tags of {len(names):,} images")
    say_classes(counts, say)


def read_sbd(path: Path) -> np.ndarray:
    """The class map of an SBD cls/*.mat file, uint8 [H,W]: 0 background, 1..20; it has no ignored pixels."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError("reading SBD's .mat files needs scipy: pip install 'afa-ext[train]'") from error
    try:
        mask = np.asarray(loadmat(path, variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0])
    except Exception as error:  # scipy raises many exception types on damaged files
        raise UserError(f"{path} can't be read as an SBD .mat file ({error!r}); unpack it again") from error
    if mask.ndim != 2 or mask.max(initial=0) > len(VOC_CLASSES):
        raise UserError(f"{path} is not a map of VOC's {len(VOC_CLASSES)} classes; unpack it again")
    return mask.astype(np.uint8)


def _write_masks(root: Path, source: _Segmented, val: set[str], progress: bool, say: Say) -> None:
    folder = root / "SegmentationClassAug"
    if source.matrices is None:
        say("note", f"--train-masks: no masks written, because SBD's .mat files were not found (using {source.where})")
        return
    # VOC's own masks are finer and have ignored borders, so they are kept.
    done = set(files_by_name([root / "SegmentationClass", folder], (".png",)))
    names = sorted(set(source.names) - val - done)
    run_all(_convert, [(source.matrices / f"{name}.mat", folder / f"{name}.png") for name in names], "masks", progress)
    say("wrote" if names else "kept", f"{folder}: {len(names):,} additional masks from SBD")


def _convert(task: tuple[Path, Path]) -> None:
    source, target = task
    save_mask(target, read_sbd(source))
