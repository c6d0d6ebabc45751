"""Losses of AFA (CVPR 2022).

Segmentation and affinity losses divide sums over pixels or pairs by their counts over the whole batch. If the batch is
split over processes or micro-batches, each part uses the `counts` of the whole batch, and the parts add up to its loss.
The published code instead normalizes in each process separately.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import afa_ext
from afa.config import TrainConfig
from afa.data.classes import IGNORE


def classification_loss(logits: Tensor, tags: Tensor) -> Tensor:
    """Multilabel soft margin: logits and tags (0 or 1) [B, C] -> scalar."""
    return F.multilabel_soft_margin_loss(logits.float(), tags)


ENERGY_UNIT = 1e-7
"""Published weight inside the dense energy loss, which is a sum over all pairs of pixels."""


def energy_loss(images: Tensor, logits: Tensor, labels: Tensor, box: Tensor, config: TrainConfig) -> Tensor:
    """Dense energy loss of the softmax of `logits`: the mean over images, a scalar.

    images uint8 [B, 3, H, W]; logits [B, C+1, h, w], upsampled to the images (bilinear, align_corners=False); labels
    [B, H, W] with 255 where ignored; box [B, 4] on the device: y0, y1, x0, x1 of the crop's valid part. As published,
    pixels outside the box do not count, and the term of a labeled pixel is multiplied by 1 minus its largest
    probability.
    """
    loss = afa_ext.DenseEnergyLoss(ENERGY_UNIT, config.energy_sigma_rgb, config.energy_sigma_xy, config.energy_scale)
    rows = torch.arange(images.shape[2], device=box.device)
    columns = torch.arange(images.shape[3], device=box.device)
    inside_y = (rows >= box[:, :1]) & (rows < box[:, 1:2])
    inside_x = (columns >= box[:, 2:3]) & (columns < box[:, 3:])
    regions = (inside_y[:, :, None] & inside_x[:, None]).float()
    probabilities = upsampled(logits, labels).softmax(1)
    return loss(images, probabilities, regions, labels.unsqueeze(1)).squeeze(0)


def upsampled(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [B, C+1, h, w] -> float32 [B, C+1, H, W] of labels [B, H, W], bilinear (align_corners=False)."""
    logits = logits.float()
    if logits.shape[2:] != labels.shape[1:]:
        logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    return logits


def target_counts(labels: Tensor, pairs: Tensor) -> Tensor:
    """Normalizers of the losses, int64 [5]: background and foreground pixels of labels [B, H, W]; pairs of different
    classes, of background and of one foreground class."""
    background = labels == 0
    foreground = ~background & (labels != IGNORE)
    return torch.stack([kind.sum() for kind in (background, foreground, pairs == 0, pairs == 1, pairs == 2)])


def segmentation_loss(logits: Tensor, labels: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean of the average cross-entropies over background and over foreground pixels; 255 is ignored.

    logits [B, C+1, h, w] are upsampled to labels [B, H, W] (bilinear, align_corners=False). Background or foreground
    without pixels contributes 0. counts: `target_counts` of the whole batch, if this is a part of it.
    """
    logits = upsampled(logits, labels)
    entropy = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none")
    background = labels == 0
    foreground = ~background & (labels != IGNORE)
    backgrounds, foregrounds = (background.sum(), foreground.sum()) if counts is None else counts[:2]
    # Per-pixel weights compute both means in one sum, without indexing and without synchronization.
    weight = background * (0.5 / backgrounds.clamp(min=1)) + foreground * (0.5 / foregrounds.clamp(min=1))
    return (entropy * weight).sum()


def affinity_loss(
    affinity: Tensor, pairs: Tensor, counts: Tensor | None = None, object_share: float | None = None
) -> tuple[Tensor, Tensor]:
    """`afa_ext.affinity_loss_and_sums` for pairs 0 (different classes), 1 (background) and 2 (one foreground class).

    object_share: the share of the foreground pairs in the loss of pairs of the same class. None: in proportion to their
    number, which is the published loss. counts: `target_counts` of the whole batch, if this is a part of it.

    Returns the loss, and [2, 3]: the sums of the affinity over the three groups of pairs, and their numbers.
    """
    if object_share is not None:
        weights = (0.5, 0.5 * (1 - object_share), 0.5 * object_share)
        return afa_ext.affinity_loss_and_sums(
            affinity, pairs, weights=weights, counts=None if counts is None else counts[2:]
        )
    if counts is None:
        different, background, foreground = ((pairs == group).sum() for group in range(3))
    else:
        different, background, foreground = counts[2:].unbind()
    same = background + foreground
    # Both groups of the same class are divided by their common number: they are one mean.
    shared = torch.stack([different, same, same])
    return afa_ext.affinity_loss_and_sums(affinity, pairs, weights=(0.5, 0.5, 0.5), counts=shared)
