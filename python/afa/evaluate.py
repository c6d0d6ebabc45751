"""Measurement on a split: mean IoU of CAMs, walked CAMs, PAR labels, segmentation and its dense CRF; F1 of the tags.

    afa evaluate runs/voc eval.scales=1,0.5,0.75 eval.flip=true eval.crf=true
    torchrun --nproc-per-node 4 -m afa evaluate runs/voc        # every process measures its share

A split without masks has no IoU: of it only the classifier is measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from afa.cam import multi_scale_cam, pack_classes
from afa.config import Config, EvalConfig
from afa.crf import CrfPool, CrfSettings, dense_crf
from afa.data import TaggedDataset, eval_loader, share
from afa.data.transforms import image_size
from afa.distributed import all_reduce_sum_, broadcast, gather, is_main, rank, world_size
from afa.eval_store import EvalStore
from afa.labels import par_label_single, threshold_labels, walk_label_single
from afa.metrics import IGNORE, SegmentationMetrics, classification_f1, image_scores
from afa.model.network import AFANet, normalize

ROWS = ("cam", "walk", "par", "seg")
"""What every measurement scores; `EvalResult.rows` adds "crf" where it was asked for."""

Scores = dict[str, Any]
Sample = dict[str, Any]


@dataclass
class EvalResult:
    """Scores as `SegmentationMetrics.compute` gives them, one dictionary a row; all nan when there are no masks.

    cam, walk and par see the images' tags (as published); seg and crf do not.
    """

    cam: Scores
    walk: Scores
    par: Scores
    seg: Scores
    f1: float
    """Mean over images of the classifier's F1 against the tags."""
    seconds: float
    images: int
    samples: list[Sample] = field(default_factory=list)
    """name, image uint8 [H,W,3], tags (class names), cam float [H,W] (largest over classes), cam_label, walk_label,
    par_label, prediction and truth, each integer [H,W], and iou (nan without a mask, whose truth is all ignored), for
    images evenly spread over the split."""
    crf: Scores | None = None
    """The segmentation after the dense CRF, with eval.crf."""
    has_masks: bool = True
    image_iou: dict[str, float] = field(default_factory=dict)
    """Name -> mean IoU of the image's final segmentation over the classes it shows, in the split's order."""
    best: list[Sample] = field(default_factory=list)
    worst: list[Sample] = field(default_factory=list)
    """Samples of the images with the largest and the smallest `image_iou`, the most extreme first."""
    notes: list[str] = field(default_factory=list)
    """What makes the scores say less than they seem to, such as masks without any class."""

    @property
    def rows(self) -> dict[str, Scores]:
        """The rows that were measured, in the order of the table."""
        rows = {row: getattr(self, row) for row in ROWS}
        return rows if self.crf is None else {**rows, "crf": self.crf}


@dataclass
class Measured:
    """What one batch gives."""

    labels: dict[str, Tensor]
    """Row -> int64 [B, H, W]."""
    cams: Tensor
    """[B, K, H, W] of the tagged classes."""
    class_logits: Tensor
    """[B, C]."""
    seg_logits: Tensor
    """[B, C+1, H, W], fused over scales and flips."""


