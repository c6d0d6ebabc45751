"""Evaluation on a split: mean IoU of CAMs, walked CAMs, PAR labels, segmentation and dense CRF; F1 of the tags.

    afa evaluate runs/voc eval.scales=1,0.5,0.75 eval.flip=true eval.crf=true
    torchrun --nproc-per-node 4 -m afa evaluate runs/voc        # each process evaluates a share

For a split without masks, only the classifier's F1 is computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from afa.config import Config
from afa.data import TaggedDataset, eval_loader, share
from afa.data.classes import IGNORE
from afa.data.dataset import Sample
from afa.data.transforms import image_size
from afa.distributed import all_reduce_sum_, broadcast, gather, is_main, rank, world_size
from afa.evaluation.diagnostics import Diagnosis, ImageCounts, add_up, count_images, spread, token_affinity
from afa.evaluation.metrics import SegmentationMetrics, classification_f1, image_scores
from afa.evaluation.result import ROWS, EvalResult, Example
from afa.evaluation.store import EvalStore
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
    diagnose: bool = True,
    store: EvalStore | None = None,
    on_resume: Callable[[int], None] | None = None,
) -> EvalResult:
    """Evaluate `model` on `dataset` (created with train=False).

    `LabelMaker.for_evaluation` makes the label rows. The segmentation is the maximum or mean of the logits over
    eval.scales, each averaged with the horizontal flip if eval.flip; eval.crf adds a row with the dense CRF.

    keep: number of example images to return, and a third as many of the best and of the worst.
    diagnose: whether to count what `EvalResult.diagnosis` needs, on eval.diagnostic_images images.
    store: saves each image's label maps. Images already in it are not computed again; on_resume is called with their
    number. With torch.distributed, every process must call this function: each evaluates a share of the images, all
    get the summed scores, and only rank 0 gets the examples.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            measurement = _Measurement(model, dataset, config, store, config.eval.diagnostic_images if diagnose else 0)
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
        diagnosis=measurement.diagnosis(),
    )


def seconds_per_image(model: AFANet, dataset: TaggedDataset, config: Config) -> float:
    """Time of evaluating one image, from one batch; the model must be in evaluation mode."""
    measurement = _Measurement(model, dataset, config, None, config.eval.diagnostic_images)
    count = min(len(dataset), config.eval.batch_size)
    for _ in range(2):  # the first pass allocates memory
        begin = time.perf_counter()
        measurement.pass_over(range(count), workers=0)
        seconds = time.perf_counter() - begin
    return seconds / count


