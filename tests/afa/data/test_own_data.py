"""User data without VOC's layout: tags from a CSV file or from folders, splits, masks, and all kinds of mistakes."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from afa.commands.cli import main
from afa.config import DataConfig, load_config
from afa.data import TaggedDataset, check_dataset, open_dataset, train_loader
from afa.data.readers.own import read_own_folder
from afa.errors import UserError


def _picture(path: Path, size: tuple[int, int] = (40, 30), color: tuple[int, int, int] = (90, 120, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Twenty pictures p00.jpg to p19.jpg tagged cat, dog, both or nothing in tags.csv, and one without a line."""
    root = tmp_path / "album"
    labels = ["cat", "dog", "cat dog", ""]
    for number in range(20):
        _picture(root / f"p{number:02}.jpg")
    _picture(root / "deep/extra.png")
    rows = [f"p{number:02}.jpg,{labels[number % 4]}" for number in range(20)]
    (root / "tags.csv").write_text("image,labels\n" + "\n".join(rows) + "\n")
    return root


def _open(root: Path, split: str) -> TaggedDataset:
    return TaggedDataset(root, split, train=False, with_mask=True)


def test_tags_from_a_table(album: Path) -> None:
    everything = _open(album, "all")
    assert everything.classes == ["cat", "dog"]
    assert everything.tags[:4].tolist() == [[1, 0], [0, 1], [1, 1], [0, 0]]
    assert read_own_folder(album).untagged == 1
    assert read_own_folder(album).counts() == {"cat": 10, "dog": 10}
    train, val = _open(album, "train"), _open(album, "val")
    assert not set(train.names) & set(val.names)
    assert sorted(train.names + val.names) == everything.names
    assert not val.has_masks
    batch = next(train_loader(TaggedDataset(album, "train", train=True, crop_size=16, with_mask=False), 4, seed=0))
    assert batch["image"].shape == (4, 3, 16, 16)


def test_table_formats(album: Path) -> None:
    (album / "tags.csv").rename(album / "from my phone.CSV")
    rows = ["./p00.jpg,traffic light", "p01,traffic light; car", "deep\\extra.png,car", "extra2,"]
    _picture(album / "deep/extra2.JPEG")
    (album / "from my phone.CSV").write_text("\ufeff" + "\n".join(rows))
    everything = _open(album, "all")
    assert everything.names == ["p00", "p01", "deep/extra", "deep/extra2"]
    assert everything.classes == ["car", "traffic light"]
    assert everything.tags.tolist() == [[0, 1], [1, 1], [1, 0], [0, 0]]


def test_tags_from_folders(tmp_path: Path) -> None:
    for place in ("zebra/1.jpg", "zebra/far/2.png", "ant/1.jpg", "background/3.jpg", ".trash/ant/9.jpg"):
        _picture(tmp_path / place)
    everything = _open(tmp_path, "all")
    assert everything.classes == ["ant", "zebra"]
    tags = dict(zip(everything.names, everything.tags.tolist(), strict=True))
    assert tags == {"ant/1": [1, 0], "background/3": [0, 0], "zebra/1": [0, 1], "zebra/far/2": [0, 1]}
    _picture(tmp_path / ".elsewhere/4.jpg")
    (tmp_path / "bee").symlink_to(tmp_path / ".elsewhere", target_is_directory=True)
    assert _open(tmp_path, "all").classes == ["ant", "bee", "zebra"]
    (tmp_path / "bee").unlink()
    (tmp_path / "classes.txt").write_text("zebra\nant\nlion\n")
    assert _open(tmp_path, "all").classes == ["zebra", "ant", "lion"]


def test_folders_with_predefined_splits(tmp_path: Path) -> None:
    for place in ("train/ant/1.jpg", "train/bee/2.jpg", "val/ant/1.jpg"):
        _picture(tmp_path / place)
    assert _open(tmp_path, "train").names == ["train/ant/1", "train/bee/2"]
    assert _open(tmp_path, "val").names == ["val/ant/1"]
    assert _open(tmp_path, "val").classes == ["ant", "bee"]


