"""Loading of images and masks in any encoding, and the random training crop."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from afa.data.classes import IGNORE
from afa.errors import UserError

# Editors store thumbnails, histories and profiles in PNG text chunks; Pillow's default limit is 1 MiB per chunk.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20

# Exceptions that Pillow's decoders raise on damaged files, in addition to the documented OSError.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def voc_palette() -> NDArray[np.uint8]:
    """VOC's 256 colors, uint8 [256, 3]: the bits of the index are distributed over red, green and blue."""
    index = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def read_image(path: str | Path, largest_side: int | None = None) -> Image.Image:
    """Load an image as upright 8-bit RGB, shrunk so that its longer side has at most `largest_side` pixels.

    Applies the EXIF orientation, puts transparency on white, and scales grayscale of more than 8 bits (see
    `_eight_bits`). Raises UserError if the file can't be decoded completely.
    """
    try:
        with _opened(path) as image:
            height, width = shrunk(_upright_size(image), largest_side)
            if largest_side is not None and max(image.size) > largest_side:
                # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size in a fraction of the time.
                small, large = sorted((height, width))
                image.draft(None, (large, small) if image.width >= image.height else (small, large))
            image.load()
            upright = to_rgb(image)
    except _DECODE_ERRORS as error:
        raise UserError(
            f"the image {path} can't be decoded ({_reason(error)}); replace it, remove its name from the split list, "
            "or set data.bad_images=skip"
        ) from error
    return upright if upright.size == (width, height) else upright.resize((width, height), Image.Resampling.BILINEAR)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    # Use a file object: given a path, Pillow memory-maps an uncompressed file with the upright size, which scrambles
    # the rows of a rotated TIFF.
    with open(path, "rb") as file, Image.open(file) as image:
        yield image


def check_image(path: str | Path) -> tuple[int, int]:
    """Decode the image completely and return (height, width) of the upright image; UserError like `read_image`.

    A JPEG is decoded at 1/8 of its size, which still reads the whole file at less than half the cost.
    """
    read_image(path, 1)
    return image_size(path)


def shrunk(size: tuple[int, int], largest_side: int | None) -> tuple[int, int]:
    """(height, width) with the same aspect ratio and a longer side of at most `largest_side`."""
    longer = max(size)
    if largest_side is None or longer <= largest_side:
        return size
    return max(1, round(size[0] * largest_side / longer)), max(1, round(size[1] * largest_side / longer))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert the loaded `image` to upright 8-bit RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of the upright image, read only from the file's header."""
    try:
        with _opened(path) as image:
            return _upright_size(image)
    except _DECODE_ERRORS as error:
        raise UserError(f"the image {path} can't be decoded ({_reason(error)}); replace it") from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    # Orientations 5 to 8 swap width and height. For a TIFF, Pillow already returns the upright size.
    turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def _eight_bits(values: NDArray[np.number]) -> NDArray[np.uint8]:
    """Convert 16-bit, 32-bit or floating-point grayscale to 8 bits; 0 stays 0 if no value is negative.

    The range of integers is the smallest of 8, 10, 12, 14 and 16 bits that contains the maximum; floating-point values
    are in [0, 1] or [0, 255]. Other values are scaled so that their range fills [0, 255].
    """
    if not np.isfinite(values).all():
        raise ValueError("it contains NaN or infinity")
    low, high = float(values.min()), float(values.max())
    whole = np.issubdtype(values.dtype, np.integer)
    ranges = [2.0**bits - 1 for bits in (8, 10, 12, 14, 16)] if whole else [1.0, 255.0]
    full = next((limit for limit in ranges if low >= 0 and high <= limit), None)
    if full is None:
        low, full = min(low, 0.0), high
    else:
        low = 0.0
    scaled = (values.astype(np.float64) - low) * (255 / max(full - low, 1e-300))
    return np.floor(scaled + 0.5).clip(0, 255).astype(np.uint8)


