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
from afa.data.classes import IGNORE


def classification_loss(logits: Tensor, tags: Tensor) -> Tensor:
    """Multilabel soft margin: logits and tags (0 or 1) [B, C] -> scalar."""
    return F.multilabel_soft_margin_loss(logits.float(), tags)


def target_counts(labels: Tensor, pairs: Tensor) -> Tensor:
    """Normalizers of the losses, int64 [4]: background and foreground pixels of labels [B, H, W], same and different
    pairs of affinity labels."""
    background = labels == 0
    foreground = ~background & (labels != IGNORE)
    return torch.stack([kind.sum() for kind in (background, foreground, pairs == 1, pairs == 0)])


def segmentation_loss(logits: Tensor, labels: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean of the average cross-entropies over background and over foreground pixels; 255 is ignored.

    logits [B, C+1, h, w] are upsampled to labels [B, H, W] (bilinear, align_corners=False). Background or foreground
    without pixels contributes 0. counts: `target_counts` of the whole batch, if this is a part of it.
    """
    logits = logits.float()
    if logits.shape[2:] != labels.shape[1:]:
        logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    entropy = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none")
    background = labels == 0
    foreground = ~background & (labels != IGNORE)
    backgrounds, foregrounds = (background.sum(), foreground.sum()) if counts is None else counts[:2]
    # Per-pixel weights compute both means in one sum, without indexing and without synchronization.
    weight = background * (0.5 / backgrounds.clamp(min=1)) + foreground * (0.5 / foregrounds.clamp(min=1))
    return (entropy * weight).sum()


def affinity_loss(affinity: Tensor, pairs: Tensor, counts: Tensor | None = None) -> Tensor:
    """`afa_ext.affinity_loss`; counts: `target_counts` of the whole batch, if this is a part of it."""
    if counts is None:
        return afa_ext.affinity_loss(affinity, pairs)
    # The operator divides by its own counts. With one kind of pairs per call, a factor corrects the normalization.
    parts = []
    for kind, whole in ((1, counts[2]), (0, counts[3])):
        chosen = pairs == kind
        own = afa_ext.affinity_loss(affinity, pairs.masked_fill(~chosen, IGNORE))
        parts.append(own * ((chosen.sum() + 1) / (whole + 1)))
    return parts[0] + parts[1]
