"""The endless stream of tagged images for pretraining the bundled backbone.

All shapes, textures and backgrounds differ from the demo's. Any shape can have any texture, and an image's tags are the
shapes and textures in it: no mask, box or count is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .backgrounds import PRETRAIN_GENERATORS
from .scene import draw_scene
from .shapes import PRETRAIN_SHAPES, disc
from .textures import PRETRAIN_TEXTURES

TAGS: tuple[str, ...] = (*PRETRAIN_SHAPES, *PRETRAIN_TEXTURES)

_MIN_SHARE = 0.004
"""An object whose visible part is smaller than this share of the image gives no tag."""


_SHARES = np.array([[0.9, 0.1, 0.0], [0.4, 0.5, 0.1], [0.15, 0.25, 0.6]])
"""Shares of close-ups, of single large objects and of whole scenes at difficulty 0, 1 and 2.

Whole scenes from the start teach a Transformer nothing for a long time: in experiments, the precision was at chance
level after 25,000 scenes, and also after 70,000 images whose difficulty depended only on their number. With close-ups
it learns the textures within a few thousand images.
"""
HARDEST = float(len(_SHARES) - 1)


def draw_tagged(rng: np.random.Generator, size: int, difficulty: float = HARDEST) -> tuple[np.ndarray, np.ndarray]:
    """One image [size, size, 3] uint8 and its tags [len(TAGS)] float32 (0 or 1).

    A close-up shows only a texture and has no outline tag. `difficulty`, from 0 to HARDEST, sets the shares of the
    three kinds of image.
    """
    level = min(int(difficulty), len(_SHARES) - 2)
    shares = _SHARES[level] + (_SHARES[level + 1] - _SHARES[level]) * (difficulty - level)
    kind = rng.choice(3, p=shares)
    radius = [(1.1, 1.3), (0.33, 0.55), (0.14, 0.4)][kind]
    count = rng.integers(1, 4) if kind == 2 else 1
    shapes, textures = list(PRETRAIN_SHAPES.values()), list(PRETRAIN_TEXTURES.values())
    chosen = [(int(rng.integers(len(shapes))), int(rng.integers(len(textures)))) for _ in range(count)]
    objects = [(disc if kind == 0 else shapes[s], textures[t]) for s, t in chosen]
    background = PRETRAIN_GENERATORS[rng.integers(len(PRETRAIN_GENERATORS))](rng, size)
    image, index = draw_scene(rng, background, objects, radius=(radius[0] * size, radius[1] * size), period=(5, 13))
    tags = np.zeros(len(TAGS), dtype=np.float32)
    for k, (s, t) in enumerate(chosen, start=1):
        if np.count_nonzero(index == k) >= _MIN_SHARE * size * size:
            tags[len(shapes) + t] = 1
            if kind:
                tags[s] = 1
    return image, tags


class TaggedStream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Endless `(image uint8 [3, crop, crop], tags float32 [len(TAGS)])`.

    Drawing an image takes longer than a training step of a small network, so each drawn image is served about `reuse`
    times from a pool, each time with a different crop, flip and order of the color channels.
    """

    def __init__(
        self, crop: int, seed: int, *, margin: int = 12, pool: int = 700, reuse: int = 3, difficulty: float = 0.0
    ) -> None:
        self.crop, self.seed, self.margin, self.pool, self.reuse = crop, seed, margin, pool, reuse
        self._difficulty = torch.tensor(difficulty).share_memory_()

    @property
    def difficulty(self) -> float:
        """The `difficulty` passed to `draw_tagged`; may be set while worker processes draw."""
        return float(self._difficulty)

    @difficulty.setter
    def difficulty(self, value: float) -> None:
        self._difficulty.fill_(min(max(value, 0.0), HARDEST))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        pool: list[tuple[np.ndarray, np.ndarray]] = []
        while True:
            slot = int(rng.integers(self.pool)) if len(pool) == self.pool else len(pool)
            if slot == len(pool) or rng.random() < 1 / self.reuse:
                pool[slot : slot + 1] = [draw_tagged(rng, self.crop + self.margin, self.difficulty)]
            image, tags = pool[slot]
            y, x = rng.integers(0, self.margin + 1, 2)
            view = image[y : y + self.crop, x : x + self.crop]
            for axis in (0, 1):
                if rng.random() < 0.5:
                    view = np.flip(view, axis)
            view = view[..., rng.permutation(3)].transpose(2, 0, 1)
            yield torch.from_numpy(np.ascontiguousarray(view)), torch.from_numpy(tags)