def read_mask(path: str | Path, num_classes: int, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Load a class map, uint8 [H, W]: 0 background, 1..num_classes, 255 ignored.

    Applies the mask's EXIF orientation. Palette and grayscale files contain class indices; RGB files must use VOC's
    colors. Raises UserError if the file can't be decoded, doesn't have `size` (height, width), or contains an invalid
    value.
    """
    try:
        with _opened(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except _DECODE_ERRORS as error:
        raise UserError(f"the mask {path} can't be decoded ({_reason(error)}); replace it") from error
    if image.mode in ("RGB", "RGBA"):
        mask = _from_colors(np.asarray(image)[..., :3], path)
    elif image.mode in ("LA", "PA"):
        mask = np.asarray(image)[..., 0]
    elif len(image.getbands()) == 1:
        mask = np.asarray(image)
    else:
        raise UserError(
            f"the mask {path} is a color image ({image.mode}); save class indices as a palette or 8-bit grayscale PNG"
        )
    if size is not None and mask.shape != size:
        hint = ""
        if mask.shape == (size[1], size[0]):
            hint = "; rotate it: this mask seems to match the image before its EXIF rotation"
        raise UserError(
            f"the mask {path} is {mask.shape[1]} x {mask.shape[0]} pixels but its image is {size[1]} "
            f"x {size[0]}; "
            f"masks must have the size of the upright image{hint}"
        )
    values = np.unique(mask)
    known = np.isin(values, [*range(num_classes + 1), IGNORE])
    unknown = values[~known]
    if unknown.size:
        raise UserError(
            f"the mask {path} contains the value {unknown[0]:g}, but only 0 (background), 1 to {num_classes} (the "
            f"classes) and {IGNORE} (ignored) are allowed; fix the mask or list every class in classes.txt"
        )
    return mask.astype(np.uint8)


def _from_colors(rgb: NDArray[np.uint8], path: str | Path) -> NDArray[np.int64]:
    keys = np.array([1 << 16, 1 << 8, 1])
    known = voc_palette().astype(np.int64) @ keys
    order = np.argsort(known)
    colors = rgb.astype(np.int64) @ keys
    position = np.searchsorted(known[order], colors).clip(max=255)
    found = order[position]
    unknown = known[found] != colors
    if unknown.any():
        color = tuple(int(v) for v in rgb[unknown][0])
        raise UserError(
            f"the mask {path} is a color image with {color}, which is not in VOC's palette; "
            "save class indices as a palette or 8-bit grayscale PNG"
        )
    return found


def random_crop(
    image: Image.Image, size: int, scale_range: tuple[float, float], flip: bool, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], tuple[int, int, int, int]]:
    """A random `size` x `size` crop of the randomly scaled and flipped image, uint8 [size, size, 3].

    Also returns the box (y0, y1, x0, x1) of the crop that contains image and not padding. A scaled image smaller than
    the crop is placed at a random position on black, as in the published code (AFA, CVPR 2022). Only the cropped part
    is resampled.
    """
    # Always draw the same number of random values, independent of the image.
    draws = rng.random(4)
    scale = scale_range[0] + (scale_range[1] - scale_range[0]) * draws[0]
    boxes, sources = [], []
    for length, draw in ((image.height, draws[1]), (image.width, draws[2])):
        scaled = max(1, round(length * scale))
        start = int(draw * (abs(scaled - size) + 1))
        crop_start, pad_start = (start, 0) if scaled >= size else (0, start)
        kept = min(scaled, size)
        boxes.append((pad_start, pad_start + kept))
        sources.append((crop_start * length / scaled, (crop_start + kept) * length / scaled))
    (y0, y1), (x0, x1) = boxes
    (top, bottom), (left, right) = sources
    box = (left, top, min(right, image.width), min(bottom, image.height))
    part = image.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=box)
    if flip and draws[3] < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x0, x1 = size - x1, size - x0
    crop = np.zeros((size, size, 3), np.uint8)
    crop[y0:y1, x0:x1] = np.asarray(part)
    return crop, (y0, y1, x0, x1)


def _reason(error: BaseException) -> str:
    """Pillow's message without the path."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "not an image file" if "cannot identify image file" in text else text
