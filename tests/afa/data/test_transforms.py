"""Reading images and masks of all encodings, and the random crop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from afa.data.transforms import (
    check_image,
    image_size,
    random_crop,
    read_image,
    read_mask,
    voc_palette,
)
from afa.errors import UserError


def _ramp(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    values = np.stack([255 * x / max(1, width - 1), 255 * y / max(1, height - 1), 40 + 0 * x], -1)
    return Image.fromarray(values.astype(np.uint8))


def test_picture_encodings(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    color = Image.fromarray(rgb)
    gray = color.convert("L")
    alpha = color.convert("RGBA")
    alpha.putpixel((0, 0), (9, 9, 9, 0))
    cases: dict[str, tuple[Image.Image, np.ndarray]] = {
        "rgb": (color, rgb),
        "gray": (gray, np.asarray(gray)[..., None].repeat(3, 2)),
        "palette": (gray.convert("P"), np.asarray(gray)[..., None].repeat(3, 2)),
        "sixteen": (
            Image.fromarray(np.asarray(gray).astype(np.uint16) * 257),
            np.asarray(gray)[..., None].repeat(3, 2),
        ),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / f"{name}.png")
        found = np.asarray(read_image(tmp_path / f"{name}.png"))
        assert found.shape == (5, 7, 3), name
        assert np.array_equal(found, expected), name
    alpha.save(tmp_path / "alpha.png")
    found = np.asarray(read_image(tmp_path / "alpha.png"))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert np.array_equal(found[1:], rgb[1:])
    color.convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert np.asarray(read_image(tmp_path / "cmyk.jpg")).shape == (5, 7, 3)


def test_exif_rotation(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = np.rot90(np.asarray(image), -1)
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.png")), upright)
    assert image_size(tmp_path / "turned.png") == (10, 6)


def test_mask_encodings(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 2], [3, 255, 0]], np.uint8)
    palette = voc_palette()
    indexed = Image.fromarray(mask)
    indexed.putpalette(palette.reshape(-1).tolist())
    assert indexed.mode == "P"
    indexed.save(tmp_path / "indexed.png")
    Image.fromarray(mask).save(tmp_path / "gray.png")
    Image.fromarray(palette[mask]).save(tmp_path / "colors.png")
    for name in ("indexed", "gray", "colors"):
        assert np.array_equal(read_mask(tmp_path / f"{name}.png", 3, (2, 3)), mask), name


def test_voc_palette() -> None:
    palette = voc_palette()
    assert palette[[0, 1, 2, 8, 15, 20, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [64, 0, 0],
        [192, 128, 128],
        [0, 64, 128],
        [224, 224, 192],
    ]
    assert len({tuple(color) for color in palette.tolist()}) == 256


@pytest.mark.parametrize(("height", "width"), [(48, 64), (31, 97), (5, 3), (200, 20)])
@pytest.mark.parametrize("size", [32, 48])
def test_crop_box_is_the_position_of_the_image(height: int, width: int, size: int) -> None:
    # No pixel is close to the padding's color, so that padding and image can be distinguished.
    image = Image.new("RGB", (width, height), (250, 10, 250))
    seen = set()
    for seed in range(40):
        crop, (y0, y1, x0, x1) = random_crop(image, size, (0.5, 2.0), True, np.random.default_rng(seed))
        inside = np.zeros((size, size), bool)
        inside[y0:y1, x0:x1] = True
        assert 0 <= y0 < y1 <= size
        assert 0 <= x0 < x1 <= size
        assert (crop[inside] == (250, 10, 250)).all()
        assert (crop[~inside] == 0).all(), "black, as in the published code"
        seen.add((y0, y1, x0, x1))
    if 2 * max(height, width) < size:
        assert len(seen) > 20  # an image smaller than the crop gets a random position


def test_crop_equals_the_crop_of_the_whole_scaled_image() -> None:
    rng = np.random.default_rng(3)
    yy, xx = np.mgrid[:60, :90]
    smooth = np.stack([yy * 4, xx * 2, (yy + xx) * 1.5], -1).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(smooth)
    crop, box = random_crop(image, 40, (1.7, 1.7), False, rng)
    assert box == (0, 40, 0, 40)
    whole = np.asarray(image.resize((153, 102), Image.Resampling.BILINEAR)).astype(int)
    draws = np.random.default_rng(3).random(4)
    y, x = int(draws[1] * (102 - 40 + 1)), int(draws[2] * (153 - 40 + 1))
    difference = abs(whole[y : y + 40, x : x + 40] - crop.astype(int))
    # The filter is cut at the crop's border, where two pixels of the ramp differ by at most 4.
    assert difference[1:-1, 1:-1].max() <= 1
    assert difference.max() <= 4


def test_flip_mirrors_picture_and_box() -> None:
    image = Image.fromarray(np.arange(20 * 10 * 3).reshape(20, 10, 3).astype(np.uint8))
    pairs = []
    for seed in range(30):
        plain = random_crop(image, 32, (1, 1), False, np.random.default_rng(seed))
        maybe = random_crop(image, 32, (1, 1), True, np.random.default_rng(seed))
        flipped = not np.array_equal(plain[0], maybe[0])
        pairs.append(flipped)
        if flipped:
            assert np.array_equal(plain[0][:, ::-1], maybe[0])
            y0, y1, x0, x1 = plain[1]
            assert maybe[1] == (y0, y1, 32 - x1, 32 - x0)
    assert 5 < sum(pairs) < 25


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_of_image_and_mask(tmp_path: Path, orientation: int) -> None:
    upright = _ramp(6, 10)
    mask = np.arange(60, dtype=np.uint8).reshape(6, 10) % 4
    undo = {
        1: lambda array: array,
        2: lambda array: array[:, ::-1],
        3: lambda array: array[::-1, ::-1],
        4: lambda array: array[::-1],
        5: lambda array: array.swapaxes(0, 1),
        6: lambda array: np.rot90(array, 1),
        7: lambda array: array[::-1, ::-1].swapaxes(0, 1),
        8: lambda array: np.rot90(array, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo(np.asarray(upright)))).save(tmp_path / "image.png", exif=exif)
    lying = Image.fromarray(np.ascontiguousarray(undo(mask)))
    lying.putpalette(voc_palette().reshape(-1).tolist())
    lying.save(tmp_path / "mask.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "image.png")), np.asarray(upright))
    assert image_size(tmp_path / "image.png") == check_image(tmp_path / "image.png") == (6, 10)
    assert np.array_equal(read_mask(tmp_path / "mask.png", 3, (6, 10)), mask)
    small = read_image(tmp_path / "image.png", 5)
    assert small.size == (5, 3)


def test_mask_of_an_image_that_was_not_turned(tmp_path: Path) -> None:
    Image.new("L", (6, 10)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"6 x 10 pixels but its image is 10 x 6; .*rotate it"):
        read_mask(tmp_path / "mask.png", 3, (6, 10))


def test_more_mask_encodings(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    gray = Image.fromarray(mask)
    indexed = gray.copy()
    indexed.putpalette(voc_palette().reshape(-1).tolist())
    cases = {
        "bits": Image.fromarray(mask.astype(bool)),
        "sixteen": Image.fromarray(mask.astype(np.uint16)),
        "gray and alpha": gray.convert("LA"),
        "colors and alpha": indexed.convert("RGBA"),
    }
    for name, image in cases.items():
        image.save(tmp_path / f"{name}.png")
        assert np.array_equal(read_mask(tmp_path / f"{name}.png", 3, (2, 3)), mask), name
    indexed.info["transparency"] = 0
    indexed.save(tmp_path / "see-through.png", transparency=0)
    assert np.array_equal(read_mask(tmp_path / "see-through.png", 3), mask)
    Image.fromarray(mask.astype(np.uint16) * 300).save(tmp_path / "too large.png")
    with pytest.raises(UserError, match="contains the value 300"):
        read_mask(tmp_path / "too large.png", 3)
    Image.new("CMYK", (3, 2)).save(tmp_path / "print.tif")
    with pytest.raises(UserError, match=r"color image \(CMYK\)"):
        read_mask(tmp_path / "print.tif", 3)


def test_more_picture_encodings(tmp_path: Path) -> None:
    color = _ramp(24, 31)
    rgb = np.asarray(color)
    indexed = color.quantize(64)
    indexed.save(tmp_path / "see-through.png", transparency=indexed.getpixel((0, 0)))
    found = np.asarray(read_image(tmp_path / "see-through.png"))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert abs(found[-1, -1].astype(int) - rgb[-1, -1]).max() < 40
    color.convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    found = np.asarray(read_image(tmp_path / "print.jpg")).astype(int)
    assert abs(found - rgb).mean() < 3  # the colors, not their negatives
    Image.fromarray(np.full((2, 3), 70_000, np.int32)).save(tmp_path / "wide.tif")
    assert np.asarray(read_image(tmp_path / "wide.tif")).max() == 255
    for name, mode in (("bits.png", "1"), ("gray and alpha.png", "LA"), ("scan.tif", "L"), ("web.webp", "RGB")):
        color.convert(mode).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (31, 24)), name
    for size in ((1, 1), (1, 500), (333, 1)):
        Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "odd.png")
        assert read_image(tmp_path / "odd.png").size == size
        assert max(read_image(tmp_path / "odd.png", 100).size) <= 100
        assert random_crop(read_image(tmp_path / "odd.png"), 32, (0.5, 2), True, np.random.default_rng(0))[0].any()


@pytest.mark.parametrize("options", [{"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "PNG"}])
@pytest.mark.parametrize("kept", [0.99, 0.5, 0.02, 0])
def test_the_check_finds_the_errors_that_reading_finds(tmp_path: Path, options: dict[str, Any], kept: float) -> None:
    path = tmp_path / "image"
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path, **options)
    assert check_image(path) == (90, 70)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    for read in (read_image, check_image):
        with pytest.raises(UserError, match=r"image can't be decoded \(.+\); replace it"):
            read(path)


def test_shrinking_while_decoding_keeps_the_picture(tmp_path: Path) -> None:
    photograph = _ramp(700, 900)
    photograph.save(tmp_path / "large.jpg", quality=95)
    whole = read_image(tmp_path / "large.jpg")
    assert np.array_equal(np.asarray(whole), np.asarray(Image.open(tmp_path / "large.jpg").convert("RGB")))
    assert read_image(tmp_path / "large.jpg", 900).size == (900, 700)
    for side, size in ((899, (899, 699)), (300, (300, 233)), (100, (100, 78))):
        small = read_image(tmp_path / "large.jpg", side)
        assert small.size == size
        plain = whole.resize(size, Image.Resampling.BILINEAR)
        assert abs(np.asarray(small).astype(int) - np.asarray(plain)).mean() < 2


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.webp", "a.jpg"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_every_format_and_mode(tmp_path: Path, name: str, mode: str, orientation: int) -> None:
    if mode == "RGBA" and name == "a.jpg":
        return  # JPEG has no transparency
    picture = Image.new("RGB", (60, 40), (200, 0, 0))
    picture.paste((0, 0, 200), (0, 0, 30, 40))
    picture.paste((0, 200, 0), (0, 0, 60, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name == "a.webp" else {"quality": 100, "subsampling": 0} if name == "a.jpg" else {}
    picture.convert(mode).save(tmp_path / name, exif=exif, **options)
    picture.convert(mode).convert("RGB").save(tmp_path / "plain.png", exif=exif)
    found, expected = (np.asarray(read_image(tmp_path / file)).astype(int) for file in (name, "plain.png"))
    assert found.shape == expected.shape
    assert abs(found - expected).max() <= (12 if name == "a.jpg" else 0)
    assert image_size(tmp_path / name) == check_image(tmp_path / name) == found.shape[:2]
    assert read_image(tmp_path / name, 30).size == ((30, 20) if orientation < 5 else (20, 30))


@pytest.mark.parametrize(
    ("values", "kind", "mean"),
    [
        (1.0, np.float32, 127.5),
        (255.0, np.float32, 127.5),
        (0.25, np.float32, 31.9),  # a dark picture stays dark
        (90_000.0, np.float32, 127.5),
        (255, np.int32, 127),
        (4095, np.uint16, 127.5),
        (65535, np.uint16, 127.5),
        (1023, np.uint16, 127.5),
        (70_000, np.int32, 127.5),
    ],
)
def test_range_of_deep_grays(tmp_path: Path, values: float, kind: Any, mean: float) -> None:
    ramp = (np.linspace(0, values, 2400).reshape(40, 60)).astype(kind)
    Image.fromarray(ramp).save(tmp_path / "deep.tif")
    found = np.asarray(read_image(tmp_path / "deep.tif"))
    assert found.min() == 0
    assert found.mean() == pytest.approx(mean, abs=0.6)


def test_deep_grays_with_negative_values_and_nan(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(-1000, 3000, 2400).reshape(40, 60).astype(np.int32)).save(tmp_path / "scan.tif")
    found = np.asarray(read_image(tmp_path / "scan.tif"))
    assert (found.min(), found.max()) == (0, 255)
    for bad in (np.nan, np.inf):
        values = np.zeros((4, 6), np.float32)
        values[1, 1] = bad
        Image.fromarray(values).save(tmp_path / "bad.tif")
        with pytest.raises(UserError, match=r"bad\.tif can't be decoded \(it contains NaN or infinity\)"):
            read_image(tmp_path / "bad.tif")


def test_a_mask_of_fractions_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6), 1.0, np.float32)).save(tmp_path / "mask.tif")
    assert (read_mask(tmp_path / "mask.tif", 3) == 1).all()
    Image.fromarray(np.full((4, 6), 0.5, np.float32)).save(tmp_path / "mask.tif")
    with pytest.raises(UserError, match=r"contains the value 0\.5"):
        read_mask(tmp_path / "mask.tif", 3)


@pytest.mark.parametrize("size", [3_000_000, 20_000_000])
def test_large_text_and_profiles(tmp_path: Path, size: int) -> None:
    picture = Image.new("RGB", (60, 40), "red")
    text = PngImagePlugin.PngInfo()
    text.add_text("history", "A" * size, zip=True)
    picture.save(tmp_path / "text.png", pnginfo=text)
    picture.save(tmp_path / "profile.png", icc_profile=bytes(size))
    for name in ("text.png", "profile.png"):
        assert read_image(tmp_path / name).size == (60, 40)
        assert check_image(tmp_path / name) == (40, 60)
