"""Datasets in PASCAL VOC's folder layout, and the loaders of training and evaluation.

root/JPEGImages/<name>.jpg                  or .jpeg, .png, .bmp, .webp
root/ImageSets/Segmentation/<split>.txt     one name a line
root/tags.csv                               image,labels (labels separated by space or ;), or else
root/Annotations/<name>.xml                 VOC's own files, of which only the objects' names are read
root/classes.txt                            foreground classes, one a line; without it VOC's 20
root/SegmentationClass/<name>.png           masks, opened for evaluation alone
"""

from __future__ import annotations

import csv
import os
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from afa.data.transforms import IGNORE, image_size, random_crop, read_image, read_mask
from afa.errors import UserError, did_you_mean

VOC_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *(
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ),
]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

Sample = dict[str, Any]


class VOCDataset(Dataset[Sample]):
    """Images of one split with their tags, and their masks only when `with_mask`.

    A training item is {"image": uint8 [3,S,S], "tags": float32 [C], "box": int64 [4] (y0,y1,x0,x1), "name":
    str}; an evaluation item {"image": uint8 [3,H,W], "tags", "name"} with "mask": int64 [H,W] when asked for.
    A training item is indexed by (index, entropy): its crop depends on the entropy alone, so neither on the
    number of workers nor on what was loaded before; a plain index means entropy (index,).

    Lists and tags are read here and checked; UserError names the file. The pictures are left to
    `check_dataset`.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        train: bool,
        crop_size: int | None = None,
        scale_range: tuple[float, float] = (0.5, 2.0),
        flip: bool = True,
        with_mask: bool,
    ) -> None:
        if train and with_mask:
            raise ValueError("a training set has no masks: image-level labels are all it may see; set with_mask=False")
        if train and crop_size is None:
            raise ValueError("a training set needs crop_size, the side of the crop in pixels")
        self.root = Path(root)
        self.split = split
        self.train = train
        self.crop_size = crop_size
        self.scale_range = scale_range
        self.flip = flip
        self.with_mask = with_mask
        self.names = _read_split(self.root, split)
        self.classes = _read_classes(self.root)
        self.tags = _read_tags(self.root, self.names, self.classes)  # float32 [len, C]
        self.paths = _find_images(self.root, self.names, split)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: int | tuple[int, Sequence[int]]) -> Sample:
        index, entropy = key if isinstance(key, tuple) else (key, (key,))
        sample: Sample = {"tags": self.tags[index], "name": self.names[index]}
        image = read_image(self.paths[index])
        if self.train:
            assert self.crop_size is not None
            rng = np.random.default_rng(entropy)
            crop, box = random_crop(image, self.crop_size, self.scale_range, self.flip, rng)
            sample["image"] = _to_tensor(crop)
            sample["box"] = torch.tensor(box, dtype=torch.int64)
            return sample
        sample["image"] = _to_tensor(np.asarray(image))
        if self.with_mask:
            sample["mask"] = torch.from_numpy(self.mask(index, (image.height, image.width)).astype(np.int64))
        return sample

    def mask(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """The mask of one image, uint8 [H,W], checked; `size` (height, width) is what it must have."""
        path = self.root / "SegmentationClass" / f"{self.names[index]}.png"
        if not path.is_file():
            raise UserError(
                f"the mask {path} does not exist, though '{self.names[index]}' is in the split "
                f"'{self.split}'; "
                "add it, or evaluate on a split that has masks"
            )
        return read_mask(path, len(self.classes), size)

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every image, from the headers."""
        with ThreadPoolExecutor(_threads()) as pool:
            return list(pool.map(image_size, self.paths))


