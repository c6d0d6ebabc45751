"""Every mistake in the data gives a one-line error with the file and a fix, before any long computation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afa.data import TaggedDataset, check_dataset, train_loader
from afa.errors import UserError


def _train(root: Path, split: str = "train") -> None:
    check_dataset(TaggedDataset(root, split, train=True, crop_size=32, with_mask=False), progress=False)


def _val(root: Path) -> None:
    check_dataset(TaggedDataset(root, "val", train=False, with_mask=True), progress=False)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _write_mask(root: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask.astype(np.uint8)).save(root / "SegmentationClass/v1.png")


def _retag(root: Path, old: str, new: str) -> None:
    path = root / "tags.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


MISTAKES: dict[str, tuple[Callable[[Path], object], Callable[[Path], None], list[str]]] = {
    "no split list": (
        lambda root: None,
        lambda root: _train(root, "trian"),
        ["Segmentation/trian.txt", "does not exist", "train, val", "did you mean 'train'", "data.train_split"],
    ),
    "empty split list": (
        lambda root: (root / "ImageSets/Segmentation/train.txt").write_text("\n\n"),
        _train,
        ["Segmentation/train.txt", "empty", "one image name per line"],
    ),
    "no image folder": (
        lambda root: (root / "JPEGImages").rename(root / "images"),
        _train,
        ["JPEGImages", "does not exist", "data.root"],
    ),
    "image not there": (
        lambda root: (root / "JPEGImages/t3.jpg").unlink(),
        _train,
        ["'t3'", "Segmentation/train.txt", "JPEGImages", "remove it"],
    ),
    "image is text": (
        lambda root: (root / "JPEGImages/t3.jpg").write_text("hello"),
        _train,
        ["JPEGImages/t3.jpg", "can't be decoded", "not an image file", "replace it"],
    ),
    "image truncated": (
        lambda root: _truncate(root / "JPEGImages/t3.jpg"),
        _train,
        ["JPEGImages/t3.jpg", "can't be decoded", "truncated", "replace it"],
    ),
    "image empty": (
        lambda root: (root / "JPEGImages/t3.jpg").write_bytes(b""),
        _train,
        ["JPEGImages/t3.jpg", "can't be decoded"],
    ),
    "tag of no class": (
        lambda root: _retag(root, "t1,disc", "t1,dics"),
        _train,
        ["'dics'", "line 3", "tags.csv", "did you mean 'disc'", "classes.txt"],
    ),
    "no tags for an image": (
        lambda root: _retag(root, "t1,disc\n", ""),
        _train,
        ["'t1'", "no line", "tags.csv", "t1,LABELS"],
    ),
    "two rows of tags": (
        lambda root: _retag(root, "t1,disc\n", "t1,disc\nt1,square\n"),
        _train,
        ["line 4", "tags.csv", "'t1'", "second time"],
    ),
    "three columns of tags": (
        lambda root: _retag(root, "t1,disc\n", "t1,disc,square\n"),
        _train,
        ["line 3", "tags.csv", "3 columns", "image,labels"],
    ),
    "no tag file": (
        lambda root: (root / "tags.csv").unlink(),
        _train,
        ["'t0'", "no tags", "Annotations/t0.xml", "tags.csv"],
    ),
    "class twice": (
        lambda root: (root / "classes.txt").write_text("square\ndisc\ndisc\n"),
        _train,
        ["classes.txt", "'disc' twice"],
    ),
    "background as a class": (
        lambda root: (root / "classes.txt").write_text("background\nsquare\ndisc\nstripes\n"),
        _train,
        ["classes.txt", "background is always class 0"],
    ),
    "no classes": (
        lambda root: (root / "classes.txt").write_text(""),
        _train,
        ["classes.txt", "1 to 254 classes", "got 0"],
    ),
    "classes in no text": (
        lambda root: (root / "classes.txt").write_bytes(b"\xff\xfe\x80"),
        _train,
        ["classes.txt", "UTF-8"],
    ),
    "no mask": (
        lambda root: (root / "SegmentationClass/v1.png").unlink(),
        _val,
        ["SegmentationClass/v1.png", "does not exist", "'val'"],
    ),
    "mask is text": (
        lambda root: (root / "SegmentationClass/v1.png").write_text("hello"),
        _val,
        ["SegmentationClass/v1.png", "can't be decoded", "not an image file"],
    ),
    "mask truncated": (
        lambda root: _truncate(root / "SegmentationClass/v1.png"),
        _val,
        ["SegmentationClass/v1.png", "can't be decoded"],
    ),
    "mask of an unknown value": (
        lambda root: _write_mask(root, np.full((48, 64), 4)),
        _val,
        ["SegmentationClass/v1.png", "value 4", "1 to 3", "255 (ignored)"],
    ),
    "mask of another size": (
        lambda root: _write_mask(root, np.zeros((48, 60))),
        _val,
        ["SegmentationClass/v1.png", "60 x 48", "64 x 48"],
    ),
    "mask in other colors": (
        lambda root: _write_mask(root, np.full((48, 64, 3), 77)),
        _val,
        ["SegmentationClass/v1.png", "(77, 77, 77)", "palette"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_the_data(voc_root: Path, mistake: str) -> None:
    spoil, use, words = MISTAKES[mistake]
    _train(voc_root)
    _val(voc_root)  # whole before it is spoilt
    spoil(voc_root)
    with pytest.raises(UserError) as caught:
        use(voc_root)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_data_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        _train(tmp_path / "nowhere")
    for word in ("nowhere", "ImageSets/Segmentation/train.txt", "data.root=", "data.embedded=true", "afa train demo"):
        assert word in str(caught.value)


def test_tags_in_broken_xml(make_voc_tree: Callable[..., Path]) -> None:
    root = make_voc_tree(tags="xml")
    (root / "Annotations/t2.xml").write_text("<annotation><object>")
    with pytest.raises(UserError, match=r"Annotations/t2\.xml can't be read as XML"):
        _train(root)
    (root / "Annotations/t2.xml").write_text("<annotation><object><name>sqare</name></object></annotation>")
    with pytest.raises(UserError, match=r"unknown class 'sqare' in .*Annotations/t2\.xml; did you mean 'square'"):
        _train(root)


def test_the_first_bad_file_is_reported(voc_root: Path) -> None:
    for name in ("t5", "t2", "t4"):
        (voc_root / f"JPEGImages/{name}.jpg").write_text("hello")
    with pytest.raises(UserError, match=r"t2\.jpg"):
        _train(voc_root)


def test_a_file_damaged_during_the_run_gives_a_one_line_error(voc_root: Path) -> None:
    dataset = TaggedDataset(voc_root, "train", train=True, crop_size=32, with_mask=False)
    (voc_root / "JPEGImages/t1.jpg").write_text("hello")
    for workers in (0, 1):
        with pytest.raises(UserError) as caught:
            list(itertools.islice(train_loader(dataset, 6, seed=0, workers=workers), 1))
        assert str(caught.value).startswith("the image ")
        assert "t1.jpg can't be decoded" in str(caught.value)
        assert "\n" not in str(caught.value)
