"""Surface patterns: functions of pixel coordinates that return a value in [0, 1] for each pixel.

`x` and `y` are float32 arrays in units of the pattern's period, already rotated and shifted at random; the value
mixes the object's two colors. Classes differ by their patterns, never by their colors.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Texture = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]

_TAU = np.float32(2 * np.pi)


def _triangle_wave(x: np.ndarray) -> np.ndarray:
    """Triangle wave with period 1 and values in [0, 1]."""
    return np.abs(2 * (x - np.floor(x)) - 1)


def _step(x: np.ndarray, sharpness: float = 6.0) -> np.ndarray:
    """A soft edge at 0."""
    return np.clip(x * sharpness + 0.5, 0, 1)


def _frac(x: np.ndarray) -> np.ndarray:
    return x - np.floor(x)


def _cell_hash(i: np.ndarray, j: np.ndarray, seed: float) -> np.ndarray:
    """A pseudo-random number in [0, 1) for each integer cell."""
    return _frac(np.sin(i * 12.9898 + j * 78.233 + seed) * 43758.547)


def _plane_waves(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, n: int = 7) -> np.ndarray:
    """Band-pass noise: a sum of waves with the same wavelength in random directions."""
    total = np.zeros_like(x)
    for direction, phase in zip(rng.uniform(0, np.pi, n), rng.uniform(0, 2 * np.pi, n), strict=True):
        total += np.cos(
            _TAU * (x * np.float32(np.cos(direction)) + y * np.float32(np.sin(direction))) + np.float32(phase)
        )
    return total / np.sqrt(n)


# ---- the demo's textures -----------------------------------------------------------------------------------


def stripes(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _step(_triangle_wave(x) - 0.5, 3)


def dots(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = np.floor(y)
    dx, dy = _frac(x + 0.5 * (row % 2)) - 0.5, _frac(y) - 0.5
    return _step(0.33 - np.sqrt(dx * dx + dy * dy))


def checker(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return ((np.floor(x * 1.6) + np.floor(y * 1.6)) % 2).astype(np.float32)


def honeycomb(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height = np.float32(np.sqrt(3))
    ax, ay = _frac(x) - 0.5, height * (_frac(y / height) - 0.5)
    bx, by = _frac(x - 0.5) - 0.5, height * (_frac(y / height - 0.5) - 0.5)
    nearer = ax * ax + ay * ay < bx * bx + by * by
    dx, dy = np.abs(np.where(nearer, ax, bx)), np.abs(np.where(nearer, ay, by))
    return _step(0.4 - np.maximum(dx, 0.5 * dx + 0.5 * height * dy), 12)


def scales(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = np.floor(y * 1.4)
    dx, dy = _frac(x + 0.5 * (row % 2)) - 0.5, _frac(y * 1.4)
    return np.clip(1.25 - 1.4 * np.abs(np.sqrt(dx * dx * 1.6 + dy * dy) - 0.1), 0, 1)


def curls(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Truchet tiles: two quarter circles per cell, rotated at random, which join to form winding lines."""
    turned = _cell_hash(np.floor(x), np.floor(y), float(rng.uniform(0, 100))) < 0.5
    dx, dy = np.where(turned, 1 - _frac(x), _frac(x)), _frac(y)
    line = np.minimum(np.abs(np.hypot(dx, dy) - 0.5), np.abs(np.hypot(1 - dx, 1 - dy) - 0.5))
    return _step(0.15 - line, 8)


