"""Pseudo labels from CAMs: thresholds, PAR, and the affinity walk (AFA, CVPR 2022).

Everything works on whole batches. Images with different tags share one set of packed maps (`ClassSet`), crops with
different valid boxes share one canvas, and nothing reads a tensor back to the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import afa_ext
from afa.cam import ClassSet
from afa.config import LabelConfig
from afa.metrics import IGNORE


def threshold_labels(cams: Tensor, classes: ClassSet, background: float) -> Tensor:
    """The largest of a constant background score and the CAMs [B, K, H, W] -> int64 [B, H, W], 0 background."""
    return classes.labels(_choose(cams, background))


def cam_labels(
    cams: Tensor, classes: ClassSet, *, low: float = 0.35, high: float = 0.55, box: Tensor | None = None
) -> Tensor:
    """Background below `low`, a class above `high`, ignored (255) between and outside `box` [B, 4] (y0, y1, x0, x1).

    cams [B, K, H, W] -> int64 [B, H, W].
    """
    return _three_way(_choose(cams, high), _choose(cams, low), classes, box)


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
    argmax; then the three-way rule of `cam_labels`.

    images uint8 [B, 3, H, W], cams [B, K, H, W] -> int64 [B, H, W]. weights: PAR's affinity of the images where it is
    at hand already (`par_weights`).
    """
    return _par_labels(images, cams, classes, config, config.low, config.high, box=box, weights=weights)


def par_label_single(images: Tensor, cams: Tensor, classes: ClassSet, config: LabelConfig, background: float) -> Tensor:
    """PAR label against one background score, with nothing ignored: what evaluation scores. int64 [B, H, W]."""
    return _par_labels(images, cams, classes, config, background, background)


