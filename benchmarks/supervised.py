"""Training from true masks, the upper bound of training from tags: the same network, schedule and crops."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

import afa_ext
from afa.config import Config
from afa.data import open_dataset, train_loader
from afa.data.classes import IGNORE
from afa.training.step import Targets, TrainStep


class Supervised(TrainStep):
    """A step that learns from the masks in the batch, [B, S, S], instead of from labels that it makes."""

    @torch.no_grad()
    def targets(self, batch: dict[str, Any], images: Tensor, inputs: Tensor, cam: Tensor, phase: str) -> Targets:
        masks = batch["mask"].to(self.device)
        radius = self.config.labels.walk_radius
        return Targets(masks, afa_ext.affinity_labels(masks, stride=self.model.stride, radius=radius, background=0))


def masked_batches(config: Config, begin: int) -> Iterator[dict[str, Any]]:
    """Batches of images and masks: crops at scale 1 and flips, the same for an image and its mask. Images smaller than
    the crop are padded with black, which is ignored."""
    data = config.data
    items = open_dataset(data, data.train_split, train=False, with_mask=True)
    for iteration in itertools.count(begin):
        random = np.random.default_rng([config.train.seed, iteration])
        batch = []
        for number in random.choice(len(items), config.train.batch_size, replace=False):
            item = items[int(number)]
            height, width = item["mask"].shape
            short = (0, max(0, data.crop_size - width), 0, max(0, data.crop_size - height))
            image, mask = F.pad(item["image"], short), F.pad(item["mask"], short, value=IGNORE)
            top, left = (int(random.integers(side - data.crop_size + 1)) for side in mask.shape)
            window = (..., slice(top, top + data.crop_size), slice(left, left + data.crop_size))
            flip = (lambda x: x.flip(-1)) if random.random() < 0.5 else (lambda x: x)
            batch.append((flip(image[window]), flip(mask[window]), item["tags"]))
        images, masks, tags = (torch.stack(part) for part in zip(*batch, strict=True))
        box = torch.tensor([0, data.crop_size] * 2).expand(len(images), 4)
        yield {"image": images, "mask": masks, "tags": tags, "box": box}


def run_steps(train_step: TrainStep, begin: int, end: int, title: str) -> None:
    """Update with the batches of iterations begin to end - 1, from masks if the step is `Supervised`."""
    config = train_step.config
    batches: Iterator[dict[str, Any]] = masked_batches(config, begin)
    if not isinstance(train_step, Supervised):
        data = config.data
        batches = train_loader(
            open_dataset(data, data.train_split, train=True, with_mask=False),
            config.train.batch_size,
            seed=config.train.seed,
            start_iteration=begin,
            workers=data.workers,
        )
    for iteration in trange(begin, end, desc=title, unit="it", dynamic_ncols=True):
        train_step.update(next(batches), iteration)
