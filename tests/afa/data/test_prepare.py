"""`afa prepare` on small trees with the layout of the public downloads: derived files, missing parts, resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from afa.commands.cli import main
from afa.config import load_config
from afa.data import COCO_CLASSES, VOC_CLASSES, TaggedDataset, check_dataset, open_dataset
from afa.data.prepare import coco as coco_module
from afa.data.prepare import prepare_coco, prepare_voc
from afa.errors import UserError

Lines = list[tuple[str, str]]


def _jpeg(path: Path, size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (120, 90, 60)).save(path)


def _mask(path: Path, number: int, size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size[::-1], np.uint8)
    mask[4:8, 4:8] = number
    mask[3, 4:8] = 255
    Image.fromarray(mask).save(path)


def _files(root: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def said() -> Lines:
    return []


@pytest.fixture
def say(said: Lines) -> Callable[[str, str], None]:
    return lambda what, text: said.append((what, text))


# ---- VOC


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """VOCdevkit with VOC2012: train a1 a2, val v1 v2, and the images s1 to s3 that only SBD has segmented."""
    root = tmp_path / "VOCdevkit/VOC2012"
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a1\na2\n")
    (lists / "val.txt").write_text("v1\nv2\n")
    objects = {"a1": "dog person dog", "a2": "cat", "v1": "sofa", "v2": "dog", "s1": "train", "s2": "bird", "s3": "cow"}
    for name, labels in objects.items():
        _jpeg(root / f"JPEGImages/{name}.jpg")
        parts = "".join(f"<object><name>{label}</name></object>" for label in labels.split())
        (root / "Annotations").mkdir(exist_ok=True)
        (root / f"Annotations/{name}.xml").write_text(f"<annotation>{parts}</annotation>")
    for name in ("a1", "a2", "v1", "v2"):
        _mask(root / f"SegmentationClass/{name}.png", 12)
    return root.parent


@pytest.fixture
def sbd(devkit: Path) -> Path:
    """benchmark_RELEASE next to the devkit; its train and val lists include images of VOC's val."""
    dataset = devkit.parent / "benchmark_RELEASE/dataset"
    (dataset / "cls").mkdir(parents=True)
    (dataset / "train.txt").write_text("s1\nv1\na1\n")
    (dataset / "val.txt").write_text("s2\ns3\n")
    for number, name in enumerate(("s1", "s2", "s3", "v1", "a1"), 1):
        segmentation = np.zeros((16, 20), np.uint8)
        segmentation[2:9, 5:11] = number
        savemat(dataset / f"cls/{name}.mat", {"GTcls": {"Segmentation": segmentation, "CategoriesPresent": [[number]]}})
    return devkit.parent / "benchmark_RELEASE"


def _trainaug(devkit: Path) -> list[str]:
    return (devkit / "VOC2012/ImageSets/Segmentation/train_aug.txt").read_text().split()


def test_voc_with_sbd(devkit: Path, sbd: Path, said: Lines, say: Any) -> None:
    root = prepare_voc(devkit, progress=False, say=say)
    assert root == devkit / "VOC2012"
    assert _trainaug(devkit) == ["a1", "a2", "s1", "s2", "s3"]
    assert (root / "tags.csv").read_text().splitlines() == [
        "image,labels",
        "a1,dog person",
        "a2,cat",
        "s1,train",
        "s2,bird",
        "s3,cow",
        "v1,sofa",
        "v2,dog",
    ]
    assert any("5 names (the complete list has 10,582)" in text for _, text in said)
    assert not (root / "SegmentationClassAug").exists()
    config = load_config("voc", [f"data.root={root}", "data.crop_size=32"])
    train = open_dataset(config.data, config.data.train_split, train=True, with_mask=False)
    assert train.classes == VOC_CLASSES
    assert train.tags[train.names.index("a1")].nonzero().flatten().tolist() == [11, 14]
    val = open_dataset(config.data, config.data.val_split, train=False, with_mask=True)
    check_dataset(val, progress=False)
    assert val.has_masks


