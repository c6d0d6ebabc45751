"""Compose a background and a few textured, overlapping objects into an image with its exact mask."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np

from .shapes import Shape, rasterize
from .textures import Texture, paint

_MIN_VISIBLE = 0.45
"""At least this share of an object's area stays visible; otherwise the object that would cover it is moved."""
_PLACEMENTS = 8


def _two_tones(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random object color and a darker or lighter tone of it with a slightly different hue; each [3] in 0..255."""
    hue, saturation, value = rng.random(), rng.uniform(0.15, 0.95), rng.uniform(0.5, 1.0)
    other = value * rng.uniform(0.25, 0.55)
    hue2 = (hue + rng.normal(0, 0.06)) % 1.0
    a = np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32) * 255
    b = np.array(colorsys.hsv_to_rgb(hue2, min(1.0, saturation * 1.1), other), dtype=np.float32) * 255
    return (a, b) if rng.random() < 0.5 else (b, a)


def draw_scene(
    rng: np.random.Generator,
    background: np.ndarray,
    objects: Sequence[tuple[Shape, Texture]],
    *,
    radius: tuple[float, float],
    period: tuple[float, float] = (6.5, 12.0),
) -> tuple[np.ndarray, np.ndarray]:
    """Paint objects on a background; later ones are in front.

    Args:
        background: [S, S, 3] uint8, not changed.
        objects: outline and texture of each object.
        radius: range of the objects' circumscribed circles, pixels.
        period: range of the textures' repeats, pixels.

    Returns:
        image [S, S, 3] uint8 and index map [S, S] uint8: 0 is the background, k the k-th object.
    """
    size = background.shape[0]
    image = background.astype(np.float32)
    index = np.zeros((size, size), dtype=np.uint8)
    areas: dict[int, int] = {}
    for k, (shape, texture) in enumerate(objects, start=1):
        for _ in range(_PLACEMENTS):
            r = rng.uniform(*radius)
            center = rng.uniform(0.55 * r, size - 0.55 * r, 2) if 1.1 * r < size else np.full(2, size / 2)
            coverage = rasterize(
                shape, rng, size, (center[0], center[1]), r, rng.uniform(-0.6, 0.6), rng.uniform(0.85, 1.15)
            )
            inside = coverage >= 0.5
            hidden = {j: np.count_nonzero((index == j) & ~inside) < _MIN_VISIBLE * area for j, area in areas.items()}
            if inside.any() and not any(hidden.values()):
                break
        else:
            continue
        areas[k] = int(np.count_nonzero(inside))
        rows, columns = np.flatnonzero(coverage.any(1)), np.flatnonzero(coverage.any(0))
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        alpha = coverage[box][..., None]
        height, width = alpha.shape[:2]
        values = paint(texture, rng, (height, width), rng.uniform(*period), rng.uniform(0, np.pi))[..., None]
        a, b = _two_tones(rng)
        light = rng.uniform(-0.25, 0.25, 2).astype(np.float32)
        shading = (
            1
            + light[0] * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
            + light[1] * np.linspace(-1, 1, width, dtype=np.float32)[None, :]
        )
        surface = (b + (a - b) * values) * shading[..., None]
        image[box] += alpha * (surface - image[box])
        index[inside] = k
    grain = rng.standard_normal((size, size), dtype=np.float32) * np.float32(rng.uniform(1, 5))
    return np.clip(image + grain[..., None], 0, 255).astype(np.uint8), index