def zigzag(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _step(_triangle_wave(y + 0.6 * _triangle_wave(x * 0.7)) - 0.5, 3)


def bricks(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = np.floor(y * 1.3)
    across = np.abs(_frac(x * 0.65 + 0.5 * (row % 2)) - 0.5)
    along = np.abs(_frac(y * 1.3) - 0.5)
    shade = 0.75 + 0.25 * _cell_hash(np.floor(x * 0.65 + 0.5 * (row % 2)), row, 3.0)
    return np.minimum(_step(0.44 - across, 14), _step(0.38 - along, 8)) * shade


# ---- the pretraining's textures ----------------------------------------------------------------------------


def diamonds(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _step(0.2 - np.abs(_frac(x) - 0.5) - 0.55 * np.abs(_frac(y * 0.6) - 0.5), 8)


def plaid(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 0.5 * _step(_triangle_wave(x * 0.8) - 0.55) + 0.5 * _step(_triangle_wave(y * 0.8) - 0.55)


def grid(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.maximum(_step(_triangle_wave(x) - 0.72, 5), _step(_triangle_wave(y) - 0.72, 5))


def circles(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    dx, dy = _frac(x * 0.7) - 0.5, _frac(y * 0.7) - 0.5
    return _step(0.11 - np.abs(np.sqrt(dx * dx + dy * dy) - 0.3), 9)


def target(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _step(_triangle_wave(np.hypot(x - x.mean(), y - y.mean())) - 0.5, 3)


def spokes(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    turn = np.arctan2(y - y.mean(), x - x.mean()) / _TAU
    return _step(_triangle_wave(turn * int(rng.integers(9, 14))) - 0.5, 3)


def spiral(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    dx, dy = x - x.mean(), y - y.mean()
    return _step(_triangle_wave(np.hypot(dx, dy) * 0.8 + 2 * np.arctan2(dy, dx) / _TAU) - 0.5, 3)


def triangles(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = np.floor(y)
    return _step(_frac(y) - 2 * np.abs(_frac(x + 0.5 * (row % 2)) - 0.5), 5)


def dashes(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = np.floor(y * 1.3)
    return np.minimum(
        _step(_triangle_wave(y * 1.3) - 0.45, 4), _step(_triangle_wave(x * 0.6 + 0.5 * (row % 2)) - 0.45, 6)
    )


def pluses(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    dx, dy = np.abs(_frac(x * 0.8) - 0.5), np.abs(_frac(y * 0.8) - 0.5)
    arm = np.minimum(_step(0.1 - np.minimum(dx, dy), 10), _step(0.36 - np.maximum(dx, dy), 10))
    return arm


def wood(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    bend = 0.5 * np.sin(_TAU * y * 0.13 + 1) + 0.25 * np.sin(_TAU * (y * 0.31 + x * 0.1))
    return _frac(x * 0.8 + bend)


def marble(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.abs(np.sin(_TAU * 0.3 * (x + y) + 2.2 * _plane_waves(x * 0.35, y * 0.35, rng, 5)))


def leopard(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _step(_plane_waves(x * 0.9, y * 0.9, rng) - 0.45, 2.5)


def maze(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _step(0.35 - np.abs(_plane_waves(x * 0.6, y * 0.6, rng)), 3)


def _voronoi(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances to the nearest and second nearest of jittered lattice points, and the nearest one's cell value."""
    seed = float(rng.uniform(0, 100))
    i0, j0 = np.floor(x), np.floor(y)
    first = np.full_like(x, 9.0)
    second = np.full_like(x, 9.0)
    value = np.zeros_like(x)
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            i, j = i0 + di, j0 + dj
            h = _cell_hash(i, j, seed)
            d = np.hypot(i + 0.15 + 0.7 * h - x, j + 0.15 + 0.7 * _frac(h * 57.3) - y)
            nearer = d < first
            second = np.where(nearer, first, np.minimum(second, d))
            first = np.where(nearer, d, first)
            value = np.where(nearer, _frac(h * 91.7), value)
    return first, second, value


def mosaic(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _voronoi(x * 0.8, y * 0.8, rng)[2]


def cracks(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    first, second, _ = _voronoi(x * 0.75, y * 0.75, rng)
    return _step(0.12 - (second - first), 9)


def pebbles(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(1.1 - 1.5 * _voronoi(x * 0.9, y * 0.9, rng)[0], 0, 1)


def basket(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    odd = (np.floor(x * 0.6) + np.floor(y * 0.6)) % 2
    return _step(_triangle_wave(np.where(odd == 1, x, y) * 1.8) - 0.5, 2.5)


def nested_squares(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    d = np.maximum(np.abs(_frac(x * 0.5) - 0.5), np.abs(_frac(y * 0.5) - 0.5))
    return _step(_triangle_wave(d * 4) - 0.5, 2)


def speckle(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.random(x.shape, dtype=np.float32) ** 2


def confetti(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _cell_hash(np.floor(x * 1.7), np.floor(y * 1.7), float(rng.uniform(0, 100)))


def ripples(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(_TAU * x) * np.sin(_TAU * y)


DEMO_TEXTURES: dict[str, Texture] = {
    f.__name__: f for f in (dots, stripes, checker, honeycomb, scales, curls, zigzag, bricks)
}

PRETRAIN_TEXTURES: dict[str, Texture] = {
    f.__name__: f
    for f in (
        diamonds, plaid, grid, circles, target, spokes, spiral, triangles, dashes, pluses, wood, marble,
        leopard, maze, mosaic, cracks, pebbles, basket, nested_squares, speckle, confetti, ripples,
    )
}  # fmt: skip


def paint(texture: Texture, rng: np.random.Generator, size: tuple[int, int], period: float, angle: float) -> np.ndarray:
    """The pattern's values [height, width] float32, with a period of `period` pixels, rotated by `angle` radians."""
    height, width = size
    x = np.arange(width, dtype=np.float32)[None, :] / np.float32(period)
    y = np.arange(height, dtype=np.float32)[:, None] / np.float32(period)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    dx, dy = rng.uniform(0, 20, 2).astype(np.float32)
    return texture(c * x + s * y + dx, c * y - s * x + dy, rng).astype(np.float32, copy=False)
