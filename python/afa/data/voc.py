"""Datasets in PASCAL VOC's folder layout, and the check of every file before long work.

root/JPEGImages/<name>.jpg                  or .jpeg, .png, .bmp, .webp
root/ImageSets/Segmentation/<split>.txt     one name a line
root/tags.csv                               image,labels (labels separated by space or ;), or else
root/Annotations/<name>.xml                 VOC's own files, of which only the objects' names are read
root/classes.txt                            foreground classes, one a line; without it VOC's 20
root/SegmentationClass/<name>.png           masks, opened for evaluation alone; a split may have none
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from afa.data.lists import find_images, read_classes, read_split
from afa.data.tags import read_tags
from afa.data.transforms import IGNORE, image_size, random_crop, read_image, read_mask
from afa.errors import UserError

Sample = dict[str, Any]


class VOCDataset(Dataset[Sample]):
    """Images of one split with their tags, and their masks only when `with_mask`.

    A training item is {"image": uint8 [3,S,S], "tags": float32 [C], "box": int64 [4] (y0,y1,x0,x1), "name":
    str}; an evaluation item {"image": uint8 [3,H,W], "tags", "name"} with "mask": int64 [H,W] when asked for.
    A training item is indexed by (index, entropy): its crop depends on the entropy alone, so neither on the
    number of workers nor on what was loaded before; a plain index means entropy (index,).

    A split without any mask (`has_masks` tells) gives masks of 255 throughout, which no score counts. A split with
    some masks must have them all.

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
        self.names = read_split(self.root, split)
        self.classes = read_classes(self.root)
        self.tags = read_tags(self.root, self.names, self.classes)  # float32 [len, C]
        self.paths = find_images(self.root, self.names, split)
        if with_mask:
            _ = self.has_masks  # looked up once, here, and not in every worker

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

    def mask_path(self, index: int) -> Path:
        """Where the mask of an image is, or would be."""
        return self.root / "SegmentationClass" / f"{self.names[index]}.png"

    @cached_property
    def has_masks(self) -> bool:
        """Whether any image of the split has a mask."""
        folder = self.root / "SegmentationClass"
        there = {path.stem for path in folder.iterdir()} if folder.is_dir() else set()
        return not there.isdisjoint(self.names)

    def mask(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """The mask of one image, uint8 [H,W], checked; `size` (height, width) is what it must have."""
        path = self.mask_path(index)
        if not self.has_masks:
            return np.full(size, IGNORE, np.uint8)
        if not path.is_file():
            raise UserError(
                f"the mask {path} does not exist, though '{self.names[index]}' is in the split "
                f"'{self.split}' and others of it have masks; "
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


def _to_tensor(image: np.ndarray) -> Tensor:
    """uint8 [H,W,3] -> contiguous [3,H,W], owning its memory."""
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))


def _threads() -> int:
    return min(8, os.cpu_count() or 1)
