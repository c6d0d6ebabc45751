from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from afa.data import COCO_CLASSES, VOC_CLASSES, TaggedDataset, check_dataset, eval_loader, share, train_loader

MakeTree = Callable[..., Path]


def _train(root: Path, **options: Any) -> TaggedDataset:
    return TaggedDataset(root, "train", train=True, with_mask=False, **{"crop_size": 32, **options})


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

    val = TaggedDataset(root, "val", train=False, with_mask=True)
    item = val[1]
    assert tuple(item["image"].shape) == (3, 48, 64)
    assert (item["mask"].dtype, tuple(item["mask"].shape)) == (torch.int64, (48, 64))
    assert set(item["mask"].unique().tolist()) == {0, 2, 255}
    assert "mask" not in TaggedDataset(root, "val", train=False, with_mask=False)[1]


def test_voc_classes_without_classes_txt(make_voc_tree: MakeTree) -> None:
    root = make_voc_tree(tags="xml")
    (root / "classes.txt").unlink()
    for path in (root / "Annotations").iterdir():
        # A person's head is a part with its own name, but not a tag.
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
    assert TaggedDataset(voc_root, "aug", train=True, crop_size=16, with_mask=False).names == ["t0", "t1", "t2"]


def test_batches_depend_only_on_seed_and_position(voc_root: Path) -> None:
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
    val = TaggedDataset(voc_root, "val", train=False, with_mask=True)
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
def test_evaluation_is_distributed_in_order_and_without_duplicates(voc_root: Path, world_size: int) -> None:
    val = TaggedDataset(voc_root, "val", train=False, with_mask=True)
    for size in (1, 3):
        shares = [list(eval_loader(val, size, rank=rank, world_size=world_size)) for rank in range(world_size)]
        names = [[name for batch in batches for name in batch["name"]] for batches in shares]
        assert [name for part in names for name in part] == val.names
        assert [len(part) for part in names] == [len(share(4, rank, world_size)) for rank in range(world_size)]
        assert max(map(len, names)) - min(map(len, names)) <= 1
    chosen = [list(eval_loader(val, 2, indices=[3, 0, 1], rank=rank, world_size=2)) for rank in range(2)]
    assert [[batch["name"] for batch in batches] for batches in chosen] == [[["v3"]], [["v0", "v1"]]]


def test_rank_outside_the_world_is_refused(voc_root: Path) -> None:
    val = TaggedDataset(voc_root, "val", train=False, with_mask=True)
    with pytest.raises(ValueError, match="got rank 2 of 2"):
        train_loader(_train(voc_root), 2, seed=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="got rank -1 of 1"):
        eval_loader(val, 1, rank=-1)


def test_waiting_for_batches_is_counted(voc_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = train_loader(_train(voc_root), 2, seed=0)
    assert batches.wait_seconds == 0
    item = TaggedDataset.__getitem__

    def slow(dataset: TaggedDataset, key: Any) -> dict[str, Any]:
        time.sleep(0.05)
        return item(dataset, key)

    monkeypatch.setattr(TaggedDataset, "__getitem__", slow)
    next(batches)
    assert batches.wait_seconds >= 0.1
    before = batches.wait_seconds
    time.sleep(0.1)  # the caller's work does not count as waiting
    assert batches.wait_seconds == before


def test_masks_of_a_split_without_masks_are_all_ignored(voc_root: Path) -> None:
    for path in (voc_root / "SegmentationClass").glob("v*.png"):
        path.unlink()
    val = TaggedDataset(voc_root, "val", train=False, with_mask=True)
    assert not val.has_masks
    check_dataset(val, progress=False)
    assert (val[0]["mask"] == 255).all()
    assert val[0]["mask"].shape == val[0]["image"].shape[1:]
    assert TaggedDataset(voc_root, "train", train=False, with_mask=True).has_masks
    for path in (voc_root / "SegmentationClass").iterdir():
        path.unlink()
    (voc_root / "SegmentationClass").rmdir()
    assert not TaggedDataset(voc_root, "train", train=False, with_mask=False).has_masks


def test_class_lists() -> None:
    assert len(VOC_CLASSES) == len(set(VOC_CLASSES)) == 20
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80
    assert [COCO_CLASSES[number - 1] for number in (1, 12, 40, 61, 80)] == [
        *("person", "stop sign", "bottle", "dining table", "toothbrush")
    ]


def test_training_works_with_unreadable_train_masks(voc_root: Path) -> None:
    # Invalid contents instead of file permissions, which do not apply to the superuser.
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
    val = TaggedDataset(voc_root, "val", train=False, with_mask=True)
    check_dataset(val, progress=False)
    masks = {Path(path).stem for path in opened if "SegmentationClass" in path}
    assert masks == {"v0", "v1", "v2", "v3"}


def test_a_training_set_refuses_masks(voc_root: Path) -> None:
    with pytest.raises(ValueError, match="no masks"):
        TaggedDataset(voc_root, "train", train=True, crop_size=32, with_mask=True)
    with pytest.raises(ValueError, match="crop_size"):
        TaggedDataset(voc_root, "train", train=True, with_mask=False)


def test_small_images_load_fast(make_voc_tree: MakeTree) -> None:
    train = _train(make_voc_tree(train=30, size=(128, 128)), crop_size=128)
    best = min(_seconds(train) for _ in range(3))
    # Measured: 700 to 1,300 per second on one core; the bound is lower for slow machines.
    assert len(train) / best > 150


def _seconds(train: TaggedDataset) -> float:
    """CPU seconds of this process: other processes on a busy machine don't count."""
    start = time.process_time()
    for index in range(len(train)):
        train[index]
    return time.process_time() - start
