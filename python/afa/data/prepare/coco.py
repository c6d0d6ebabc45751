"""COCO 2014: split lists, tags and masks of the 80 classes from its instance annotations.

COCO's category ids, 1 to 90 with gaps, become 1 to 80 in their order. Where objects overlap, the smaller lies on top,
so that what is in front of something larger is not lost: instances are drawn from the largest area to the smallest
(equal ones by id), and crowd regions, whose outlines are rough, before all instances.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from afa.data.classes import COCO_CLASSES
from afa.data.lists import files_by_name, split_list
from afa.data.prepare.common import Say, run_all, some, write_if_new
from afa.errors import UserError
from afa.visualize import save_mask

URL = "http://images.cocodataset.org"
ARCHIVES = {
    "train": ("train2014.zip", f"{URL}/zips/train2014.zip", "13 GB"),
    "val": ("val2014.zip", f"{URL}/zips/val2014.zip", "6 GB"),
    "annotations": ("annotations_trainval2014.zip", f"{URL}/annotations/annotations_trainval2014.zip", "241 MB"),
}
PICTURES = {"train": 82_783, "val": 40_504}


def prepare_coco(root: Path, *, train_masks: bool = False, progress: bool = True, say: Say) -> Path:
    """Write classes.txt, tags.csv, ImageSets/Segmentation/{train,val}.txt and SegmentationClass/<name>.png of the
    validation images into `root`, which holds COCO 2014's train2014, val2014 and annotations; returns it.

    Images without any annotated object are in no list. train_masks: also the masks of the training images, which
    training never opens.

    UserError says what is missing and where it is to be had.
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
                f"{len(absent):,} of the {len(images):,} annotated pictures of {path} are not in {folders[split]} "
                f"({some(absent)}); unpack {name} ({url}) anew"
            )
        rows += [f"{image.name},{';'.join(COCO_CLASSES[number - 1] for number in image.numbers())}" for image in images]
    write_if_new(root / "classes.txt", COCO_CLASSES, say, f"{len(COCO_CLASSES)} classes")
    write_if_new(root / "tags.csv", rows, say, f"the tags of {len(rows) - 1:,} images")
    # A list comes last: what it names is complete.
    for split, images in splits.items():
        if split == "val" or train_masks:
            _draw(root / "SegmentationClass", images, split, progress, say)
        what = f"{len(images):,} images with objects"
        write_if_new(split_list(root, split), [image.name for image in images], say, what)
    return root


def _check_coco(root: Path, say: Say) -> tuple[dict[str, Path], dict[str, Path]]:
    """The image folder and the annotation file of each split; everything missing is named at once."""
    folders, annotations, missing = {}, {}, []
    for split, full in PICTURES.items():
        for name in (f"{split}2014", f"images/{split}2014", "JPEGImages"):
            count = len(files_by_name([root / name], (".jpg", ".jpeg", ".png")))
            if count:
                folders[split] = root / name
                say("found", f"{root / name}: {count:,} pictures of {full:,}")
                break
        else:
            missing.append((f"{split}2014", split))
    for split in PICTURES:
        name = f"instances_{split}2014.json"
        places = [place for place in (root / "annotations" / name, root / name) if place.is_file()]
        if places:
            annotations[split] = places[0]
            say("found", str(places[0]))
        else:
            missing.append((f"annotations/{name}", "annotations"))
    if missing:
        archives = dict.fromkeys(key for _, key in missing)
        get = ", ".join(f"{ARCHIVES[key][0]} ({ARCHIVES[key][2]}, {ARCHIVES[key][1]})" for key in archives)
        raise UserError(
            f"COCO 2014 in {root} lacks {', '.join(name for name, _ in missing)}: get {get}, unpack into {root} and "
            "run this again"
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
                raise UserError(f"category {number} of {path} is {found!r}, and not {expected!r} as in COCO")
        numbers = {category["id"]: number for number, category in enumerate(categories, 1)}
        images = {
            image["id"]: _Image(Path(image["file_name"]).stem, image["height"], image["width"], [])
            for image in content["images"]
        }
        for item in content["annotations"]:
            images[item["image_id"]].objects.append(
                _Object(
                    numbers[item["category_id"]],
                    float(item["area"]),
                    bool(item.get("iscrowd", 0)),
                    item["id"],
                    item["segmentation"],
                )
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        name, url, _ = ARCHIVES["annotations"]
        raise UserError(
            f"{path} can't be read as COCO's instance annotations ({error!r:.100}); unpack {name} ({url}) anew"
        ) from error
    return sorted((image for image in images.values() if image.objects), key=lambda image: image.name)


def draw_mask(height: int, width: int, objects: Sequence[_Object]) -> np.ndarray:
    """uint8 [height, width]: 0 background, 1..80; the smaller object over the larger, crowds below all."""
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
