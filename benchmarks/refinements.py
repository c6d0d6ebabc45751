"""Simulated class activation maps (CAMs), the refinements that `real_photos.py refine` compares, and their scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import afa_ext
from afa.config import LabelConfig
from afa.data.classes import IGNORE
from afa.evaluation.diagnostics import oracle_affinity
from afa.labeling.cam import ClassSet, pack_classes
from afa.labeling.labels import walk_scores

VOID_BAND = 4
"""Width in pixels of the ignored band around objects that is filled with the nearest label."""
TOLERANCE = 0.0075
"""Distance within which boundaries match, as a share of the image's diagonal."""
COLOR_DEVIATION = 20.0
"""Standard deviation of the walk's color affinity, in gray levels."""
WALK_RADIUS = 4
"""Radius of the walk in tokens. On images of 288 pixels, it covers the share that 8 tokens cover on the 512 of AFA."""


@dataclass(frozen=True)
class CamKind:
    """How CAMs are made from true masks: averaged per token, eroded, blurred, with false peaks, upsampled."""

    stride: int
    blur: float
    """Standard deviation of a Gaussian blur, in tokens."""
    erode: bool = False
    """Keep only the tokens whose neighbors all belong to the class; a class that would vanish is kept whole."""
    false_peaks: int = 0
    """Number of Gaussian peaks at random positions, 0.6 high and 1.5 tokens wide, added to each map."""


CAM_KINDS: dict[str, CamKind | None] = {
    "true mask": None,
    "stride 8": CamKind(8, 0.5),
    "stride 16, little blur": CamKind(16, 0.5),
    "stride 16, wide blur": CamKind(16, 1.0),
    "stride 16, eroded, false peaks": CamKind(16, 0.5, erode=True, false_peaks=1),
}
"""Name -> kind; None: the true masks themselves, which show what a refinement destroys."""


@dataclass
class Photo:
    """One image of the data set with its simulated CAM."""

    image: Tensor
    """uint8 [1, 3, H, W]."""
    mask: Tensor
    """int64 [1, H, W], 0 background, class index + 1, 255 ignored."""
    tags: Tensor
    """float32 [1, C]."""
    backbone: Callable[[Tensor], Tensor]
    """uint8 [1, 3, H, W] -> features [1, D, h, w]."""
    cams: Tensor = field(init=False)
    """float32 [1, K, H, W] in [0, 1], of the tagged classes."""
    stride: int = field(init=False)
    """Pixels per token of the CAM."""

    @cached_property
    def classes(self) -> ClassSet:
        return pack_classes(self.tags)

    @cached_property
    def filled(self) -> Tensor:
        """The mask with the narrow ignored band filled; wide ignored areas keep their inner part."""
        return fill_void(self.mask, VOID_BAND)

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.image.shape[2:]
        return math.ceil(height / self.stride), math.ceil(width / self.stride)

    def simulate(self, kind: CamKind | None, seed: int) -> None:
        """Set `cams` and `stride`."""
        self.stride = 16 if kind is None else kind.stride
        wanted = self.classes.index[0][:, None, None] + 1
        masks = (self.filled == wanted).float()[None]
        self.cams = masks if kind is None else simulated_cams(masks, kind, self.grid, seed)


