"""Pseudo labels from CAMs: thresholds, PAR, and the random walk (AFA, CVPR 2022).

All functions work on batches and never synchronize with the GPU. Images with different tags share one set of packed
maps (`ClassSet`). All labels use the same rule with two background scores (low, high): background if it wins with the
low score, a class if it wins against the high score, otherwise ignored (255). With equal scores, no pixel is ignored.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import afa_ext
from afa.config import LabelConfig
from afa.data.classes import IGNORE
from afa.labeling.cam import ClassSet

Thresholds = tuple[float, float]
"""Background scores (low, high)."""


def cam_labels(cams: Tensor, classes: ClassSet, thresholds: Thresholds) -> Tensor:
    """Threshold CAMs [B, K, H, W] -> int64 [B, H, W]: 0 background, class index + 1, 255 ignored."""
    low, high = thresholds
    return _three_way(classes, _choose(cams, low), _choose(cams, high) if high != low else None)


def par_labels(
    images: Tensor,
    cams: Tensor,
    classes: ClassSet,
    config: LabelConfig,
    *,
    thresholds: Thresholds | None = None,
    box: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """PAR labels: for each threshold, softmax over background score and CAMs at reduced size, PAR, upsampling, argmax.

    images uint8 [B, 3, H, W], cams [B, K, H, W] -> int64 [B, H, W]. Pixels outside `box` [B, 4] (y0, y1, x0, x1) are
    ignored. thresholds: default from the configuration. weights: PAR's affinity of the images, if already computed
    (`par_weights`).
    """
    low, high = thresholds or (config.low, config.high)
    return afa_ext.pseudo_labels(
        images,
        cams,
        classes.valid,
        low=low,
        high=high,
        box=box,
        weights=weights,
        class_index=classes.index,
        **_par_settings(config),
    )


@torch.no_grad()
def par_weights(images: Tensor, config: LabelConfig) -> Tensor:
    """PAR's affinity of uint8 images [B, 3, H, W] at reduced size, shared by all thresholds and labels."""
    small = [max(1, side // config.par_downscale) for side in images.shape[2:]]
    colors = F.interpolate(images.float() / 255, size=small, mode="bilinear", align_corners=False)
    return afa_ext.par_affinity(colors, dilations=config.par_dilations)


@torch.no_grad()
def walk_scores(
    cams: Tensor,
    affinity: Tensor,
    grid: tuple[int, int],
    classes: ClassSet,
    config: LabelConfig,
    background: float,
) -> Tensor:
    """Random walk of CAMs [B, K, H, W] on the token grid with affinity [B, N, N] and a background score.

    Returns scores [B, K+1, h, w], background first.
    """
    tokens = F.interpolate(cams, size=grid, mode="bilinear", align_corners=False)

    def walk(steps: int) -> Tensor:
        return afa_ext.propagate_cams(
            tokens,
            affinity,
            classes.valid,
            radius=config.walk_radius,
            background=background,
            power=config.walk_power,
            steps=steps,
            eps=config.walk_eps,
        )

    walked = walk(config.walk_steps)
    return walked if config.walk_weight == 1 else torch.lerp(walk(0), walked, config.walk_weight)


@torch.no_grad()
def walked_cam_labels(
    cams: Tensor,
    affinity: Tensor,
    grid: tuple[int, int],
    classes: ClassSet,
    config: LabelConfig,
    thresholds: Thresholds,
) -> Tensor:
    """Labels from upsampled walk scores without PAR: int64 [B, H, W]."""
    choices = []
    for background in dict.fromkeys(thresholds):
        scores = walk_scores(cams, affinity, grid, classes, config, background)
        scores = F.interpolate(scores, size=cams.shape[2:], mode="bilinear", align_corners=False)
        choices.append(_choose(scores[:, 1:], scores[:, 0]))
    return _three_way(classes, choices[0], choices[1] if len(choices) > 1 else None)


def walk_labels(
    images: Tensor,
    cams: Tensor,
    affinity: Tensor,
    grid: tuple[int, int],
    classes: ClassSet,
    config: LabelConfig,
    *,
    thresholds: Thresholds | None = None,
    box: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Walk labels: for each threshold, a random walk on the token grid, upsampling, PAR inside the box, argmax.

    images uint8 [B, 3, H, W], cams [B, K, H, W], affinity [B, N, N] on `grid` -> int64 [B, H, W]. Pixels outside `box`
    [B, 4] are ignored. thresholds, weights: as in `par_labels`; weights only without box.
    """
    low, high = (
        walk_scores(cams, affinity, grid, classes, config, score) for score in thresholds or (config.low, config.high)
    )
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


def _three_way(classes: ClassSet, low: Tensor, high: Tensor | None) -> Tensor:
    """Labels from the choices [B, H, W] for the two scores; high=None: same as low."""
    if high is None:
        return classes.labels(low)
    return classes.labels(high).masked_fill_((low > 0) & (high == 0), IGNORE)


def _choose(maps: Tensor, background: float | Tensor) -> Tensor:
    """0 where background [B, H, W] is at least as large as all maps [B, K, H, W], else 1 + index of the largest map."""
    # max, because argmax is about ten times slower over a short strided dimension on the CPU.
    best, choice = maps.max(1)
    return (choice + 1).masked_fill_(best <= background, 0)
