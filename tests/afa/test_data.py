from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from afa.data import COCO_CLASSES, VOC_CLASSES, VOCDataset, check_dataset, eval_loader, share, train_loader
from afa.data.transforms import (
    MEAN_COLOUR,
    check_image,
    image_size,
    random_crop,
    read_image,
    read_mask,
    voc_palette,
)
from afa.errors import UserError

MakeTree = Callable[..., Path]


def _train(root: Path, **options: Any) -> VOCDataset:
    return VOCDataset(root, "train", train=True, with_mask=False, **{"crop_size": 32, **options})


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first["name"] == second["name"] and all(
        torch.equal(first[key], second[key]) for key in ("image", "tags", "box")
    )


@pytest.mark.parametrize("tags", ["csv", "xml"])
def test_items(make_voc_tree: MakeTree, tags: str) -> None:
    root = make_voc_tree(tags=tags)
    train = _train(root)
    assert train.classes == ["square", "disc", "stripes"]
    assert len(train) == 6
    assert train.tags.dtype == torch.float32
    assert train.tags[:3].tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    item = train[0]
    assert set(item) == {"image", "tags", "box", "name"}
    assert (item["image"].dtype, tuple(item["image"].shape)) == (torch.uint8, (3, 32, 32))
    assert (item["box"].dtype, tuple(item["box"].shape)) == (torch.int64, (4,))

    val = VOCDataset(root, "val", train=False, with_mask=True)
    item = val[1]
    assert tuple(item["image"].shape) == (3, 48, 64)
    assert (item["mask"].dtype, tuple(item["mask"].shape)) == (torch.int64, (48, 64))
    assert set(item["mask"].unique().tolist()) == {0, 2, 255}
    assert "mask" not in VOCDataset(root, "val", train=False, with_mask=False)[1]


def test_voc_classes_without_classes_txt(make_voc_tree: MakeTree) -> None:
    root = make_voc_tree(tags="xml")
    (root / "classes.txt").unlink()
    for path in (root / "Annotations").iterdir():
        # A person's head is a part with a name of its own, and no tag.
        path.write_text(
            "<annotation><object><name>person</name><part><name>head</name></part></object>"
            "<object><name>tvmonitor</name></object><object><name>person</name></object></annotation>"
        )
    train = _train(root)
    assert train.classes == VOC_CLASSES
    assert len(VOC_CLASSES) == 20
    assert train.tags[0].nonzero().flatten().tolist() == [14, 19]


def test_tags_csv_forms(voc_root: Path) -> None:
    (voc_root / "classes.txt").write_text("traffic light\nstop sign\ncar\n")
    rows = ["t0,traffic light", "t1.jpg,stop sign;car", "t2,", "t3,car car", "t4,car;", '"t5","traffic light; car"']
    (voc_root / "tags.csv").write_text("\ufeffimage,labels\n" + "\n".join(rows) + "\n", encoding="utf-8")
    tags = _train(voc_root).tags.tolist()
    assert tags == [[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1], [0, 0, 1], [1, 0, 1]]


def test_split_lists_may_hold_paths(voc_root: Path) -> None:
    (voc_root / "ImageSets/Segmentation/aug.txt").write_text(
        "/JPEGImages/t0.jpg /SegmentationClassAug/t0.png\n\nt1\nt2.jpg\n"
    )
    assert VOCDataset(voc_root, "aug", train=True, crop_size=16, with_mask=False).names == ["t0", "t1", "t2"]


