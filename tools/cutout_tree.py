"""Create a small data set in VOC layout from existing photographs: cut-out objects on photographed backgrounds.

    python tools/cutout_tree.py OUT --backgrounds FOLDER --objects bird=FOLDER --objects fruit=FOLDER ...

Objects are images with an alpha channel; folders are searched recursively. Each generated image has one to three
objects of one or two classes, and its mask is their alpha. Every fourth object and background is only used for the
validation split, so that the scores are for objects not seen in training. Suitable Debian packages are
tuxpaint-stamps-default for objects, and lomiri-wallpapers-20.04, mate-backgrounds and plasma-workspace-wallpapers for
backgrounds; remove backgrounds that show objects of the classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import trange

from afa.data.visualize import save_mask

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
SOLID = 128  # minimum alpha of an object's pixels


def pictures(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    if not found:
        raise SystemExit(f"{folder} contains no images")
    return found


def split(files: Sequence[Path], train: bool) -> list[Path]:
    """Three of every four files for training, otherwise every fourth one, in the order of their names."""
    return [path for number, path in enumerate(files) if (number % 4 != 3) == train]


def backdrop(rng: np.random.Generator, file: Path, size: tuple[int, int]) -> Image.Image:
    """A random part of a background, `size` = (width, height)."""
    with Image.open(file) as opened:
        opened.draft("RGB", (4 * size[0], 4 * size[1]))
        image = opened.convert("RGB")
    scale = max(size[0] / image.width, size[1] / image.height)
    factor = scale * float(rng.uniform(1, max(1.0, min(3.0, 1 / scale))))
    image = image.resize((max(size[0], round(image.width * factor)), max(size[1], round(image.height * factor))))
    x, y = (int(rng.integers(0, have - want + 1)) for have, want in zip(image.size, size, strict=True))
    return image.crop((x, y, x + size[0], y + size[1]))


def cutout(rng: np.random.Generator, file: Path, side: int) -> Image.Image:
    """An object without its empty margin, at a random size, sometimes mirrored."""
    with Image.open(file) as opened:
        image = opened.convert("RGBA")
    box = image.getchannel("A").point(lambda value: 255 * (value >= SOLID)).getbbox()
    image = image.crop(box) if box else image
    longest = round(side * float(rng.uniform(0.35, 0.75)))
    factor = longest / max(image.size)
    image = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def compose(
    rng: np.random.Generator, objects: Sequence[Sequence[Path]], backgrounds: Sequence[Path]
) -> tuple[Image.Image, np.ndarray, list[int]]:
    """An image, its mask of class numbers starting at 1, and its classes."""
    size = (int(rng.integers(130, 190)), int(rng.integers(110, 170)))
    image = backdrop(rng, backgrounds[int(rng.integers(len(backgrounds)))], size)
    mask = Image.new("L", size)
    classes = rng.choice(len(objects), size=int(rng.integers(1, 3)), replace=False)
    for kind in [
        int(classes[0]),
        *(int(rng.choice(classes)) for _ in range(int(rng.integers(0, 2)))),
        int(classes[-1]),
    ]:
        if (np.asarray(mask) == kind + 1).any() and rng.random() < 0.7:
            continue
        piece = cutout(rng, objects[kind][int(rng.integers(len(objects[kind])))], min(size))
        left, top = (int(rng.integers(0, max(1, have - own + 1))) for have, own in zip(size, piece.size, strict=True))
        image.paste(piece, (left, top), piece)
        solid = piece.getchannel("A").point(lambda value: 255 * (value >= SOLID))
        mask.paste(kind + 1, (left, top, left + piece.width, top + piece.height), solid)
    array = np.asarray(mask)
    return image, array, [kind for kind in range(len(objects)) if (array == kind + 1).sum() >= 0.005 * array.size]


def make(out: Path, objects: dict[str, Path], backgrounds: Path, counts: dict[str, int], seed: int) -> None:
    files, scenes = {name: pictures(folder) for name, folder in objects.items()}, pictures(backgrounds)
    (out / "JPEGImages").mkdir(parents=True)
    (out / "ImageSets" / "Segmentation").mkdir(parents=True)
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in objects), encoding="utf-8")
    lines = ["image,labels"]
    for name, count in counts.items():
        train = name == "train"
        pool = [split(found, train) for found in files.values()]
        names = [f"{name}_{number:05d}" for number in range(count)]
        for number in trange(count, desc=name, unit="img"):
            rng = np.random.default_rng((seed, train, number))
            image, mask, shown = compose(rng, pool, split(scenes, train))
            image.save(out / "JPEGImages" / f"{names[number]}.jpg", quality=92)
            if not train:
                save_mask(out / "SegmentationClass" / f"{names[number]}.png", mask)
            lines.append(f"{names[number]},{';'.join(list(objects)[kind] for kind in shown)}")
        listed = out / "ImageSets" / "Segmentation" / f"{name}.txt"
        listed.write_text("".join(f"{entry}\n" for entry in names), encoding="utf-8")
    (out / "tags.csv").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to create; must not exist")
    parser.add_argument("--objects", action="append", required=True, metavar="CLASS=FOLDER")
    parser.add_argument("--backgrounds", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--train", type=int, default=1500, help="number of training images (default: 1500)")
    parser.add_argument("--val", type=int, default=200, help="number of validation images (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"{options.out} exists")
    objects = {}
    for entry in options.objects:
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder):
            parser.error(f"--objects must be CLASS=FOLDER, got {entry}")
        objects[name] = Path(folder)
    make(options.out, objects, options.backgrounds, {"train": options.train, "val": options.val}, options.seed)


if __name__ == "__main__":
    main()
