"""Export pseudo labels of a training set, to train a second segmentation network.

    afa pseudo-labels runs/voc --split train_aug --out labels                 # one PNG per image, in VOC's palette
    torchrun --nproc-per-node 4 -m afa pseudo-labels runs/voc --out labels
    afa pseudo-labels runs/voc --out labels --shard 2/8                       # the second of eight machines

All sources use image-level tags, as training does: a label contains only classes from its image's tags.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from afa.commands.common import first_alone, make_data, need_classes, need_run, processes, say, say_skipped
from afa.config import Config, load_config, to_dict, with_absolute_paths
from afa.data import TaggedDataset, eval_loader, open_dataset, share
from afa.data.classes import IGNORE
from afa.data.transforms import image_size, read_mask
from afa.data.visualize import save_mask
from afa.distributed import all_reduce_sum_, barrier, is_main, rank, world_size
from afa.errors import UserError, did_you_mean
from afa.evaluation.calibration import with_background_score
from afa.evaluation.metrics import SegmentationMetrics
from afa.evaluation.store import weights_id
from afa.files import atomic_path, check_writable, mark_output, write_json
from afa.labeling.crf import crf_settings
from afa.labeling.label_maker import SOURCES, LabelMaker
from afa.model.network import AFANet, load_model
from afa.run import CONFIG, MODEL

MANIFEST = "labels.json"
_WRITERS = 4


def run(options: argparse.Namespace) -> None:
    """Run `afa pseudo-labels` with its parsed options."""
    options.run = need_run(options.run)
    shard = _shard(options.shard)

    if options.source not in SOURCES:
        hint = did_you_mean(options.source, SOURCES)
        raise UserError(f"--source must be one of {', '.join(SOURCES)}, got '{options.source}'{hint}")

    config = with_absolute_paths(load_config(options.run / CONFIG, options.overrides))
    check_writable(options.out, "--out")
    split = options.split or config.data.train_split
    with processes(options.device) as (device, first):
        progress = first and not options.quiet
        with first_alone(first):
            make_data(config, progress)
        dataset = open_dataset(config.data, split, train=False, with_mask=False, progress=progress)
        path = options.run / MODEL
        model, classes, _ = load_model(path, device)
        need_classes(options.run, classes, config, dataset)
        done = export_labels(
            model,
            dataset,
            config,
            options.out,
            source=options.source,
            ignore=not options.no_ignore,
            cams=options.cams,
            shard=shard,
            model_id=weights_id(path),
            progress=progress,
        )
    if not first:
        return
    say_skipped(dataset)
    rate = f", {done.written / done.seconds:.1f} images per second" if done.written else ""
    say("written", f"{done.written:,} labels of '{split}' to {options.out} ({done.skipped:,} already existed){rate}")
    if done.scores is None:
        say("note", f"the split '{split}' has no masks, so the labels can't be evaluated")
        return
    say(
        "measured",
        f"mIoU {done.scores['miou']:.3f} on {done.measured:,} images with masks, over the "
        f"{done.scores['labeled']:.1%} of their pixels that are labeled",
    )


def _shard(text: str) -> tuple[int, int]:
    """Parse I/N into a zero-based part and the number of parts: '2/8' -> (1, 8)."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise UserError(f"--shard must be I/N with 1 <= I <= N, such as 2/8, got '{text}'")
    return int(number) - 1, int(count)