def _par_labels(
    images: Tensor,
    cams: Tensor,
    classes: ClassSet,
    config: LabelConfig,
    low: float,
    high: float,
    *,
    box: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    return afa_ext.pseudo_labels(
        images,
        cams,
        classes.valid,
        low=low,
        high=high,
        box=box,
        weights=weights,
        class_index=classes.index,
        downscale=config.par_downscale,
        dilations=config.par_dilations,
        num_iter=config.par_iterations,
        ignore_index=IGNORE,
    )


def par_weights(images: Tensor, config: LabelConfig) -> Tensor:
    """PAR's affinity of uint8 images [B, 3, H, W] at reduced size: once an image, for every threshold and label."""
    small = _reduced(images.shape[2:], config.par_downscale)
    colours = F.interpolate(images.float() / 255, size=small, mode="bilinear", align_corners=False)
    return afa_ext.par_affinity(colours, dilations=config.par_dilations)


def _reduced(size: Sequence[int], downscale: int) -> tuple[int, int]:
    return max(1, size[0] // downscale), max(1, size[1] // downscale)


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


@torch.no_grad()
def walk_labels(
    images: Tensor,
    cams: Tensor,
    affinity: Tensor,
    grid: tuple[int, int],
    classes: ClassSet,
    config: LabelConfig,
    *,
    box: Tensor | None = None,
    whole: bool | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Walk label: CAMs walked on the token grid once per threshold, upsampled, refined by PAR inside the crop's valid
    box, argmax, and the three-way rule.

    images uint8 [B, 3, H, W], cams [B, K, H, W], affinity [B, N, N] on `grid` -> int64 [B, H, W].
    box, whole, weights: see `refine_in_box`.
    """
    scores = torch.cat(
        [walk_scores(cams, affinity, grid, classes, config, b) for b in (config.low, config.high)], dim=1
    )
    scores = F.interpolate(scores, size=cams.shape[2:], mode="bilinear", align_corners=False)
    mask = F.pad(classes.valid, (1, 0), value=True).repeat(1, 2)
    scores = refine_in_box(images, scores, mask, config, box=box, whole=whole, weights=weights)
    low, high = scores.chunk(2, dim=1)
    high_choice, low_choice = (_choose(part[:, 1:], part[:, 0]) for part in (high, low))
    return _three_way(high_choice, low_choice, classes, box)


@torch.no_grad()
def refine_in_box(
    images: Tensor,
    maps: Tensor,
    mask: Tensor,
    config: LabelConfig,
    *,
    box: Tensor | None = None,
    whole: bool | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """PAR of maps [B, M, H, W] at reduced size, each image inside its own valid box alone; outside it is undefined.

    Image box and maps are shrunk (the maps with align_corners=True, as PAR itself resizes masks), refined with the
    box's edge replicated, and enlarged again. mask [B, M]: maps that are not empty.

    whole: every box is the whole image, which then takes the short way and may use `weights`, its PAR affinity.
    Without it that is read from a box on the CPU; a box on an accelerator counts as not whole.
    """
    size = (images.shape[2], images.shape[3])
    if box is None:
        whole = True
    elif whole is None:
        whole = box.device.type == "cpu" and bool((box == torch.tensor([0, size[0], 0, size[1]])).all())
    small = _reduced(size, config.par_downscale)
    if whole:
        if weights is None:
            weights = par_weights(images, config)
        maps = F.interpolate(maps, size=small, mode="bilinear", align_corners=True)
        maps = _propagate(weights, maps, mask, config)
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    assert box is not None
    # Boxes of different sizes on one canvas: each is resized into its top left corner by two small matrices, and the
    # rest of the canvas repeats the box's last row and column. After every iteration the rest is repeated anew, so
    # that a pixel at the edge never sees anything but its own box.
    rows, columns = _Axis(box[:, :2], small[0], size[0], config), _Axis(box[:, 2:], small[1], size[1], config)
    picture = rows.shrink_image @ (images.float() / 255) @ columns.shrink_image.transpose(2, 3)
    weights = afa_ext.par_affinity(picture, dilations=config.par_dilations)
    maps = rows.shrink_maps @ maps @ columns.shrink_maps.transpose(2, 3)
    inside = (rows.inside[:, :, None] * small[1] + columns.inside[:, None, :]).flatten(1).unsqueeze(1)
    for _ in range(config.par_iterations):
        maps = _propagate(weights, maps, mask, config, iterations=1)
        maps = maps.flatten(2).gather(2, inside.expand(-1, maps.shape[1], -1)).view_as(maps)
    return rows.enlarge @ maps @ columns.enlarge.transpose(2, 3)


class _Axis:
    """Resizing of the boxes along one axis, as matrices [B, 1, to, from] that carry bilinear weights."""

    def __init__(self, span: Tensor, small: int, size: int, config: LabelConfig) -> None:
        start, stop = span.double().unsqueeze(2).unbind(1)  # [B, 1]
        length = stop - start
        count = (length / config.par_downscale).floor().clamp(min=1)  # pixels of the shrunk box
        position = torch.arange(small, device=span.device, dtype=torch.float64).minimum(count - 1)  # [B, small]
        last = stop - 1
        centre = ((position + 0.5) * length / count - 0.5).clamp(min=0) + start
        self.shrink_image = _bilinear(centre.minimum(last), size)
        self.shrink_maps = _bilinear(position * (length - 1) / (count - 1).clamp(min=1) + start, size)
        pixel = torch.arange(size, device=span.device, dtype=torch.float64) - start  # [B, size]
        back = ((pixel + 0.5) * count / length - 0.5).clamp(min=0).minimum(count - 1)
        self.enlarge = _bilinear(back, small)
        self.inside = position.long()


def _bilinear(position: Tensor, size: int) -> Tensor:
    """Positions [B, to] among `size` samples -> weights [B, 1, to, size]: 1 less the distance, at least 0."""
    samples = torch.arange(size, device=position.device, dtype=position.dtype)
    return (1 - (position.unsqueeze(2) - samples).abs()).clamp(min=0).float().unsqueeze(1)


def _propagate(
    weights: Tensor, maps: Tensor, mask: Tensor, config: LabelConfig, iterations: int | None = None
) -> Tensor:
    return afa_ext.par_propagate(
        weights,
        maps,
        dilations=config.par_dilations,
        num_iter=config.par_iterations if iterations is None else iterations,
        class_mask=mask,
    )


def _choose(maps: Tensor, background: float | Tensor) -> Tensor:
    """0 where the background [B, H, W] is at least every map [B, K, H, W], else 1 + the first largest map."""
    # Not argmax, which is some ten times slower across a short strided dimension on the CPU.
    best, choice = maps.max(1)
    return (choice + 1).masked_fill_(best <= background, 0)


def _three_way(high: Tensor, low: Tensor, classes: ClassSet, box: Tensor | None) -> Tensor:
    """Choices against the high and the low background score -> labels: the class where even the high score loses,
    background where even the low score wins, ignored between and outside the box."""
    labels = classes.labels(high)
    labels.masked_fill_((high == 0) & (low != 0), IGNORE)
    if box is not None:
        labels.masked_fill_(~box_mask(box, labels.shape[1], labels.shape[2]), IGNORE)
    return labels


def box_mask(box: Tensor, height: int, width: int) -> Tensor:
    """bool [B, height, width], true inside box [B, 4] (y0, y1, x0, x1; the ends y1 and x1 excluded)."""
    y0, y1, x0, x1 = box[:, :, None].unbind(1)
    row = torch.arange(height, device=box.device)
    column = torch.arange(width, device=box.device)
    return ((row >= y0) & (row < y1)).unsqueeze(2) & ((column >= x0) & (column < x1)).unsqueeze(1)
