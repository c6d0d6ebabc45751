"""Backgrounds: crops of photographs, and generated surfaces.

Photographs come from the scikit-image and scikit-learn packages (no download). The train and val splits use different
ones. Pretraining uses none: all its backgrounds are generated, and its generators differ from the demo's.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

TRAIN_PHOTOGRAPHS = (
    "astronaut.png", "coffee.png", "ihc.png", "hubble_deep_field.jpg", "motorcycle_left.png", "china.jpg",
    "grass.png", "camera.png", "retina.jpg", "moon.png",
)  # fmt: skip
VAL_PHOTOGRAPHS = ("chelsea.png", "rocket.jpg", "flower.jpg", "gravel.png", "coins.png")

_LONGEST_SIDE = 512


def _photograph_path(name: str) -> Path:
    import skimage
    import sklearn

    for folder in (
        Path(skimage.__file__).parent / "data",
        Path(sklearn.__file__).parent / "datasets" / "images",
    ):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"the photograph {name} ships with neither the installed scikit-image nor scikit-learn; "
        'install the versions that pip install "afa-ext[train]" asks for'
    )


@cache
def _photograph(name: str) -> Image.Image:
    with Image.open(_photograph_path(name)) as file:
        image = file.convert("RGB")
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.BOX)
    return image


def photograph(rng: np.random.Generator, size: int, names: tuple[str, ...]) -> np.ndarray:
    """A warped, recolored crop of one of the photographs `names`, uint8 [size, size, 3]."""
    image = _photograph(names[rng.integers(len(names))])
    side = rng.uniform(0.2, 0.9) * min(image.size)
    x, y = (rng.uniform(0, extent - side) for extent in image.size)
    corners = np.array([(x, y), (x, y + side), (x + side, y + side), (x + side, y)])
    corners = np.roll(corners, rng.integers(4), axis=0)
    if rng.random() < 0.5:
        corners = corners[::-1]
    corners = corners + rng.uniform(-0.12, 0.12, (4, 2)) * side
    corners = np.clip(corners, 0, np.array(image.size) - 1)
    crop = image.transform((size, size), Image.Transform.QUAD, tuple(corners.ravel()), Image.Resampling.BICUBIC)
    pixels = np.asarray(crop, dtype=np.float32) / 255
    pixels = pixels[..., rng.permutation(3)] ** np.float32(rng.uniform(0.6, 1.6))
    gray = pixels.mean(-1, keepdims=True)
    pixels = gray + (pixels - gray) * np.float32(rng.uniform(0.4, 1.5))
    tint = rng.uniform(0.65, 1.25, 3).astype(np.float32)
    return (np.clip(pixels * tint, 0, 1) * 255).astype(np.uint8)


def _noise(rng: np.random.Generator, size: int, octaves: tuple[int, ...], falloff: float = 0.6) -> np.ndarray:
    """Smooth noise [size, size], roughly in [-1, 1]: random grids of the given sides, enlarged and summed."""
    total = np.zeros((size, size), dtype=np.float32)
    weight = 1.0
    for side in octaves:
        grid = Image.fromarray(rng.uniform(-1, 1, (side, side)).astype(np.float32))
        total += weight * np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
        weight *= falloff
    return total


def _colors(rng: np.random.Generator, n: int) -> np.ndarray:
    """[n, 3] colors in 0..255 around one random mean."""
    mean, spread = rng.uniform(40, 215, 3), rng.uniform(15, 70)
    return np.clip(mean + rng.normal(0, spread, (n, 3)), 0, 255)


def _colorize(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Map [H, W] values to a random path through three colors."""
    low, high = values.min(), values.max()
    t = (values - low) * np.float32(2 / max(high - low, 1e-6))
    a, b, c = (color.astype(np.float32) for color in _colors(rng, 3))
    t = t[..., None]
    return np.where(t < 1, a + (b - a) * t, b + (c - b) * (t - 1)).clip(0, 255).astype(np.uint8)