@dataclass
class Export:
    """Summary of an export, over all processes."""

    written: int
    skipped: int
    """Number of images with existing files."""
    seconds: float
    scores: dict[str, Any] | None
    """Scores of the labels against the masks of `measured` images (`SegmentationMetrics.compute`); None without
    masks.
    """
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
    model_id: str = "",
    progress: bool = True,
) -> Export:
    """Write out/<name>.png, a palette PNG of the image's size, for every image of `dataset`.

    Existing files are kept, and files are written atomically.

    dataset: created with train=False and with_mask=False.
    ignore: if False, use one background score (labels.cam_threshold; for walk labels.walk_threshold) instead of two.
    cams: also write out/cams/<name>.npz with `classes` uint8 [K] (class indices as in the labels) and `cams` float16
    [K, H, W].
    shard: (index, count) of the part to write; several processes split that part.
    model_id: identifies the model in the manifest of `out`.

    The settings of the eval section apply only to the source seg. Raises UserError if `out` contains labels that were
    made differently.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    out = Path(out)
    if not ignore:
        config = with_background_score(config, model, dataset)
    maker = LabelMaker.for_training(config, ignore=ignore)
    if is_main():
        _claim(out, _description(maker, dataset, source, model_id))
    barrier()
    started = time.perf_counter()
    number, count = shard
    mine = share(len(dataset), number * world_size() + rank(), count * world_size())
    left = [index for index in mine if not _there(out, dataset.names[index], cams)]
    writer = _Writer(model, dataset, maker, out, source, cams)
    with (
        tqdm(total=len(left), desc="labeling", unit="img", disable=not (progress and is_main()), leave=False) as bar,
        closing(writer),
    ):
        writer.run(left, bar)
    seconds = time.perf_counter() - started
    metrics, measured, labeled = _score(dataset, out, mine)
    assert metrics.confusion is not None
    sums = torch.tensor([len(left), len(mine) - len(left), measured, *labeled])
    written, skipped, measured, known, pixels = all_reduce_sum_(sums).tolist()
    metrics.confusion = all_reduce_sum_(metrics.confusion)
    scores = {**metrics.compute(), "labeled": known / pixels} if measured else None
    return Export(written, skipped, seconds, scores, measured)


class _Writer:
    """Makes labels batch by batch. Threads encode and write them."""

    def __init__(
        self, model: AFANet, dataset: TaggedDataset, maker: LabelMaker, out: Path, source: str, cams: bool
    ) -> None:
        self.model, self.dataset, self.maker = model, dataset, maker
        self.out, self.cams = out, cams
        self.source = "crf" if source == "seg" and maker.config.eval.crf else source
        self.device = next(model.parameters()).device
        self.numbers = {name: number for number, name in enumerate(dataset.names)}
        self.threads = ThreadPoolExecutor(_WRITERS)
        self.writing: deque[Future[None]] = deque()

    def run(self, indices: Sequence[int], bar: tqdm[Any]) -> None:
        settings = self.maker.config
        for batch in eval_loader(self.dataset, settings.eval.batch_size, settings.data.workers, indices=indices):
            images = batch["image"].to(self.device, non_blocking=True)
            labels = self.maker.from_images(self.model, images, batch["tags"], (self.source,))
            maps = labels.maps[self.source].to(torch.uint8).cpu().numpy()
            maps_of_classes = labels.cams.half().cpu().numpy() if self.cams else None
            for i, name in enumerate(batch["name"]):
                present = batch["tags"][i].nonzero()[:, 0].numpy().astype(np.uint8)
                own = None if maps_of_classes is None else maps_of_classes[i, : len(present)]
                self._write(_Labeled(name, maps[i], present + 1, own))
            bar.update(len(batch["name"]))
        self._wait(0)

    def _write(self, item: _Labeled) -> None:
        self._wait(8 * _WRITERS)
        size = None if self.dataset.largest_side is None else self.dataset.paths[self.numbers[item.name]]
        self.writing.append(self.threads.submit(_save, self.out, item, size))

    def _wait(self, max_pending: int) -> None:
        """Wait until at most max_pending files are being written. Errors of the threads are raised here."""
        while len(self.writing) > max_pending:
            self.writing.popleft().result()

    def close(self) -> None:
        self.threads.shutdown()


@dataclass(frozen=True, eq=False)
class _Labeled:
    """The output of one image."""

    name: str
    label: NDArray[np.uint8]
    classes: NDArray[np.uint8]
    """Class indices of the image; background is 0."""
    cams: NDArray[np.float16] | None


def _label_path(out: Path, name: str) -> Path:
    return out / f"{name}.png"


def _cam_path(out: Path, name: str) -> Path:
    return out / "cams" / f"{name}.npz"


def _save(out: Path, item: _Labeled, sized_as: Path | None) -> None:
    """Write the files of an image. The label is written last, so its presence means that all files are complete.

    sized_as: the image file, if the image was shrunk when loaded.
    """
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
    """Compare labels with the existing masks, over the labeled pixels.

    Returns the metrics, the number of images with masks, and (labeled pixels, all pixels) among those with a true
    class.
    """
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


def _description(maker: LabelMaker, dataset: TaggedDataset, source: str, model_id: str) -> dict[str, Any]:
    """Everything that a label depends on."""
    content = to_dict(maker.config)
    evaluation = {name: content["eval"][name] for name in ("longer_side", "scales", "flip", "fusion")}
    if maker.config.eval.crf:
        settings = crf_settings(maker.config.eval)
        # Lists, as JSON reads them back.
        kernels = {name: list(map(float, settings[name])) for name in ("gaussian", "bilateral")}
        evaluation["crf"] = {"num_iter": settings["num_iter"], **kernels}
    return {
        "source": source,
        "weights": model_id,
        "data": str(dataset.root.resolve()),
        "largest_side": dataset.largest_side,
        "classes": ["background", *dataset.classes],
        "labels": content["labels"],
        "thresholds": [list(maker.thresholds), list(maker.walk_thresholds)],
        "eval": evaluation if source == "seg" else {},
    }


def _claim(out: Path, description: dict[str, Any]) -> None:
    """Write the manifest of `out`, or check it against `description`; UserError if they differ."""
    path = out / MANIFEST
    if not path.is_file():
        if out.is_dir() and next(out.glob("*.png"), None) is not None:
            raise UserError(f"{out} contains images that `afa pseudo-labels` did not write; choose another --out")
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
            f"{out} contains labels made with different {', '.join(other)} (see {path}); choose another --out, or "
            "remove the folder"
        )