def test_voc_again_changes_nothing(devkit: Path, sbd: Path, said: Lines, say: Any) -> None:
    prepare_voc(devkit, train_masks=True, progress=False, say=say)
    before = _files(devkit)
    said.clear()
    prepare_voc(devkit / "VOC2012", train_masks=True, progress=False, say=say)
    assert _files(devkit) == before
    assert {what for what, _ in said} == {"found", "kept", "classes"}


def test_voc_train_masks(devkit: Path, sbd: Path, say: Any) -> None:
    root = prepare_voc(devkit, train_masks=True, progress=False, say=say)
    folder = root / "SegmentationClassAug"
    # No masks for val images, and none for images with finer masks in VOC.
    assert sorted(path.name for path in folder.iterdir()) == ["s1.png", "s2.png", "s3.png"]
    image = Image.open(folder / "s2.png")
    assert image.mode == "P"
    assert np.unique(np.asarray(image)).tolist() == [0, 2]
    train = TaggedDataset(root, "train_aug", train=False, with_mask=True)
    check_dataset(train, progress=False)
    assert [train[i]["mask"].max().item() for i in range(5)] == [255, 255, 1, 2, 3]
    (folder / "s2.png").unlink()
    times = {name: (folder / f"{name}.png").stat().st_mtime_ns for name in ("s1", "s3")}
    prepare_voc(devkit, train_masks=True, progress=False, say=say)
    assert (folder / "s2.png").is_file()
    assert times == {name: (folder / f"{name}.png").stat().st_mtime_ns for name in ("s1", "s3")}


def test_voc_with_sbd_elsewhere(devkit: Path, sbd: Path, tmp_path: Path, say: Any) -> None:
    (tmp_path / "far").mkdir()
    sbd.rename(tmp_path / "far/benchmark_RELEASE")
    with pytest.raises(UserError, match="needs SBD"):
        prepare_voc(devkit, progress=False, say=say)
    prepare_voc(devkit, sbd=tmp_path / "far", progress=False, say=say)
    assert len(_trainaug(devkit)) == 5
    with pytest.raises(UserError, match=r"--sbd .* does not contain SBD .*benchmark\.tgz"):
        prepare_voc(devkit, sbd=devkit, progress=False, say=say)


def test_voc_with_the_folder_of_masks(devkit: Path, say: Any) -> None:
    for name in ("a1", "a2", "s1", "s3", "v1", "v2"):
        _mask(devkit / f"VOC2012/SegmentationClassAug/{name}.png", 3)
    prepare_voc(devkit, progress=False, say=say)
    assert _trainaug(devkit) == ["a1", "a2", "s1", "s3"]


def test_voc_with_a_list_from_elsewhere(devkit: Path, said: Lines, say: Any) -> None:
    path = devkit / "VOC2012/ImageSets/Segmentation/train_aug.txt"
    path.write_text("/JPEGImages/s2.jpg /SegmentationClassAug/s2.png\na2\na1\n")
    before = path.read_bytes()
    prepare_voc(devkit, progress=False, say=say)
    assert path.read_bytes() == before
    path.unlink()
    path.with_name("trainaug.txt").write_text("s1\n")
    prepare_voc(devkit, progress=False, say=say)
    assert _trainaug(devkit) == ["a1", "a2", "s1"]


def test_voc_grows_when_sbd_is_completed(devkit: Path, sbd: Path, said: Lines, say: Any) -> None:
    (sbd / "dataset/val.txt").write_text("s3\n")
    prepare_voc(devkit, progress=False, say=say)
    assert _trainaug(devkit) == ["a1", "a2", "s1", "s3"]
    (sbd / "dataset/val.txt").write_text("s2\ns3\n")
    said.clear()
    prepare_voc(devkit, progress=False, say=say)
    assert len(_trainaug(devkit)) == 5
    assert any(what == "rewrote" and "train_aug.txt" in text for what, text in said)
    former = devkit / "VOC2012/ImageSets/Segmentation/train_aug.txt.old"
    assert former.read_text().split() == ["a1", "a2", "s1", "s3"]


def test_voc_tags_from_sbd_where_there_is_no_annotation(devkit: Path, sbd: Path, say: Any) -> None:
    (devkit / "VOC2012/Annotations/s3.xml").unlink()
    prepare_voc(devkit, progress=False, say=say)
    assert "s3,bird" in (devkit / "VOC2012/tags.csv").read_text().splitlines()  # class 3 of its .mat
    (sbd / "dataset/cls/s3.mat").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"s3\.mat can't be read"):
        prepare_voc(devkit, progress=False, say=say)


