"""Pseudo labels from class activation maps (AFA, CVPR 2022, section 3.3) in plain PyTorch, as published: one image at a
time, with a separate refinement for each background score.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_pseudo_labels, check_refine_labels
from .par import DILATIONS, par_affinity, par_propagate, par_refine


def shrink(x: Tensor, downscale: int) -> Tensor:
    """[B, C, H, W] -> [B, C, H//downscale, W//downscale] (at least one pixel), bilinear."""
    size = [max(1, side // downscale) for side in x.shape[2:]]
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def present_classes(class_labels: Tensor, image: int, max_classes: int | None) -> Tensor:
    """The class numbers of one image."""
    present = class_labels.nonzero()[:, 0]
    if max_classes is not None and len(present) > max_classes:
        raise RuntimeError(f"max_classes is {max_classes}, but image {image} has {len(present)} classes")
    return present


def refined_scores(
    images: Tensor,
    cams: Tensor,
    background: float,
    *,
    weights: Tensor | None = None,
    downscale: int = 2,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    w1: float = 0.3,
    w2: float = 0.01,
) -> Tensor:
    """CAMs [B, K, H, W] of present classes and a background score -> [B, K+1, H, W], background first."""
    scores = F.pad(cams, (0, 0, 0, 0, 1, 0), value=background)
    scores = shrink(scores, downscale).softmax(dim=1)
    if weights is None:
        weights = par_affinity(shrink(images, downscale), dilations=dilations, w1=w1, w2=w2)
    scores = par_propagate(weights, scores, dilations=dilations, num_iter=num_iter)
    return F.interpolate(scores, size=cams.shape[2:], mode="bilinear", align_corners=False)


@torch.no_grad()
def pseudo_labels(
    images: Tensor,
    cams: Tensor,
    class_labels: Tensor,
    *,
    low: float = 0.35,
    high: float = 0.55,
    box: Tensor | None = None,
    weights: Tensor | None = None,
    class_index: Tensor | None = None,
    max_classes: int | None = None,
    downscale: int = 2,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    w1: float = 0.3,
    w2: float = 0.01,
    ignore_index: int = 255,
) -> Tensor:
    """Reference implementation of `afa_ext.pseudo_labels`."""
    dilations = check_pseudo_labels(
        images,
        cams,
        class_labels,
        low,
        high,
        box,
        weights,
        class_index,
        max_classes,
        downscale,
        dilations,
        num_iter,
        w1,
        w2,
        ignore_index,
    )
    batch, classes, height, width = cams.shape
    wide = torch.float64 if cams.dtype == torch.float64 else torch.float32
    labels = torch.zeros(batch, height, width, dtype=torch.int64, device=cams.device)
    if labels.numel() == 0:
        return labels
    colors = images.to(wide) / 255 if images.dtype == torch.uint8 else images.to(wide)
    if class_index is None:
        class_index = torch.arange(classes, device=cams.device).expand(batch, classes)
    for i in range(batch):
        present = present_classes(class_labels[i], i, max_classes)
        numbers = F.pad(class_index[i, present].long() + 1, (1, 0))
        against_low, against_high = (
            numbers[
                refined_scores(
                    colors[i : i + 1],
                    cams[i : i + 1, present].to(wide),
                    background,
                    weights=None if weights is None else weights[i : i + 1],
                    downscale=downscale,
                    dilations=dilations,
                    num_iter=num_iter,
                    w1=w1,
                    w2=w2,
                ).argmax(dim=1)[0]
            ]
            for background in (low, high)
        )
        labels[i] = against_high.masked_fill((against_high == 0) & (against_low != 0), ignore_index)
        if box is not None:
            y0, y1, x0, x1 = box[i].tolist()
            inside = torch.zeros_like(labels[i], dtype=torch.bool)
            inside[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
            labels[i].masked_fill_(~inside, ignore_index)
    return labels


def refined_in_box(
    images: Tensor,
    scores: Tensor,
    box: tuple[int, int, int, int],
    *,
    weights: Tensor | None = None,
    downscale: int = 2,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    w1: float = 0.3,
    w2: float = 0.01,
) -> Tensor:
    """Scores [B, M, h, w] of images [B, 3, H, W], upsampled, cropped to the box that all share, and refined there."""
    y0, y1, x0, x1 = box
    maps = F.interpolate(scores, size=images.shape[2:], mode="bilinear", align_corners=False)[:, :, y0:y1, x0:x1]
    colors = shrink(images[:, :, y0:y1, x0:x1], downscale)
    if weights is None:
        refined = par_refine(colors, maps, dilations=dilations, num_iter=num_iter, w1=w1, w2=w2)
    else:
        small = F.interpolate(maps, size=colors.shape[2:], mode="bilinear", align_corners=True)
        refined = par_propagate(weights, small, dilations=dilations, num_iter=num_iter)
    return F.interpolate(refined, size=maps.shape[2:], mode="bilinear", align_corners=False)


@torch.no_grad()
def refine_labels(
    images: Tensor,
    scores: Tensor,
    class_labels: Tensor,
    *,
    low_scores: Tensor | None = None,
    box: Tensor | None = None,
    weights: Tensor | None = None,
    class_index: Tensor | None = None,
    max_classes: int | None = None,
    downscale: int = 2,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    w1: float = 0.3,
    w2: float = 0.01,
    ignore_index: int = 255,
) -> Tensor:
    """Reference implementation of `afa_ext.refine_labels`."""
    dilations = check_refine_labels(
        images,
        scores,
        class_labels,
        low_scores,
        box,
        weights,
        class_index,
        max_classes,
        downscale,
        dilations,
        num_iter,
        w1,
        w2,
        ignore_index,
    )
    batch, _, height, width = images.shape
    classes = scores.shape[1] - 1
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    labels = torch.full((batch, height, width), ignore_index, device=scores.device)
    colors = images.to(wide) / 255 if images.dtype == torch.uint8 else images.to(wide)
    if class_index is None:
        class_index = torch.arange(classes, device=scores.device).expand(batch, classes)
    for i in range(batch):
        present = present_classes(class_labels[i], i, max_classes)
        numbers = F.pad(class_index[i, present].long() + 1, (1, 0))
        maps = F.pad(present + 1, (1, 0))
        y0, y1, x0, x1 = (0, height, 0, width) if box is None else box[i].clamp(min=0).tolist()
        if 0 in labels[i, y0:y1, x0:x1].shape:
            continue
        against_low, against_high = (
            numbers[
                refined_in_box(
                    colors[i : i + 1],
                    given[i : i + 1, maps].to(wide),
                    (y0, y1, x0, x1),
                    weights=None if weights is None else weights[i : i + 1],
                    downscale=downscale,
                    dilations=dilations,
                    num_iter=num_iter,
                    w1=w1,
                    w2=w2,
                ).argmax(dim=1)[0]
            ]
            for given in (scores if low_scores is None else low_scores, scores)
        )
        unsure = (against_high == 0) & (against_low != 0)
        labels[i, y0:y1, x0:x1] = against_high.masked_fill(unsure, ignore_index)
    return labels
