"""Dataset of tagged images in any supported folder layout, and a check of all files before long work.

root/JPEGImages/<name>.jpg                  or .jpeg, .png, .bmp, .webp, .tif; or COCO's train2014 and val2014
root/ImageSets/Segmentation/<split>.txt     one name per line
root/tags.csv                               image,labels (labels separated by spaces or ;), or instead of it
root/Annotations/<name>.xml                 VOC's files, of which only the object names are used
root/classes.txt                            foreground classes, one per line; default: VOC's 20
root/SegmentationClass/<name>.png           masks, used only for evaluation; a split can have none. Missing masks are
                                            looked up in SegmentationClassAug

`afa prepare` adds the files that the public downloads lack. readers/own.py documents folders without ImageSets and
JPEGImages.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from afa.config import DataConfig
from afa.data.classes import IGNORE
from afa.data.mask_notes import mask_notes
from afa.data.readers import read_tagged
from afa.data.transforms import check_image, image_size, random_crop, read_image, read_mask, shrunk
from afa.errors import UserError

Sample = dict[str, Any]


class TaggedDataset(Dataset[Sample]):
    """Images of one split with their tags, and with masks if `with_mask`.

    A training item is {"image": uint8 [3,S,S], "tags": float32 [C], "box": int64 [4] (y0,y1,x0,x1), "name": str}. An
    evaluation item is {"image": uint8 [3,H,W], "tags", "name"}, with "mask": int64 [H,W] if requested. A training item
    is indexed by (index, entropy): its crop depends only on the entropy, not on the number of workers or the items
    loaded before. A plain index means entropy (index,).

    If a split has no masks (see `has_masks`), every mask pixel is 255 (ignored). If it has some, it must have all.

    The constructor reads and checks lists and tags and raises UserError for a bad file. `check_dataset` checks the
    images.
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
        largest_side: int | None = None,
        with_mask: bool,
    ) -> None:
        if train and with_mask:
            raise ValueError("a training set uses only image-level tags and has no masks; set with_mask=False")
        if train and crop_size is None:
            raise ValueError("a training set needs crop_size, the side of the crop in pixels")
        self.root = Path(root)
        self.split = split
        self.train = train
        self.crop_size = crop_size
        self.scale_range = scale_range
        self.flip = flip
        self.with_mask = with_mask
        self.largest_side = largest_side
        self.skipped: list[str] = []  # reasons for the images that `check_dataset` dropped
        pictures = read_tagged(self.root, split)
        self.classes = pictures.classes
        self.names = pictures.names
        self.paths = pictures.paths
        self.tags = pictures.tags  # float32 [len, C]
        self.notes = pictures.notes
        self.mask_folder = pictures.mask_folder
        self._masks = pictures.masks
        self.mask_pixels: np.ndarray | None = None  # int64 [256] by value over all masks, after `check_dataset`
        if with_mask:
            _ = self.has_masks  # compute once here instead of in every worker

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: int | tuple[int, Sequence[int]]) -> Sample:
        index, entropy = key if isinstance(key, tuple) else (key, (key,))
        sample: Sample = {"tags": self.tags[index], "name": self.names[index]}
        image = read_image(self.paths[index], self.largest_side)
        if self.train:
            assert self.crop_size is not None
            rng = np.random.default_rng(entropy)
            crop, box = random_crop(image, self.crop_size, self.scale_range, self.flip, rng)
            sample["image"] = _to_tensor(crop)
            sample["box"] = torch.tensor(box, dtype=torch.int64)
            return sample
        sample["image"] = _to_tensor(np.asarray(image))
        if self.with_mask:
            # Without largest_side, the image has its original size.
            size = (image.height, image.width) if self.largest_side is None else image_size(self.paths[index])
            sample["mask"] = torch.from_numpy(self.mask(index, size).astype(np.int64))
        return sample

    def mask_path(self, index: int) -> Path:
        """Path of an image's mask, whether or not it exists."""
        name = self.names[index]
        return self._masks.get(name, self.mask_folder / f"{name}.png")

    @cached_property
    def has_masks(self) -> bool:
        """Whether any image of the split has a mask."""
        return not self._masks.keys().isdisjoint(self.names)

    def mask(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Read and check the mask of one image: uint8 [H,W], shrunk like the image.

        size: (height, width) of the upright image.
        """
        height, width = shrunk(size, self.largest_side)
        path = self.mask_path(index)
        if not self.has_masks:
            return np.full((height, width), IGNORE, np.uint8)
        if not path.is_file():
            raise UserError(
                f"the mask {path} does not exist, but other images of the split '{self.split}' have masks; "
                "add it, or evaluate on a split with all masks"
            )
        mask = read_mask(path, len(self.classes), size)
        if mask.shape != (height, width):
            mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
        return mask

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every image as loaded, read from the file headers."""
        with ThreadPoolExecutor(_threads()) as pool:
            return [shrunk(size, self.largest_side) for size in pool.map(image_size, self.paths)]

    def class_counts(self) -> str:
        """Number of images per class as text: 'cat 10, dog 3'."""
        counts = self.tags.sum(0).long().tolist()
        return ", ".join(f"{name} {count:,}" for name, count in zip(self.classes, counts, strict=True))

    def mask_notes(self) -> list[str]:
        """Warnings about the masks that affect the scores; available after `check_dataset`."""
        if self.mask_pixels is None or not self.has_masks:
            return []
        counts = self.mask_pixels.tolist()
        return mask_notes(counts[: len(self.classes) + 1], counts[IGNORE], self.classes)

    def drop(self, bad: dict[int, str]) -> None:
        """Remove images; `bad` maps their indices to the reasons, which are added to `skipped`."""
        kept = [index for index in range(len(self)) if index not in bad]
        if not kept:
            raise UserError(f"no image of the split '{self.split}' of {self.root} is left: {next(iter(bad.values()))}")
        self.names = [self.names[index] for index in kept]
        self.paths = [self.paths[index] for index in kept]
        self.tags = self.tags[kept]
        self.skipped += bad.values()
        self.__dict__.pop("sizes", None)
        self.__dict__.pop("has_masks", None)


def open_dataset(data: DataConfig, split: str, *, train: bool, with_mask: bool, progress: bool = True) -> TaggedDataset:
    """Open a split with the settings of the data section.

    With data.bad_images=skip, all files are checked and unusable images removed; `skipped` of the dataset lists them.
    """
    dataset = TaggedDataset(
        data.root,
        split,
        train=train,
        crop_size=data.crop_size,
        scale_range=data.scale_range,
        flip=data.flip,
        largest_side=data.largest_side,
        with_mask=with_mask,
    )
    if data.bad_images == "skip":
        check_dataset(dataset, progress, skip=True)
    return dataset


def check_dataset(dataset: TaggedDataset, progress: bool = True, *, skip: bool = False) -> None:
    """Decode every image, and every mask if the dataset uses masks. Call it before long work.

    Raises UserError for the first bad file. With `skip`, images with bad files are dropped instead.
    """

    def check(index: int) -> tuple[str | None, np.ndarray | None]:
        try:
            size = _checked_size(dataset.paths[index])
            if dataset.with_mask and dataset.has_masks:
                return None, np.bincount(dataset.mask(index, size).reshape(-1), minlength=IGNORE + 1)
        except UserError as error:
            if not skip:
                raise
            return str(error), None
        return None, None

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
        pixels = np.zeros(IGNORE + 1, np.int64)
        bad: dict[int, str] = {}
        for index, (reason, counts) in enumerate(bar):
            if reason is not None:
                bad[index] = reason
            if counts is not None:
                pixels += counts
    finally:
        pool.shutdown(cancel_futures=True)
    if dataset.with_mask:
        dataset.mask_pixels = pixels
    if bad:
        dataset.drop(bad)


def _checked_size(path: Path) -> tuple[int, int]:
    """`check_image`, cached until the file changes."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"the image {path} can't be read ({error.strerror or error}); replace it") from error
    found = _checked(str(path), status.st_size, status.st_mtime_ns)
    if isinstance(found, str):
        raise UserError(found)
    return found


@cache
def _checked(path: str, size: int, modified: int) -> tuple[int, int] | str:
    try:
        return check_image(path)
    except UserError as error:
        return str(error)


def _to_tensor(image: np.ndarray) -> Tensor:
    """uint8 [H,W,3] -> contiguous [3,H,W], owning its memory."""
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))


def _threads() -> int:
    return min(8, os.cpu_count() or 1)
