"""Class activation maps of the tagged classes, combined over scales and horizontal flips (AFA, CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ClassSet:
    """The tagged classes of each image, packed to the left, so that a batch computes K maps per image instead of C."""

    index: Tensor
    """int64 [B, K]: class indices in [0, C); arbitrary where not valid."""
    valid: Tensor
    """bool [B, K]."""

    def gather(self, maps: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, K, h, w], zero where not valid."""
        picked = maps.take_along_dim(self.index[:, :, None, None], dim=1)
        return picked.masked_fill_(~self.valid[:, :, None, None], 0)

    def scatter(self, maps: Tensor, num_classes: int) -> Tensor:
        """[B, K, h, w] -> [B, C, h, w], zero for absent classes."""
        out = maps.new_zeros(maps.shape[0], num_classes, *maps.shape[2:])
        index = self.index[:, :, None, None].expand_as(maps)
        return out.scatter_add_(1, index, maps.masked_fill(~self.valid[:, :, None, None], 0))

    def labels(self, choice: Tensor) -> Tensor:
        """Map choice [B, H, W] (0 background, k + 1 the k-th packed class) to labels (0 or class index + 1)."""
        table = F.pad(self.index + 1, (1, 0))
        return table.gather(1, choice.flatten(1)).view_as(choice)


def pack_classes(tags: Tensor, max_classes: int | None = None) -> ClassSet:
    """Tags [B, C] -> the classes present, K = max_classes per image.

    max_classes must be at least the maximum number of tags per image. By default, this maximum is read from CPU tags;
    for tags on a GPU, reading would synchronize, so K is C.
    """
    if max_classes is None:
        max_classes = tags.shape[1] if tags.device.type != "cpu" else int((tags > 0).sum(1).max()) if len(tags) else 1
    max_classes = min(max(max_classes, 1), tags.shape[1])
    present = (tags > 0).to(torch.uint8)
    index = present.argsort(dim=1, descending=True, stable=True)[:, :max_classes]
    return ClassSet(index, present.gather(1, index).bool())


def pack_host_tags(tags: Tensor, device: torch.device) -> ClassSet:
    """`pack_classes` on `device` for CPU tags [B, C], without synchronization."""
    max_classes = int((tags > 0).sum(1).max())
    return pack_classes(tags.to(device, non_blocking=True), max_classes)


@torch.no_grad()
def combine_cams(scales: Sequence[tuple[Tensor, Tensor]], classes: ClassSet, size: tuple[int, int]) -> Tensor:
    """Combine raw CAMs (per scale: of the images and of the flipped images, [B, C, h, w]) to [B, K, H, W] in [0, 1].

    Takes the maximum over flips, upsamples bilinearly to `size`, applies ReLU, sums over scales, and normalizes each
    map to [0, 1]. Zero for absent classes.
    """
    total: Tensor | None = None
    for original, flipped in scales:
        maps = torch.maximum(classes.gather(original), classes.gather(flipped))
        maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False).relu_()
        total = maps if total is None else total.add_(maps)
    assert total is not None
    total -= total.amin((2, 3), keepdim=True)
    total /= total.amax((2, 3), keepdim=True) + 1e-5
    return total
