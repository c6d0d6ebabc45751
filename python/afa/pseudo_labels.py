"""Export of a training set's pseudo labels for a second-stage segmentor.

    afa pseudo-labels runs/voc --split train_aug --out labels                 # one PNG an image, in VOC's palette
    torchrun --nproc-per-node 4 -m afa pseudo-labels runs/voc --out labels
    afa pseudo-labels runs/voc --out labels --shard 2/8                       # the second of eight machines

Every source is told the image's tags, as at training: a class that the image doesn't show is never in its label.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from afa.cam import ClassSet, multi_scale_cam, pack_classes
from afa.config import Config, to_dict
from afa.crf import CrfPool
from afa.data import TaggedDataset, eval_loader, share
from afa.data.transforms import image_size, read_mask
from afa.distributed import all_reduce_sum_, barrier, is_main, rank, world_size
from afa.errors import UserError
from afa.evaluate import crf_settings, fuse_segmentation, precision
from afa.files import atomic_path, mark_output, write_json
from afa.labels import par_labels, threshold_labels, walk_labels
from afa.metrics import IGNORE, SegmentationMetrics
from afa.model.network import AFANet, normalize
from afa.visualize import save_mask

SOURCES = ("seg", "walk", "par", "cam")
"""seg: the segmentation among background and the image's tags. walk: the CAM walked by the affinity, then PAR, and par:
the CAM refined by PAR, as training makes them. cam: the CAM against the two background scores."""

MANIFEST = "labels.json"
_WRITERS = 4


@dataclass
class Labels:
    """Pseudo labels of one batch."""

    maps: dict[str, Tensor]
    """Source -> int64 [B, H, W]: 0 background, class number + 1, 255 ignored."""
    cams: Tensor
    """[B, K, H, W] of the tagged classes, in [0, 1]."""
    classes: ClassSet
    seg_logits: Tensor | None = None
    """[B, K+1, H, W] of background and the tagged classes (-inf where there are fewer), when seg was asked for."""


@torch.inference_mode()
def make_labels(
    model: AFANet, images: Tensor, tags: Tensor, config: Config, sources: Sequence[str] = SOURCES
) -> Labels:
    """uint8 images [B, 3, H, W] and tags [B, C] on the CPU -> labels of each source, as training makes them.

    cam, par and walk ignore what lies between labels.low and labels.high; with both equal nothing is ignored. The walk
    uses the affinity of the largest CAM scale.
    """
    device = images.device
    settings = config.labels
    classes = pack_classes(tags.to(device, non_blocking=True), int((tags > 0).sum(1).max()))
    inputs = normalize(images)
    with precision(device, config):
        out = model(inputs, want=("cam", "seg") if "seg" in sources else ("cam",))
        assert out.cam is not None
        scale = max(settings.cam_scales) if "walk" in sources else None
        result = multi_scale_cam(model, inputs, classes, settings.cam_scales, affinity_scale=scale, base=out.cam)
        fused = fuse_segmentation(model, inputs, out.seg_logits, config.eval) if "seg" in sources else None
    maps: dict[str, Tensor] = {}
    if "cam" in sources:
        low, high = (threshold_labels(result.cams, classes, score) for score in (settings.low, settings.high))
        maps["cam"] = torch.where((low > 0) & (high == 0), IGNORE, high)
    if "par" in sources:
        maps["par"] = par_labels(images, result.cams, classes, settings)
    if "walk" in sources:
        assert result.affinity is not None and result.grid is not None
        maps["walk"] = walk_labels(images, result.cams, result.affinity, result.grid, classes, settings)
    packed = None
    if fused is not None:
        own = fused[:, 1:].take_along_dim(classes.index[:, :, None, None], dim=1)
        own = own.masked_fill(~classes.valid[:, :, None, None], -torch.inf)
        packed = torch.cat([fused[:, :1], own], 1)
        maps["seg"] = classes.labels(packed.max(1).indices)
    return Labels(maps, result.cams, classes, packed)


@dataclass
class Export:
    """What an export did, over all processes."""

    written: int
    skipped: int
    """Images whose files were there already."""
    seconds: float
    scores: dict[str, Any] | None
    """Of the labels against the masks of `measured` images (`SegmentationMetrics.compute`); None without masks."""
    measured: int


def export_labels(
    model: AFANet,
    dataset: TaggedDataset,
    config: Config,
    out: str | Path,
    *,
    source: str = "seg",
    ignore: bool = True,
    cams: bool = False,
    shard: tuple[int, int] = (0, 1),
    weights_id: str = "",
    progress: bool = True,
) -> Export:
    """Write out/<name>.png, a palette PNG of the image's own size, for every image of `dataset` (made with train=False,
    with_mask=False), and with `cams` out/cams/<name>.npz: `classes` uint8 [K] (class numbers as in the labels) and
    `cams` float16 [K, H, W].

    What is there already is kept; a file appears whole or not at all. ignore=False puts labels.cam_threshold in the
    place of both background scores. eval.scales, eval.flip, eval.fusion and eval.crf hold for the source seg. shard:
    (number, count) of the part to write; of several processes each takes a part of that.

    UserError when `out` holds labels that were made otherwise; `weights_id` tells one model from another there.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    out = Path(out)
    if not ignore:
        score = config.labels.cam_threshold
        config = replace(config, labels=replace(config.labels, low=score, high=score))
    if is_main():
        _claim(out, _description(config, dataset, source, weights_id))
    barrier()
    started = time.perf_counter()
    number, count = shard
    mine = share(len(dataset), number * world_size() + rank(), count * world_size())
    left = [index for index in mine if not _there(out, dataset.names[index], cams)]
    writer = _Writer(model, dataset, config, out, source, cams)
    with (
        tqdm(total=len(left), desc="labelling", unit="img", disable=not (progress and is_main()), leave=False) as bar,
        closing(writer),
    ):
        writer.run(left, bar)
    seconds = time.perf_counter() - started
    metrics, measured, labelled = _score(dataset, out, mine)
    assert metrics.confusion is not None
    sums = torch.tensor([len(left), len(mine) - len(left), measured, *labelled])
    written, skipped, measured, known, pixels = all_reduce_sum_(sums).tolist()
    metrics.confusion = all_reduce_sum_(metrics.confusion)
    scores = {**metrics.compute(), "labelled": known / pixels} if measured else None
    return Export(written, skipped, seconds, scores, measured)