def test_an_image_keeps_its_split_when_others_are_added(album: Path) -> None:
    before = {split: set(_open(album, split).names) for split in ("train", "val")}
    with open(album / "tags.csv", "a") as table:
        for number in range(200):
            _picture(album / f"q{number}.jpg")
            table.write(f"q{number}.jpg,cat\n")
    after = {split: set(_open(album, split).names) for split in ("train", "val")}
    assert before["train"] <= after["train"]
    assert before["val"] <= after["val"]
    assert 10 <= len(after["val"]) <= 35  # a tenth of 220, by chance


def test_few_images_leave_one_for_validation(tmp_path: Path) -> None:
    for place in ("ant/1.jpg", "ant/2.jpg"):
        _picture(tmp_path / place)
    assert [len(_open(tmp_path, split)) for split in ("train", "val")] == [1, 1]
    (tmp_path / "ant/2.jpg").unlink()
    with pytest.raises(UserError, match=r"split 'val' of .* is empty: 1 tagged"):
        _open(tmp_path, "val")


def test_images_with_masks_are_used_for_validation(album: Path) -> None:
    for name in ("p03", "p08"):
        mask = np.zeros((30, 40), np.uint8)
        mask[5:10] = 2
        mask[10] = 255
        (album / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(album / f"masks/{name}.png")
    val = _open(album, "val")
    assert val.names == ["p03", "p08"]
    assert val.has_masks
    assert val[1]["mask"].unique().tolist() == [0, 2, 255]
    assert len(_open(album, "train")) == 18
    assert "masks are used for validation" in read_own_folder(album).how_split()
    (album / "val.txt").write_text("p01.jpg\np03\n")
    with pytest.raises(UserError, match=r"masks/p01\.png does not exist"):
        check_dataset(_open(album, "val"), progress=False)


def test_lists_choose_the_split(album: Path) -> None:
    (album / "val.txt").write_text("p01.jpg\np02\n")
    assert _open(album, "val").names == ["p01", "p02"]
    assert len(_open(album, "train")) == 18
    (album / "train.txt").write_text("p05\n")
    assert _open(album, "train").names == ["p05"]
    (album / "val.txt").unlink()
    assert len(_open(album, "val")) == 19
    (album / "test.txt").write_text("p07\n")
    assert _open(album, "test").names == ["p07"]


def test_large_photographs_are_shrunk_as_they_are_read(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = np.linspace(0, 255, 640)[None, :, None].repeat(480, 0).repeat(3, 2).astype(np.uint8)
    (tmp_path / "ant").mkdir()
    Image.fromarray(ramp).save(tmp_path / "ant/1.jpg", exif=exif, quality=95)
    _picture(tmp_path / "ant/2.jpg")
    (tmp_path / "masks/ant").mkdir(parents=True)
    mask = np.zeros((640, 480), np.uint8)
    mask[320:] = 1
    Image.fromarray(mask).save(tmp_path / "masks/ant/1.png")
    data = DataConfig(root=str(tmp_path), largest_side=100, crop_size=32)
    val = open_dataset(data, "val", train=False, with_mask=True, progress=False)
    check_dataset(val, progress=False)
    item = val[0]
    assert item["image"].shape == (3, 100, 75)
    assert val.sizes == [(100, 75)]
    # Upright, and the ramp goes down the picture as it went to the right in the file.
    expected = torch.linspace(0, 255, 100)[None, :, None]
    assert (item["image"].float() - expected).abs().max() < 8
    assert (item["mask"][:50] == 0).all() and (item["mask"][50:] == 1).all()
    train = open_dataset(data, "train", train=True, with_mask=False, progress=False)
    assert train.largest_side == 100
    assert train[0]["image"].shape == (3, 32, 32)


def _two_of_a_name(root: Path) -> None:
    _picture(root / "more/extra.jpg")
    (root / "tags.csv").write_text("extra,cat\n")


def _no_pictures(root: Path) -> None:
    for path in [*root.glob("*.jpg"), root / "deep/extra.png"]:
        path.unlink()


MISTAKES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a picture that is not there": (
        lambda root: (root / "p04.jpg").unlink(),
        ["'p04.jpg'", "line 6", "tags.csv", "did you mean"],
    ),
    "a picture of a kind that can't be read": (
        lambda root: (root / "p04.jpg").rename(root / "p04.heic"),
        ["'p04.jpg'", "did you mean"],
    ),
    "a line with such a picture": (
        lambda root: ((root / "x.heic").write_bytes(b""), (root / "tags.csv").write_text("x.heic,cat\n")),
        ["'x.heic' in line 1", "not a supported image type", "convert it"],
    ),
    "a line twice": (
        lambda root: (root / "tags.csv").write_text("p01.jpg,cat\np01,dog\n"),
        ["line 2", "'p01'", "second time", "line 1"],
    ),
    "columns": (
        lambda root: (root / "tags.csv").write_text("p01.jpg,cat,dog\n"),
        ["line 1", "3 columns", "image,labels"],
    ),
    "capitals": (
        lambda root: (root / "tags.csv").write_text("p01.jpg,cat\np02.jpg,Cat\n"),
        ["'Cat' and 'cat'", "only in case"],
    ),
    "no tags": (
        lambda root: (root / "tags.csv").write_text("p01.jpg,\n"),
        ["tags.csv", "1 to 254 classes", "got 0"],
    ),
    "a tag out of the list": (
        lambda root: (root / "classes.txt").write_text("cat\ndogs\n"),
        ["'dog'", "classes.txt", "did you mean 'dogs'"],
    ),
    "two names alike": (
        lambda root: _picture(root / "p01.png"),
        ["p01.jpg", "p01.png", "rename"],
    ),
    "a bare name of two pictures": (
        _two_of_a_name,
        ["'extra'", "deep/extra or more/extra", "path relative to"],
    ),
    "neither table nor folders": (
        lambda root: (root / "tags.csv").unlink(),
        ["no tag", "tags.csv", "folder named after its class"],
    ),
    "several tables": (
        lambda root: ((root / "tags.csv").rename(root / "a.csv"), (root / "b.csv").write_text("")),
        ["a.csv, b.csv", "tags.csv"],
    ),
    "no picture": (
        _no_pictures,
        ["no images", "data.root"],
    ),
    "an unknown split list": (
        lambda root: (root / "val.txt").write_text("p99.jpg\n"),
        ["'p99.jpg'", "val.txt", "did you mean"],
    ),
    "a truncated picture": (
        lambda root: (root / "p05.jpg").write_bytes((root / "p05.jpg").read_bytes()[:500]),
        ["p05.jpg", "can't be decoded", "data.bad_images=skip"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_the_folder(album: Path, mistake: str) -> None:
    spoil, words = MISTAKES[mistake]
    check_dataset(_open(album, "train"), progress=False)
    spoil(album)

    def read() -> None:
        check_dataset(_open(album, "all"), progress=False)
        _open(album, "val")

    with pytest.raises(UserError) as caught:
        read()
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_downloads_are_not_mistaken_for_own_images(tmp_path: Path) -> None:
    _picture(tmp_path / "kit/VOC2012/JPEGImages/a.jpg")
    with pytest.raises(UserError, match=r"contains a folder in PASCAL VOC layout; set data\.root=.*kit/VOC2012$"):
        _open(tmp_path / "kit", "train")
    with pytest.raises(UserError, match=r"there are no lists.*afa prepare voc .*VOC2012$"):
        _open(tmp_path / "kit/VOC2012", "train_aug")
    _picture(tmp_path / "coco/train2014/a.jpg")
    with pytest.raises(UserError, match=r"there are no lists.*afa prepare coco .*coco$"):
        _open(tmp_path / "coco", "train")


def test_an_unknown_split_is_reported(album: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'vall' in .*did you mean 'val'"):
        _open(album, "vall")


def test_bad_pictures_are_skipped_by_option(album: Path) -> None:
    (album / "p05.jpg").write_bytes(b"")
    (album / "p07.jpg").write_bytes((album / "p07.jpg").read_bytes()[:400])
    data = DataConfig(root=str(album), crop_size=16, bad_images="skip")
    train = open_dataset(data, "all", train=True, with_mask=False, progress=False)
    assert len(train) == len(train.tags) == len(train.paths) == 18
    assert not {"p05", "p07"} & set(train.names)
    assert ["p05.jpg" in train.skipped[0], "p07.jpg" in train.skipped[1]] == [True, True]
    names = [name for batch in itertools.islice(train_loader(train, 9, seed=0), 2) for name in batch["name"]]
    assert sorted(names) == sorted(train.names)
    again = open_dataset(data, "all", train=True, with_mask=False, progress=False)
    assert again.names == train.names and again.skipped == train.skipped
    data.bad_images = "refuse"
    with pytest.raises(UserError, match=r"p05\.jpg can't be decoded"):
        check_dataset(open_dataset(data, "all", train=True, with_mask=False), progress=False)


def test_bad_masks_are_skipped_with_their_pictures(album: Path) -> None:
    (album / "masks").mkdir()
    for name in ("p01", "p02", "p03"):
        Image.new("L", (40, 30)).save(album / f"masks/{name}.png")
    (album / "masks/p02.png").write_bytes(b"no mask")
    data = DataConfig(root=str(album), bad_images="skip")
    val = open_dataset(data, "val", train=False, with_mask=True, progress=False)
    assert val.names == ["p01", "p03"]
    assert "masks/p02.png" in val.skipped[0]
    for name in ("p01", "p03"):
        (album / f"masks/{name}.png").write_bytes(b"no mask")
    with pytest.raises(UserError, match=r"no image of the split 'val' .* is left: the mask .*p01\.png"):
        open_dataset(data, "val", train=False, with_mask=True, progress=False)


TINY = [
    *("model.backbone=pvt_v2_b0", "model.weights=null", "model.decoder_width=16", "data.crop_size=64"),
    *("model.backbone_args.depths=[1, 1, 1, 1]", "model.backbone_args.embed_dims=[8, 16, 40, 64]"),
    *("train.iterations=3", "train.classify_until=1", "train.par_until=2", "train.batch_size=2", "train.warmup=1"),
    *("labels.cam_scales=1", "labels.par_iterations=1", "data.workers=0", "--device=cpu", "--quiet"),
]


def test_worked_example_of_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[3] / "docs/own_data.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (table,) = re.findall(r"```csv\n(.*?)```", page, re.DOTALL)
    rng = np.random.default_rng(0)
    for line in table.splitlines()[1:]:
        path = tmp_path / "photos" / line.partition(",")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 80, 3)).astype(np.uint8)).save(path)
    (tmp_path / "photos/tags.csv").write_text(table)
    _picture(tmp_path / "holiday/one.jpg", (90, 70))
    # Not `afa app`, which runs until it is stopped; tests/afa/app has its tests.
    commands = re.findall(r"^afa (?!app ).*", "".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)), re.MULTILINE)
    shown = []
    for command in commands:
        words = command.split()[1:]
        if words[1:2] == ["own"] and "--run" in words:  # the mask of the last section
            (mask,) = re.findall(r"^  (masks/.*\.png)$", page, re.MULTILINE)
            (tmp_path / "photos" / mask).parent.mkdir(parents=True)
            Image.fromarray(np.full((60, 80), 2, np.uint8)).save(tmp_path / "photos" / mask)
        extra = {"train": TINY, "predict": ["--device=cpu", "--quiet"], "prepare": ["--quiet"]}[words[0]]
        assert main([*words, *extra]) == 0, command
        shown.append(capsys.readouterr().out)
    for override in re.findall(r"(?:train|data|model)\.\w+=[^\s`]+", page):
        load_config("own", [override])
    assert [command.split()[1] for command in commands] == ["prepare", "train", "predict", "train"]
    assert "7 images, tagged by tags.csv, 3 classes" in shown[0]
    assert "no masks" in shown[1] and "tag F1" in shown[1]
    assert (tmp_path / "results/masks/one.png").is_file()
    assert (tmp_path / "runs/own/report.html").is_file()
    assert "no masks" not in shown[3]
    metrics = json.loads((tmp_path / "runs/with_masks/metrics.json").read_text())
    assert metrics["images"] == 1
    assert metrics["seg_miou"] is not None
