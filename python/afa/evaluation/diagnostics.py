"""Diagnostics of the labels: what the walk gains and could gain, the affinity's quality, and the background scores.

Counts are kept per image, so that a resumed or distributed evaluation can add them in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import afa_ext
from afa.config import Config
from afa.data.classes import IGNORE
from afa.evaluation.metrics import AffinityMetrics, SegmentationMetrics, count_pixels
from afa.labeling.cam import ClassSet
from afa.labeling.label_maker import Labels
from afa.labeling.labels import cam_labels, par_labels, par_weights, walk_labels, walked_cam_labels

BACKGROUND_SCORES = tuple(round(0.05 * i, 2) for i in range(2, 14))
"""Background scores of the curves."""
CURVES = ("cam", "walk", "par")
CHECKS = ("walk_identity", "walk_oracle", "walk_par")
"""Labels at labels.walk_threshold. walk_identity: the walk with an affinity of 1 for each token with itself and 0
otherwise, so that only the resampling to tokens and back remains. walk_oracle: the walk with the affinity of the true
masks, its ceiling. walk_par: the walk refined by PAR, as in training."""

ImageCounts = dict[str, Any]
"""Counts of one image, of JSON types: `pixels` by kind of label and `affinity`, both sparse (`_sparse`)."""


@dataclass
class Diagnosis:
    """Sums over the diagnosed images; all mIoUs are over the same images."""

    images: int
    miou: dict[str, float]
    """cam, walk and par at the configured background scores, and `CHECKS`."""
    curves: dict[str, list[float]]
    """mIoU of cam, walk and par at each of `scores`."""
    affinity: dict[str, float]
    """See `AffinityMetrics.compute`; pairs within labels.walk_radius, true classes at the centers of the tokens."""
    scores: tuple[float, ...] = BACKGROUND_SCORES

    def best(self, row: str) -> tuple[float, float]:
        """(background score, mIoU) with the highest mIoU of cam, walk or par."""
        miou = self.curves[row]
        place = max(range(len(miou)), key=lambda i: miou[i])
        return self.scores[place], miou[place]


def spread(names: Sequence[str], limit: int) -> list[str]:
    """At most `limit` of the names, evenly spaced."""
    count = min(limit, len(names))
    return [names[round(i * (len(names) - 1) / max(1, count - 1))] for i in range(count)]


def oracle_affinity(truth: Tensor, grid: tuple[int, int]) -> Tensor:
    """Affinity [B, N, N] of true masks [B, H, W]: 1 for tokens whose centers have the same class and for a token with
    itself, otherwise 0. Ignored tokens are like no other."""
    tokens = token_classes(truth, grid).flatten(1)
    same = (tokens[:, :, None] == tokens[:, None, :]) & (tokens != IGNORE)[:, :, None]
    same.diagonal(dim1=1, dim2=2).fill_(True)
    return same.float()


def token_classes(truth: Tensor, grid: tuple[int, int]) -> Tensor:
    """Classes at the centers of the tokens: [B, H, W] -> int64 [B, h, w]."""
    return F.interpolate(truth.unsqueeze(1).float(), size=grid, mode="nearest-exact").squeeze(1).long()


@torch.inference_mode()
def count_images(
    images: Tensor, labels: Labels, truth: Tensor, config: Config, num_classes: int, chosen: Sequence[int]
) -> list[ImageCounts]:
    """Counts of the images at the positions `chosen` of a batch.

    images: uint8 [B, 3, H, W]. labels: those of `LabelMaker.for_evaluation`, with affinity. truth: [B, H, W] in
    [0, num_classes) or 255 (ignored).
    """
    if not chosen:
        return []
    picked = torch.tensor(chosen, device=images.device)
    assert labels.affinity is not None and labels.grid is not None
    images, cams, affinity, truth = (x[picked] for x in (images, labels.cams, labels.affinity, truth))
    classes = ClassSet(labels.classes.index[picked], labels.classes.valid[picked])
    settings, grid = config.labels, labels.grid
    weights = par_weights(images, settings)
    at = (settings.walk_threshold,) * 2

    def walk(pairs: Tensor, thresholds: tuple[float, float]) -> Tensor:
        return walked_cam_labels(cams, pairs, grid, classes, settings, thresholds)

    identity = torch.eye(affinity.shape[1], device=affinity.device).expand_as(affinity).contiguous()
    found = {row: labels.maps[row][picked] for row in CURVES}
    found["walk_identity"] = walk(identity, at)
    found["walk_oracle"] = walk(oracle_affinity(truth, grid), at)
    found["walk_par"] = walk_labels(images, cams, affinity, grid, classes, settings, thresholds=at, weights=weights)
    for score in BACKGROUND_SCORES:
        both = (score, score)
        found[f"cam@{score}"] = cam_labels(cams, classes, both)
        found[f"walk@{score}"] = walk(affinity, both)
        found[f"par@{score}"] = par_labels(images, cams, classes, settings, thresholds=both, weights=weights)
    pixels = {name: count_pixels(label.flatten(1), truth.flatten(1), num_classes) for name, label in found.items()}
    pairs = afa_ext.affinity_labels(token_classes(truth, grid), stride=1, radius=settings.walk_radius, background=0)
    counts = []
    for i in range(len(chosen)):
        metrics = AffinityMetrics()
        metrics.update(affinity[i : i + 1], pairs[i : i + 1])
        assert metrics.sums is not None and metrics.histograms is not None
        counts.append(
            {
                "pixels": {name: _sparse(count[i]) for name, count in pixels.items()},
                "affinity": [_sparse(metrics.sums), _sparse(metrics.histograms)],
            }
        )
    return counts


def add_up(counts: Iterable[Mapping[str, Any]], num_classes: int) -> Diagnosis:
    """Sum the counts of images."""
    metrics: dict[str, SegmentationMetrics] = {}
    affinity, images = AffinityMetrics(), 0
    for image in counts:
        images += 1
        for name, sparse in image["pixels"].items():
            metrics.setdefault(name, SegmentationMetrics(num_classes)).add(_dense(sparse))
        affinity.add(*(_dense(sparse) for sparse in image["affinity"]))
    miou = {name: float(one.compute()["miou"]) for name, one in metrics.items()}
    return Diagnosis(
        images,
        {name: miou[name] for name in (*CURVES, *CHECKS) if name in miou},
        {row: [miou[f"{row}@{score}"] for score in BACKGROUND_SCORES] for row in CURVES} if images else {},
        affinity.compute(),
    )


def token_affinity(labels: Labels, cam: Tensor) -> tuple[tuple[float, float], Tensor]:
    """The token with the highest value of a CAM [H, W] of the first image, and the affinity of all tokens to it.

    Returns the token's center (y, x) as shares of height and width, and [h, w].
    """
    assert labels.affinity is not None and labels.grid is not None
    height, width = labels.grid
    tokens = F.interpolate(cam[None, None], size=labels.grid, mode="bilinear", align_corners=False).flatten()
    token = int(tokens.argmax())
    center = ((token // width + 0.5) / height, (token % width + 0.5) / width)
    return center, labels.affinity[0, token].float().view(height, width)


def _sparse(values: Tensor) -> list[Any]:
    """[dtype is floating, shape, indices of entries that aren't 0, these entries]."""
    flat = values.detach().cpu().flatten()
    where = flat.nonzero().squeeze(1)
    return [flat.dtype.is_floating_point, list(values.shape), where.tolist(), flat[where].tolist()]


def _dense(sparse: list[Any]) -> Tensor:
    floating, shape, where, values = sparse
    dtype = torch.float64 if floating else torch.int64
    flat = torch.zeros(torch.Size(shape).numel(), dtype=dtype)
    flat[torch.tensor(where, dtype=torch.int64)] = torch.tensor(values, dtype=dtype)
    return flat.view(shape)