class _Writer:
    """Makes labels batch by batch; threads encode and write them, processes do the CRF."""

    def __init__(
        self, model: AFANet, dataset: TaggedDataset, config: Config, out: Path, source: str, cams: bool
    ) -> None:
        self.model, self.dataset, self.config = model, dataset, config
        self.out, self.source, self.cams = out, source, cams
        self.device = next(model.parameters()).device
        self.numbers = {name: number for number, name in enumerate(dataset.names)}
        self.threads = ThreadPoolExecutor(_WRITERS)
        self.writing: deque[Future[None]] = deque()
        settings = config.eval
        self.crf: CrfPool[_Labelled] | None = None
        if source == "seg" and settings.crf:
            self.crf = CrfPool(crf_settings(settings), settings.crf_workers)

    def run(self, indices: Sequence[int], bar: tqdm[Any]) -> None:
        settings = self.config
        for batch in eval_loader(self.dataset, settings.eval.batch_size, settings.data.workers, indices=indices):
            images = batch["image"].to(self.device, non_blocking=True)
            labels = make_labels(self.model, images, batch["tags"], settings, (self.source,))
            maps = labels.maps[self.source].to(torch.uint8).cpu().numpy()
            maps_of_classes = labels.cams.half().cpu().numpy() if self.cams else None
            for i, name in enumerate(batch["name"]):
                present = batch["tags"][i].nonzero()[:, 0].numpy().astype(np.uint8)
                own = None if maps_of_classes is None else maps_of_classes[i, : len(present)]
                item = _Labelled(name, maps[i], present + 1, own)
                if self.crf is None:
                    self._write(item)
                else:
                    assert labels.seg_logits is not None
                    # Of the image's own classes alone: there are few, and the cost is theirs.
                    probabilities = labels.seg_logits[i, : len(present) + 1].softmax(0).cpu().numpy()
                    self.crf.add(item, batch["image"][i].permute(1, 2, 0).contiguous().numpy(), probabilities)
            if self.crf is not None:
                self._refined(self.crf.take())
            bar.update(len(batch["name"]))
        if self.crf is not None:
            self._refined(self.crf.take(everything=True))
        self._wait(0)

    def _refined(self, results: Iterable[tuple[_Labelled, NDArray[np.uint8]]]) -> None:
        for item, choice in results:
            numbers = np.concatenate([np.zeros(1, np.uint8), item.classes])
            self._write(replace(item, label=numbers[choice]))

    def _write(self, item: _Labelled) -> None:
        self._wait(8 * _WRITERS)
        size = None if self.dataset.largest_side is None else self.dataset.paths[self.numbers[item.name]]
        self.writing.append(self.threads.submit(_save, self.out, item, size))

    def _wait(self, most: int) -> None:
        """Until at most `most` files are under way; an error of a thread comes out here."""
        while len(self.writing) > most:
            self.writing.popleft().result()

    def close(self) -> None:
        self.threads.shutdown()
        if self.crf is not None:
            self.crf.close()


