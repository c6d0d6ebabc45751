"""COCO 2014: split lists, tags and masks of the 80 classes from its instance annotations.

COCO's category ids, 1 to 90 with gaps, are mapped to 1 to 80 in order. If objects overlap, the smaller one is on top,
so that objects in front of larger ones are kept: instances are drawn from largest to smallest area (ties by id), after
all crowd regions, whose outlines are coarse.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from afa.data.classes import COCO_CLASSES
from afa.data.listing import files_by_name
from afa.data.prepare.common import Say, run_all, say_classes, some, write_if_new
from afa.data.readers.voc import split_list
from afa.data.visualize import save_mask
from afa.errors import UserError

URL = "http://images.cocodataset.org"
ARCHIVES = {
    "train": ("train2014.zip", f"{URL}/zips/train2014.zip", "13 GB"),
    "val": ("val2014.zip", f"{URL}/zips/val2014.zip", "6 GB"),
    "annotations": ("annotations_trainval2014.zip", f"{URL}/annotations/annotations_trainval2014.zip", "241 MB"),
}
PICTURES = {"train": 82_783, "val": 40_504}


def prepare_coco(root: Path, *, train_masks: bool = False, progress: bool = True, say: Say) -> Path:
    """Write classes.txt, tags.csv, ImageSets/Segmentation/{train,val}.txt and SegmentationClass/<name>.png of the
    validation images to `root`, the folder of COCO 2014's train2014, val2014 and annotations; returns `root`.

    Images without annotated objects are in no list. train_masks: also write masks of the training images, which
    training never reads.

    Raises UserError with the missing files and their download locations.
    """
    folders, annotations = _check_coco(root, say)
    if _importable() is None:
        raise UserError("drawing COCO's masks needs pycocotools: pip install 'afa-ext[coco]'")
    rows = ["image,labels"]
    splits: dict[str, list[_Image]] = {}
    for split, path in annotations.items():
        say("reading", str(path))
        images = splits[split] = _read_instances(path)
        there = files_by_name([folders[split]], (".jpg", ".jpeg", ".png"))
        absent = [image.name for image in images if image.name not in there]
        if absent:
            name, url, _ = ARCHIVES[split]
            raise UserError(
                f"{len(absent):,} of the {len(images):,} annotated images of {path} are not in {folders[split]} "
                f"({some(absent)}); unpack {name} ({url}) again"
            )
        rows += [f"{image.name},{';'.join(COCO_CLASSES[number - 1] for number in image.numbers())}" for image in images]
    write_if_new(root / "classes.txt", COCO_CLASSES, say, f"{len(COCO_CLASSES)} classes")
    write_if_new(root / "tags.csv", rows, say, f"the tags of {len(rows) - 1:,} images")
    shown = Counter(number for images in splits.values() for image in images for number in image.numbers())
    say_classes({name: shown[number] for number, name in enumerate(COCO_CLASSES, 1)}, say)
    # Write the lists last, so that all listed images are complete.
    for split, images in splits.items():
        if split == "val" or train_masks:
            _draw(root / "SegmentationClass", images, split, progress, say)
        what = f"{len(images):,} images with objects"
        write_if_new(split_list(root, split), [image.name for image in images], say, what)
    return root


def _check_coco(root: Path, say: Say) -> tuple[dict[str, Path], dict[str, Path]]:
    """The image folder and the annotation file of each split; UserError lists all missing files."""
    folders, annotations, missing = {}, {}, []
    for split, full in PICTURES.items():
        for name in (f"{split}2014", f"images/{split}2014", "JPEGImages"):
            count = len(files_by_name([root / name], (".jpg", ".jpeg", ".png")))
            if count:
                folders[split] = root / name
                say("found", f"{root / name}: {count:,} of {full:,} images")
                break
        else:
            missing.append((f"{split}2014", split))
    for split in PICTURES:
        name = f"instances_{split}2014.json"
        existing = [path for path in (root / "annotations" / name, root / name) if path.is_file()]
        if existing:
            annotations[split] = existing[0]
            say("found", str(existing[0]))
        else:
            missing.append((f"annotations/{name}", "annotations"))
    if missing:
        archives = dict.fromkeys(key for _, key in missing)
        get = ", ".join(f"{ARCHIVES[key][0]} ({ARCHIVES[key][2]}, {ARCHIVES[key][1]})" for key in archives)
        raise UserError(
            f"COCO 2014 in {root} lacks {', '.join(name for name, _ in missing)}; download {get}, unpack into {root} "
            "and run this command again"
        )
    return folders, annotations


@dataclass(frozen=True)
class _Object:
    number: int
    """1..80."""
    area: float
    crowd: bool
    id: int
    outline: Any
    """Polygons or a run-length code, as in the file."""


@dataclass(frozen=True)
class _Image:
    name: str
    height: int
    width: int
    objects: list[_Object]

    def numbers(self) -> list[int]:
        return sorted({item.number for item in self.objects})


def _read_instances(path: Path) -> list[_Image]:
    """The images with at least one object, by name."""
    try:
        content = json.loads(path.read_bytes())
        categories = sorted(content["categories"], key=lambda category: category["id"])
        for number, (found, expected) in enumerate(zip_longest((c["name"] for c in categories), COCO_CLASSES), 1):
            if found != expected:
                raise UserError(f"category {number} of {path} must be {expected!r} as in COCO, got {found!r}")
        numbers = {category["id"]: number for number, category in enumerate(categories, 1)}
        images: dict[Any, _Image] = {}
        for image in content["images"]:
            # Some exports include the folder in the name.
            name = Path(image["file_name"]).stem
            images[image["id"]] = _Image(name, _side(image, "height"), _side(image, "width"), [])
        for item in content["annotations"]:
            image = images[item["image_id"]]
            image.objects.append(
                _Object(
                    numbers[item["category_id"]],
                    _area(item),
                    bool(item.get("iscrowd", 0)),
                    item["id"],
                    _outline(item, image),
                )
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        name, url, _ = ARCHIVES["annotations"]
        raise UserError(
            f"{path} can't be read as COCO's instance annotations ({error!r:.200}); unpack {name} ({url}) again"
        ) from error
    names = Counter(image.name for image in images.values())
    double = [name for name, count in names.items() if count > 1]
    if double:
        raise UserError(f"{path} lists the image {double[0]} {names[double[0]]} times; keep one entry per image")
    return sorted((image for image in images.values() if image.objects), key=lambda image: image.name)


def _side(image: dict[str, Any], key: str) -> int:
    value = image[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"the {key} of image {image['id']!r} must be a positive integer, got {value!r}")
    return value


def _area(item: dict[str, Any]) -> float:
    area = float(item["area"])
    if not math.isfinite(area):
        raise ValueError(f"the area of annotation {item['id']!r} must be finite, got {area}")
    return area


def _outline(item: dict[str, Any], image: _Image) -> Any:
    """Check and return the segmentation; pycocotools does not check its input."""
    where = f"the segmentation of annotation {item['id']!r}"
    outline = item["segmentation"]
    if isinstance(outline, dict):
        if list(outline["size"]) != [image.height, image.width]:
            raise ValueError(f"{where} has the size {outline['size']}, but its image has {[image.height, image.width]}")
        if not isinstance(outline["counts"], str | list):
            raise ValueError(f"{where} must have run lengths, got {outline['counts']!r:.40}")
        return outline
    if not isinstance(outline, list):
        raise ValueError(f"{where} must be polygons or run lengths, got {outline!r:.40}")
    if outline and all(isinstance(value, int | float) for value in outline):
        outline = [outline]  # one polygon without the list around it
    for polygon in outline:
        if not isinstance(polygon, list) or len(polygon) % 2 or not all(map(_is_number, polygon)):
            raise ValueError(f"{where} must have polygons of x, y, x, y, ..., got {polygon!r:.40}")
    # Skip polygons with fewer than three points; pycocotools interprets four numbers as a box.
    return [polygon for polygon in outline if len(polygon) >= 6]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def draw_mask(height: int, width: int, objects: Sequence[_Object]) -> np.ndarray:
    """Mask uint8 [height, width]: 0 background, 1..80; smaller objects over larger ones, crowds at the bottom."""
    from pycocotools import mask as coco

    drawn = np.zeros((height, width), np.uint8)
    for item in sorted(objects, key=lambda item: (not item.crowd, -item.area, item.id)):
        outline = item.outline
        if not outline:
            continue
        if isinstance(outline, list):
            code = coco.merge(coco.frPyObjects(outline, height, width))
        elif isinstance(outline["counts"], list):
            code = coco.frPyObjects(outline, height, width)
        else:
            code = outline
        drawn[coco.decode(code).astype(bool)] = item.number
    return drawn


def _draw(folder: Path, images: list[_Image], split: str, progress: bool, say: Say) -> None:
    done = files_by_name([folder], (".png",))
    due = [(folder / f"{image.name}.png", image) for image in images if image.name not in done]
    run_all(_draw_one, due, f"masks of {split}", progress)
    kept = len(images) - len(due)
    say("wrote" if due else "kept", f"{folder}: {len(images):,} masks of {split}2014" + f" ({kept:,} kept)" * bool(due))


def _draw_one(task: tuple[Path, _Image]) -> None:
    path, image = task
    save_mask(path, draw_mask(image.height, image.width, image.objects))


def _importable() -> object | None:
    try:
        from pycocotools import mask
    except ImportError:
        return None
    return mask
