"""The three losses of AFA (CVPR 2022): classification, segmentation and affinity."""

from __future__ import annotations

import torch
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


def affinity_labels(label_map: Tensor, *, stride: int = 16, radius: int) -> Tensor:
    """Pairs of tokens from a label map [B, H, W] -> uint8 [B, N, N]: 1 same label, 0 different, 255 where either is
    ignored or the pair lies outside the window (Chebyshev distance above `radius`, tokens).

    The map is read at every `stride`-th pixel (nearest), so N = ceil(H/stride) * ceil(W/stride).
    """
    tokens = label_map[:, ::stride, ::stride]
    rows, columns = tokens.shape[1:]
    flat = tokens.flatten(1)
    same = flat.unsqueeze(2) == flat.unsqueeze(1)
    known = flat != IGNORE
    valid = known.unsqueeze(2) & known.unsqueeze(1) & _window((rows, columns), radius, label_map.device)
    return torch.where(valid, same.to(torch.uint8), IGNORE)


def affinity_loss(affinity: Tensor, labels: Tensor) -> Tensor:
    """affinity [B, N, N] in (0, 1), labels [B, N, N] of `affinity_labels` -> 1/2 sum_same(1 - A)/(n_same + 1) +
    1/2 sum_different(A)/(n_different + 1), counted over the whole batch."""
    affinity = affinity.float()
    same = labels == 1
    different = labels == 0
    n_same, n_different = same.sum(), different.sum()
    # sum_same(1 - A) = n_same - sum_same(A): one weight a pair, one sum over all.
    weight = different * (0.5 / (n_different + 1)) - same * (0.5 / (n_same + 1))
    return (affinity * weight).sum() + 0.5 * n_same / (n_same + 1)


def _window(grid: tuple[int, int], radius: int, device: torch.device) -> Tensor:
    """bool [N, N]: pairs of tokens at most `radius` apart along both axes."""
    row = torch.arange(grid[0], device=device)
    column = torch.arange(grid[1], device=device)
    near_rows = (row[:, None] - row).abs() <= radius
    near_columns = (column[:, None] - column).abs() <= radius
    near = near_rows[:, None, :, None] & near_columns[None, :, None, :]
    return near.reshape(grid[0] * grid[1], grid[0] * grid[1])
