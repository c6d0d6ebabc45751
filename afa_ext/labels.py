"""Pseudo labels: training labels for a segmentation network when only image-level tags are available.

"Learning Affinity from Attention" (AFA), CVPR 2022, section 3.3: class activation maps are compared with two background
scores and refined by PAR; pixels on which the two results disagree are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native  # noqa: F401  (registers the operators)
from ._checks import check_pseudo_labels, check_refine_labels
from .par import DILATIONS

_ops = torch.ops.afa_ext


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
    """Labels of a batch whose images have different classes, without a loop over images or a device synchronization.

    Images and CAMs are downscaled (bilinear, align_corners=False). For each of the two background scores, the softmax
    over that score and the image's classes is refined by PAR and upsampled to the original size. A pixel where a class
    exceeds even the high score gets that class. A pixel where even the low score is the maximum is background. All
    other pixels are ignored. On ties the background wins, then the class with the lowest position.

    Only the present classes are computed, and only their downscaled maps are stored. Sums are accumulated in float32
    (float64 for float64 ``cams``). Like argmax, the operator has no gradient with respect to any argument.

    Args:
        images: [B, 3, H, W]; uint8, which PAR divides by 255, or floating-point in any range. Any number of channels.
        cams: [B, C, H, W], such as CAMs scaled to [0, 1] per class.
        class_labels: [B, C], nonzero if the image has the class.
        low, high: background scores. If they are equal, no pixel is ignored, as in evaluation.
        box: int64 or int32 [B, 4] (y0, y1, x0, x1; y1 and x1 exclusive); pixels outside are ignored.
        weights: precomputed PAR affinity, [B, 8*len(dilations), H//downscale, W//downscale], from
            `par_affinity` of the downscaled images with the same ``dilations`` and ``w2``; float32 (float64 for
            float64 ``cams``). ``images`` is then not read.
        class_index: int64 or int32 [B, C], the class number of each map if it differs from the map's position.
        max_classes: the maximum number of classes per image in the batch, if known. Without it, CUDA memory is
            proportional to C, and the batch is processed in parts that fit in 1 GiB (at least one image). An image with
            more classes raises an error on the CPU and is ignored entirely on CUDA.
        downscale: PAR works at 1/downscale of the size (at least one pixel).
        dilations, num_iter, w1, w2: as in `par_affinity` and `par_propagate`.
        ignore_index: the label of ignored pixels.

    Returns:
        int64 [B, H, W], as torch's losses and indexing require: 0 background, class number + 1, or ``ignore_index``.

    Raises:
        TypeError, ValueError: an argument is invalid.
        RuntimeError: an image has more than ``max_classes`` classes (CPU only).
    """
    offsets = check_pseudo_labels(
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
    labels: Tensor = _ops.pseudo_labels(
        images.detach(),
        cams.detach(),
        class_labels != 0,
        None if class_index is None else class_index.long(),
        None if box is None else box.long(),
        None if weights is None else weights.detach(),
        float(low),
        float(high),
        downscale,
        offsets,
        num_iter,
        float(w1),
        float(w2),
        max_classes or 0,
        ignore_index,
    )
    return labels


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
    """Labels from score maps with a background map, refined by PAR inside each image's valid box: AFA's walk label
    ("Learning Affinity from Attention", CVPR 2022), computed from the result of `propagate_cams`.

    The scores are upsampled to the image (bilinear, align_corners=False) and cropped to the box. The cropped image and
    scores are downscaled (the scores with align_corners=True, like `par_refine`), refined with the box's edge
    replicated, upsampled again, and compared. Values outside a box have no effect on its labels. With ``low_scores``, a
    pixel where both maps agree is labeled, and a pixel where only the lower background score loses is ignored. All
    other rules are those of `pseudo_labels`.

    Args:
        images: [B, 3, H, W], uint8 or floating-point.
        scores: [B, C+1, h, w], background first; any size.
        class_labels: [B, C], nonzero if the image has the class; the maps of other classes are not read.
        low_scores: like ``scores``, computed with a lower background score.
        box: int64 or int32 [B, 4] (y0, y1, x0, x1; y1 and x1 exclusive), clipped to the image; pixels outside are
            ignored. None: the whole image.
        weights: PAR affinity of the whole images, as in `pseudo_labels`; only without ``box``.
        class_index, max_classes, downscale, dilations, num_iter, w1, w2, ignore_index: as in `pseudo_labels`.

    Returns:
        int64 [B, H, W]: 0 background, class number + 1, or ``ignore_index``.

    Raises:
        TypeError, ValueError: an argument is invalid.
        RuntimeError: an image has more than ``max_classes`` classes (CPU only).
    """
    offsets = check_refine_labels(
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
    labels: Tensor = _ops.refine_labels(
        images.detach(),
        scores.detach(),
        None if low_scores is None else low_scores.detach(),
        class_labels != 0,
        None if class_index is None else class_index.long(),
        None if box is None else box.long(),
        None if weights is None else weights.detach(),
        downscale,
        offsets,
        num_iter,
        float(w1),
        float(w2),
        max_classes or 0,
        ignore_index,
    )
    return labels


@torch.library.register_fake("afa_ext::pseudo_labels")
def _(images: Tensor, cams: Tensor, *settings: Any) -> Tensor:
    batch, _, height, width = cams.shape
    return cams.new_empty(batch, height, width, dtype=torch.int64)


@torch.library.register_fake("afa_ext::refine_labels")
def _(images: Tensor, scores: Tensor, *settings: Any) -> Tensor:
    batch, _, height, width = images.shape
    return scores.new_empty(batch, height, width, dtype=torch.int64)