def simulated_cams(masks: Tensor, kind: CamKind, grid: tuple[int, int], seed: int) -> Tensor:
    """Masks [1, K, H, W] -> CAMs [1, K, H, W], each normalized to a maximum of 1."""
    tokens = F.adaptive_avg_pool2d(masks, grid)
    if kind.erode:
        kept = -F.max_pool2d(-tokens, 3, stride=1, padding=1)
        tokens = torch.where(kept.amax((2, 3), keepdim=True) > 0.5, kept, tokens)
    random = torch.Generator().manual_seed(seed)
    rows, columns = torch.arange(grid[0]).view(-1, 1), torch.arange(grid[1]).view(1, -1)
    for _ in range(kind.false_peaks):
        for one in tokens[0]:
            y, x = (float(torch.rand((), generator=random)) * side for side in grid)
            one += 0.6 * torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * 1.5**2))
    tokens = gaussian_blur(tokens, kind.blur)
    cams = F.interpolate(tokens, size=masks.shape[2:], mode="bilinear", align_corners=False)
    return cams / cams.amax((2, 3), keepdim=True).clamp(min=1e-5)


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """Blur [B, C, h, w] with replicated borders."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(maps.shape[1], 1, 1, -1)
    padded = F.pad(maps, (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel, groups=maps.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=maps.shape[1])


def fill_void(mask: Tensor, steps: int) -> Tensor:
    """Give ignored pixels [B, H, W] that are up to `steps` pixels from a label the label of the nearest one."""
    out = mask.clone()
    for _ in range(steps):
        near = F.max_pool2d(out.masked_fill(out == IGNORE, -1).float(), 3, stride=1, padding=1).long()
        out = torch.where((out == IGNORE) & (near >= 0), near, out)
    return out


def boundary_f(label: Tensor, truth: Tensor, number: int) -> float:
    """F-score of the boundary of one class: the harmonic mean of the shares of predicted and of true boundary pixels
    that have one of the other kind within `TOLERANCE` of the diagonal (Csurka et al., BMVC 2013).

    label and truth: [H, W]. Pixels that are ignored in truth are excluded. 0 if only one of them has a boundary.
    """
    known = truth != IGNORE
    reach = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    lines = [_boundary(mask == number) & known for mask in (label, truth)]
    if not all(line.any() for line in lines):
        return float(not any(line.any() for line in lines))
    near = [_dilated(line, reach) for line in lines]
    precision = float((lines[0] & near[1]).sum() / lines[0].sum())
    recall = float((lines[1] & near[0]).sum() / lines[1].sum())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _boundary(mask: Tensor) -> Tensor:
    """Pixels of the mask that touch a pixel outside it; the image's edge is no boundary."""
    inside = F.pad(mask[None, None].float(), (1,) * 4, mode="replicate")
    return mask & (-F.max_pool2d(-inside, 3, stride=1)[0, 0] < 1)


def _dilated(line: Tensor, reach: int) -> Tensor:
    offsets = torch.arange(-reach, reach + 1.0)
    disk = (offsets.view(-1, 1) ** 2 + offsets**2 <= reach**2).float()
    return F.conv2d(line[None, None].float(), disk[None, None], padding=reach)[0, 0] > 0


Refinement = Callable[[Photo, float], Tensor]
"""(photo, background score) -> labels int64 [H, W]."""


def with_background(photo: Photo, background: float, softmax: bool) -> Tensor:
    """Scores [1, K+1, H, W], background first."""
    scores = F.pad(photo.cams, (0, 0, 0, 0, 1, 0), value=background)
    return scores.softmax(1) if softmax else scores


def threshold(photo: Photo, background: float) -> Tensor:
    return labels(photo, with_background(photo, background, softmax=False))


def par(*, softmax: bool = True, pamr: bool = False, **settings: Any) -> Refinement:
    """PAR by `afa_ext.refine_labels`, by default as AFA uses it: softmax of the scores, half resolution."""

    def refine(photo: Photo, background: float) -> Tensor:
        return refined(photo, with_background(photo, background, softmax), pamr=pamr, **settings)

    return refine


