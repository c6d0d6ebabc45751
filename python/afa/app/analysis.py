"""One photograph through a model: its segmentation, CAMs, walked maps, and pseudo labels with chosen settings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from afa.config import Config
from afa.data.visualize import Picture, heat
from afa.labeling.cam import ClassSet, pack_host_tags
from afa.labeling.crf import crf_probabilities
from afa.labeling.inference import ScaleOutputs, found_classes, infer
from afa.labeling.labels import cam_labels, par_labels, walk_labels, walk_scores, walked_cam_labels
from afa.labeling.upsample import upsampled_labels
from afa.model import AFANet

SOURCES = {"cam": "CAM", "par": "CAM + PAR", "walk": "walk", "walk_par": "walk + PAR"}
"""Pseudo labels and their names on the page."""


@dataclass
class Analysis:
    """Outputs of a model for one image, from which labels with other settings are made without the model."""

    picture: Picture
    """uint8 [H, W, 3], the size that the model saw."""
    labels: NDArray[np.uint8]
    """Segmentation in the size of the photograph: 0 background, class index + 1."""
    found: list[int]
    """Indices of the classes, from 0, that the classifier or the segmentation found."""
    probabilities: list[float]
    """Of all classes, from the classifier."""
    outputs: ScaleOutputs

    def cams(self, tags: list[int]) -> dict[int, Picture]:
        """Class -> heat map of its CAM."""
        return self._heat(tags, self._cams(tags)[0][0])

    def walked(self, tags: list[int], config: Config, background: float) -> dict[int, Picture]:
        """Class -> heat map of its CAM after the random walk: its share of the scores, from the lowest to the highest.

        The walk starts from a softmax with the background, so no share is near 0.
        """
        cams, classes = self._cams(tags)
        scores = walk_scores(cams, *self._affinity(), classes, config.labels, background)
        walked = scores[:, 1:] / scores.sum(1, keepdim=True)
        walked = walked - walked.amin((2, 3), keepdim=True)
        walked = walked / walked.amax((2, 3), keepdim=True).clamp(min=1e-5)
        return self._heat(tags, F.interpolate(walked, size=cams.shape[2:], mode="bilinear", align_corners=False)[0])

    def pseudo_label(
        self, tags: list[int], config: Config, source: str, background: float, par_iterations: int
    ) -> NDArray[np.uint8]:
        """The label [H, W] of a source in SOURCES, at the size of `picture`: 0 background, class index + 1."""
        settings = config.labels.model_copy(
            update={"par_iterations": par_iterations, "walk_par_iterations": par_iterations}
        )
        cams, classes = self._cams(tags)
        images = torch.from_numpy(self.picture.transpose(2, 0, 1)[None].copy()).to(cams.device)
        both = (background, background)
        if source == "cam":
            labels = cam_labels(cams, classes, both)
        elif source == "par":
            labels = par_labels(images, cams, classes, settings, thresholds=both)
        elif source == "walk":
            labels = walked_cam_labels(cams, *self._affinity(), classes, settings, both)
        else:
            labels = walk_labels(images, cams, *self._affinity(), classes, settings, thresholds=both)
        return labels[0].to(torch.uint8).cpu().numpy()

    def _cams(self, tags: list[int]) -> tuple[Tensor, ClassSet]:
        own = torch.zeros(1, len(self.probabilities))
        own[0, tags] = 1
        classes = pack_host_tags(own, self.outputs.cams[0][0].device)
        return self.outputs.class_activation_maps(classes), classes

    def _affinity(self) -> tuple[Tensor, tuple[int, int]]:
        assert self.outputs.affinity is not None and self.outputs.grid is not None
        return self.outputs.affinity, self.outputs.grid

    def _heat(self, tags: list[int], maps: Tensor) -> dict[int, Picture]:
        values = maps.cpu().numpy()
        return {tag: heat(self.picture, values[row]) for row, tag in enumerate(sorted(tags))}


@torch.inference_mode()
def analyze(model: AFANet, config: Config, image: Image.Image, largest_side: int) -> Analysis:
    """Run the model on an RGB image, whose longer side is first limited to `largest_side` pixels."""
    small = image.copy()
    small.thumbnail((largest_side, largest_side), Image.Resampling.BILINEAR)
    picture = np.asarray(small)
    pixels = torch.from_numpy(picture.transpose(2, 0, 1)[None].copy()).to(next(model.parameters()).device)
    result = infer(model, pixels, config, {"class", "cam", "seg"}, affinity_scale=config.labels.walk_scale)
    outputs, scores = result.outputs, result.seg_logits
    assert scores is not None and outputs.class_logits is not None
    if config.eval.crf:
        scores = crf_probabilities(pixels, scores, config.eval)
    found = found_classes(outputs.class_logits, scores)[0].nonzero()[:, 0].tolist()
    return Analysis(
        picture=picture,
        labels=upsampled_labels(scores[0], image.height, image.width),
        found=found,
        probabilities=outputs.class_logits[0].sigmoid().tolist(),
        outputs=outputs,
    )