def evaluate(
    model: AFANet,
    dataset: TaggedDataset,
    config: Config,
    *,
    progress: bool = True,
    keep: int = 0,
    store: EvalStore | None = None,
    on_resume: Callable[[int], None] | None = None,
) -> EvalResult:
    """Measure `model` on `dataset` (made with train=False) and keep samples of `keep` images, and of a third as many of
    the best and of the worst.

    The three label rows use one background score, labels.cam_threshold, since a label that may be ignored can't be
    scored; the walk uses the affinity of scale 1. The segmentation is the maximum or mean of the logits over
    eval.scales, each with its flip when eval.flip; eval.crf adds a row with the dense CRF over it.

    store: where each image's label maps are put once done; images found there are not computed again, and on_resume is
    told how many they are. With torch.distributed up, every process must call this; each measures its share and all
    get the sums, the samples only the first.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            measurement = _Measurement(model, dataset, config, store)
            measurement.run(progress, on_resume)
            measurement.gather()
            image_iou = {name: measurement.image_iou[name] for name in dataset.names if name in measurement.image_iou}
            samples, best, worst = _samples(model, dataset, config, keep, image_iou) if is_main() else ([], [], [])
    finally:
        model.train(was_training)
    if store is not None and is_main():
        store.clear()
    return EvalResult(
        **{row: metrics.compute() for row, metrics in measurement.metrics.items()},
        f1=measurement.f1(),
        seconds=time.perf_counter() - started,
        images=len(dataset),
        samples=samples,
        has_masks=measurement.has_masks,
        image_iou=image_iou,
        best=best,
        worst=worst,
        notes=dataset.mask_notes() if dataset.with_mask else [],
    )


class _Measurement:
    """Counts over one process's share of a split."""

    def __init__(self, model: AFANet, dataset: TaggedDataset, config: Config, store: EvalStore | None) -> None:
        self.model, self.dataset, self.config = model, dataset, config
        self.device = next(model.parameters()).device
        self.has_masks = dataset.with_mask and dataset.has_masks
        self.store = store if self.has_masks else None
        self.num_classes = len(dataset.classes) + 1
        self.crf = config.eval.crf and self.has_masks
        self.metrics = {row: SegmentationMetrics(self.num_classes) for row in ((*ROWS, "crf") if self.crf else ROWS)}
        self.found: dict[str, list[int]] = {}
        """Name -> the class numbers, from 0, that the classifier finds."""
        self.image_iou: dict[str, float] = {}

    def run(self, progress: bool, on_resume: Callable[[int], None] | None) -> None:
        settings = self.config.eval
        # The first process's list counts: another might look when the first has added to it already.
        done = broadcast(self.store.done() if self.store is not None and is_main() else set())
        names = self.dataset.names
        stored = [i for i, name in enumerate(names) if name in done]
        left = [i for i, name in enumerate(names) if name not in done]
        if stored and on_resume is not None and is_main():
            on_resume(len(stored))
        for position in share(len(stored), rank(), world_size()):
            self._count_stored(stored[position])
        loader = eval_loader(
            self.dataset,
            settings.batch_size,
            self.config.data.workers,
            rank=rank(),
            world_size=world_size(),
            indices=left,
        )
        bar = tqdm(
            total=len(share(len(left), rank(), world_size())),
            desc="evaluating",
            unit="img",
            disable=not (progress and is_main()),
            leave=False,
        )
        with bar, _crf_pool(settings) if self.crf else nullcontext() as pool:
            for batch in loader:
                if self.has_masks:
                    self._measure(batch, pool)
                else:
                    images = batch["image"].to(self.device, non_blocking=True)
                    with precision(self.device, self.config):
                        out = self.model(normalize(images), want=("class",))
                    self._note_found(batch["name"], out.class_logits)
                bar.update(len(batch["name"]))
                if pool is not None:
                    self._finish_crf(pool.take())
            if pool is not None:
                self._finish_crf(pool.take(everything=True))

    def _measure(self, batch: Sample, pool: CrfPool[_Waiting] | None) -> None:
        truth = batch["mask"].to(self.device, non_blocking=True)
        images = batch["image"].to(self.device, non_blocking=True)
        measured = measure_batch(self.model, images, batch["tags"], self.config)
        for row in ROWS:
            self.metrics[row].update(measured.labels[row], truth)
        self._note_found(batch["name"], measured.class_logits)
        if pool is None:
            self._note_iou(batch["name"], measured.labels["seg"], truth)
        if pool is None and self.store is None:
            return
        planes = {row: labels.to(torch.uint8).cpu().numpy() for row, labels in measured.labels.items()}
        for i, name in enumerate(batch["name"]):
            own = {row: plane[i] for row, plane in planes.items()}
            if pool is None:
                self._keep(name, own)
            else:
                image = batch["image"][i].permute(1, 2, 0).contiguous().numpy()
                probabilities = measured.seg_logits[i].softmax(0).cpu().numpy()
                pool.add(_Waiting(name, own, batch["mask"][i]), image, probabilities)

    def _finish_crf(self, results: Iterable[tuple[_Waiting, NDArray[np.uint8]]]) -> None:
        for waiting, labels in results:
            prediction, truth = torch.from_numpy(labels)[None], waiting.truth[None]
            self.metrics["crf"].update(prediction, truth)
            self._note_iou([waiting.name], prediction, truth)
            self._keep(waiting.name, {**waiting.planes, "crf": labels})

    def _keep(self, name: str, planes: dict[str, NDArray[np.uint8]]) -> None:
        if self.store is not None:
            self.store.save(name, planes, self.found[name])

    def _count_stored(self, index: int) -> None:
        assert self.store is not None
        name = self.dataset.names[index]
        planes, self.found[name] = self.store.load(name)
        truth = torch.from_numpy(self.dataset.mask(index, image_size(self.dataset.paths[index])))[None]
        for row, metrics in self.metrics.items():
            metrics.update(torch.from_numpy(planes[row])[None], truth)
        self._note_iou([name], torch.from_numpy(planes["crf" if self.crf else "seg"])[None], truth)

    def _note_found(self, names: Sequence[str], logits: Tensor | None) -> None:
        assert logits is not None
        for name, row in zip(names, (logits > 0).tolist(), strict=True):
            self.found[name] = [number for number, found in enumerate(row) if found]

    def _note_iou(self, names: Sequence[str], prediction: Tensor, truth: Tensor) -> None:
        scores = image_scores(prediction, truth, self.num_classes).tolist()
        self.image_iou.update(zip(names, scores, strict=True))

    def gather(self) -> None:
        """Sum the counts of all processes, and give each what the others found."""
        if world_size() == 1:
            return
        for metrics in self.metrics.values():
            counts = metrics.confusion
            if counts is None:
                counts = torch.zeros(self.num_classes, self.num_classes + 1, dtype=torch.int64)
            metrics.confusion = all_reduce_sum_(counts.to(self.device))
        for found, image_iou in broadcast(gather((self.found, self.image_iou))):
            self.found.update(found)
            self.image_iou.update(image_iou)

    def f1(self) -> float:
        scores = torch.full_like(self.dataset.tags, -1)
        for row, name in enumerate(self.dataset.names):
            scores[row, self.found[name]] = 1
        return classification_f1(scores, self.dataset.tags)


