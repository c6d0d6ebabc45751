"""Class maps in the formats of annotation tools: COCO with run-length codes, and labelme's polygons."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afa.data.classes import IGNORE
from afa.data.visualize import save_mask, save_picture
from afa.files import write_json

Mask = NDArray[np.integer]
MASK_FORMATS = ("palette", "index", "coco", "labelme")
BACKGROUND = "_background_"
"""labelme's own name for class 0."""


class MaskWriter:
    """Writes class maps to a folder in one of MASK_FORMATS.

    palette: <name>.png with VOC's palette. index: <name>.png, gray, with the class indices as values. coco: one
    coco.json (see `CocoWriter`), written by `finish`. labelme: <name>.json (see `labelme`).
    """

    def __init__(self, folder: Path, kind: str, names: Sequence[str]) -> None:
        """names: of all classes, background first."""
        self.folder, self.kind, self.names = folder, kind, names
        self._coco = CocoWriter(names) if kind == "coco" else None

    def write(self, name: str, image: Path, mask: Mask) -> None:
        """Write or collect the class map [H, W] of an image."""
        if self.kind == "palette":
            save_mask(self.folder / f"{name}.png", mask)
        elif self.kind == "index":
            save_picture(self.folder / f"{name}.png", mask.astype(np.uint8))
        elif self._coco is not None:
            self._coco.add(f"{name}{image.suffix}", mask)
        else:
            file = self.folder / f"{name}.json"
            write_json(file, labelme(mask, self.names, os.path.relpath(image, file.parent)))

    def finish(self) -> None:
        """Write the file of all images, if the format has one."""
        if self._coco is not None:
            write_json(self.folder / "coco.json", self._coco.content)


class CocoWriter:
    """Collects class maps as a COCO data set with one annotation per image and class, as a run-length code.

    names: of all classes, background (0) first, which is no category. Ignored pixels (255) are in no annotation.
    """

    def __init__(self, names: Sequence[str]) -> None:
        from pycocotools import mask as codes

        self._codes = codes
        self.content: dict[str, Any] = {
            "images": [],
            "categories": [{"id": index, "name": name} for index, name in enumerate(names) if index],
            "annotations": [],
        }

    def add(self, file_name: str, mask: Mask) -> None:
        """Add the class map [H, W] of an image."""
        images, annotations = self.content["images"], self.content["annotations"]
        number = len(images) + 1
        images.append({"id": number, "file_name": file_name, "height": mask.shape[0], "width": mask.shape[1]})
        for index in _classes(mask):
            code = self._codes.encode(np.asfortranarray(mask == index, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": index,
                    "segmentation": {"size": list(mask.shape), "counts": code["counts"].decode("ascii")},
                    "area": int(self._codes.area(code)),
                    "bbox": self._codes.toBbox(code).tolist(),
                    # COCO's convention for run-length codes, which cover all objects of a class.
                    "iscrowd": 1,
                }
            )


def labelme(mask: Mask, names: Sequence[str], image: str | Path) -> dict[str, Any]:
    """A class map [H, W] as the content of a labelme file: one polygon per connected region, the largest first.

    labelme's polygons have no holes: what lies inside a region has its own polygon, drawn later, also background, which
    is named `_background_`. Ignored pixels (255) become background. image: path of the image, relative to the file.
    """
    from scipy import ndimage

    mask = np.where(mask == IGNORE, 0, mask)
    regions = []
    for index in (0, *_classes(mask)):
        parts, _ = ndimage.label(mask == index)
        for number, window in enumerate(ndimage.find_objects(parts), 1):
            inside = parts[window] == number
            at_border = any(span.start == 0 or span.stop == side for span, side in zip(window, mask.shape, strict=True))
            if index == 0 and at_border:
                continue  # not inside another region
            filled = ndimage.binary_fill_holes(inside)
            regions.append((int(filled.sum()), index, window, filled))
    shapes: list[dict[str, Any]] = []
    for _, index, window, filled in sorted(regions, key=lambda region: -region[0]):
        shapes.append(
            {
                "label": names[index] if index else BACKGROUND,
                "points": _outline(filled, top=window[0].start, left=window[1].start),
                "group_id": None,
                "shape_type": "polygon",
                "flags": {},
            }
        )
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": str(image),
        "imageData": None,
        "imageHeight": mask.shape[0],
        "imageWidth": mask.shape[1],
    }


def _outline(filled: NDArray[np.bool_], top: int, left: int) -> list[list[float]]:
    """Outline of a region without holes as (x, y) in pixels, where the first pixel's center is at 0.5.

    It is simplified where that changes the region's area by less than 5 percent; thin regions keep all their corners.
    """
    from skimage import measure

    twice = np.pad(filled.repeat(2, axis=0).repeat(2, axis=1), 1)  # so that the line cuts only a quarter of a pixel
    exact = max(measure.find_contours(twice.astype(np.float32), 0.5), key=len)[:-1] / 2 - 0.25
    line = measure.approximate_polygon(np.concatenate([exact, exact[:1]]), tolerance=0.6)[:-1]
    if abs(_area(line) - filled.sum()) > 0.05 * filled.sum():
        line = exact
    return [[round(float(x) + left, 2), round(float(y) + top, 2)] for y, x in line]


def _area(polygon: NDArray[np.floating]) -> float:
    """Area of a polygon [N, 2] by the shoelace formula."""
    y, x = polygon.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _classes(mask: Mask) -> list[int]:
    return [int(index) for index in np.unique(mask) if index not in (0, IGNORE)]