def check_dataset(dataset: VOCDataset, progress: bool = True) -> None:
    """Decode every image, and every mask of a set that uses masks; UserError names the first bad file.

    Run before any long work: a run must not die of a truncated picture in its second hour.
    """

    def check(index: int) -> None:
        image = read_image(dataset.paths[index])
        if dataset.with_mask:
            dataset.mask(index, (image.height, image.width))

    pool = ThreadPoolExecutor(_threads())
    try:
        bar = tqdm(
            pool.map(check, range(len(dataset))),
            total=len(dataset),
            desc=f"checking {dataset.split}",
            unit="img",
            delay=1.0,
            leave=False,
            disable=not progress,
        )
        for _ in bar:
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def train_loader(
    dataset: VOCDataset, batch_size: int, *, seed: int, start_iteration: int = 0, workers: int = 0
) -> Iterator[Sample]:
    """Endless batches, shuffled anew each epoch: image [B,3,S,S], tags [B,C], box [B,4], name list[str].

    Batch number n is a function of (dataset, batch_size, seed, n) alone, so a run resumed at
    `start_iteration` sees exactly what the uninterrupted one would have, whatever the number of workers.
    """
    if not dataset.train:
        raise ValueError("train_loader needs a dataset made with train=True")
    return _iterate(dataset, _EndlessBatches(len(dataset), batch_size, seed, start_iteration), workers)


def eval_loader(dataset: VOCDataset, batch_size: int, workers: int = 0) -> Iterator[Sample]:
    """The split in order, once; consecutive images of one size come as one batch of up to `batch_size`."""
    if dataset.train:
        raise ValueError("eval_loader needs a dataset made with train=False")
    return _iterate(dataset, _same_size_batches(dataset.sizes, batch_size), workers)


class _EndlessBatches(Sampler[list[tuple[int, tuple[int, int]]]]):
    """Lists of (index, (seed, position)); position counts samples since the start of the run."""

    def __init__(self, length: int, batch_size: int, seed: int, start_iteration: int) -> None:
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.start_iteration = start_iteration

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, int]]]]:
        position = self.start_iteration * self.batch_size
        epoch = -1
        order = np.empty(0, np.int64)
        while True:
            batch = []
            for _ in range(self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    # The 1 keeps the shuffle's stream apart from the crops', which are seeded by two numbers.
                    order = np.random.default_rng((self.seed, epoch, 1)).permutation(self.length)
                batch.append((int(order[position % self.length]), (self.seed, position)))
                position += 1
            yield batch


def _same_size_batches(sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index, size in enumerate(sizes):
        if batches and len(batches[-1]) < batch_size and sizes[batches[-1][0]] == size:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _iterate(dataset: VOCDataset, batches: Iterable[list[Any]], workers: int) -> Iterator[Sample]:
    with warnings.catch_warnings():
        # More workers than cores is slower and no error, and the number comes from a file shared between machines.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader[Sample] = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if workers else None,
        )
        iterator = iter(loader)
    try:
        yield from iterator
    except UserError as error:
        # A worker's exception arrives with its traceback as the message; the sentence is the last part of it.
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


def _to_tensor(image: np.ndarray) -> Tensor:
    """uint8 [H,W,3] -> contiguous [3,H,W], owning its memory."""
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as UTF-8 text ({error}); mend or replace it") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _stem(name: str) -> str:
    """The bare name of an image given as a name, file name or path, as published split lists give all
    three."""
    name = name.replace("\\", "/").rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES else name


def _split_list(root: Path, split: str) -> Path:
    return root / "ImageSets" / "Segmentation" / f"{split}.txt"


def _read_split(root: Path, split: str) -> list[str]:
    path = _split_list(root, split)
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
    names = [_stem(line.split()[0]) for line in _read_lines(path)]
    if not names:
        raise UserError(f"the split list {path} is empty; it must hold one image name a line")
    return names


def _read_classes(root: Path) -> list[str]:
    path = root / "classes.txt"
    if not path.is_file():
        return list(VOC_CLASSES)
    classes = _read_lines(path)
    if not 1 <= len(classes) < IGNORE:
        raise UserError(f"{path} must name 1 to {IGNORE - 1} classes, one a line, and names {len(classes)}")
    for position, name in enumerate(classes):
        if name in classes[:position]:
            raise UserError(f"{path} names the class '{name}' twice; keep one")
        if name.lower() == "background":
            raise UserError(f"{path} names '{name}', but background is always class 0; take that line out")
    return classes


def _find_images(root: Path, names: Sequence[str], split: str) -> list[Path]:
    folder = root / "JPEGImages"
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist; data.root must be a folder in PASCAL VOC layout")
    # One listing instead of a look per name and suffix, which takes long on network disks.
    files = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES}
    for name in names:
        if name not in files:
            raise UserError(
                f"the image '{name}' of {_split_list(root, split)} is not in "
                f"{folder} "
                f"(looked for {name} with {', '.join(IMAGE_SUFFIXES)}); add it or take it out of the list"
            )
    return [files[name] for name in names]


