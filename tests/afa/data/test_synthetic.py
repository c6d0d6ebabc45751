"""The embedded data set and the pretraining stream."""

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from afa.data.dataset import TaggedDataset, check_dataset
from afa.data.synthetic import CLASSES, make_dataset
from afa.data.synthetic import backgrounds as bg
from afa.data.synthetic.embedded import draw_labeled
from afa.data.synthetic.pretraining import HARDEST, TAGS, TaggedStream, draw_tagged
from afa.data.synthetic.shapes import DEMO_SHAPES, PRETRAIN_SHAPES, rasterize
from afa.data.synthetic.textures import DEMO_TEXTURES, PRETRAIN_TEXTURES, paint


@pytest.fixture(scope="module")
def dataset_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "embedded"
    make_dataset(root, train=24, val=12, size=96, seed=5, progress=False)
    return root


@pytest.mark.slow
def test_is_read_by_the_voc_loader(dataset_root):
    train = TaggedDataset(dataset_root, "train", train=True, crop_size=64, with_mask=False)
    val = TaggedDataset(dataset_root, "val", train=False, with_mask=True)
    check_dataset(train, progress=False)
    check_dataset(val, progress=False)
    assert train.classes == val.classes == list(CLASSES)
    assert (len(train), len(val)) == (24, 12)
    assert len(CLASSES) >= 6
    assert train[0]["image"].shape == (3, 64, 64)


def test_tags_are_the_final_masks_classes(dataset_root):
    val = TaggedDataset(dataset_root, "val", train=False, with_mask=True)
    for i in range(len(val)):
        present = sorted(set(val[i]["mask"].unique().tolist()) - {0})
        assert present == (torch.nonzero(val.tags[i]).flatten() + 1).tolist()
        assert 1 <= len(present) <= 3


@pytest.mark.slow
def test_same_arguments_give_the_same_files(dataset_root, tmp_path):
    make_dataset(tmp_path / "again", train=24, val=12, size=96, seed=5, progress=False)
    for file in sorted(p.relative_to(dataset_root) for p in dataset_root.rglob("*") if p.is_file()):
        assert (tmp_path / "again" / file).read_bytes() == (dataset_root / file).read_bytes(), file


def test_an_existing_folder_is_refused(dataset_root):
    with pytest.raises(FileExistsError, match="already exists"):
        make_dataset(dataset_root, train=1, val=1, progress=False)


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match=r"(?i)size|dimension|negative|width"):
        make_dataset(tmp_path / "data", train=2, val=1, size=-3, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_train_and_val_share_no_photograph():
    assert not set(bg.TRAIN_PHOTOGRAPHS) & set(bg.VAL_PHOTOGRAPHS)
    for name in (*bg.TRAIN_PHOTOGRAPHS, *bg.VAL_PHOTOGRAPHS):
        assert bg._photograph_path(name).is_file()


def test_splits_and_numbers_differ():
    pictures = [draw_labeled(split, n, 64, 0)[0] for split in ("train", "val") for n in (0, 1)]
    assert len({p.tobytes() for p in pictures}) == 4


def test_pretraining_shares_no_shape_texture_or_background_generator_with_the_demo():
    assert not set(DEMO_SHAPES) & set(PRETRAIN_SHAPES)
    assert not set(DEMO_SHAPES.values()) & set(PRETRAIN_SHAPES.values())
    assert not set(DEMO_TEXTURES.values()) & set(PRETRAIN_TEXTURES.values())
    assert not set(bg.DEMO_GENERATORS) & set(bg.PRETRAIN_GENERATORS)
    assert not set(CLASSES) & set(TAGS)


@pytest.mark.parametrize("name", [*DEMO_SHAPES, *PRETRAIN_SHAPES])
def test_every_shape_is_within_its_circle(name):
    shape = {**DEMO_SHAPES, **PRETRAIN_SHAPES}[name]
    coverage = rasterize(shape, np.random.default_rng(1), 96, (48.0, 48.0), 30.0, 0.3, 1.0)
    y, x = np.nonzero(coverage > 0.5)
    assert coverage.min() >= 0 and coverage.max() == 1
    assert len(x) > 0.1 * np.pi * 30**2
    assert np.hypot(x - 47.5, y - 47.5).max() < 30 * 1.35


@pytest.mark.parametrize("name", [*DEMO_TEXTURES, *PRETRAIN_TEXTURES])
def test_every_texture_varies_within_range(name):
    values = paint({**DEMO_TEXTURES, **PRETRAIN_TEXTURES}[name], np.random.default_rng(2), (40, 50), 9.0, 0.4)
    assert values.shape == (40, 50) and values.dtype == np.float32
    assert values.min() >= 0 and values.max() <= 1 + 1e-6
    assert values.std() > 0.1


def test_photograph_crop_is_rgb_of_the_requested_size():
    crop = bg.photograph(np.random.default_rng(0), 80, bg.VAL_PHOTOGRAPHS)
    assert crop.shape == (80, 80, 3) and crop.dtype == np.uint8 and crop.std() > 1


@pytest.mark.parametrize("difficulty", [0.0, HARDEST])
def test_pretraining_tags_name_outlines_and_textures(difficulty):
    drawn = [draw_tagged(np.random.default_rng([3, i]), 64, difficulty) for i in range(24)]
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image, _ in drawn)
    outlines = np.array([tags[: len(PRETRAIN_SHAPES)].sum() for _, tags in drawn])
    textures = np.array([tags[len(PRETRAIN_SHAPES) :].sum() for _, tags in drawn])
    assert ((textures >= 1) & (textures <= 3)).all() and (outlines <= 3).all()
    close_ups = (outlines == 0).mean()  # 0.9 of the images at the start of the stream, 0.15 at its end
    assert close_ups > 0.4 if difficulty == 0 else close_ups < 0.4


def test_stream_is_endless_and_varied():
    stream = TaggedStream(48, seed=0, pool=20, reuse=3)
    items = list(islice(stream, 40))
    assert all(image.shape == (3, 48, 48) and image.dtype == torch.uint8 for image, _ in items)
    assert len({image.numpy().tobytes() for image, _ in items}) == 40
    assert torch.equal(items[0][0], next(iter(stream))[0])


def test_masks_carry_the_voc_palette(dataset_root):
    with Image.open(next((dataset_root / "SegmentationClass").iterdir())) as mask:
        assert mask.mode == "P"
        palette = mask.getpalette()
        assert palette is not None and palette[3:6] == [128, 0, 0]
