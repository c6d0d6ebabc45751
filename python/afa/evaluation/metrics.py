"""Metrics: mean IoU, pixel and mean accuracy from a confusion matrix, and F1 of the image tags."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afa.data.classes import IGNORE


class SegmentationMetrics:
    """Confusion matrix over `num_classes` classes (including background), and the scores computed from it.

    The matrix stays on the device of the inputs, so `update` never synchronizes with the GPU.
    """

    def __init__(self, num_classes: int) -> None:
        if not 1 <= num_classes <= IGNORE:
            raise ValueError(f"num_classes must be 1 to {IGNORE}, got {num_classes}")
        self.num_classes = num_classes
        self.confusion: Tensor | None = None

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add pred [B,H,W] and target [B,H,W]: integers in [0, num_classes); 255 in target is ignored.

        A prediction outside the classes, such as an ignored pixel of a pseudo label, is a false negative of the true
        class and a false positive of no class.
        """
        if pred.shape != target.shape:
            raise ValueError(
                f"pred and target must have the same shape, got {tuple(pred.shape)} and {tuple(target.shape)}"
            )
        for name, labels in (("pred", pred), ("target", target)):
            if labels.dtype.is_floating_point or labels.dtype == torch.bool:
                raise TypeError(f"{name} must contain integers, got {labels.dtype}")
        self.add(count_pixels(pred.reshape(1, -1), target.reshape(1, -1), self.num_classes)[0])

    def add(self, counts: Tensor) -> None:
        """Add counts of `count_pixels`: int64 [num_classes, num_classes + 1]."""
        self.confusion = counts if self.confusion is None else self.confusion + counts.to(self.confusion.device)

    def compute(self) -> dict[str, Any]:
        """Return `miou`, `iou` (one value per class), `pixel_acc`, `mean_acc` and `confusion` (rows: true classes,
        columns: predicted classes).

        IoU is nan for a class that is neither present nor predicted, and 0 for one that is predicted but never present.
        Both means are over the classes present in the targets, as in the published code.
        """
        n = self.num_classes
        counts = torch.zeros(n, n + 1) if self.confusion is None else self.confusion.cpu()
        counts = counts.double()
        hit = counts[:, :n].diagonal()
        present = counts.sum(1)
        union = present + counts[:, :n].sum(0) - hit
        iou = hit / union
        return {
            "miou": float(iou[present > 0].mean()),
            "iou": iou.tolist(),
            "pixel_acc": float(hit.sum() / present.sum()),
            "mean_acc": float((hit / present)[present > 0].mean()),
            "confusion": counts[:, :n].long().tolist(),
        }


class AffinityMetrics:
    """Mean affinity of three groups of token pairs, and how well the affinity separates objects.

    Sums stay on the device of the inputs, so `update` never synchronizes with the GPU.
    """

    BINS = 1000

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        """float64 [2, 3]: sums of the affinity over pairs of different classes, of background and of one foreground
        class; numbers of these pairs."""
        self.histograms: Tensor | None = None
        """int64 [2, BINS]: pairs from a foreground token, by affinity: to another class, to the same class."""

    def update(self, affinity: Tensor, pairs: Tensor) -> None:
        """Add affinity [B, N, N] in [0, 1] and pairs [B, N, N] of `afa_ext.affinity_labels` with a background. Pairs of
        a token with itself are not counted."""
        affinity = affinity.float()
        foreground = pairs.diagonal(dim1=1, dim2=2) == 2
        pairs = pairs.clone()
        pairs.diagonal(dim1=1, dim2=2).fill_(IGNORE)
        sums = torch.stack(
            [
                torch.stack([(affinity * (pairs == group)).sum(dtype=torch.float64) for group in range(3)]),
                torch.stack([(pairs == group).sum() for group in range(3)]).double(),
            ]
        )
        bins = (affinity * self.BINS).long().clamp(0, self.BINS - 1)
        histograms = torch.stack(
            [
                torch.zeros(self.BINS, dtype=torch.int64, device=affinity.device).scatter_add_(
                    0, bins.flatten(), ((pairs == group) & foreground.unsqueeze(2)).flatten().long()
                )
                for group in (0, 2)
            ]
        )
        self.add(sums, histograms)

    def add(self, sums: Tensor, histograms: Tensor) -> None:
        """Add `sums` and `histograms` of another object."""
        self.sums = sums if self.sums is None else self.sums + sums
        self.histograms = histograms if self.histograms is None else self.histograms + histograms

    def compute(self) -> dict[str, float]:
        """`different`, `background` and `object`: mean affinities of the three groups. `auc`: the probability that,
        from a foreground token, a random token of its class has a higher affinity than a random token of another class
        (area under the ROC curve; 0.5 is chance). nan without such pairs."""
        if self.sums is None or self.histograms is None:
            return dict.fromkeys(("different", "background", "object", "auc"), float("nan"))
        total, pairs = self.sums.cpu()
        different, background, same = (total / pairs).tolist()
        other, own = self.histograms.double().cpu()
        below = other.cumsum(0) - other / 2  # ties count half
        auc = float((own * below).sum() / (own.sum() * other.sum()))
        return {"different": different, "background": background, "object": same, "auc": auc}


def image_scores(pred: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Mean IoU of each image over the classes present in its target: float64 [B] for inputs [B,H,W].

    nan for an image with only ignored pixels.
    """
    counts = count_pixels(pred.flatten(1), target.flatten(1), num_classes).double()
    hit = counts[:, :, :num_classes].diagonal(dim1=1, dim2=2)
    present = counts.sum(2)
    union = present + counts[:, :, :num_classes].sum(1) - hit
    there = present > 0
    return torch.where(there, hit / union.clamp(min=1), 0).sum(1) / there.sum(1)


def count_pixels(pred: Tensor, target: Tensor, n: int) -> Tensor:
    """Confusion matrices int64 [B,n,n+1] of pixels [B,P], rows: targets; the last column counts predictions outside the
    classes."""
    target = target.long()
    pred = pred.to(target)
    # An extra row and column collect values outside the classes. Selecting pixels with a mask would synchronize with
    # the GPU.
    row = torch.where((target >= 0) & (target < n), target, n)
    column = torch.where((pred >= 0) & (pred < n), pred, n)
    counts = torch.zeros(len(target), (n + 1) ** 2, dtype=torch.int64, device=target.device)
    counts.scatter_add_(1, row * (n + 1) + column, torch.ones_like(row))
    return counts.view(-1, n + 1, n + 1)[:, :n]


def classification_f1(scores: Tensor, tags: Tensor, threshold: float = 0.0) -> float:
    """Mean over images of the F1 between `scores > threshold` and `tags`, both [B,C]; scores are logits.

    An image without tags scores 1 if nothing is predicted and 0 otherwise.
    """
    if scores.shape != tags.shape or scores.dim() != 2:
        raise ValueError(f"scores and tags must both be [B,C], got {tuple(scores.shape)} and {tuple(tags.shape)}")
    predicted = scores > threshold
    true = tags > 0.5
    both = (predicted & true).sum(1)
    total = predicted.sum(1) + true.sum(1)
    return float(torch.where(total == 0, 1.0, 2.0 * both / total.clamp(min=1)).mean())