@dataclass(frozen=True, eq=False)
class _Labelled:
    """What is written of one image."""

    name: str
    label: NDArray[np.uint8]
    classes: NDArray[np.uint8]
    """Its class numbers, background being 0."""
    cams: NDArray[np.float16] | None


def _label_path(out: Path, name: str) -> Path:
    return out / f"{name}.png"


def _cam_path(out: Path, name: str) -> Path:
    return out / "cams" / f"{name}.npz"


def _save(out: Path, item: _Labelled, sized_as: Path | None) -> None:
    """Write an image's files, the label last: where it is, all is. sized_as: the picture, when it was read smaller."""
    if item.cams is not None:
        path = _cam_path(out, item.name)
        with atomic_path(path) as temporary:
            np.savez_compressed(temporary, classes=item.classes, cams=item.cams)
    label = item.label
    if sized_as is not None:
        height, width = image_size(sized_as)
        label = np.asarray(Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST))
    save_mask(_label_path(out, item.name), label)


def _there(out: Path, name: str, cams: bool) -> bool:
    if cams and not _cam_path(out, name).is_file():
        return False
    try:
        with Image.open(_label_path(out, name)) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _score(
    dataset: TaggedDataset, out: Path, indices: Iterable[int]
) -> tuple[SegmentationMetrics, int, tuple[int, int]]:
    """Labels against the masks that are there, over the labelled pixels: counts, how many images, and of all pixels
    with a true class how many are labelled, and how many there are."""
    metrics = SegmentationMetrics(len(dataset.classes) + 1)
    metrics.confusion = torch.zeros(metrics.num_classes, metrics.num_classes + 1, dtype=torch.int64)
    measured = known = pixels = 0
    for index in indices:
        path = dataset.mask_path(index)
        if not path.is_file():
            continue
        with Image.open(_label_path(out, dataset.names[index])) as image:
            label = np.array(image)
        truth = read_mask(path, len(dataset.classes), (label.shape[0], label.shape[1])).copy()
        pixels += int((truth != IGNORE).sum())
        truth[label == IGNORE] = IGNORE
        known += int((truth != IGNORE).sum())
        metrics.update(torch.from_numpy(label)[None], torch.from_numpy(truth)[None])
        measured += 1
    return metrics, measured, (known, pixels)


def _description(config: Config, dataset: TaggedDataset, source: str, weights_id: str) -> dict[str, Any]:
    """All that a label depends on."""
    content = to_dict(config)
    used = ("scales", "flip", "fusion", "crf", "crf_iterations", "crf_gaussian", "crf_bilateral")
    return {
        "source": source,
        "weights": weights_id,
        "data": str(dataset.root.resolve()),
        "largest_side": dataset.largest_side,
        "classes": ["background", *dataset.classes],
        "labels": content["labels"],
        "eval": {name: content["eval"][name] for name in used} if source == "seg" else {},
    }


def _claim(out: Path, description: dict[str, Any]) -> None:
    """Make `out` the folder of labels made this way; UserError when it is that of others."""
    path = out / MANIFEST
    if not path.is_file():
        if out.is_dir() and next(out.glob("*.png"), None) is not None:
            raise UserError(f"{out} holds pictures that `afa pseudo-labels` did not write; give another --out")
        write_json(path, description)
        mark_output(out)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        before = {}
    other = [key for key, value in description.items() if before.get(key) != value]
    if other:
        raise UserError(
            f"{out} holds labels made with another {', '.join(other)} (see {path}); give another --out, or remove it"
        )