def test_voc_without_sbd_is_ready_for_its_own_training_list(devkit: Path, say: Any) -> None:
    with pytest.raises(UserError) as caught:
        prepare_voc(devkit, progress=False, say=say)
    for word in ("2 training images", "data.train_split=train", "benchmark.tgz", "berkeley.edu", "--sbd"):
        assert word in str(caught.value)
    assert len(TaggedDataset(devkit / "VOC2012", "train", train=True, crop_size=16, with_mask=False)) == 2
    assert not (devkit / "VOC2012/ImageSets/Segmentation/train_aug.txt").exists()


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (["VOC2012/SegmentationClass"], ["SegmentationClass/*.png"]),
        (
            ["VOC2012/Annotations", "VOC2012/ImageSets/Segmentation/val.txt"],
            ["Annotations/*.xml", "ImageSets/Segmentation/val.txt"],
        ),
        (["VOC2012"], ["does not contain VOC 2012"]),
        (["VOC2012/JPEGImages/s2.jpg"], ["1 listed images", "(s2)"]),
    ],
)
def test_voc_missing_parts_are_reported(devkit: Path, sbd: Path, gone: list[str], words: list[str], say: Any) -> None:
    for name in gone:
        (devkit / name).rename(devkit.parent / "away") if len(gone) == 1 else (devkit / name).rename(
            devkit.parent / Path(name).name
        )
    with pytest.raises(UserError) as caught:
        prepare_voc(devkit, progress=False, say=say)
    for word in [*words, "VOCtrainval_11-May-2012.tar", "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"]:
        assert word in str(caught.value)


# ---- COCO


def _square(x: int, y: int, side: int) -> list[list[int]]:
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def _annotation(image: int, category: int, outline: Any, area: float, crowd: int = 0) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "segmentation": outline, "area": area, "iscrowd": crowd}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """COCO 2014 as it unpacks: two training images with objects and one without, three validation images."""
    ids = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    categories = [{"id": i, "name": name} for i, name in zip(ids, COCO_CLASSES, strict=True)]
    crowd = np.zeros((16, 20), bool)
    crowd[:, :12] = True  # runs are counted down the columns, from 0s
    contents = {
        "train": (
            [1, 2, 3],
            [
                _annotation(1, 90, _square(2, 2, 5), 25),
                _annotation(1, 13, _square(9, 2, 5), 25),
                _annotation(2, 1, _square(2, 2, 5), 25),
            ],
        ),
        "val": (
            [4, 5, 6],
            [
                # The small dog comes first in the file, and still lies on the couch.
                _annotation(4, 18, _square(4, 4, 4), 16),
                _annotation(4, 63, _square(2, 2, 10), 100),
                _annotation(4, 1, {"size": [16, 20], "counts": [0, 16 * 12, 16 * 8]}, 1, crowd=1),
                _annotation(5, 90, _square(0, 0, 4), 16),
                _annotation(6, 1, _square(0, 0, 4), 16),
            ],
        ),
    }
    root = tmp_path / "coco2014"
    (root / "annotations").mkdir(parents=True)
    for split, (numbers, objects) in contents.items():
        images = []
        for number in numbers:
            name = f"COCO_{split}2014_{number:012}.jpg"
            _jpeg(root / f"{split}2014/{name}")
            images.append({"id": number, "file_name": name, "height": 16, "width": 20})
        for number, item in enumerate(objects, 100):
            item["id"] = number
        content = {"images": images[::-1], "annotations": objects, "categories": categories[::-1]}
        (root / f"annotations/instances_{split}2014.json").write_text(json.dumps(content))
    return root


def _coco_mask(root: Path, number: int, split: str = "val") -> np.ndarray:
    return np.asarray(Image.open(root / f"SegmentationClass/COCO_{split}2014_{number:012}.png"))


