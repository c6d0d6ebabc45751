"""Pseudo labels from CAMs: thresholds, PAR, and the affinity walk (AFA, CVPR 2022).

Everything works on whole batches. Images with different tags share one set of packed maps (`ClassSet`), and nothing
reads a tensor back to the host.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import afa_ext
from afa.config import LabelConfig
from afa.evaluation.metrics import IGNORE
from afa.labeling.cam import ClassSet


def threshold_labels(cams: Tensor, classes: ClassSet, background: float) -> Tensor:
    """The largest of a constant background score and the CAMs [B, K, H, W] -> int64 [B, H, W], 0 background."""
    return classes.labels(_choose(cams, background))


def par_labels(
    images: Tensor,
    cams: Tensor,
    classes: ClassSet,
    config: LabelConfig,
    *,
    box: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """PAR label: per threshold the softmax over background score and CAMs at reduced size, refined by PAR, upsampled,
    argmax. Background where even the low score wins, a class where even the high one loses, ignored (255) between and
    outside `box` [B, 4] (y0, y1, x0, x1).

    images uint8 [B, 3, H, W], cams [B, K, H, W] -> int64 [B, H, W]. weights: PAR's affinity of the images where it is
    at hand already (`par_weights`).
    """
    return afa_ext.pseudo_labels(
        images,
        cams,
        classes.valid,
        low=config.low,
        high=config.high,
        box=box,
        weights=weights,
        class_index=classes.index,
        **_par_settings(config),
    )


def par_label_single(images: Tensor, cams: Tensor, classes: ClassSet, config: LabelConfig, background: float) -> Tensor:
    """PAR label against one background score, with nothing ignored: what evaluation scores. int64 [B, H, W]."""
    return afa_ext.pseudo_labels(
        images,
        cams,
        classes.valid,
        low=background,
        high=background,
        class_index=classes.index,
        **_par_settings(config),
    )


@torch.no_grad()
def par_weights(images: Tensor, config: LabelConfig) -> Tensor:
    """PAR's affinity of uint8 images [B, 3, H, W] at reduced size: once an image, for every threshold and label."""
    small = [max(1, side // config.par_downscale) for side in images.shape[2:]]
    colours = F.interpolate(images.float() / 255, size=small, mode="bilinear", align_corners=False)
    return afa_ext.par_affinity(colours, dilations=config.par_dilations)


@torch.no_grad()
def walk_scores(
    cams: Tensor,
    affinity: Tensor,
    grid: tuple[int, int],
    classes: ClassSet,
    config: LabelConfig,
    background: float,
) -> Tensor:
    """CAMs [B, K, H, W] on the token grid, walked by affinity [B, N, N] against a background score:
    [B, K+1, h, w], background first."""
    tokens = F.interpolate(cams, size=grid, mode="bilinear", align_corners=False)
    return afa_ext.propagate_cams(
        tokens,
        affinity,
        classes.valid,
        radius=config.walk_radius,
        background=background,
        power=config.walk_power,
        steps=config.walk_steps,
        eps=config.walk_eps,
    )


@torch.no_grad()
def walk_label_single(
    cams: Tensor,
    affinity: Tensor,
    grid: tuple[int, int],
    classes: ClassSet,
    config: LabelConfig,
    background: float,
) -> Tensor:
    """Argmax of the walked CAMs against one background score, upsampled, not refined. int64 [B, H, W]."""
    scores = walk_scores(cams, affinity, grid, classes, config, background)
    scores = F.interpolate(scores, size=cams.shape[2:], mode="bilinear", align_corners=False)
    return classes.labels(_choose(scores[:, 1:], scores[:, 0]))


def walk_labels(
    images: Tensor,
    cams: Tensor,
    affinity: Tensor,
    grid: tuple[int, int],
    classes: ClassSet,
    config: LabelConfig,
    *,
    box: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Walk label: CAMs walked on the token grid once per threshold, upsampled, refined by PAR inside the crop's valid
    box, argmax, and the three-way rule of `par_labels`.

    images uint8 [B, 3, H, W], cams [B, K, H, W], affinity [B, N, N] on `grid` -> int64 [B, H, W]. weights: as in
    `par_labels`, for whole images alone.
    """
    low, high = (walk_scores(cams, affinity, grid, classes, config, score) for score in (config.low, config.high))
    settings = _par_settings(config)
    if config.walk_par_iterations is not None:
        settings["num_iter"] = config.walk_par_iterations
    return afa_ext.refine_labels(
        images,
        high,
        classes.valid,
        low_scores=low,
        box=box,
        weights=weights,
        class_index=classes.index,
        **settings,
    )


def _par_settings(config: LabelConfig) -> dict[str, Any]:
    return {
        "downscale": config.par_downscale,
        "dilations": config.par_dilations,
        "num_iter": config.par_iterations,
        "ignore_index": IGNORE,
    }


def _choose(maps: Tensor, background: float | Tensor) -> Tensor:
    """0 where the background [B, H, W] is at least every map [B, K, H, W], else 1 + the first largest map."""
    # Not argmax, which is some ten times slower across a short strided dimension on the CPU.
    best, choice = maps.max(1)
    return (choice + 1).masked_fill_(best <= background, 0)
