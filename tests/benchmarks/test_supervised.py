"""Training from true masks."""

from __future__ import annotations

import itertools
from pathlib import Path

import supervised
import torch

from afa.config import load_config
from afa.data import open_dataset
from tests.benchmarks.test_ablation import settings


def test_masks_are_cropped_and_flipped_with_their_images(voc_root: Path) -> None:
    config = load_config("demo", settings(voc_root))
    batch = next(supervised.masked_batches(config, 3))
    assert batch["image"].shape == (3, 3, 32, 32) and batch["mask"].shape == (3, 32, 32)
    whole = open_dataset(config.data, config.data.train_split, train=False, with_mask=True)
    sources = [(item["image"], item["mask"]) for item in (whole[i] for i in range(len(whole)))]
    for image, mask in zip(batch["image"], batch["mask"], strict=True):
        found = False
        for (picture, truth), flip in itertools.product(sources, (False, True)):
            if flip:
                picture, truth = picture.flip(-1), truth.flip(-1)
            for y, x in itertools.product(range(picture.shape[1] - 31), range(picture.shape[2] - 31)):
                if torch.equal(picture[:, y : y + 32, x : x + 32], image):
                    found = torch.equal(truth[y : y + 32, x : x + 32], mask)
        assert found


def test_small_images_are_padded_with_ignored_pixels(voc_root: Path) -> None:
    config = load_config("demo", [*settings(voc_root), "data.crop_size=64"])  # the images are 48 pixels high
    batch = next(supervised.masked_batches(config, 0))
    assert batch["image"].shape == (3, 3, 64, 64)
    assert (batch["image"][:, :, 48:] == 0).all()
    assert (batch["mask"][:, 48:] == 255).all()
    assert (batch["mask"][:, :48] != 255).any()
