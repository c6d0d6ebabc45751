"""Measurement on a split with masks: mean IoU of CAMs, walked CAMs, PAR labels and the segmentation itself."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from afa.cam import multi_scale_cam, pack_classes
from afa.config import Config
from afa.data import VOCDataset, eval_loader
from afa.labels import par_label_single, threshold_labels, walk_label_single
from afa.metrics import SegmentationMetrics, classification_f1
from afa.model.network import AFANet, normalize

ROWS = ("cam", "walk", "par", "seg")


@dataclass
class EvalResult:
    """Scores as `SegmentationMetrics.compute` gives them, one dictionary a row.

    cam, walk and par see the images' tags (as published); seg does not.
    """

    cam: dict[str, Any]
    walk: dict[str, Any]
    par: dict[str, Any]
    seg: dict[str, Any]
    f1: float
    """Mean over images of the classifier's F1 against the tags."""
    seconds: float
    images: int
    samples: list[dict[str, Any]] = field(default_factory=list)
    """name, image uint8 [H,W,3], tags (class names), cam float [H,W] (largest over classes), cam_label, walk_label,
    par_label, prediction and truth, each integer [H,W], for images evenly spread over the split."""


def evaluate(model: AFANet, dataset: VOCDataset, config: Config, *, progress: bool = True, keep: int = 0) -> EvalResult:
    """Measure `model` on `dataset` (made with train=False, with_mask=True) and keep samples of `keep` images.

    The three label rows use one background score, labels.cam_threshold, since a label that may be ignored can't be
    scored; the walk uses the affinity of scale 1. The segmentation is the maximum of the logits over eval.scales, each
    with its flip when eval.flip.
    """
    started = time.perf_counter()
    device = next(model.parameters()).device
    metrics = {row: SegmentationMetrics(len(dataset.classes) + 1) for row in ROWS}
    logits, tags = [], []
    spread = {round(i * (len(dataset) - 1) / max(1, keep - 1)) for i in range(min(keep, len(dataset)))}
    samples: list[dict[str, Any]] = []
    position = 0
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(dataset), desc="evaluating", unit="img", disable=not progress, leave=False)
    try:
        with torch.inference_mode(), bar:
            for batch in eval_loader(dataset, config.eval.batch_size, config.data.workers):
                images = batch["image"].to(device, non_blocking=True)
                truth = batch["mask"].to(device, non_blocking=True)
                labels, cams, scores = measure_batch(model, images, batch["tags"], config)
                for row in ROWS:
                    metrics[row].update(labels[row], truth)
                logits.append(scores.cpu())
                tags.append(batch["tags"])
                for offset, name in enumerate(batch["name"]):
                    if position + offset in spread:
                        present = batch["tags"][offset].nonzero()[:, 0].tolist()
                        samples.append(
                            {
                                "name": name,
                                "image": batch["image"][offset].permute(1, 2, 0).numpy(),
                                "tags": [dataset.classes[index] for index in present],
                                "cam": cams[offset].amax(0).cpu().numpy(),
                                "cam_label": labels["cam"][offset].cpu().numpy(),
                                "walk_label": labels["walk"][offset].cpu().numpy(),
                                "par_label": labels["par"][offset].cpu().numpy(),
                                "prediction": labels["seg"][offset].cpu().numpy(),
                                "truth": batch["mask"][offset].numpy(),
                            }
                        )
                position += len(images)
                bar.update(len(images))
    finally:
        model.train(was_training)
    return EvalResult(
        **{row: metrics[row].compute() for row in ROWS},
        f1=classification_f1(torch.cat(logits), torch.cat(tags)),
        seconds=time.perf_counter() - started,
        images=position,
        samples=samples,
    )


def measure_batch(
    model: AFANet, images: Tensor, tags: Tensor, config: Config
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """uint8 images [B, 3, H, W] and tags [B, C] on the CPU -> the four label maps [B, H, W] by row, CAMs [B, K, H, W]
    of the tagged classes, class logits [B, C]."""
    device = images.device
    most = int((tags > 0).sum(1).max())
    classes = pack_classes(tags.to(device, non_blocking=True), most)
    inputs = normalize(images)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")
    with precision:
        # One forward of the images as they are serves the tags, the CAM, the affinity and the segmentation.
        out = model(inputs, want=("class", "cam", "seg", "affinity"))
        assert out.class_logits is not None and out.cam is not None and out.affinity is not None
        result = multi_scale_cam(
            model,
            inputs,
            classes,
            config.labels.cam_scales,
            affinity_scale=1.0,
            base=out.cam,
            base_affinity=out.affinity,
        )
        segmentation = _segment(model, inputs, out.seg_logits, config)
    assert result.affinity is not None and result.grid is not None
    background = config.labels.cam_threshold
    labels = {
        "cam": threshold_labels(result.cams, classes, background),
        "walk": walk_label_single(result.cams, result.affinity, result.grid, classes, config.labels, background),
        "par": par_label_single(images, result.cams, classes, config.labels, background),
        "seg": segmentation.max(1).indices,
    }
    return labels, result.cams, out.class_logits.float()


def segment(model: AFANet, images: Tensor, config: Config) -> Tensor:
    """uint8 images [B, 3, H, W] -> segmentation logits [B, C+1, H, W] at eval.scales: what prediction uses, no tags."""
    with (
        torch.inference_mode(),
        torch.autocast(images.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"),
    ):
        return _segment(model, normalize(images), None, config)


def _segment(model: AFANet, inputs: Tensor, base: Tensor | None, config: Config) -> Tensor:
    """Maximum over scales and flips of the logits at full size; `base` saves the forward of scale 1."""
    size = inputs.shape[2:]
    fused: Tensor | None = None

    def add(logits: Tensor) -> None:
        nonlocal fused
        logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        fused = logits if fused is None else torch.maximum(fused, logits)

    for scale in config.eval.scales:
        scaled = inputs
        if scale != 1:
            sides = [max(1, int(side * scale)) for side in size]
            scaled = F.interpolate(inputs, size=sides, mode="bilinear", align_corners=False)
        if scale == 1 and base is not None:
            add(base)
        else:
            add(model(scaled, want=("seg",)).seg_logits)
        if config.eval.flip:
            add(model(scaled.flip(-1), want=("seg",)).seg_logits.flip(-1))
    assert fused is not None
    return fused
