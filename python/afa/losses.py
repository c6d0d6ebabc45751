"""Losses of AFA (CVPR 2022): classification and segmentation. That of the affinity is `afa_ext.affinity_loss`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from afa.metrics import IGNORE


def classification_loss(logits: Tensor, tags: Tensor) -> Tensor:
    """Multilabel soft margin: logits and tags (0 or 1) [B, C] -> scalar."""
    return F.multilabel_soft_margin_loss(logits.float(), tags)


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Half the cross-entropy over background pixels plus half that over foreground pixels, so that neither swamps the
    other; 255 is ignored.

    logits [B, C+1, h, w] are upsampled to labels [B, H, W] (bilinear, align_corners=False). A kind of pixel the batch
    has none of adds 0 (a plain mean would be nan).
    """
    logits = logits.float()
    if logits.shape[2:] != labels.shape[1:]:
        logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    entropy = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none")
    background = labels == 0
    foreground = ~background & (labels != IGNORE)
    # One weight a pixel, 1/2 over the count of its kind: both means in one sum, with no pixel gathered and no wait.
    weight = background * (0.5 / background.sum().clamp(min=1)) + foreground * (0.5 / foreground.sum().clamp(min=1))
    return (entropy * weight).sum()
