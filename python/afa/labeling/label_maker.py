"""Creation of all labels: training targets, evaluation rows and exported files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from afa.config import Config, LabelConfig
from afa.labeling.cam import ClassSet, pack_host_tags
from afa.labeling.crf import crf_probabilities
from afa.labeling.inference import ScaleOutputs, infer
from afa.labeling.labels import Thresholds, cam_labels, par_labels, par_weights, walk_labels, walked_cam_labels
from afa.model.network import AFANet

SOURCES = ("seg", "walk", "par", "cam")
"""seg: the segmentation. walk: the CAM after the random walk. par: the CAM refined by PAR. cam: the CAM itself."""


@dataclass
class Labels:
    """Labels of one batch and their inputs."""

    maps: dict[str, Tensor]
    """Source -> int64 [B, H, W]: 0 background, class index + 1, 255 ignored."""
    cams: Tensor
    """[B, K, H, W] in [0, 1] of the tagged classes."""
    classes: ClassSet
    class_logits: Tensor | None
    """[B, C], if requested."""
    affinity: Tensor | None = None
    """[B, N, N] on `grid`, with the source walk."""
    grid: tuple[int, int] | None = None
    """Token grid (h, w) of the affinity."""


@dataclass(frozen=True)
class LabelMaker:
    """Makes labels with fixed settings; use `for_training` or `for_evaluation` to create one."""

    config: Config
    thresholds: Thresholds
    """Background scores for CAM and PAR labels."""
    walk_thresholds: Thresholds
    walk_scale: float
    """Image scale of the walk's affinity."""
    refine_walk: bool
    """Whether walk labels are refined by PAR."""
    tagged_only: bool
    """Whether the sources seg and crf are restricted to the tagged classes."""

    @classmethod
    def for_training(cls, config: Config, *, ignore: bool = True) -> LabelMaker:
        """Labels for training. ignore=False replaces both background scores with the single one of evaluation, so that
        no pixel is ignored."""
        labels = config.labels
        both = (labels.low, labels.high)
        return cls(
            config,
            thresholds=both if ignore else _single(labels),
            walk_thresholds=both if ignore else (labels.walk_threshold,) * 2,
            walk_scale=max(labels.cam_scales),
            refine_walk=True,
            tagged_only=True,
        )

    @classmethod
    def for_evaluation(cls, config: Config) -> LabelMaker:
        """Labels for evaluation: a single background score, so that no pixel is ignored; the walk uses the affinity of
        labels.walk_scale and no PAR."""
        return cls(
            config,
            thresholds=_single(config.labels),
            walk_thresholds=(config.labels.walk_threshold,) * 2,
            walk_scale=config.labels.walk_scale,
            refine_walk=False,
            tagged_only=False,
        )

    @torch.no_grad()
    def from_outputs(
        self,
        images: Tensor,
        outputs: ScaleOutputs,
        classes: ClassSet,
        sources: Collection[str],
        *,
        box: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Labels by source (cam, par, walk) and the CAMs [B, K, H, W].

        images: uint8 [B, 3, H, W]. box: [B, 4], the valid part of padded crops, or None for full images. The source
        walk needs `outputs.affinity`.
        """
        settings = self.config.labels
        cams = outputs.class_activation_maps(classes)
        whole_walk = "walk" in sources and self.refine_walk and box is None
        weights = par_weights(images, settings) if "par" in sources or whole_walk else None
        maps: dict[str, Tensor] = {}
        if "cam" in sources:
            maps["cam"] = cam_labels(cams, classes, self.thresholds)
        if "par" in sources:
            maps["par"] = par_labels(
                images, cams, classes, settings, thresholds=self.thresholds, box=box, weights=weights
            )
        if "walk" in sources:
            assert outputs.affinity is not None and outputs.grid is not None
            walk = (cams, outputs.affinity, outputs.grid, classes, settings)
            if self.refine_walk:
                whole = weights if box is None else None
                maps["walk"] = walk_labels(images, *walk, thresholds=self.walk_thresholds, box=box, weights=whole)
            else:
                maps["walk"] = walked_cam_labels(*walk, self.walk_thresholds)
        return maps, cams

    @torch.inference_mode()
    def from_images(self, model: AFANet, images: Tensor, tags: Tensor, sources: Collection[str] = SOURCES) -> Labels:
        """Labels of uint8 images [B, 3, H, W] with CPU tags [B, C]; the model must be in evaluation mode.

        The additional source crf is the segmentation after the dense CRF of the eval section. If the segmentation is
        restricted to the tagged classes, so is the CRF.
        """
        classes = pack_host_tags(tags, images.device)
        want = {"class", "cam", "seg"} if {"seg", "crf"} & set(sources) else {"class", "cam"}
        scale = self.walk_scale if "walk" in sources else None
        found = infer(model, images, self.config, want, affinity_scale=scale)
        maps, cams = self.from_outputs(images, found.outputs, classes, sources)
        logits = found.seg_logits
        if logits is not None:
            valid = None
            if self.tagged_only:
                logits = _among_tagged(logits, classes)
                valid = F.pad(classes.valid, (1, 0), value=True)
            scores = {"seg": logits} if "seg" in sources else {}
            if "crf" in sources:
                scores["crf"] = crf_probabilities(images, logits, self.config.eval, class_mask=valid)
            for source, score in scores.items():
                choice = score.max(1).indices
                maps[source] = classes.labels(choice) if self.tagged_only else choice
        outputs = found.outputs
        return Labels(maps, cams, classes, outputs.class_logits, outputs.affinity, outputs.grid)


def _single(labels: LabelConfig) -> Thresholds:
    """The background score of evaluation, twice."""
    score = labels.cam_threshold
    if isinstance(score, str):
        raise ValueError("labels.cam_threshold must be a number here; with_background_score replaces auto by one")
    return score, score


def _among_tagged(logits: Tensor, classes: ClassSet) -> Tensor:
    """[B, C+1, H, W] -> [B, K+1, H, W]: background and the tagged classes, padded with -inf."""
    own = logits[:, 1:].take_along_dim(classes.index[:, :, None, None], dim=1)
    own = own.masked_fill(~classes.valid[:, :, None, None], -torch.inf)
    return torch.cat([logits[:, :1], own], 1)
