"""Reading pictures and masks whatever their encoding, and the random crop of training."""

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

# Editors put whole thumbnails, histories and profiles into a PNG's text; Pillow's own limit is 1 MiB a chunk.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20

# What Pillow's decoders raise on damaged files, the documented OSError aside.
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
    """VOC's 256 colors, uint8 [256, 3]: the bits of the index spread over red, green and blue, highest
    first."""
    index = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def read_image(path: str | Path, largest_side: int | None = None) -> Image.Image:
    """The picture at `path` as an upright RGB image, shrunk until its longer side has `largest_side` pixels at most.

    Turned by its EXIF orientation; transparency goes on white; every mode becomes 8-bit RGB, deep grey scaled by the
    range in the file (see `_eight_bits`). Raises UserError naming the file when it can't be decoded to its last row.
    """
    try:
        with _opened(path) as image:
            height, width = shrunk(_upright_size(image), largest_side)
            if largest_side is not None and max(image.size) > largest_side:
                # A JPEG can be decoded at a half, a quarter or an eighth of its size, in a fraction of the time.
                # Without the option nothing is shrunk: the published recipes' pixels are those of the file.
                small, large = sorted((height, width))
                image.draft(None, (large, small) if image.width >= image.height else (small, large))
            image.load()
            upright = to_rgb(image)
    except _DECODE_ERRORS as error:
        raise UserError(
            f"the image {path} can't be decoded ({_reason(error)}); replace it, take its name out of the split list, "
            "or set data.bad_images=skip"
        ) from error
    return upright if upright.size == (width, height) else upright.resize((width, height), Image.Resampling.BILINEAR)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    # Through a file object: given a path, Pillow maps an uncompressed file into memory by the upright size, which mixes
    # up the rows of a TIFF that lies on its side.
    with open(path, "rb") as file, Image.open(file) as image:
        yield image


def check_image(path: str | Path) -> tuple[int, int]:
    """(height, width) of the upright picture after decoding it to its last row; UserError as of `read_image`.

    A JPEG is decoded to an eighth of its size: all of the file is read, at less than half the cost.
    """
    read_image(path, 1)
    return image_size(path)


def shrunk(size: tuple[int, int], largest_side: int | None) -> tuple[int, int]:
    """(height, width) in the same proportion, the longer at most `largest_side`."""
    longer = max(size)
    if largest_side is None or longer <= largest_side:
        return size
    return max(1, round(size[0] * largest_side / longer)), max(1, round(size[1] * largest_side / longer))


def to_rgb(image: Image.Image) -> Image.Image:
    """The loaded `image` upright and in 8-bit RGB."""
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
    """(height, width) of the upright picture, read from the file's header alone."""
    try:
        with _opened(path) as image:
            return _upright_size(image)
    except _DECODE_ERRORS as error:
        raise UserError(f"the image {path} can't be decoded ({_reason(error)}); replace it") from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    # Orientations 5 to 8 lie on their side; of a TIFF Pillow gives the upright size at once.
    turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def _eight_bits(values: NDArray[np.number]) -> NDArray[np.uint8]:
    """Grey of 16 or 32 bits or of floating point as 8 bits, black staying black where nothing is negative.

    Whole numbers are taken for the fewest of 8, 10, 12, 14 and 16 bits that hold the picture's largest; floating point
    for 0 to 1 or 0 to 255. What fits none of these is scaled so that its range fills 0 to 255.
    """
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
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
    """The class map at `path`, uint8 [H, W]: 0 background, 1..num_classes, 255 ignored.

    Turned by its own EXIF orientation. Palette and grey files hold the class itself; RGB files must use VOC's
    colors. Raises UserError naming the file: not decodable, not of `size` (height, width), or holding a value that
    is no class.
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
            f"the mask {path} is a color picture ({image.mode}); save the class numbers as a palette or 8-bit grey PNG"
        )
    if size is not None and mask.shape != size:
        hint = ""
        if mask.shape == (size[1], size[0]):
            hint = ": turn this one, as the image has been drawn on as it lies in the file, before its EXIF rotation"
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
            f"the mask {path} holds the value {unknown[0]:g}, but only 0 (background), 1 to "
            f"{num_classes} (the classes) "
            f"and {IGNORE} (ignored) are allowed; fix the mask or list every class in classes.txt"
        )
    return mask.astype(np.uint8)


def _from_colors(rgb: NDArray[np.uint8], path: str | Path) -> NDArray[np.int64]:
    keys = np.array([1 << 16, 1 << 8, 1])
    known = voc_palette().astype(np.int64) @ keys
    order = np.argsort(known)
    colors = rgb.astype(np.int64) @ keys
    place = np.searchsorted(known[order], colors).clip(max=255)
    found = order[place]
    strange = known[found] != colors
    if strange.any():
        color = tuple(int(v) for v in rgb[strange][0])
        raise UserError(
            f"the mask {path} is a color picture holding {color}, which is no color of VOC's palette; "
            "save the class numbers as a palette or 8-bit grey PNG"
        )
    return found


def random_crop(
    image: Image.Image, size: int, scale_range: tuple[float, float], flip: bool, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], tuple[int, int, int, int]]:
    """A random `size` x `size` crop of the randomly scaled and mirrored image, uint8 [size, size, 3].

    Also its valid box (y0, y1, x0, x1): where picture lies and not padding. A scaled image smaller than the
    crop is put at a random place on black, as in the published code (AFA, CVPR 2022). Only the part that stays is
    resampled.
    """
    # Every draw happens whatever the image, so that a sample's numbers do not depend on its neighbors'.
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
    """Pillow's own words, without the path it repeats."""
    if isinstance(error, FileNotFoundError):
        return "the file is not there"
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "not an image file" if "cannot identify image file" in text else text
