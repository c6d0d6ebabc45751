"""A tiny data set in VOC layout: colored squares, discs and stripes on noise, with exact masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from afa.config import Config

CLASSES = ["square", "disc", "stripes"]

MakeTree = Callable[..., Path]


def _scene(rng: np.random.Generator, size: tuple[int, int], objects: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """An image uint8 [H,W,3] and its mask uint8 [H,W], which has a border of 255 around the objects as VOC's do."""
    height, width = size
    image = rng.integers(60, 120, (height, width, 3)).astype(np.uint8)
    mask = np.zeros(size, np.uint8)
    y, x = np.mgrid[:height, :width]
    radius = min(size) // 5
    for number in objects:
        cy, cx = rng.integers(radius, height - radius), rng.integers(radius, width - radius)
        inside = np.maximum(abs(y - cy), abs(x - cx)) <= radius
        if number == 2:
            inside = (y - cy) ** 2 + (x - cx) ** 2 <= radius**2
        color = np.array([(220, 40, 40), (40, 200, 60), (60, 80, 230)][number - 1])
        shade = np.where((x // 3 % 2 == 0) | (number != 3), 1.0, 0.3)[..., None]
        image[inside] = (shade * color)[inside].astype(np.uint8)
        mask[inside] = number
    edge = np.zeros(size, bool)
    edge[1:] |= mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    mask[edge] = 255
    return image, mask


@pytest.fixture
def make_voc_tree(tmp_path: Path) -> MakeTree:
    """make_voc_tree(name="voc", train=6, val=4, size=(48, 64), tags="csv" | "xml") -> root of a new tree.

    Classes: square, disc, stripes. Images t0.jpg, t1.jpg, ... and v0.jpg, ... of one size, one or two objects each;
    the train masks are written too, so that a test can spoil them.
    """

    def make(
        name: str = "voc",
        *,
        train: int = 6,
        val: int = 4,
        size: tuple[int, int] = (48, 64),
        tags: str = "csv",
    ) -> Path:
        root = tmp_path / name
        for folder in ("JPEGImages", "ImageSets/Segmentation", "SegmentationClass", "Annotations"):
            (root / folder).mkdir(parents=True)
        (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
        rng = np.random.default_rng(7)
        lines = ["image,labels"]
        for split, prefix, count in (("train", "t", train), ("val", "v", val)):
            names = [f"{prefix}{i}" for i in range(count)]
            (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
            for i, image_name in enumerate(names):
                objects = [1 + i % 3] if i % 2 else [1 + i % 3, 1 + (i + 1) % 3]
                image, mask = _scene(rng, size, objects)
                Image.fromarray(image).save(root / "JPEGImages" / f"{image_name}.jpg", quality=95)
                palette = Image.fromarray(mask, mode="L").convert("P")
                palette.putdata(mask.reshape(-1).tolist())
                palette.save(root / "SegmentationClass" / f"{image_name}.png")
                labels = [CLASSES[number - 1] for number in objects]
                lines.append(f"{image_name},{' '.join(labels)}")
                if tags == "xml":
                    parts = "".join(f"<object><name>{label}</name></object>" for label in labels)
                    (root / "Annotations" / f"{image_name}.xml").write_text(f"<annotation>{parts}</annotation>")
        if tags == "csv":
            (root / "tags.csv").write_text("\n".join(lines) + "\n")
        return root

    return make


@pytest.fixture
def voc_root(make_voc_tree: MakeTree) -> Path:
    """Root of the tiny tree: 6 train and 4 val images of 48 x 64 pixels, three classes."""
    return make_voc_tree()


TinyConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def tiny_config() -> TinyConfig:
    """tiny_config(key=value, ...) -> a configuration small enough for tests; keys override its model section.

    pvt_v2_b0 shrunk to 32 channels with random weights, crops of 64 pixels, 3 iterations a phase.
    """

    def make(**model: Any) -> Config:
        config = Config()
        config.model.backbone = "pvt_v2_b0"
        config.model.backbone_args = {
            "embed_dims": [8, 16, 24, 32],
            "depths": [1, 1, 1, 2],
            "num_heads": [1, 2, 3, 4],
            "mlp_ratios": [2, 2, 2, 2],
        }
        config.model.weights = None
        config.model.decoder_width = 16
        for name, value in model.items():
            setattr(config.model, name, value)
        config.data.crop_size = 64
        config.data.workers = 0
        train = config.train
        train.iterations, train.batch_size = 9, 3
        train.classify_until, train.par_until, train.warmup = 3, 6, 2
        train.lr, train.norm_lr_factor = 1e-3, 1.0
        train.log_every, train.eval_every, train.checkpoint_every = 2, 1000, 1000
        train.tensorboard = False
        config.labels.par_dilations, config.labels.par_iterations = (1, 2, 4), 3
        return config

    return make
