"""The embedded data set: eight classes of objects, one to three per image, written once in PASCAL VOC's layout."""

from __future__ import annotations

import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from afa.data.visualize import voc_palette

from .backgrounds import DEMO_GENERATORS, TRAIN_PHOTOGRAPHS, VAL_PHOTOGRAPHS, photograph
from .scene import draw_scene
from .shapes import DEMO_SHAPES
from .textures import DEMO_TEXTURES

CLASSES: tuple[str, ...] = tuple(DEMO_SHAPES)
"""Every class has its own outline and texture; the colors are random."""

_OBJECTS = list(zip(DEMO_SHAPES.values(), DEMO_TEXTURES.values(), strict=True))
_SPLITS = {"train": (0, TRAIN_PHOTOGRAPHS), "val": (1, VAL_PHOTOGRAPHS)}
_SHARE_OF_PHOTOGRAPHS = 0.6


def draw_labeled(split: str, number: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image `number` of a split and its mask: [size, size, 3] and [size, size] uint8 (0 background, classes from 1)."""
    stream, photographs = _SPLITS[split]
    rng = np.random.default_rng([seed, stream, number])
    if rng.random() < _SHARE_OF_PHOTOGRAPHS:
        background = photograph(rng, size, photographs)
    else:
        background = DEMO_GENERATORS[rng.integers(len(DEMO_GENERATORS))](rng, size)
    classes = rng.integers(len(CLASSES), size=rng.integers(1, 4))
    image, index = draw_scene(
        rng, background, [_OBJECTS[c] for c in classes], radius=(0.18 * size, 0.36 * size), period=(7.5, 11.0)
    )
    return image, np.concatenate([[0], classes + 1]).astype(np.uint8)[index]


def _annotation(name: str, size: int, present: list[str]) -> str:
    objects = "".join(f"\n  <object><name>{c}</name></object>" for c in present)
    return (
        f"<annotation>\n  <filename>{name}.jpg</filename>\n"
        f"  <size><width>{size}</width><height>{size}</height><depth>3</depth></size>{objects}\n</annotation>\n"
    )


def _write_one(folder: Path, split: str, size: int, seed: int, number: int) -> str:
    name = f"{split}_{number:05d}"
    image, mask = draw_labeled(split, number, size, seed)
    Image.fromarray(image).save(folder / "JPEGImages" / f"{name}.jpg", quality=92)
    paletted = Image.fromarray(mask, mode="P")
    paletted.putpalette(voc_palette().tobytes())
    paletted.save(folder / "SegmentationClass" / f"{name}.png")
    present = [CLASSES[c - 1] for c in np.unique(mask) if c]
    (folder / "Annotations" / f"{name}.xml").write_text(_annotation(name, size, present), encoding="utf-8")
    return name


def make_dataset(
    root: str | Path,
    *,
    train: int = 2000,
    val: int = 160,
    size: int = 144,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Atomically write the embedded data set to `root`; the same arguments give the same files.

    Args:
        train, val: number of images in each split.
        size: side of the square images, pixels.

    Raises:
        FileExistsError: `root` already exists.
    """
    root = Path(root)
    if root.exists():
        raise FileExistsError(f"{root} already exists; remove it to create the embedded data set again")
    root.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        for sub in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation"):
            (folder / sub).mkdir(parents=True)
        (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
        with (
            ProcessPoolExecutor(os.cpu_count()) as pool,
            tqdm(total=train + val, desc="drawing the embedded data set", unit="img", disable=not progress) as bar,
        ):
            for split, count in (("train", train), ("val", val)):
                names = []
                for name in pool.map(partial(_write_one, folder, split, size, seed), range(count), chunksize=16):
                    names.append(name)
                    bar.update()
                (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        folder.chmod(0o755)
        folder.rename(root)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