def test_coco(coco: Path, said: Lines, say: Any) -> None:
    assert prepare_coco(coco, progress=False, say=say) == coco
    config = load_config("coco", [f"data.root={coco}", "data.crop_size=32"])
    train = open_dataset(config.data, config.data.train_split, train=True, with_mask=False)
    val = open_dataset(config.data, config.data.val_split, train=False, with_mask=True)
    check_dataset(train, progress=False)
    check_dataset(val, progress=False)
    assert train.classes == COCO_CLASSES
    assert train.names == [f"COCO_train2014_{number:012}" for number in (1, 2)]  # 3 shows no object
    assert [[COCO_CLASSES[i] for i in row.nonzero().flatten()] for row in train.tags] == [
        ["stop sign", "toothbrush"],
        ["person"],
    ]
    assert sorted(path.name for path in (coco / "SegmentationClass").iterdir()) == [
        f"COCO_val2014_{number:012}.png" for number in (4, 5, 6)
    ]
    mask = _coco_mask(coco, 4)
    expected = np.zeros((16, 20), np.uint8)
    expected[:, :12] = 1  # the crowd below all, though its area is given as the smallest
    expected[2:12, 2:12] = COCO_CLASSES.index("couch") + 1
    expected[4:8, 4:8] = COCO_CLASSES.index("dog") + 1
    assert np.array_equal(mask, expected)
    assert _coco_mask(coco, 5).max() == 80


def test_coco_again_changes_nothing(coco: Path, said: Lines, say: Any) -> None:
    prepare_coco(coco, progress=False, say=say)
    before = _files(coco)
    said.clear()
    prepare_coco(coco, progress=False, say=say)
    assert _files(coco) == before
    assert {what for what, _ in said} == {"found", "reading", "kept", "classes"}
    prepare_coco(coco, train_masks=True, progress=False, say=say)
    assert sorted({*_files(coco)} - {*before}) == [
        f"SegmentationClass/COCO_train2014_{number:012}.png" for number in (1, 2)
    ]
    assert np.unique(_coco_mask(coco, 1, "train")).tolist() == [0, 12, 80]


