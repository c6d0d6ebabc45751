"""Visualization of masks and CAMs: palette PNGs, overlays and heat maps. Images are uint8 [H,W,3]."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.data.classes import IGNORE
from afa.data.transforms import voc_palette
from afa.files import atomic_path

Picture = NDArray[np.uint8]

PALETTE = voc_palette()

# On a screen, over a photo, half of VOC's colors look dark and alike. Scaling them by one factor preserves the hues.
SCREEN_COLORS = np.clip(PALETTE.astype(np.float64) * 1.55, 0, 255).astype(np.uint8)

_HEAT = np.array(
    [(16, 12, 48), (60, 26, 120), (132, 32, 130), (200, 50, 96), (240, 98, 52), (252, 170, 42), (252, 244, 150)],
    np.float64,
)
"""Color map with monotonically increasing lightness, so that it also works in grayscale."""


def class_color(index: int) -> str:
    """The screen color of a class as CSS: '#rrggbb'."""
    return "#{:02x}{:02x}{:02x}".format(*SCREEN_COLORS[index].tolist())


def class_shares(mask: NDArray[np.integer], classes: int) -> dict[int, float]:
    """Share of the pixels of a mask [H, W] of each of the classes 1 to `classes` in it, largest first."""
    shares = np.bincount(mask.reshape(-1), minlength=classes + 1) / mask.size
    return {int(index): float(shares[index]) for index in np.argsort(-shares) if index and shares[index] > 0}


def share_text(share: float) -> str:
    """A share in percent; "<1%" below half a percent, because the class is in the mask."""
    return f"{share:.0%}" if share >= 0.005 else "<1%"


def save_mask(path: str | Path, mask: NDArray[np.integer]) -> None:
    """Atomically write a class map [H,W] as a PNG with VOC's palette."""
    image = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    image.putpalette(PALETTE.tobytes())
    with atomic_path(path) as temporary:
        image.save(temporary)


def save_picture(path: str | Path, picture: Picture) -> None:
    """Atomically write an image in the format of the suffix."""
    with atomic_path(path) as temporary:
        Image.fromarray(np.ascontiguousarray(picture)).save(temporary)


def overlay(picture: Picture, mask: NDArray[np.integer], strength: float = 0.6) -> Picture:
    """Draw the classes of mask [H,W] over the image, with outlines, dimmed background and hatched ignored pixels."""
    mask = np.asarray(mask)
    result = np.empty(picture.shape, np.uint8)
    for rows in _strips(*mask.shape):
        result[rows] = _overlay_rows(picture[rows], mask, rows, strength)
    return result


def _overlay_rows(picture: Picture, whole: NDArray[np.integer], rows: slice, strength: float) -> NDArray[np.float64]:
    mask = whole[rows]
    base = picture.astype(np.float64)
    gray = base.mean(-1, keepdims=True)
    colors = SCREEN_COLORS[np.clip(mask, 0, 255)].astype(np.float64)
    # Desaturate the image by half, so that the class colors remain recognizable.
    result = (1 - strength) * (0.5 * base + 0.5 * gray) + strength * colors
    result = np.where((mask == 0)[..., None], 0.62 * (0.35 * base + 0.65 * gray), result)
    y, x = np.mgrid[rows, : mask.shape[1]]
    hatch = np.where((x + y) % 6 < 3, 215.0, 160.0)[..., None]
    result = np.where((mask == IGNORE)[..., None], 0.45 * gray + 0.55 * hatch, result)
    edge = np.zeros(mask.shape, bool)
    above = whole[max(0, rows.start - 1) : rows.stop - 1]
    edge[len(mask) - len(above) :] |= mask[len(mask) - len(above) :] != above
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    result[edge] = 0.25 * result[edge] + 0.75 * 255
    return result.clip(0, 255)


def heat(picture: Picture, cam: NDArray[np.floating]) -> Picture:
    """Draw a CAM as a heat map over the grayscale image; cam: float [H,W], or [C,H,W] (maximum is used), in [0,1]."""
    cam = np.asarray(cam)
    cam = cam.max(0) if cam.ndim == 3 else cam
    result = np.empty(picture.shape, np.uint8)
    for rows in _strips(*cam.shape):
        position = np.nan_to_num(cam[rows].astype(np.float64)).clip(0, 1) * (len(_HEAT) - 1)
        low = np.minimum(position.astype(int), len(_HEAT) - 2)
        part = (position - low)[..., None]
        colors = (1 - part) * _HEAT[low] + part * _HEAT[low + 1]
        gray = picture[rows].astype(np.float64).mean(-1, keepdims=True)
        result[rows] = (0.38 * gray + 0.72 * colors).clip(0, 255)
    return result


def _strips(height: int, width: int) -> Iterator[slice]:
    """Row slices of about 100,000 pixels: drawing temporarily needs a hundred times the memory of the image."""
    rows = max(1, 100_000 // max(1, width))
    return (slice(top, min(height, top + rows)) for top in range(0, height, rows))
