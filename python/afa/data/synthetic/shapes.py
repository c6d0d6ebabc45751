"""Object outlines, drawn as filled polygons with holes.

A shape is a function that takes a random generator and returns contours: `(points [n, 2], filled)` pairs in unit
coordinates (x right, y down, the object within the unit circle). They are painted in order, so a contour with
`filled=False` cuts a hole. The generator varies the proportions within the class.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Contour = tuple[np.ndarray, bool]
Shape = Callable[[np.random.Generator], list[Contour]]

_OVERSAMPLING = 4


def _polar(radius: np.ndarray | float, n: int = 64, start: float = 0.0, sweep: float = 2 * np.pi) -> np.ndarray:
    """[n, 2] points at the given radius, over `sweep` radians from `start`."""
    angle = start + sweep * np.arange(n) / n
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _points(*xy: tuple[float, float]) -> np.ndarray:
    return np.array(xy, dtype=float)


def _mirrored(right_half: np.ndarray) -> np.ndarray:
    """Close a contour given by its right half (top to bottom) with the mirror image of that half."""
    return np.concatenate([right_half, right_half[::-1] * [-1.0, 1.0]])


def _solid(points: np.ndarray) -> list[Contour]:
    return [(points, True)]


# ---- the demo's shapes -------------------------------------------------------------------------------------


def star(rng: np.random.Generator) -> list[Contour]:
    radius = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.42, 0.55))
    return _solid(_polar(radius, 10, -np.pi / 2))


def ring(rng: np.random.Generator) -> list[Contour]:
    return [(_polar(1.0), True), (_polar(rng.uniform(0.38, 0.5)), False)]


def cross(rng: np.random.Generator) -> list[Contour]:
    a = rng.uniform(0.3, 0.42)
    corner = _points((a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1))
    return _solid(_mirrored(corner) * 0.95)


def moon(rng: np.random.Generator) -> list[Contour]:
    shift = rng.uniform(0.5, 0.62)
    return [(_polar(1.0), True), (_polar(0.82) + [shift, 0.0], False)]


def heart(rng: np.random.Generator) -> list[Contour]:
    t = 2 * np.pi * np.arange(64) / 64
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return _solid(np.stack([x, y * rng.uniform(0.9, 1.1)], 1) / 17)


def leaf(rng: np.random.Generator) -> list[Contour]:
    y = np.linspace(-1, 1, 33)
    width = rng.uniform(0.5, 0.62) * np.cos(y * np.pi / 2) ** 0.8
    return _solid(_mirrored(np.stack([width, y], 1)))


def bolt(rng: np.random.Generator) -> list[Contour]:
    k = rng.uniform(0.9, 1.1)
    half = _points((0.45, -1), (0.05, -0.25), (0.62, -0.25), (-0.35, 1), (-0.08, 0.12), (-0.62, 0.12), (-0.2, -1))
    return _solid(half * [k, 1])


def castle(rng: np.random.Generator) -> list[Contour]:
    w, gap = rng.uniform(0.62, 0.78), rng.uniform(0.2, 0.3)
    right = _points((gap / 2, -0.5), (gap / 2, -0.85), (w * 0.62, -0.85), (w * 0.62, -0.5), (w, -0.5), (w, 0.85))
    door = _mirrored(_points((0.0, 0.3), (0.16, 0.42), (0.16, 0.9)))
    return [(_mirrored(right), True), (door, False)]


# ---- the pretraining's shapes ------------------------------------------------------------------------------


def _polygon(sides: int) -> Shape:
    def shape(rng: np.random.Generator) -> list[Contour]:
        return _solid(_polar(rng.uniform(0.92, 1.0, sides), sides, -np.pi / 2))

    return shape


def _outline(*xy: tuple[float, float], jitter: float = 0.06) -> Shape:
    """A fixed polygon whose corners move by up to `jitter`."""
    base = _points(*xy)

    def shape(rng: np.random.Generator) -> list[Contour]:
        return _solid(base + rng.uniform(-jitter, jitter, base.shape))

    return shape


def disc(rng: np.random.Generator) -> list[Contour]:
    return _solid(_polar(1.0) * [1.0, rng.uniform(0.75, 1.0)])


def half_disc(rng: np.random.Generator) -> list[Contour]:
    return _solid(_polar(1.0, 40, 0.0, np.pi * rng.uniform(1.0, 1.12)) * [1.0, 0.9] + [0, -0.35])


def pie(rng: np.random.Generator) -> list[Contour]:
    mouth = rng.uniform(0.45, 0.75)
    return _solid(np.concatenate([_polar(1.0, 56, mouth, 2 * np.pi - 2 * mouth), [[0.0, 0.0]]]))


def flower(rng: np.random.Generator) -> list[Contour]:
    t = 2 * np.pi * np.arange(96) / 96
    return _solid(_polar(0.75 + 0.25 * np.cos(rng.integers(5, 8) * t), 96))


def gear(rng: np.random.Generator) -> list[Contour]:
    teeth = int(rng.integers(7, 11))
    radius = np.where(np.arange(4 * teeth) % 4 < 2, 1.0, 0.76)
    return [(_polar(radius, 4 * teeth), True), (_polar(rng.uniform(0.2, 0.3)), False)]


def frame(rng: np.random.Generator) -> list[Contour]:
    square = _points((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8))
    return [(square, True), (square * rng.uniform(0.45, 0.6), False)]


def drop(rng: np.random.Generator) -> list[Contour]:
    t = 2 * np.pi * np.arange(64) / 64
    return _solid(np.stack([0.8 * np.sin(t) * np.sin(t / 2) ** rng.uniform(1.2, 1.8), -np.cos(t)], 1))


def mushroom(rng: np.random.Generator) -> list[Contour]:
    stem = rng.uniform(0.18, 0.3)
    cap = _polar(1.0, 32, np.pi, np.pi) * [1.0, 0.95]
    return _solid(np.concatenate([cap, [[1.0, 0.05], [stem, 0.05], [stem, 0.85], [-stem, 0.85], [-stem, 0.05]]]))


def fish(rng: np.random.Generator) -> list[Contour]:
    body = _polar(1.0, 48) * [0.68, rng.uniform(0.4, 0.52)] + [-0.28, 0.0]
    tail = _points((0.25, 0.0), (0.95, -0.5), (0.78, 0.0), (0.95, 0.5))
    return [(body, True), (tail, True)]


def bottle(rng: np.random.Generator) -> list[Contour]:
    neck, body = rng.uniform(0.13, 0.2), rng.uniform(0.36, 0.48)
    return _solid(_mirrored(_points((neck, -1), (neck, -0.4), (body, -0.05), (body, 1))))


def blob(rng: np.random.Generator) -> list[Contour]:
    t = 2 * np.pi * np.arange(96) / 96
    waves = [rng.uniform(0.05, 0.16) * np.cos(k * t + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5)]
    radius = 0.7 + np.sum(waves, 0)
    return _solid(_polar(radius / radius.max(), 96))


def dumbbell(rng: np.random.Generator) -> list[Contour]:
    r, bar = rng.uniform(0.36, 0.46), rng.uniform(0.1, 0.18)
    ball = _polar(r, 32)
    rod = _points((-0.6, -bar), (0.6, -bar), (0.6, bar), (-0.6, bar))
    return [(ball + [-0.58, 0], True), (ball + [0.58, 0], True), (rod, True)]


DEMO_SHAPES: dict[str, Shape] = {
    "star": star,
    "ring": ring,
    "cross": cross,
    "moon": moon,
    "heart": heart,
    "leaf": leaf,
    "bolt": bolt,
    "castle": castle,
}

PRETRAIN_SHAPES: dict[str, Shape] = {
    "triangle": _polygon(3),
    "pentagon": _polygon(5),
    "octagon": _polygon(8),
    "disc": disc,
    "square": _outline((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "bar": _outline((-1, -0.32), (1, -0.32), (1, 0.32), (-1, 0.32)),
    "trapezoid": _outline((-0.45, -0.65), (0.45, -0.65), (0.95, 0.65), (-0.95, 0.65)),
    "parallelogram": _outline((-0.95, -0.5), (0.4, -0.5), (0.95, 0.5), (-0.4, 0.5)),
    "letter_l": _outline((-0.65, -0.9), (-0.15, -0.9), (-0.15, 0.4), (0.65, 0.4), (0.65, 0.9), (-0.65, 0.9)),
    "letter_t": _outline(
        (-0.85, -0.85),
        (0.85, -0.85),
        (0.85, -0.38),
        (0.25, -0.38),
        (0.25, 0.9),
        (-0.25, 0.9),
        (-0.25, -0.38),
        (-0.85, -0.38),
    ),
    "letter_u": _outline(
        (-0.8, -0.8),
        (-0.34, -0.8),
        (-0.34, 0.35),
        (0.34, 0.35),
        (0.34, -0.8),
        (0.8, -0.8),
        (0.8, 0.85),
        (-0.8, 0.85),
    ),
    "letter_z": _outline(
        (-0.8, -0.85),
        (0.8, -0.85),
        (0.8, -0.45),
        (-0.1, 0.42),
        (0.8, 0.42),
        (0.8, 0.85),
        (-0.8, 0.85),
        (-0.8, 0.45),
        (0.1, -0.42),
        (-0.8, -0.42),
    ),
    "arrow": _outline((-1, -0.22), (0.15, -0.22), (0.15, -0.65), (1, 0), (0.15, 0.65), (0.15, 0.22), (-1, 0.22)),
    "hourglass": _outline((-0.75, -0.9), (0.75, -0.9), (0.14, 0), (0.75, 0.9), (-0.75, 0.9), (-0.14, 0)),
    "chevron": _outline((-0.9, -0.3), (0, -0.85), (0.9, -0.3), (0.9, 0.35), (0, -0.2), (-0.9, 0.35)),
    "house": _outline((0, -0.95), (0.85, -0.2), (0.65, -0.2), (0.65, 0.8), (-0.65, 0.8), (-0.65, -0.2), (-0.85, -0.2)),
    "half_disc": half_disc,
    "pie": pie,
    "flower": flower,
    "gear": gear,
    "frame": frame,
    "drop": drop,
    "mushroom": mushroom,
    "fish": fish,
    "bottle": bottle,
    "blob": blob,
    "dumbbell": dumbbell,
}


def rasterize(
    shape: Shape,
    rng: np.random.Generator,
    size: int,
    center: tuple[float, float],
    radius: float,
    angle: float,
    aspect: float,
) -> np.ndarray:
    """Coverage [size, size] float32 in [0, 1] of a shape at `center` (x, y), `radius` in pixels, turned by `angle`."""
    canvas = Image.new("L", (size * _OVERSAMPLING, size * _OVERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    c, s = np.cos(angle), np.sin(angle)
    to_pixels = np.array([[c, s], [-s, c]]) * (radius * _OVERSAMPLING)
    for points, filled in shape(rng):
        xy = (points * [aspect, 1.0]) @ to_pixels + np.array(center) * _OVERSAMPLING
        draw.polygon([tuple(p) for p in xy], fill=255 if filled else 0)
    return np.asarray(canvas.reduce(_OVERSAMPLING), dtype=np.float32) / 255
