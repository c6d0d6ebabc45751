"""Forward passes over image scales and flips, shared by training, evaluation, prediction and export.

Each scale and flip runs through the network once, for all requested outputs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from afa.config import Config
from afa.labeling.cam import ClassSet, combine_cams
from afa.model.network import AFANet, Output
from afa.model.precision import inference_precision


@dataclass
class ScaleOutputs:
    """Outputs of the forward passes over scales and flips; outputs that were not requested are empty or None."""

    size: tuple[int, int]
    """(H, W) of the images."""
    cams: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Per CAM scale: raw CAMs [B, C, h, w] of the images and of the flipped images, the latter flipped back."""
    seg_logits: list[tuple[float, Tensor]] = field(default_factory=list)
    """Per segmentation scale: (scale, logits [B, C+1, h, w] on the decoder's grid), averaged over flips."""
    class_logits: Tensor | None = None
    """[B, C] at scale 1."""
    affinity: Tensor | None = None
    """[B, N, N] at the requested scale."""
    grid: tuple[int, int] | None = None
    """Token grid (h, w) of that affinity."""

    def class_activation_maps(self, classes: ClassSet) -> Tensor:
        """CAMs [B, K, H, W] in [0, 1] of the given classes (see `combine_cams`)."""
        return combine_cams(self.cams, classes, self.size)


@torch.no_grad()
def run_scales(
    model: AFANet,
    inputs: Tensor,
    *,
    cam_scales: Sequence[float] = (),
    seg_scales: Sequence[float] = (),
    seg_flip: bool = False,
    affinity_scale: float | None = None,
    classify: bool = False,
    base_cam: Tensor | None = None,
) -> ScaleOutputs:
    """Run normalized images [B, 3, H, W] at all requested scales.

    cam_scales: with flips. seg_scales: with flips if seg_flip. affinity_scale: without flips. base_cam: raw CAMs
    [B, C, h, w] at scale 1, if already computed.
    """
    found = ScaleOutputs((inputs.shape[2], inputs.shape[3]))
    wanted = [*cam_scales, *seg_scales, *([] if affinity_scale is None else [affinity_scale]), *([1.0] * classify)]
    for scale in dict.fromkeys(wanted):
        straight, mirrored = set[str](), set[str]()
        if scale in cam_scales:
            straight.add("cam")
            mirrored.add("cam")
        if scale in seg_scales:
            straight.add("seg")
            if seg_flip:
                mirrored.add("seg")
        if scale == affinity_scale:
            straight.add("affinity")
        if scale == 1 and classify:
            straight.add("class")
        out, mirror = _both_ways(model, resize(inputs, scale), straight, mirrored, base_cam if scale == 1 else None)
        if scale in cam_scales:
            assert out.cam is not None and mirror.cam is not None
            found.cams.append((out.cam.float(), mirror.cam.float().flip(-1)))
        if scale in seg_scales:
            assert out.seg_logits is not None
            logits = out.seg_logits.float()
            if mirror.seg_logits is not None:
                logits = (logits + mirror.seg_logits.float().flip(-1)) / 2
            found.seg_logits.append((scale, logits))
        if scale == affinity_scale:
            assert out.affinity is not None
            found.affinity, found.grid = out.affinity, out.grid
        if scale == 1 and classify:
            assert out.class_logits is not None
            found.class_logits = out.class_logits.float()
    return found


def _both_ways(
    model: AFANet, images: Tensor, straight: set[str], mirrored: set[str], base_cam: Tensor | None
) -> tuple[Output, Output]:
    """Outputs of the images and of the flipped images, in one forward pass if both need the same outputs."""
    missing = straight - {"cam"} if base_cam is not None else straight
    if "affinity" in missing and mirrored == straight - {"affinity"}:
        missing = straight  # computes the CAM again, but in one forward pass with the flipped images
    same = missing - {"affinity"}
    if mirrored and same == mirrored:
        both = model(torch.cat([images, images.flip(-1)]), want={*same, "qk"} if "affinity" in missing else same)
        out, mirror = both.split(len(images))
        if "affinity" in missing:
            assert out.queries is not None and out.keys is not None
            out.affinity = model.affinity_head(out.queries, out.keys)
    else:
        out = model(images, want=missing) if missing else Output()
        mirror = model(images.flip(-1), want=mirrored) if mirrored else Output()
    if out.cam is None:
        out.cam = base_cam
    return out, mirror


