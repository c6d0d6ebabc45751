"""Pseudo labels: what a segmentation network learns from when only image tags are given.

"Learning Affinity from Attention" (AFA), CVPR 2022, section 3.3: class activation maps against two background scores,
refined by PAR, and the pixels the two disagree on ignored.
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
    """Labels of a batch whose images have different classes, without a loop over images or a wait for the device.

    Images and CAMs are shrunk (bilinear, align_corners=False). For each of the two background scores the softmax over
    that score and the image's own classes is refined by PAR and enlarged again. A pixel where a class beats even the
    high score takes that class, one where even the low score wins is background, and any other is ignored. Equal
    scores go to the background, then to the class that comes first.

    Only the present classes are computed and only their shrunken maps are stored; the sums are formed in float32
    (float64 for float64 ``cams``). Labels have no gradient: as with argmax, none flows to any argument.

    Args:
        images: [B, 3, H, W]; uint8, which PAR compares over 255, or floating-point of any range. Any number of
            channels.
        cams: [B, C, H, W], such as CAMs scaled to [0, 1] for each class.
        class_labels: [B, C], nonzero where the image has the class.
        low, high: the background's scores. Equal ones leave nothing to ignore: what evaluation scores.
        box: int64 or int32 [B, 4] (y0, y1, x0, x1; the ends y1 and x1 excluded); pixels outside are ignored.
        weights: PAR's affinity where it is at hand, [B, 8*len(dilations), H//downscale, W//downscale] from
            :func:`par_affinity` of the shrunken images with the same ``dilations`` and ``w2``; float32 (float64 for
            float64 ``cams``). ``images`` is then not read.
        class_index: int64 or int32 [B, C], the class number of each map where that isn't its position.
        max_classes: the most classes an image of the batch has, where it is known. On CUDA memory otherwise
            goes with C, for as many images at a time as fit in 1 GiB (at least one). An image with more raises on the
            CPU and is ignored as a whole on CUDA.
        downscale: PAR works at 1/downscale of the size (at least one pixel).
        dilations, num_iter, w1, w2: as in :func:`par_affinity` and :func:`par_propagate`.
        ignore_index: the label of ignored pixels.

    Returns:
        int64 [B, H, W], the type torch's losses and indexing take: 0 background, class number + 1, ``ignore_index``.

    Raises:
        TypeError, ValueError: an argument is not as stated.
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
    ("Learning Affinity from Attention", CVPR 2022), from what :func:`propagate_cams` returns.

    The scores are enlarged to the image (bilinear, align_corners=False) and cut to the box. Image and scores of the box
    are shrunk, the scores with align_corners=True as :func:`par_refine` resizes them, refined with the box's edge
    replicated, enlarged again, and compared. Nothing outside a box has a part in its labels. With ``low_scores``, a
    pixel where both maps agree is labelled, one where only the lower background loses is ignored; see
    :func:`pseudo_labels`, which this follows in all else.

    Args:
        images: [B, 3, H, W], uint8 or floating-point.
        scores: [B, C+1, h, w], the background first; any size.
        class_labels: [B, C], nonzero where the image has the class; the maps of others are not read.
        low_scores: like ``scores``, against a lower background score.
        box: int64 or int32 [B, 4] (y0, y1, x0, x1; the ends y1 and x1 excluded), clipped to the image; pixels outside
            are ignored. None: the whole image.
        weights: PAR's affinity of the whole images, as in :func:`pseudo_labels`; only without ``box``.
        class_index, max_classes, downscale, dilations, num_iter, w1, w2, ignore_index: as in :func:`pseudo_labels`.

    Returns:
        int64 [B, H, W]: 0 background, class number + 1, ``ignore_index``.

    Raises:
        TypeError, ValueError: an argument is not as stated.
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