def test_coco_resumes_after_a_stop(coco: Path, said: Lines, say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(work: Callable[[Any], object], tasks: list[Any], name: str, progress: bool) -> None:
        work(tasks[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(coco_module, "run_all", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare_coco(coco, progress=False, say=say)
    # Incomplete output can't be mistaken for complete output: the list of val is written after its masks.
    assert not (coco / "ImageSets/Segmentation/val.txt").exists()
    done = sorted((coco / "SegmentationClass").iterdir())
    assert len(done) == 1
    before = done[0].stat().st_mtime_ns
    prepare_coco(coco, progress=False, say=say)
    assert len(list((coco / "SegmentationClass").iterdir())) == 3
    assert done[0].stat().st_mtime_ns == before
    assert ("wrote", f"{coco / 'SegmentationClass'}: 3 masks of val2014 (1 kept)") in said


@pytest.mark.slow
def test_coco_resumes_after_a_kill(coco: Path, tmp_path: Path, say: Any) -> None:
    path = coco / "annotations/instances_val2014.json"
    content = json.loads(path.read_text())
    rng = np.random.default_rng(0)
    for number in range(10, 210):
        name = f"COCO_val2014_{number:012}.jpg"
        _jpeg(coco / "val2014" / name)
        content["images"].append({"id": number, "file_name": name, "height": 480, "width": 640})
        for _ in range(6):
            x, y, side = (int(v) for v in rng.integers(1, 300, 3))
            item = _annotation(number, 18, _square(x, y, min(side, 470 - y)), side * side)
            content["annotations"].append({**item, "id": len(content["annotations"])})
    path.write_text(json.dumps(content))
    masks = coco / "SegmentationClass"
    command = [sys.executable, "-m", "afa.commands.cli", "prepare", "coco", str(coco), "--quiet"]
    # A separate session, so that its pool is killed, too.
    with subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            for _ in range(6000):
                if masks.is_dir() and sum(1 for _ in masks.glob("[!.]*.png")) >= 10:
                    break
                time.sleep(0.01)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    done = {path.name: path.stat().st_mtime_ns for path in masks.glob("[!.]*.png")}
    assert 10 <= len(done) < 203
    assert not (coco / "ImageSets/Segmentation/val.txt").exists()
    prepare_coco(coco, progress=False, say=say)
    assert done.items() <= {path.name: path.stat().st_mtime_ns for path in masks.glob("[!.]*.png")}.items()
    images = coco_module._read_instances(path)
    assert len(images) == 203
    for image in images:
        drawn = coco_module.draw_mask(image.height, image.width, image.objects)
        assert np.array_equal(np.asarray(Image.open(masks / f"{image.name}.png")), drawn)


def test_coco_missing_parts_are_reported_together(coco: Path, say: Any) -> None:
    (coco / "val2014").rename(coco / "elsewhere")
    (coco / "annotations/instances_train2014.json").unlink()
    with pytest.raises(UserError) as caught:
        prepare_coco(coco, progress=False, say=say)
    for word in (
        "lacks val2014, annotations/instances_train2014.json",
        "http://images.cocodataset.org/zips/val2014.zip",
        "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
    ):
        assert word in str(caught.value)
    assert "train2014.zip" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b'{"images": []}', b"[]"])
def test_coco_damaged_annotations(coco: Path, content: bytes, say: Any) -> None:
    (coco / "annotations/instances_val2014.json").write_bytes(content)
    with pytest.raises(UserError, match=r"instances_val2014\.json can't be read .*annotations_trainval2014\.zip"):
        prepare_coco(coco, progress=False, say=say)


def test_coco_other_categories_are_refused(coco: Path, say: Any) -> None:
    path = coco / "annotations/instances_train2014.json"
    path.write_text(path.read_text().replace('"toothbrush"', '"toothpick"'))
    with pytest.raises(UserError, match=r"category 80 of .* must be 'toothbrush'.*got 'toothpick'"):
        prepare_coco(coco, progress=False, say=say)


def test_coco_missing_image_is_reported(coco: Path, say: Any) -> None:
    (coco / "train2014/COCO_train2014_000000000002.jpg").unlink()
    (coco / "train2014/COCO_train2014_000000000003.jpg").unlink()  # shows nothing, and isn't missed
    with pytest.raises(
        UserError, match=r"1 of the 2 annotated .*\(COCO_train2014_000000000002\); unpack train2014\.zip"
    ):
        prepare_coco(coco, progress=False, say=say)


# ---- the command


def test_command(devkit: Path, sbd: Path, coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "voc", str(devkit), "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next     afa train voc data.root={devkit / 'VOC2012'}"
    assert main(["prepare", "coco", str(coco), "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next     afa train coco data.root={coco}"
    for arguments, words in (
        (["voc", "nowhere"], ["no such folder: nowhere", "VOCtrainval"]),
        (["vco", "nowhere"], ["voc, coco, own", "did you mean 'voc'"]),
        (["coco", "nowhere"], ["lacks train2014, val2014", "train2014.zip"]),
        (["own", "nowhere"], ["no such folder: nowhere"]),
        (["coco", str(coco), "--sbd", "x"], ["--sbd is only valid for"]),
        (["own", str(devkit / "VOC2012")], ["PASCAL VOC layout", "afa train voc"]),
    ):
        assert main(["prepare", *arguments, "--quiet"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        for word in words:
            assert word in error


def test_command_on_own_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "my photos"
    rows = []
    for number in range(30):
        _jpeg(root / f"{number}.jpg")
        rows.append(f"{number}.jpg,{'zebra' if number else 'zebar'}")
    (root / "tags.csv").write_text("\n".join(rows))
    _jpeg(root / "other.jpg")
    (root / "clip.MOV").write_bytes(b"film")
    (root / ".DS_Store").write_bytes(b"")
    before = _files(root)
    assert main(["prepare", "own", str(root), "--quiet"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "30 images, tagged by tags.csv, 2 classes",
        "skipped because tags.csv has no line for them: 1 of 31 images",
        f"no masks in {root / 'masks'}: only the classifier's F1 will be computed",
        "skipped because they are not supported image files: 1 .mov",
        "1  zebar",
        "is this 'zebra'?",
        f"next     afa train own data.root={root}",
    ):
        assert words in shown
    assert _files(root) == before
    (root / "3.jpg").write_bytes(b"")
    (root / "17.jpg").write_bytes(b"hello")
    assert main(["prepare", "own", str(root), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert "2 of the 30 images" in captured.err
    assert "data.bad_images=skip" in captured.err
    assert [name in captured.out for name in ("3.jpg can't", "17.jpg can't")] == [True, True]


# ---- oddities of annotations


def _val(coco: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = coco / "annotations/instances_val2014.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3]]), "must have polygons"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4, "5", 6]]), "must have polygons"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4, float("nan"), 6]]), "must have polygons"),
        (lambda c: c["annotations"][0].update(segmentation="mask"), "must be polygons or run lengths"),
        (lambda c: c["annotations"][0].update(segmentation=None), "must be polygons or run lengths"),
        (lambda c: c["annotations"][2]["segmentation"].update(size=[20, 16]), "has the size"),
        (lambda c: c["annotations"][2]["segmentation"].update(counts=3), "must have run lengths"),
        (lambda c: c["annotations"][0].pop("segmentation"), "segmentation"),
        (lambda c: c["annotations"][0].update(area=float("nan")), "area of annotation"),
        (lambda c: c["annotations"][0].update(area=None), "can't be read"),
        (lambda c: c["annotations"][0].update(image_id=77), "can't be read"),
        (lambda c: c["annotations"][0].update(category_id=12), "can't be read"),
        (lambda c: c["annotations"].append("x"), "can't be read"),
        (lambda c: c["images"][0].update(height=None), "height of image"),
        (lambda c: c["images"][0].update(width=0), "width of image"),
        (lambda c: c["images"].append({**c["images"][0], "id": 99}), "2 times"),
    ],
)
def test_invalid_coco_annotations_give_a_one_line_error(coco: Path, say: Any, change: Any, words: str) -> None:
    _val(coco, change)
    with pytest.raises(UserError, match=words) as caught:
        prepare_coco(coco, progress=False, say=say)
    assert "instances_val2014.json" in str(caught.value)
    assert not (coco / "classes.txt").exists()


def test_unusual_coco_annotations_are_read(coco: Path, say: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["file_name"] = f"val2014/{image['file_name']}"
        content["annotations"][3]["segmentation"] = [0, 0, 4, 0, 4, 4, 0, 4]  # without the list around it
        content["annotations"][4]["segmentation"] = [[1, 1, 3, 3]]  # two points: no area

    _val(coco, change)
    prepare_coco(coco, progress=False, say=say)
    assert _coco_mask(coco, 5).max() == 80
    assert _coco_mask(coco, 6).max() == 0


def test_a_former_file_is_kept_however_often_it_is_rewritten(devkit: Path, sbd: Path, say: Any) -> None:
    path = devkit / "VOC2012/tags.csv"
    for number in range(3):
        path.write_text(f"someone's work {number}\n")
        prepare_voc(devkit, progress=False, say=say)
    kept = [path.with_name(f"tags.csv.old{suffix}").read_text() for suffix in ("", "2", "3")]
    assert kept == [f"someone's work {number}\n" for number in range(3)]


def test_voc_names_with_spaces_and_folders(voc_root: Path) -> None:
    for old, new in (("t0", "my cat 1"), ("t1", "sub/t1"), ("t2", "a.b")):
        target = voc_root / f"JPEGImages/{new}.jpg"
        target.parent.mkdir(exist_ok=True)
        (voc_root / f"JPEGImages/{old}.jpg").rename(target)
    text = (voc_root / "tags.csv").read_text()
    (voc_root / "tags.csv").write_text(text.replace("t0,", "my cat 1.jpg,").replace("t2,", "a.b,"))
    lists = voc_root / "ImageSets/Segmentation"
    (lists / "odd.txt").write_text(
        "my cat 1\nsub/t1\na.b\nt3.jpg\n/JPEGImages/t4.jpg /SegmentationClass/t4.png\nmy cat 1\n"
    )
    odd = TaggedDataset(voc_root, "odd", train=False, with_mask=False)
    assert odd.names == ["my cat 1", "sub/t1", "a.b", "t3", "t4"]
    assert odd.tags.sum(1).tolist() == [2, 1, 2, 1, 2]