def _read_tags(root: Path, names: Sequence[str], classes: Sequence[str]) -> Tensor:
    """float32 [len(names), len(classes)], 1 where the image holds the class."""
    numbers = {name: number for number, name in enumerate(classes)}
    path = root / "tags.csv"
    labels_of = _csv_tags(path, numbers) if path.is_file() else _xml_tags(root)
    tags = torch.zeros(len(names), len(classes))
    for row, name in enumerate(names):
        labels, source = labels_of(name)
        for label in labels:
            if label not in numbers:
                raise UserError(
                    f"the tag '{label}' in {source} names no class{did_you_mean(label, classes)} "
                    f"(the {len(classes)} classes come from {_classes_source(root)})"
                )
            tags[row, numbers[label]] = 1
    return tags


def _classes_source(root: Path) -> str:
    path = root / "classes.txt"
    return str(path) if path.is_file() else f"PASCAL VOC, as there is no {path}"


TagReader = Callable[[str], tuple[list[str], str]]
"""Image name -> its labels, and where they stand in words."""


def _csv_tags(path: Path, numbers: dict[str, int]) -> TagReader:
    rows: dict[str, tuple[list[str], str]] = {}
    for number, line in enumerate(_read_lines(path), 1):
        cells = next(csv.reader([line]))
        if number == 1 and [cell.strip().lower() for cell in cells] == ["image", "labels"]:
            continue
        if len(cells) != 2:
            raise UserError(
                f"line {number} of {path} has {len(cells)} columns: it must be image,labels with the labels "
                "separated by spaces or semicolons"
            )
        name, text = _stem(cells[0].strip()), cells[1].strip()
        if name in rows:
            raise UserError(f"line {number} of {path} tags '{name}' a second time; keep one line an image")
        # 'traffic light' alone is one class and not two; several such need semicolons.
        parts = text.split(";") if ";" in text or text in numbers else text.split()
        rows[name] = ([part.strip() for part in parts if part.strip()], f"line {number} of {path}")

    def labels_of(name: str) -> tuple[list[str], str]:
        if name not in rows:
            raise UserError(
                f"the image '{name}' has no line in {path}; add '{name},LABELS' (nothing after the comma "
                "when it "
                "shows no class)"
            )
        return rows[name]

    return labels_of


def _xml_tags(root: Path) -> TagReader:
    folder = root / "Annotations"

    def labels_of(name: str) -> tuple[list[str], str]:
        path = folder / f"{name}.xml"
        if not path.is_file():
            raise UserError(
                f"the image '{name}' has no tags: there is no {path} and no {root / 'tags.csv'}; add one of them"
            )
        try:
            tree = ElementTree.parse(path)
        except (ElementTree.ParseError, OSError, ValueError) as error:
            raise UserError(f"the tag file {path} can't be read as XML ({error}); replace it") from error
        # 'object/name' and not any 'name': parts of a person (head, hand) have names too.
        return [(node.text or "").strip() for node in tree.getroot().findall("object/name")], str(path)

    return labels_of