def fuse_segmentation(outputs: ScaleOutputs, fusion: str, size: tuple[int, int]) -> Tensor:
    """Fuse the logits over scales by maximum or mean, then upsample to `size`: [B, C+1, H, W].

    Fusion uses the decoder's grid of the scale closest to 1, as in the published code.
    """
    _, nearest = min(outputs.seg_logits, key=lambda pair: abs(math.log(pair[0])))
    grid = (nearest.shape[2], nearest.shape[3])
    stacked = torch.stack([_interpolate(logits, grid) for _, logits in outputs.seg_logits])
    return _interpolate(stacked.amax(0) if fusion == "max" else stacked.mean(0), size)


@dataclass
class Inference:
    """Model outputs at the configuration's scales."""

    outputs: ScaleOutputs
    seg_logits: Tensor | None
    """[B, C+1, H, W], fused over scales and flips."""


def infer(
    model: AFANet,
    images: Tensor,
    config: Config,
    want: Collection[str],
    *,
    affinity_scale: float | None = None,
) -> Inference:
    """Run uint8 images [B, 3, H, W] and return the outputs in `want` (class, cam, seg), and the affinity if its scale
    is given.

    CAMs use labels.cam_scales; the segmentation uses eval.longer_side, eval.scales, eval.flip and eval.fusion.
    """
    size = (images.shape[2], images.shape[3])
    inputs = model.normalize(images)
    settings = config.eval
    seg_scales = settings.scales if "seg" in want else ()
    cam_scales = config.labels.cam_scales if "cam" in want else ()
    seg_size = size if settings.longer_side is None else fit_longer_side(size, settings.longer_side)
    together = seg_size == size
    with torch.inference_mode(), inference_precision(images.device, config.train.precision):
        outputs = run_scales(
            model,
            inputs,
            cam_scales=cam_scales,
            seg_scales=seg_scales if together else (),
            seg_flip=settings.flip,
            affinity_scale=affinity_scale,
            classify="class" in want,
        )
        if seg_scales and not together:
            resized = F.interpolate(inputs, size=seg_size, mode="bilinear", align_corners=False, antialias=True)
            outputs.seg_logits = run_scales(model, resized, seg_scales=seg_scales, seg_flip=settings.flip).seg_logits
        fused = fuse_segmentation(outputs, settings.fusion, size) if seg_scales else None
    return Inference(outputs, fused)


def found_classes(class_logits: Tensor, scores: Tensor) -> Tensor:
    """The classes that the classifier or the segmentation predicts, as tags [B, C] of 0 and 1.

    class_logits: [B, C]. scores: segmentation logits or probabilities [B, C+1, H, W].
    """
    found = (class_logits > 0).float()
    for own, labels in zip(found, scores.argmax(1), strict=True):
        segmented = labels.unique()
        own[segmented[segmented > 0] - 1] = 1
    return found


def resize(images: Tensor, scale: float) -> Tensor:
    """Resize images [B, 3, H, W] by a scale, bilinear (align_corners=False)."""
    size = resize_size((images.shape[2], images.shape[3]), scale)
    return _interpolate(images, size)


def resize_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) at a scale, rounded down."""
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def fit_longer_side(size: tuple[int, int], longer_side: int) -> tuple[int, int]:
    """(height, width) with the same aspect ratio and the given longer side."""
    factor = longer_side / max(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _interpolate(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