def refined(photo: Photo, scores: Tensor, *, pamr: bool = False, downscale: int = 2, **settings: Any) -> Tensor:
    weights = None
    if pamr:
        size = [max(1, side // downscale) for side in photo.image.shape[2:]]
        small = F.interpolate(photo.image.float() / 255, size=size, mode="bilinear", align_corners=False)
        weights = afa_ext.pamr_affinity(small)
    label = afa_ext.refine_labels(
        photo.image,
        scores,
        photo.classes.valid,
        weights=weights,
        class_index=photo.classes.index,
        downscale=downscale,
        **settings,
    )
    return label[0]


def crf(preset: str) -> Refinement:
    """Dense CRF over the scores divided by their sum."""
    return lambda photo, background: crf_labels(photo, with_background(photo, background, softmax=False), preset)


def crf_labels(photo: Photo, scores: Tensor, preset: str) -> Tensor:
    probabilities = scores / scores.sum(1, keepdim=True)
    return labels(photo, afa_ext.dense_crf(photo.image, probabilities, **afa_ext.CRF_PRESETS[preset]))


def walk(affinity: Callable[[Photo], Tensor], then: Callable[[Photo, Tensor], Tensor] | None = None) -> Refinement:
    """AFA's walk on the CAM's token grid, optionally followed by another refinement of its scores."""
    config = LabelConfig(walk_radius=WALK_RADIUS)

    def refine(photo: Photo, background: float) -> Tensor:
        scores = walk_scores(photo.cams, affinity(photo), photo.grid, photo.classes, config, background)
        if then is not None:
            return then(photo, scores)
        wide = F.interpolate(scores, size=photo.image.shape[2:], mode="bilinear", align_corners=False)
        return labels(photo, wide)

    return refine


def walked_crf(photo: Photo, scores: Tensor) -> Tensor:
    wide = F.interpolate(scores, size=photo.image.shape[2:], mode="bilinear", align_corners=False)
    return crf_labels(photo, wide, "afa")


def par_then_crf(photo: Photo, background: float) -> Tensor:
    """PAR at full resolution, because `refine_labels` gives labels and a CRF needs scores."""
    scores = afa_ext.par_refine(photo.image.float() / 255, with_background(photo, background, softmax=False))
    return crf_labels(photo, scores, "afa")


def true_affinity(photo: Photo) -> Tensor:
    return oracle_affinity(photo.mask, photo.grid)


def color_affinity(photo: Photo) -> Tensor:
    """``exp(-|a - b|^2 / (2 COLOR_DEVIATION^2))`` of the tokens' mean colors, [1, N, N]."""
    colors = F.adaptive_avg_pool2d(photo.image.float(), photo.grid).flatten(2).transpose(1, 2)
    return torch.exp(-torch.cdist(colors, colors).square() / (2 * COLOR_DEVIATION**2))


def backbone_affinity(photo: Photo) -> Tensor:
    """Cosine similarity of the tokens' features, less their mean over the image; negative ones are 0. [1, N, N]."""
    features = F.adaptive_avg_pool2d(photo.backbone(photo.image), photo.grid).flatten(2).transpose(1, 2)
    features = F.normalize(features - features.mean(1, keepdim=True), dim=2)
    return (features @ features.transpose(1, 2)).clamp(0, 1)


def labels(photo: Photo, scores: Tensor) -> Tensor:
    """Scores [1, K+1, H, W] -> labels [H, W]."""
    return photo.classes.labels(scores.argmax(1))[0]


REFINEMENTS: dict[str, Refinement] = {
    "none": threshold,
    "PAR, 10 iterations": par(num_iter=10),
    "PAR, 15 iterations": par(num_iter=15),
    "PAR, 20 iterations": par(num_iter=20),
    "PAMR, 10 iterations": par(pamr=True, num_iter=10),
    "dense CRF, AFA's settings": crf("afa"),
    "dense CRF, PSA's settings": crf("psa"),
    "walk, true affinity": walk(true_affinity),
    "walk, color affinity": walk(color_affinity),
    "walk, backbone affinity": walk(backbone_affinity),
    "walk (true) + PAR": walk(true_affinity, refined),
    "walk (backbone) + PAR": walk(backbone_affinity, refined),
    "walk (true) + CRF": walk(true_affinity, walked_crf),
    "PAR + CRF": par_then_crf,
}
"""The main comparison."""

PAR_VARIANTS: dict[str, Refinement] = {
    "half resolution, softmax (AFA)": REFINEMENTS["PAR, 10 iterations"],
    "no softmax": par(softmax=False),
    "full resolution": par(downscale=1),
    "full resolution, no softmax": par(downscale=1, softmax=False),
    "full resolution, no softmax, 20 iterations": par(downscale=1, softmax=False, num_iter=20),
    "5 iterations": par(num_iter=5),
    "2 iterations": par(num_iter=2),
    "dilations 1, 2, 4": par(dilations=(1, 2, 4)),
    "full resolution, no softmax, dilations 1, 2, 4": par(downscale=1, softmax=False, dilations=(1, 2, 4)),
    "w1 = 0.1": par(w1=0.1),
    "w2 = 0": par(w2=0.0),
}
"""What limits PAR: one thing changed at a time from AFA's settings, and combinations."""