def test_picture_encodings(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    colour = Image.fromarray(rgb)
    grey = colour.convert("L")
    alpha = colour.convert("RGBA")
    alpha.putpixel((0, 0), (9, 9, 9, 0))
    cases: dict[str, tuple[Image.Image, np.ndarray]] = {
        "rgb": (colour, rgb),
        "grey": (grey, np.asarray(grey)[..., None].repeat(3, 2)),
        "palette": (grey.convert("P"), np.asarray(grey)[..., None].repeat(3, 2)),
        "sixteen": (
            Image.fromarray(np.asarray(grey).astype(np.uint16) * 257),
            np.asarray(grey)[..., None].repeat(3, 2),
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
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg")
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
    Image.fromarray(mask).save(tmp_path / "grey.png")
    Image.fromarray(palette[mask]).save(tmp_path / "colours.png")
    for name in ("indexed", "grey", "colours"):
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
    assert len({tuple(colour) for colour in palette.tolist()}) == 256


@pytest.mark.parametrize(("height", "width"), [(48, 64), (31, 97), (5, 3), (200, 20)])
@pytest.mark.parametrize("size", [32, 48])
def test_crop_box_is_where_the_picture_lies(height: int, width: int, size: int) -> None:
    # No pixel is near the padding's colour, so that padding can be told from picture.
    image = Image.new("RGB", (width, height), (250, 10, 250))
    seen = set()
    for seed in range(40):
        crop, (y0, y1, x0, x1) = random_crop(image, size, (0.5, 2.0), True, np.random.default_rng(seed))
        inside = np.zeros((size, size), bool)
        inside[y0:y1, x0:x1] = True
        assert 0 <= y0 < y1 <= size
        assert 0 <= x0 < x1 <= size
        assert (crop[inside] == (250, 10, 250)).all()
        assert (crop[~inside] == MEAN_COLOUR).all()
        seen.add((y0, y1, x0, x1))
    if 2 * max(height, width) < size:
        assert len(seen) > 20  # a picture smaller than the crop falls at random places


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


def test_batches_depend_on_seed_and_position_alone(voc_root: Path) -> None:
    train = _train(voc_root)
    whole = list(itertools.islice(train_loader(train, 4, seed=5), 8))
    workers = list(itertools.islice(train_loader(train, 4, seed=5, workers=2), 8))
    resumed = list(itertools.islice(train_loader(train, 4, seed=5, start_iteration=5), 3))
    other = next(train_loader(train, 4, seed=6))
    assert all(_same(a, b) for a, b in zip(whole, workers, strict=True))
    assert all(_same(a, b) for a, b in zip(whole[5:], resumed, strict=True))
    assert not _same(whole[0], other)
    names = [name for batch in whole for name in batch["name"]]
    for epoch in range(5):
        assert sorted(names[6 * epoch : 6 * epoch + 6]) == [f"t{i}" for i in range(6)]
    assert len({tuple(names[6 * epoch : 6 * epoch + 6]) for epoch in range(5)}) > 1
    # The same image gets another crop in another epoch.
    first, second = (
        next(batch["image"][list(batch["name"]).index("t0")] for batch in batches if "t0" in batch["name"])
        for batches in (whole[:2], whole[3:])
    )
    assert not torch.equal(first, second)


def test_eval_batches_keep_order_and_never_mix_sizes(voc_root: Path) -> None:
    small = Image.new("RGB", (30, 20))
    small.save(voc_root / "JPEGImages/v2.jpg")
    Image.new("L", (30, 20)).save(voc_root / "SegmentationClass/v2.png")
    val = VOCDataset(voc_root, "val", train=False, with_mask=True)
    for workers in (0, 1):
        batches = list(eval_loader(val, 4, workers))
        assert [batch["name"] for batch in batches] == [["v0", "v1"], ["v2"], ["v3"]]
        assert [tuple(batch["mask"].shape) for batch in batches] == [(2, 48, 64), (1, 20, 30), (1, 48, 64)]
    assert [batch["name"] for batch in eval_loader(val, 1)] == [["v0"], ["v1"], ["v2"], ["v3"]]


def _together(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """The batches of all ranks as one."""
    joined: dict[str, Any] = {key: torch.cat([batch[key] for batch in batches]) for key in ("image", "tags", "box")}
    return {**joined, "name": [name for batch in batches for name in batch["name"]]}


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_of_one(voc_root: Path, world_size: int) -> None:
    train = _train(voc_root)
    # 5 does not divide the epoch of 6 images, so that global batches reach over its end.
    one = list(itertools.islice(train_loader(train, 5 * world_size, seed=2), 4))
    ranks = [
        train_loader(train, 5, seed=2, workers=rank % 2, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for whole in one:
        assert _same(whole, _together([next(batches) for batches in ranks]))
    late = [
        train_loader(train, 5, seed=2, start_iteration=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert _same(one[3], _together([next(batches) for batches in late]))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_evaluation_is_shared_out_in_order_and_without_duplicates(voc_root: Path, world_size: int) -> None:
    val = VOCDataset(voc_root, "val", train=False, with_mask=True)
    for size in (1, 3):
        shares = [list(eval_loader(val, size, rank=rank, world_size=world_size)) for rank in range(world_size)]
        names = [[name for batch in batches for name in batch["name"]] for batches in shares]
        assert [name for part in names for name in part] == val.names
        assert [len(part) for part in names] == [len(share(4, rank, world_size)) for rank in range(world_size)]
        assert max(map(len, names)) - min(map(len, names)) <= 1
    chosen = [list(eval_loader(val, 2, indices=[3, 0, 1], rank=rank, world_size=2)) for rank in range(2)]
    assert [[batch["name"] for batch in batches] for batches in chosen] == [[["v3"]], [["v0", "v1"]]]


def test_rank_outside_the_world_is_refused(voc_root: Path) -> None:
    val = VOCDataset(voc_root, "val", train=False, with_mask=True)
    with pytest.raises(ValueError, match="got rank 2 of 2"):
        train_loader(_train(voc_root), 2, seed=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="got rank -1 of 1"):
        eval_loader(val, 1, rank=-1)


def test_waiting_for_batches_is_counted(voc_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = train_loader(_train(voc_root), 2, seed=0)
    assert batches.wait_seconds == 0
    item = VOCDataset.__getitem__

    def slow(dataset: VOCDataset, key: Any) -> dict[str, Any]:
        time.sleep(0.05)
        return item(dataset, key)

    monkeypatch.setattr(VOCDataset, "__getitem__", slow)
    next(batches)
    assert batches.wait_seconds >= 0.1
    before = batches.wait_seconds
    time.sleep(0.1)  # the caller's own work is no waiting
    assert batches.wait_seconds == before


def test_a_split_without_masks_has_nothing_to_count(voc_root: Path) -> None:
    for path in (voc_root / "SegmentationClass").glob("v*.png"):
        path.unlink()
    val = VOCDataset(voc_root, "val", train=False, with_mask=True)
    assert not val.has_masks
    check_dataset(val, progress=False)
    assert (val[0]["mask"] == 255).all()
    assert val[0]["mask"].shape == val[0]["image"].shape[1:]
    assert VOCDataset(voc_root, "train", train=False, with_mask=True).has_masks
    for path in (voc_root / "SegmentationClass").iterdir():
        path.unlink()
    (voc_root / "SegmentationClass").rmdir()
    assert not VOCDataset(voc_root, "train", train=False, with_mask=False).has_masks


def test_class_lists() -> None:
    assert len(VOC_CLASSES) == len(set(VOC_CLASSES)) == 20
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80
    assert [COCO_CLASSES[number - 1] for number in (1, 12, 40, 61, 80)] == [
        *("person", "stop sign", "bottle", "dining table", "toothbrush")
    ]


def test_training_works_with_unreadable_train_masks(voc_root: Path) -> None:
    # Garbage instead of file permissions, which do not hold the superuser back.
    for path in (voc_root / "SegmentationClass").glob("t*.png"):
        path.write_bytes(b"no picture at all")
    train = _train(voc_root)
    check_dataset(train, progress=False)
    batches = list(itertools.islice(train_loader(train, 3, seed=0, workers=1), 4))
    assert len({name for batch in batches for name in batch["name"]}) == 6


class _OpenedPaths:
    """Every path opened while active; one hook for the whole process, as audit hooks can't be taken away."""

    def __init__(self) -> None:
        self.paths: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.paths is not None and event == "open":
            self.paths.append(str(arguments[0]))


@pytest.fixture(scope="module")
def audit() -> _OpenedPaths:
    return _OpenedPaths()


@pytest.fixture
def opened(audit: _OpenedPaths) -> Iterator[list[str]]:
    audit.paths = []
    yield audit.paths
    audit.paths = None


def test_no_train_mask_is_ever_opened(voc_root: Path, opened: list[str]) -> None:
    train = _train(voc_root)
    check_dataset(train, progress=False)
    list(itertools.islice(train_loader(train, 3, seed=0), 4))
    assert any("JPEGImages" in path for path in opened)  # the hook does see what is opened
    assert [path for path in opened if "SegmentationClass" in path] == []
    # Evaluation opens the masks of its own split and no other.
    val = VOCDataset(voc_root, "val", train=False, with_mask=True)
    check_dataset(val, progress=False)
    masks = {Path(path).stem for path in opened if "SegmentationClass" in path}
    assert masks == {"v0", "v1", "v2", "v3"}


def test_a_training_set_refuses_masks(voc_root: Path) -> None:
    with pytest.raises(ValueError, match="no masks"):
        VOCDataset(voc_root, "train", train=True, crop_size=32, with_mask=True)
    with pytest.raises(ValueError, match="crop_size"):
        VOCDataset(voc_root, "train", train=True, with_mask=False)


def test_small_images_load_by_the_hundred(make_voc_tree: MakeTree) -> None:
    train = _train(make_voc_tree(train=30, size=(128, 128)), crop_size=128)
    best = min(_seconds(train) for _ in range(3))
    # Measured 700 to 1,300 a second on one core; the bound leaves room for a busy machine.
    assert len(train) / best > 150


def _seconds(train: VOCDataset) -> float:
    start = time.perf_counter()
    for index in range(len(train)):
        train[index]
    return time.perf_counter() - start


def _ramp(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    values = np.stack([255 * x / max(1, width - 1), 255 * y / max(1, height - 1), 40 + 0 * x], -1)
    return Image.fromarray(values.astype(np.uint8))


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
    with pytest.raises(UserError, match=r"6 x 10 pixels but its image is 10 x 6; .*turn this one"):
        read_mask(tmp_path / "mask.png", 3, (6, 10))


def test_more_mask_encodings(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    grey = Image.fromarray(mask)
    indexed = grey.copy()
    indexed.putpalette(voc_palette().reshape(-1).tolist())
    cases = {
        "bits": Image.fromarray(mask.astype(bool)),
        "sixteen": Image.fromarray(mask.astype(np.uint16)),
        "grey and alpha": grey.convert("LA"),
        "colours and alpha": indexed.convert("RGBA"),
    }
    for name, image in cases.items():
        image.save(tmp_path / f"{name}.png")
        assert np.array_equal(read_mask(tmp_path / f"{name}.png", 3, (2, 3)), mask), name
    indexed.info["transparency"] = 0
    indexed.save(tmp_path / "see-through.png", transparency=0)
    assert np.array_equal(read_mask(tmp_path / "see-through.png", 3), mask)
    Image.fromarray(mask.astype(np.uint16) * 300).save(tmp_path / "too large.png")
    with pytest.raises(UserError, match="holds the value 300"):
        read_mask(tmp_path / "too large.png", 3)
    Image.new("CMYK", (3, 2)).save(tmp_path / "print.tif")
    with pytest.raises(UserError, match=r"colour picture \(CMYK\)"):
        read_mask(tmp_path / "print.tif", 3)


def test_more_picture_encodings(tmp_path: Path) -> None:
    colour = _ramp(24, 31)
    rgb = np.asarray(colour)
    indexed = colour.quantize(64)
    indexed.save(tmp_path / "see-through.png", transparency=indexed.getpixel((0, 0)))
    found = np.asarray(read_image(tmp_path / "see-through.png"))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert abs(found[-1, -1].astype(int) - rgb[-1, -1]).max() < 40
    colour.convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    found = np.asarray(read_image(tmp_path / "print.jpg")).astype(int)
    assert abs(found - rgb).mean() < 3  # the colours themselves, and not their negatives
    Image.fromarray(np.full((2, 3), 70_000, np.int32)).save(tmp_path / "wide.tif")
    assert np.asarray(read_image(tmp_path / "wide.tif")).max() == 255
    for name, mode in (("bits.png", "1"), ("grey and alpha.png", "LA"), ("scan.tif", "L"), ("web.webp", "RGB")):
        colour.convert(mode).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (31, 24)), name
    for size in ((1, 1), (1, 500), (333, 1)):
        Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "odd.png")
        assert read_image(tmp_path / "odd.png").size == size
        assert max(read_image(tmp_path / "odd.png", 100).size) <= 100
        assert random_crop(read_image(tmp_path / "odd.png"), 32, (0.5, 2), True, np.random.default_rng(0))[0].any()


@pytest.mark.parametrize("options", [{"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "PNG"}])
@pytest.mark.parametrize("kept", [0.99, 0.5, 0.02, 0])
def test_the_check_finds_what_reading_would(tmp_path: Path, options: dict[str, Any], kept: float) -> None:
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
