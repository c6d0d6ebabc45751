"""Losses of AFA (CVPR 2022).

Segmentation and affinity loss divide sums over pixels or pairs by their counts over a whole batch. Where that batch is
divided among processes or micro-batches, each part's loss is computed with the `counts` of the whole, and the parts add
up to the loss of the whole batch; the published code instead treats each process's images as a batch of their own.
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
    """What the losses divide by, int64 [4]: background and foreground pixels of labels [B, H, W], like and unlike
    pairs of affinity labels."""
    background = labels == 0
    foreground = ~background & (labels != IGNORE)
    return torch.stack([kind.sum() for kind in (background, foreground, pairs == 1, pairs == 0)])


def segmentation_loss(logits: Tensor, labels: Tensor, counts: Tensor | None = None) -> Tensor:
    """Half the cross-entropy over background pixels plus half that over foreground pixels, so that neither swamps the
    other; 255 is ignored.

    logits [B, C+1, h, w] are upsampled to labels [B, H, W] (bilinear, align_corners=False). A kind of pixel the batch
    has none of adds 0 (a plain mean would be nan). counts: `target_counts` of the whole batch, when this is a part.
    """
    logits = logits.float()
    if logits.shape[2:] != labels.shape[1:]:
        logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    entropy = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none")
    background = labels == 0
    foreground = ~background & (labels != IGNORE)
    backgrounds, foregrounds = (background.sum(), foreground.sum()) if counts is None else counts[:2]
    # One weight a pixel, 1/2 over the count of its kind: both means in one sum, with no pixel gathered and no wait.
    weight = background * (0.5 / backgrounds.clamp(min=1)) + foreground * (0.5 / foregrounds.clamp(min=1))
    return (entropy * weight).sum()


def affinity_loss(affinity: Tensor, pairs: Tensor, counts: Tensor | None = None) -> Tensor:
    """`afa_ext.affinity_loss`; counts: `target_counts` of the whole batch, when this is a part of it."""
    if counts is None:
        return afa_ext.affinity_loss(affinity, pairs)
    # The operator divides by the counts it finds: of each kind of pairs alone, that is undone by one factor.
    parts = []
    for kind, whole in ((1, counts[2]), (0, counts[3])):
        chosen = pairs == kind
        own = afa_ext.affinity_loss(affinity, pairs.masked_fill(~chosen, IGNORE))
        parts.append(own * ((chosen.sum() + 1) / (whole + 1)))
    return parts[0] + parts[1]
