"""The background score of labels.cam_threshold=auto, chosen without masks.

A high score cuts objects off, and a low one lets them grow into the background. In both cases PAR, which follows the
colors, moves the borders far. So the score is chosen at which the CAM labels and the PAR labels of tagged images agree
best. docs/evidence.md compares it with the best score according to masks.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from afa import distributed
from afa.config import Config, LabelConfig
from afa.data import TaggedDataset
from afa.data.transforms import read_image
from afa.errors import UserError
from afa.evaluation.diagnostics import BACKGROUND_SCORES, spread
from afa.evaluation.metrics import SegmentationMetrics
from afa.labeling.cam import ClassSet, pack_host_tags
from afa.labeling.inference import infer
from afa.labeling.labels import cam_labels, par_labels, par_weights
from afa.model.network import AFANet

IMAGES = 60
"""Number of images, evenly spaced over the split."""
CamImage = tuple[Tensor, Tensor, ClassSet]
"""Image uint8 [1, 3, H, W], CAMs [1, K, H, W] and their classes."""


def agreement(images: Iterable[CamImage], num_classes: int, settings: LabelConfig) -> list[float]:
    """Mean IoU between CAM labels and PAR labels for each of `BACKGROUND_SCORES`."""
    metrics = [SegmentationMetrics(num_classes) for _ in BACKGROUND_SCORES]
    for image, cams, classes in images:
        weights = par_weights(image, settings)
        for score, metric in zip(BACKGROUND_SCORES, metrics, strict=True):
            refined = par_labels(image, cams, classes, settings, thresholds=(score, score), weights=weights)
            metric.update(cam_labels(cams, classes, (score, score)), refined)
    return [float(metric.compute()["miou"]) for metric in metrics]


@torch.no_grad()
def background_score(model: AFANet, dataset: TaggedDataset, config: Config) -> float:
    """The score with the highest agreement on up to `IMAGES` tagged images of a dataset. Reads no masks.

    Images that can't be read are skipped. UserError if no image with a tag is left. With torch.distributed, every
    process must call this function; rank 0 computes the score for all.
    """
    score = 0.0
    problem: UserError | None = None
    if distributed.is_main():
        was_training = model.training
        model.eval()
        try:
            score = _best(model, dataset, config)
        except UserError as error:
            problem = error
        finally:
            model.train(was_training)
    score, problem = distributed.broadcast((score, problem))
    if problem is not None:
        raise problem
    return score


def _best(model: AFANet, dataset: TaggedDataset, config: Config) -> float:
    device = next(model.parameters()).device
    tagged = [i for i in range(len(dataset)) if dataset.tags[i].any()]
    chosen = set(spread([dataset.names[i] for i in tagged], IMAGES))
    used = 0

    def images() -> Iterable[CamImage]:
        nonlocal used
        for index in tagged:
            if dataset.names[index] not in chosen:
                continue
            try:
                pixels = np.asarray(read_image(dataset.paths[index], dataset.largest_side))
            except UserError:
                continue
            used += 1
            image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].to(device)
            classes = pack_host_tags(dataset.tags[index][None], device)
            yield image, infer(model, image, config, {"cam"}).outputs.class_activation_maps(classes), classes

    scores = agreement(images(), len(dataset.classes) + 1, config.labels)
    if not used:
        raise UserError(
            f"labels.cam_threshold=auto needs tagged images, but none of the split '{dataset.split}' of {dataset.root} "
            "can be used; give a number"
        )
    return BACKGROUND_SCORES[int(np.argmax(scores))]


def with_background_score(config: Config, model: AFANet, dataset: TaggedDataset) -> Config:
    """A configuration with a number for labels.cam_threshold: itself, or for auto a copy with the `background_score` of
    the dataset."""
    if config.labels.cam_threshold != "auto":
        return config
    labels = config.labels.model_copy(update={"cam_threshold": background_score(model, dataset, config)})
    return config.model_copy(update={"labels": labels})