# ---- the demo's generators ---------------------------------------------------------------------------------


def warped_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Marbled clouds: waves bent by noise."""
    bend = _noise(rng, size, (4, 8, 16))
    yx = np.mgrid[0:size, 0:size].astype(np.float32) / size
    direction = rng.normal(0, rng.uniform(1, 5), 2)
    values = np.sin(direction[0] * yx[0] + direction[1] * yx[1] + 2 * bend) + 0.5 * _noise(rng, size, (24, 48))
    return _colorize(values, rng)


def patchwork(rng: np.random.Generator, size: int) -> np.ndarray:
    """Overlapping soft rectangles, like a city or a shelf out of focus."""
    image = Image.new("RGB", (size, size), tuple(int(v) for v in _colors(rng, 1)[0]))
    draw = ImageDraw.Draw(image)
    for color in _colors(rng, int(rng.integers(15, 50))):
        x, y = rng.uniform(-0.2, 1, 2) * size
        w, h = rng.uniform(0.05, 0.5, 2) * size
        draw.rectangle((x, y, x + w, y + h), fill=tuple(int(v) for v in color))
    image = image.rotate(rng.uniform(-30, 30), Image.Resampling.BILINEAR, fillcolor=image.getpixel((0, 0)))
    grain = 12 * _noise(rng, size, (16, 64))
    return np.clip(np.asarray(image) + grain[..., None], 0, 255).astype(np.uint8)


# ---- the pretraining's generators --------------------------------------------------------------------------


def clouds(rng: np.random.Generator, size: int) -> np.ndarray:
    """Fractal noise with some independent color noise."""
    image = _colorize(_noise(rng, size, (3, 6, 12, 24, 48), rng.uniform(0.4, 0.85)), rng).astype(np.float32)
    image += rng.uniform(0, 40) * _noise(rng, size, (6, 20))[..., None] * rng.normal(0, 1, 3).astype(np.float32)
    return image.clip(0, 255).astype(np.uint8)


def dead_leaves(rng: np.random.Generator, size: int) -> np.ndarray:
    """Occluding ellipses with power-law sizes, which gives the edge statistics of photographs."""
    image = Image.new("RGB", (size, size), tuple(int(v) for v in _colors(rng, 1)[0]))
    draw = ImageDraw.Draw(image)
    for color in _colors(rng, int(rng.integers(30, 120))):
        x, y = rng.uniform(0, size, 2)
        radius = size * 0.04 / np.sqrt(rng.uniform(0.006, 1.0))
        w, h = radius * rng.uniform(0.6, 1.4, 2)
        draw.ellipse((x - w, y - h, x + w, y + h), fill=tuple(int(v) for v in color))
    grain = rng.uniform(4, 16) * _noise(rng, size, (12, 32, 64))
    return np.clip(np.asarray(image) + grain[..., None], 0, 255).astype(np.uint8)


def shards(rng: np.random.Generator, size: int) -> np.ndarray:
    """Random thin and thick triangles over a gradient."""
    yx = np.mgrid[0:size, 0:size].astype(np.float32) / size
    image = Image.fromarray(_colorize(yx[0] * rng.normal() + yx[1] * rng.normal(), rng))
    draw = ImageDraw.Draw(image)
    for color in _colors(rng, int(rng.integers(5, 30))):
        points = rng.uniform(-0.1, 1.1, 2) * size + rng.normal(0, rng.uniform(0.05, 0.3) * size, (3, 2))
        draw.polygon([tuple(p) for p in points], fill=tuple(int(v) for v in color))
    grain = rng.uniform(2, 14) * _noise(rng, size, (8, 40))
    return np.clip(np.asarray(image) + grain[..., None], 0, 255).astype(np.uint8)


DEMO_GENERATORS = (warped_noise, patchwork)
PRETRAIN_GENERATORS = (clouds, dead_leaves, shards)