@dataclass(frozen=True, eq=False)
class _Waiting:
    """An image whose CRF is under way."""

    name: str
    planes: dict[str, NDArray[np.uint8]]
    truth: Tensor


@contextmanager
def _crf_pool(settings: EvalConfig) -> Iterator[CrfPool[_Waiting]]:
    pool: CrfPool[_Waiting] = CrfPool(crf_settings(settings), settings.crf_workers)
    try:
        yield pool
    finally:
        pool.close()


def crf_settings(settings: EvalConfig) -> CrfSettings:
    """The CRF that a configuration asks for."""
    return CrfSettings(settings.crf_iterations, settings.crf_gaussian, settings.crf_bilateral)


def _samples(
    model: AFANet, dataset: TaggedDataset, config: Config, keep: int, image_iou: Mapping[str, float]
) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Samples evenly spread, of the best and of the worst images, computed once more: which images are the best is
    known only at the end, and of an evaluation that was resumed nothing but labels is left."""
    spread = sorted({round(i * (len(dataset) - 1) / max(1, keep - 1)) for i in range(min(keep, len(dataset)))})
    numbers = {name: number for number, name in enumerate(dataset.names)}
    ranked = sorted((name for name in image_iou if not math.isnan(image_iou[name])), key=lambda name: image_iou[name])
    extremes = min(keep // 3, len(ranked) // 2)
    best, worst = ranked[::-1][:extremes], ranked[:extremes]

    def take(names: Iterable[str]) -> list[Sample]:
        return [_sample(model, dataset, numbers[name], config, image_iou.get(name, math.nan)) for name in names]

    return take(dataset.names[number] for number in spread), take(best), take(worst)


def _sample(model: AFANet, dataset: TaggedDataset, number: int, config: Config, iou: float) -> Sample:
    item = dataset[number]
    image = item["image"].permute(1, 2, 0).contiguous().numpy()
    device = next(model.parameters()).device
    measured = measure_batch(model, item["image"][None].to(device), item["tags"][None], config)
    prediction = measured.labels["seg"][0].cpu().numpy()
    if config.eval.crf:
        probabilities = measured.seg_logits[0].softmax(0).cpu().numpy()
        prediction = dense_crf(image, probabilities, crf_settings(config.eval)).argmax(0)
    truth = item["mask"].numpy() if "mask" in item else np.full(prediction.shape, IGNORE)
    return {
        "name": item["name"],
        "image": image,
        "tags": [dataset.classes[index] for index in item["tags"].nonzero()[:, 0].tolist()],
        "cam": measured.cams[0].amax(0).cpu().numpy(),
        "cam_label": measured.labels["cam"][0].cpu().numpy(),
        "walk_label": measured.labels["walk"][0].cpu().numpy(),
        "par_label": measured.labels["par"][0].cpu().numpy(),
        "prediction": prediction,
        "truth": truth,
        "iou": iou,
    }


def measure_batch(model: AFANet, images: Tensor, tags: Tensor, config: Config) -> Measured:
    """uint8 images [B, 3, H, W] and tags [B, C] on the CPU -> labels of the four rows, CAMs and logits."""
    device = images.device
    most = int((tags > 0).sum(1).max())
    classes = pack_classes(tags.to(device, non_blocking=True), most)
    inputs = normalize(images)
    with precision(device, config):
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
        segmentation = fuse_segmentation(model, inputs, out.seg_logits, config.eval)
    assert result.affinity is not None and result.grid is not None
    background = config.labels.cam_threshold
    labels = {
        "cam": threshold_labels(result.cams, classes, background),
        "walk": walk_label_single(result.cams, result.affinity, result.grid, classes, config.labels, background),
        "par": par_label_single(images, result.cams, classes, config.labels, background),
        "seg": segmentation.max(1).indices,
    }
    return Measured(labels, result.cams, out.class_logits.float(), segmentation)


def segment(model: AFANet, images: Tensor, config: Config) -> Tensor:
    """uint8 images [B, 3, H, W] -> segmentation logits [B, C+1, H, W] at eval.scales: what prediction uses, no tags."""
    with torch.inference_mode(), precision(images.device, config):
        return fuse_segmentation(model, normalize(images), None, config.eval)


def precision(device: torch.device, config: Config) -> torch.autocast:
    """bfloat16 where the model was trained in it; float32 for all others, those trained in float16 included."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")


def fuse_segmentation(model: AFANet, inputs: Tensor, base: Tensor | None, settings: EvalConfig) -> Tensor:
    """Maximum or mean over scales and flips of the logits at full size; `base` saves the forward of scale 1."""
    size = inputs.shape[2:]
    fused: Tensor | None = None

    def add(logits: Tensor) -> None:
        nonlocal fused
        logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        if fused is None:
            fused = logits
        else:
            fused = torch.maximum(fused, logits) if settings.fusion == "max" else fused.add_(logits)

    for scale in settings.scales:
        scaled = inputs
        if scale != 1:
            sides = [max(1, int(side * scale)) for side in size]
            scaled = F.interpolate(inputs, size=sides, mode="bilinear", align_corners=False)
        if scale == 1 and base is not None:
            add(base)
        else:
            add(model(scaled, want=("seg",)).seg_logits)
        if settings.flip:
            add(model(scaled.flip(-1), want=("seg",)).seg_logits.flip(-1))
    assert fused is not None
    if settings.fusion == "mean":
        fused /= len(settings.scales) * (2 if settings.flip else 1)
    return fused
