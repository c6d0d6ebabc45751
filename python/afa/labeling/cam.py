"""Class activation maps over scales and flips (AFA, CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afa.model.network import AFANet


@dataclass(frozen=True)
class ClassSet:
    """The tagged classes of each image, packed to the left: what a batch computes on in place of all C classes."""

    index: Tensor
    """int64 [B, K]: class numbers 0..C-1; arbitrary where not valid."""
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
        """choice [B, H, W], 0 background and k+1 the k-th packed class -> labels 0 or class number + 1."""
        table = F.pad(self.index + 1, (1, 0))
        return table.gather(1, choice.flatten(1)).view_as(choice)


def pack_classes(tags: Tensor, most: int | None = None) -> ClassSet:
    """Tags [B, C] -> the classes present, K = `most` of them an image.

    `most` must be at least the largest number of tags in the batch. Without it that number is read from tags on the
    CPU; on an accelerator, where reading would make the host wait, K is C.
    """
    if most is None:
        most = tags.shape[1] if tags.device.type != "cpu" else int((tags > 0).sum(1).max()) if len(tags) else 1
    most = min(max(most, 1), tags.shape[1])
    present = (tags > 0).to(torch.uint8)
    index = present.argsort(dim=1, descending=True, stable=True)[:, :most]
    return ClassSet(index, present.gather(1, index).bool())


class MultiScaleCam(NamedTuple):
    """Result of `multi_scale_cam`."""

    cams: Tensor
    """[B, K, H, W] in [0, 1] for a ClassSet, [B, C, H, W] for tags; zero for absent classes."""
    affinity: Tensor | None
    """[B, N, N] of the scale asked for."""
    grid: tuple[int, int] | None
    """Token grid (h, w) of that affinity."""


@torch.no_grad()
def multi_scale_cam(
    model: AFANet,
    images: Tensor,
    tags: Tensor | ClassSet,
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    *,
    flip: bool = True,
    affinity_scale: float | None = None,
    base: Tensor | None = None,
    base_affinity: Tensor | None = None,
) -> MultiScaleCam:
    """CAMs of normalised images [B, 3, H, W], summed over scales and normalised per class.

    Each scale's map is the maximum of the image's and its mirror image's, upsampled bilinearly, positive part. Their
    sum is shifted and scaled to [0, 1] over the image.

    base: raw CAMs [B, C, h, w] of the images as they are, when a forward already made them: that forward is not done
    again. affinity_scale: also give the affinity of the (unmirrored) images at this scale; `base_affinity` likewise
    saves that at scale 1.
    """
    classes = tags if isinstance(tags, ClassSet) else pack_classes(tags)
    size = images.shape[-2:]
    total: Tensor | None = None
    affinity: Tensor | None = None
    grid: tuple[int, int] | None = None
    count = len(images)
    wanted = list(scales)
    extra = affinity_scale is not None and affinity_scale not in wanted
    for scale in [*wanted, affinity_scale] if extra else wanted:
        assert scale is not None
        scaled = _scaled(images, scale)
        need_affinity = scale == affinity_scale
        own_base = base if scale == 1 and (not need_affinity or base_affinity is not None) else None
        inputs = []
        if own_base is None:
            inputs.append(scaled)
        if flip and scale in wanted:
            inputs.append(scaled.flip(-1))
        raw: Tensor | None = own_base
        if inputs:
            want = ("cam", "qk") if need_affinity and own_base is None else ("cam",)
            out = model(torch.cat(inputs) if len(inputs) > 1 else inputs[0], want=want)
            assert out.cam is not None
            raw = out.cam if own_base is None else torch.cat([own_base.to(out.cam), out.cam])
            if need_affinity and own_base is None:
                assert out.queries is not None and out.keys is not None
                affinity = model.affinity_head(out.queries[:count], out.keys[:count])
        assert raw is not None
        if need_affinity:
            affinity = base_affinity if affinity is None else affinity
            grid = (raw.shape[2], raw.shape[3])
        if scale not in wanted:
            continue
        maps = classes.gather(raw[:count].float())
        if flip:
            maps = torch.maximum(maps, classes.gather(raw[count:].float()).flip(-1))
        maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False).relu_()
        total = maps if total is None else total.add_(maps)
    assert total is not None
    total -= total.amin((2, 3), keepdim=True)
    total /= total.amax((2, 3), keepdim=True) + 1e-5
    cams = total if isinstance(tags, ClassSet) else classes.scatter(total, tags.shape[1])
    return MultiScaleCam(cams, affinity, grid)


def _scaled(images: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return images
    size = [max(1, int(side * scale)) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
