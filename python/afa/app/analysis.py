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
from afa.labeling.label_maker import LabelMaker
from afa.labeling.labels import walk_scores
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
    images: Tensor
    """`picture` as uint8 [1, 3, H, W], on the model's device."""
    outputs: ScaleOutputs

    def cams(self, tags: list[int]) -> dict[int, Picture]:
        """Class -> heat map of its CAM."""
        return self._heat(tags, self.outputs.class_activation_maps(self._classes(tags))[0])

    def walked(self, tags: list[int], config: Config, background: float) -> dict[int, Picture]:
        """Class -> heat map of its CAM after the random walk: its share of the scores, from the lowest to the highest.

        The walk starts from a softmax with the background, so no share is near 0.
        """
        classes = self._classes(tags)
        cams, affinity, grid = self.outputs.class_activation_maps(classes), self.outputs.affinity, self.outputs.grid
        assert affinity is not None and grid is not None
        scores = walk_scores(cams, affinity, grid, classes, config.labels, background)
        walked = scores[:, 1:] / scores.sum(1, keepdim=True)
        walked = walked - walked.amin((2, 3), keepdim=True)
        walked = walked / walked.amax((2, 3), keepdim=True).clamp(min=1e-5)
        return self._heat(tags, F.interpolate(walked, size=cams.shape[2:], mode="bilinear", align_corners=False)[0])

    def pseudo_label(
        self, tags: list[int], config: Config, source: str, background: float, par_iterations: int
    ) -> NDArray[np.uint8]:
        """The label [H, W] of a source in SOURCES, at the size of `picture`: 0 background, class index + 1."""
        iterations = {"par_iterations": par_iterations, "walk_par_iterations": par_iterations}
        both = (background, background)
        maker = LabelMaker(
            config.model_copy(update={"labels": config.labels.model_copy(update=iterations)}),
            thresholds=both,
            walk_thresholds=both,
            walk_scale=config.labels.walk_scale,
            refine_walk=source == "walk_par",
            tagged_only=True,
        )
        kind = "walk" if source == "walk_par" else source
        labels = maker.from_outputs(self.images, self.outputs, self._classes(tags), {kind})[0][kind]
        return labels[0].to(torch.uint8).cpu().numpy()

    def _classes(self, tags: list[int]) -> ClassSet:
        own = torch.zeros(1, len(self.probabilities))
        own[0, tags] = 1
        return pack_host_tags(own, self.images.device)

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
        images=pixels,
        outputs=outputs,
    )
