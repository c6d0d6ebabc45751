"""Pixel-adaptive refinement (PAR; AFA, CVPR 2022, section 3.3) and its predecessor PAMR (1-stage-wseg, CVPR 2020,
section 3.3) in plain PyTorch, as published.

A convolution of a padded copy with eight one-hot 3x3 kernels gathers the neighbors of each dilation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_pamr_affinity, check_par_affinity, check_par_propagate, check_par_refine

DILATIONS = (1, 2, 4, 8, 12, 24)
RING = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def neighbors(x: Tensor, dilations: Sequence[int]) -> Tensor:
    """[B, C, H, W] -> [B, C, 8*len(dilations), H, W]: the 8 neighbors at every dilation, borders replicated."""
    batch, channels, height, width = x.shape
    pick = x.new_zeros(8, 1, 3, 3)
    for index, (dy, dx) in enumerate(RING):
        pick[index, 0, dy + 1, dx + 1] = 1
    planes = x.reshape(batch * channels, 1, height, width)
    rings = []
    for d in dilations:
        padded = F.pad(planes, (d, d, d, d), mode="replicate")
        rings.append(F.conv2d(padded, pick, dilation=d).view(batch, channels, 8, height, width))
    return torch.cat(rings, dim=2)


def position_weights(dilations: Sequence[int], w1: float) -> Tensor:
    """Softmax of the position logits over the neighbors: float64 [8*len(dilations)]."""
    distance = torch.tensor(
        [d * math.sqrt(dy * dy + dx * dx) for d in dilations for dy, dx in RING], dtype=torch.float64
    )
    logits = -((distance / ((distance.std() + 1e-8) * w1)) ** 2)
    return logits.softmax(0)


def par_affinity(
    images: Tensor,
    *,
    dilations: Sequence[int] = DILATIONS,
    w1: float = 0.3,
    w2: float = 0.01,
) -> Tensor:
    """Reference implementation of `afa_ext.par_affinity`."""
    dilations = check_par_affinity(images, dilations, w1, w2)
    wide = images if images.dtype == torch.float64 else images.float()  # sigma near 0 overflows half precision
    if wide.numel() == 0:
        return images.new_empty(images.shape[0], 8 * len(dilations), *images.shape[2:])
    ring = neighbors(wide, dilations)
    difference = (ring - wide.unsqueeze(2)).abs()
    sigma = ring.std(dim=2, keepdim=True)
    logits = -((difference / ((sigma + 1e-8) * w1)) ** 2)
    color = logits.mean(dim=1).softmax(dim=1)
    position = position_weights(dilations, w1).to(color)
    return (color + w2 * position.view(1, -1, 1, 1)).to(images.dtype)


def pamr_affinity(images: Tensor, *, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """Reference implementation of `afa_ext.pamr_affinity`."""
    dilations = check_pamr_affinity(images, dilations)
    wide = images if images.dtype == torch.float64 else images.float()
    if wide.numel() == 0:
        return images.new_empty(images.shape[0], 8 * len(dilations), *images.shape[2:])
    ring, center = neighbors(wide, dilations), wide.unsqueeze(2)
    sigma = torch.cat([ring, center.expand(-1, -1, len(dilations), -1, -1)], dim=2).std(dim=2, keepdim=True)
    logits = -(ring - center).abs() / (1e-8 + 0.1 * sigma)
    return logits.mean(dim=1).softmax(dim=1).to(images.dtype)


def par_propagate(
    weights: Tensor,
    masks: Tensor,
    *,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    class_mask: Tensor | None = None,
) -> Tensor:
    """Reference implementation of `afa_ext.par_propagate`."""
    dilations = check_par_propagate(weights, masks, dilations, num_iter, class_mask)
    wide = masks if masks.dtype == torch.float64 else masks.float()
    weights = weights.to(wide.dtype)
    if class_mask is not None:
        wide = wide.masked_fill(~class_mask[:, :, None, None], 0)
    if wide.numel():
        for _ in range(num_iter):
            wide = (neighbors(wide, dilations) * weights.unsqueeze(1)).sum(dim=2)
    if class_mask is not None:  # again: 0 times a NaN weight is NaN
        wide = wide.masked_fill(~class_mask[:, :, None, None], 0)
    return wide.to(masks.dtype)


def par_refine(
    images: Tensor,
    masks: Tensor,
    *,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    w1: float = 0.3,
    w2: float = 0.01,
    class_mask: Tensor | None = None,
    resize: str = "mask_to_image",
) -> Tensor:
    """Reference implementation of `afa_ext.par_refine`."""
    images, masks = of_one_size(images, masks, class_mask, resize)
    weights = par_affinity(images, dilations=dilations, w1=w1, w2=w2)
    return propagate(weights, masks, dilations, num_iter, class_mask)


def pamr_refine(
    images: Tensor,
    masks: Tensor,
    *,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    class_mask: Tensor | None = None,
    resize: str = "mask_to_image",
) -> Tensor:
    """Reference implementation of `afa_ext.pamr_refine`."""
    images, masks = of_one_size(images, masks, class_mask, resize)
    weights = pamr_affinity(images, dilations=dilations)
    return propagate(weights, masks, dilations, num_iter, class_mask)


def of_one_size(images: Tensor, masks: Tensor, class_mask: Tensor | None, resize: str) -> tuple[Tensor, Tensor]:
    check_par_refine(images, masks, class_mask, resize)
    if images.shape[2:] != masks.shape[2:]:
        if resize == "mask_to_image":
            masks = F.interpolate(masks, size=images.shape[2:], mode="bilinear", align_corners=True)
        else:
            images = F.interpolate(images, size=masks.shape[2:], mode="bilinear", align_corners=True)
    return images, masks


def propagate(
    weights: Tensor, masks: Tensor, dilations: Sequence[int], num_iter: int, class_mask: Tensor | None
) -> Tensor:
    dtype = torch.promote_types(weights.dtype, masks.dtype)
    weights, masks = weights.to(dtype), masks.to(dtype)
    return par_propagate(weights, masks, dilations=dilations, num_iter=num_iter, class_mask=class_mask)


class PAR(nn.Module):
    """Reference implementation of `afa_ext.PAR`."""

    def __init__(self, dilations: Sequence[int], num_iter: int, *, resize: str = "mask_to_image") -> None:
        super().__init__()
        self.dilations = dilations
        self.num_iter = num_iter
        self.resize = resize

    def forward(self, imgs: Tensor, masks: Tensor) -> Tensor:
        return par_refine(imgs, masks, dilations=self.dilations, num_iter=self.num_iter, resize=self.resize)


class PAMR(nn.Module):
    """Reference implementation of `afa_ext.PAMR`."""

    def __init__(self, num_iter: int = 1, dilations: Sequence[int] = (1,), *, resize: str = "mask_to_image") -> None:
        super().__init__()
        self.num_iter = num_iter
        self.dilations = dilations
        self.resize = resize

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return pamr_refine(x, mask, dilations=self.dilations, num_iter=self.num_iter, resize=self.resize)
