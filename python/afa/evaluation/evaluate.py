"""Evaluation on a split: mean IoU of CAMs, walked CAMs, PAR labels, segmentation and dense CRF; F1 of the tags.

    afa evaluate runs/voc eval.scales=1,0.5,0.75 eval.flip=true eval.crf=true
    torchrun --nproc-per-node 4 -m afa evaluate runs/voc        # each process evaluates a share

For a split without masks, only the classifier's F1 is computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from afa.config import Config, EvalConfig
from afa.data import TaggedDataset, eval_loader, share
from afa.data.classes import IGNORE
from afa.data.dataset import Sample
from afa.data.transforms import image_size
from afa.distributed import all_reduce_sum_, broadcast, gather, is_main, rank, world_size
from afa.evaluation.metrics import SegmentationMetrics, classification_f1, image_scores
from afa.evaluation.result import ROWS, EvalResult, Example
from afa.evaluation.store import EvalStore
from afa.labeling.crf import CrfPool, CrfSettings, dense_crf
from afa.labeling.inference import infer
from afa.labeling.label_maker import LabelMaker
from afa.model.network import AFANet


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
    """Evaluate `model` on `dataset` (created with train=False).

    `LabelMaker.for_evaluation` makes the label rows. The segmentation is the maximum or mean of the logits over
    eval.scales, each averaged with the horizontal flip if eval.flip; eval.crf adds a row with the dense CRF.

    keep: number of example images to return, and a third as many of the best and of the worst.
    store: saves each image's label maps. Images already in it are not computed again; on_resume is called with their
    number. With torch.distributed, every process must call this function: each evaluates a share of the images, all
    get the summed scores, and only rank 0 gets the examples.
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
    """Accumulates the scores of one process's share of a split."""

    def __init__(self, model: AFANet, dataset: TaggedDataset, config: Config, store: EvalStore | None) -> None:
        self.model, self.dataset, self.config = model, dataset, config
        self.label_maker = LabelMaker.for_evaluation(config)
        self.device = next(model.parameters()).device
        self.has_masks = dataset.with_mask and dataset.has_masks
        self.store = store if self.has_masks else None
        self.num_classes = len(dataset.classes) + 1
        self.crf = config.eval.crf and self.has_masks
        self.metrics = {row: SegmentationMetrics(self.num_classes) for row in ((*ROWS, "crf") if self.crf else ROWS)}
        self.found: dict[str, list[int]] = {}
        """Name -> zero-based class indices predicted by the classifier."""
        self.image_iou: dict[str, float] = {}

    def run(self, progress: bool, on_resume: Callable[[int], None] | None) -> None:
        settings = self.config.eval
        # Rank 0's list is used everywhere, because the store may change before another rank reads it.
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
                    found = infer(self.model, images, self.config, {"class"})
                    self._note_found(batch["name"], found.outputs.class_logits)
                bar.update(len(batch["name"]))
                if pool is not None:
                    self._finish_crf(pool.take())
            if pool is not None:
                self._finish_crf(pool.take(everything=True))

    def _measure(self, batch: Sample, pool: CrfPool[_Waiting] | None) -> None:
        truth = batch["mask"].to(self.device, non_blocking=True)
        images = batch["image"].to(self.device, non_blocking=True)
        labels = self.label_maker.from_images(self.model, images, batch["tags"])
        for row in ROWS:
            self.metrics[row].update(labels.maps[row], truth)
        self._note_found(batch["name"], labels.class_logits)
        if pool is None:
            self._note_iou(batch["name"], labels.maps["seg"], truth)
        if pool is None and self.store is None:
            return
        planes = {row: label.to(torch.uint8).cpu().numpy() for row, label in labels.maps.items()}
        for i, name in enumerate(batch["name"]):
            own = {row: plane[i] for row, plane in planes.items()}
            if pool is None:
                self._keep(name, own)
            else:
                image = batch["image"][i].permute(1, 2, 0).contiguous().numpy()
                assert labels.seg_logits is not None
                probabilities = labels.seg_logits[i].softmax(0).cpu().numpy()
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
        """Sum the counts over all processes and share the per-image results."""
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
    """An image that waits for its CRF."""

    name: str
    planes: dict[str, NDArray[np.uint8]]
    truth: Tensor


@contextmanager
def _crf_pool(settings: EvalConfig) -> Iterator[CrfPool[_Waiting]]:
    pool: CrfPool[_Waiting] = CrfPool(CrfSettings.of(settings), settings.crf_workers)
    try:
        yield pool
    finally:
        pool.close()


def _samples(
    model: AFANet, dataset: TaggedDataset, config: Config, keep: int, image_iou: Mapping[str, float]
) -> tuple[list[Example], list[Example], list[Example]]:
    """Evenly spaced examples, the best and the worst images.

    They are computed again, because the ranking is known only at the end and a resumed evaluation has only the labels.
    """
    spread = sorted({round(i * (len(dataset) - 1) / max(1, keep - 1)) for i in range(min(keep, len(dataset)))})
    numbers = {name: number for number, name in enumerate(dataset.names)}
    ranked = sorted((name for name in image_iou if not math.isnan(image_iou[name])), key=lambda name: image_iou[name])
    extremes = min(keep // 3, len(ranked) // 2)
    best, worst = ranked[::-1][:extremes], ranked[:extremes]

    def take(names: Iterable[str]) -> list[Example]:
        return [_sample(model, dataset, numbers[name], config, image_iou.get(name, math.nan)) for name in names]

    return take(dataset.names[number] for number in spread), take(best), take(worst)


def _sample(model: AFANet, dataset: TaggedDataset, number: int, config: Config, iou: float) -> Example:
    item = dataset[number]
    image = item["image"].permute(1, 2, 0).contiguous().numpy()
    device = next(model.parameters()).device
    labels = LabelMaker.for_evaluation(config).from_images(model, item["image"][None].to(device), item["tags"][None])
    prediction = labels.maps["seg"][0].cpu().numpy()
    if config.eval.crf:
        assert labels.seg_logits is not None
        probabilities = labels.seg_logits[0].softmax(0).cpu().numpy()
        prediction = dense_crf(image, probabilities, CrfSettings.of(config.eval)).argmax(0)
    truth = item["mask"].numpy() if "mask" in item else np.full(prediction.shape, IGNORE)
    return {
        "name": item["name"],
        "image": image,
        "tags": [dataset.classes[index] for index in item["tags"].nonzero()[:, 0].tolist()],
        "cam": labels.cams[0].amax(0).cpu().numpy(),
        "cam_label": labels.maps["cam"][0].cpu().numpy(),
        "walk_label": labels.maps["walk"][0].cpu().numpy(),
        "par_label": labels.maps["par"][0].cpu().numpy(),
        "prediction": prediction,
        "truth": truth,
        "iou": iou,
    }