class _Measurement:
    """Accumulates the scores of one process's share of a split."""

    def __init__(
        self, model: AFANet, dataset: TaggedDataset, config: Config, store: EvalStore | None, diagnosed: int
    ) -> None:
        self.model, self.dataset, self.config = model, dataset, config
        self.label_maker = LabelMaker.for_evaluation(config)
        self.device = next(model.parameters()).device
        self.has_masks = dataset.with_mask and dataset.has_masks
        self.store = store if self.has_masks else None
        self.num_classes = len(dataset.classes) + 1
        self.rows = _rows(config)
        kept = self.rows if self.has_masks else ROWS
        self.metrics = {row: SegmentationMetrics(self.num_classes) for row in kept}
        self.found: dict[str, list[int]] = {}
        """Name -> zero-based class indices predicted by the classifier."""
        self.image_iou: dict[str, float] = {}
        self.diagnosed = set(spread(dataset.names, diagnosed)) if self.has_masks else set()
        self.counts: dict[str, ImageCounts] = {}
        """Name -> counts of a diagnosed image."""

    def run(self, progress: bool, on_resume: Callable[[int], None] | None) -> None:
        # Rank 0's list is used everywhere, because the store may change before another rank reads it.
        done = broadcast(self.store.done() if self.store is not None and is_main() else set())
        names = self.dataset.names
        stored = [i for i, name in enumerate(names) if name in done]
        left = [i for i, name in enumerate(names) if name not in done]
        if stored and on_resume is not None and is_main():
            on_resume(len(stored))
        for position in share(len(stored), rank(), world_size()):
            self._count_stored(stored[position])
        bar = tqdm(
            total=len(share(len(left), rank(), world_size())),
            desc="evaluating",
            unit="img",
            disable=not (progress and is_main()),
            leave=False,
        )
        with bar:
            self.pass_over(left, self.config.data.workers, bar.update)

    def pass_over(self, indices: Sequence[int], workers: int, done: Callable[[int], object] = lambda _: None) -> None:
        """Measure this process's share of the images; `done` is called with the size of each finished batch."""
        loader = eval_loader(
            self.dataset, self.config.eval.batch_size, workers, rank=rank(), world_size=world_size(), indices=indices
        )
        for batch in loader:
            if self.has_masks:
                self._measure(batch)
            else:
                images = batch["image"].to(self.device, non_blocking=True)
                found = infer(self.model, images, self.config, {"class"})
                self._note_found(batch["name"], found.outputs.class_logits)
            done(len(batch["name"]))

    def _measure(self, batch: Sample) -> None:
        truth = batch["mask"].to(self.device, non_blocking=True)
        images = batch["image"].to(self.device, non_blocking=True)
        labels = self.label_maker.from_images(self.model, images, batch["tags"], self.rows)
        for row in self.rows:
            self.metrics[row].update(labels.maps[row], truth)
        self._note_found(batch["name"], labels.class_logits)
        self._note_iou(batch["name"], labels.maps[self.rows[-1]], truth)
        chosen = [i for i, name in enumerate(batch["name"]) if name in self.diagnosed]
        counts = count_images(images, labels, truth, self.config, self.num_classes, chosen)
        self.counts.update((batch["name"][i], count) for i, count in zip(chosen, counts, strict=True))
        if self.store is None:
            return
        planes = {row: labels.maps[row].to(torch.uint8).cpu().numpy() for row in self.rows}
        for i, name in enumerate(batch["name"]):
            own = {row: plane[i] for row, plane in planes.items()}
            self.store.save(name, own, self.found[name], self.counts.get(name))

    def _count_stored(self, index: int) -> None:
        assert self.store is not None
        name = self.dataset.names[index]
        planes, self.found[name], counts = self.store.load(name)
        if counts is not None and name in self.diagnosed:
            self.counts[name] = counts
        truth = torch.from_numpy(self.dataset.mask(index, image_size(self.dataset.paths[index])))[None]
        for row, metrics in self.metrics.items():
            metrics.update(torch.from_numpy(planes[row])[None], truth)
        self._note_iou([name], torch.from_numpy(planes[self.rows[-1]])[None], truth)

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
        for found, image_iou, counts in broadcast(gather((self.found, self.image_iou, self.counts))):
            self.found.update(found)
            self.image_iou.update(image_iou)
            self.counts.update(counts)

    def diagnosis(self) -> Diagnosis | None:
        return add_up(self.counts.values(), self.num_classes) if self.counts else None

    def f1(self) -> float:
        scores = torch.full_like(self.dataset.tags, -1)
        for row, name in enumerate(self.dataset.names):
            scores[row, self.found[name]] = 1
        return classification_f1(scores, self.dataset.tags)


def _rows(config: Config) -> tuple[str, ...]:
    """Rows to compute; the last one is the final segmentation."""
    return (*ROWS, "crf") if config.eval.crf else ROWS


def _samples(
    model: AFANet, dataset: TaggedDataset, config: Config, keep: int, image_iou: Mapping[str, float]
) -> tuple[list[Example], list[Example], list[Example]]:
    """Evenly spaced examples, the best and the worst images.

    They are computed again, because the ranking is known only at the end and a resumed evaluation has only the labels.
    """
    numbers = {name: number for number, name in enumerate(dataset.names)}
    ranked = sorted((name for name in image_iou if not math.isnan(image_iou[name])), key=lambda name: image_iou[name])
    extremes = min(keep // 3, len(ranked) // 2)
    best, worst = ranked[::-1][:extremes], ranked[:extremes]

    def take(names: Iterable[str]) -> list[Example]:
        return [_sample(model, dataset, numbers[name], config, image_iou.get(name, math.nan)) for name in names]

    return take(spread(dataset.names, keep)), take(best), take(worst)


def _sample(model: AFANet, dataset: TaggedDataset, number: int, config: Config, iou: float) -> Example:
    item = dataset[number]
    image = item["image"].permute(1, 2, 0).contiguous().numpy()
    device = next(model.parameters()).device
    rows, maker = _rows(config), LabelMaker.for_evaluation(config)
    labels = maker.from_images(model, item["image"][None].to(device), item["tags"][None], rows)
    prediction = labels.maps[rows[-1]][0].cpu().numpy()
    truth = item["mask"].numpy() if "mask" in item else np.full(prediction.shape, IGNORE)
    cam = labels.cams[0].amax(0)
    token, affinity = token_affinity(labels, cam)
    return {
        "name": item["name"],
        "image": image,
        "tags": [dataset.classes[index] for index in item["tags"].nonzero()[:, 0].tolist()],
        "cam": cam.cpu().numpy(),
        "token": token,
        "affinity": affinity.cpu().numpy(),
        "cam_label": labels.maps["cam"][0].cpu().numpy(),
        "walk_label": labels.maps["walk"][0].cpu().numpy(),
        "par_label": labels.maps["par"][0].cpu().numpy(),
        "prediction": prediction,
        "truth": truth,
        "iou": iou,
    }
