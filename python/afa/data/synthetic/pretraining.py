"""The endless stream of tagged images that the bundled backbone is pretrained on.

Shapes, textures and backgrounds are all other ones than the demo's. An object has any shape with any texture, and an
image's tags are the shapes and textures in it: no mask, box or count is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .backgrounds import PRETRAIN_GENERATORS
from .scene import draw_scene
from .shapes import PRETRAIN_SHAPES
from .textures import PRETRAIN_TEXTURES

TAGS: tuple[str, ...] = (*PRETRAIN_SHAPES, *PRETRAIN_TEXTURES)

_MIN_SHARE = 0.004
"""A visible part smaller than this share of the image gives no tag."""


def draw_tagged(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One image [size, size, 3] uint8 and its tags [len(TAGS)] float32 (0 or 1)."""
    shapes, textures = list(PRETRAIN_SHAPES.values()), list(PRETRAIN_TEXTURES.values())
    chosen = [(int(rng.integers(len(shapes))), int(rng.integers(len(textures)))) for _ in range(rng.integers(1, 4))]
    background = PRETRAIN_GENERATORS[rng.integers(len(PRETRAIN_GENERATORS))](rng, size)
    image, index = draw_scene(
        rng,
        background,
        [(shapes[s], textures[t]) for s, t in chosen],
        radius=(0.13 * size, 0.4 * size),
        period=(5, 13),
    )
    tags = np.zeros(len(TAGS), dtype=np.float32)
    for k, (s, t) in enumerate(chosen, start=1):
        if np.count_nonzero(index == k) >= _MIN_SHARE * size * size:
            tags[[s, len(shapes) + t]] = 1
    return image, tags


class TaggedStream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Endless `(image uint8 [3, crop, crop], tags float32 [len(TAGS)])`.

    Drawing costs more than a small network's step, so each drawn image is served about `reuse` times from a pool, each
    time with another crop, flip and order of the colour channels.
    """

    def __init__(self, crop: int, seed: int, *, margin: int = 12, pool: int = 2048, reuse: int = 3) -> None:
        self.crop, self.seed, self.margin, self.pool, self.reuse = crop, seed, margin, pool, reuse

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        pool: list[tuple[np.ndarray, np.ndarray]] = []
        while True:
            if len(pool) < self.pool // self.reuse:
                pool.append(draw_tagged(rng, self.crop + self.margin))
                slot = len(pool) - 1
            else:
                slot = int(rng.integers(len(pool)))
                if rng.random() < 1 / self.reuse:
                    pool[slot] = draw_tagged(rng, self.crop + self.margin)
            image, tags = pool[slot]
            y, x = rng.integers(0, self.margin + 1, 2)
            view = image[y : y + self.crop, x : x + self.crop]
            for axis in (0, 1):
                if rng.random() < 0.5:
                    view = np.flip(view, axis)
            view = view[..., rng.permutation(3)].transpose(2, 0, 1)
            yield torch.from_numpy(np.ascontiguousarray(view)), torch.from_numpy(tags)
