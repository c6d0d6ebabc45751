"""Compares rules that choose the background score without masks with the best score according to masks.

    python benchmarks/background_scores.py --data DIR --run runs/demo    # minutes

The CAMs are those simulated from the masks of DIR, a folder in VOC layout (see real_photos.py), and those of trained
runs on their own validation images. "agreement" is the rule of labels.cam_threshold=auto: CAM and PAR labels agree
best. "Otsu" thresholds the histogram of the CAMs' maxima over the classes. 0.45 is AFA's score.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_photos import Photos
from refinements import CAM_KINDS, Photo
from timing import RESULTS, print_table, write_results
from tqdm import tqdm

from afa.config import LabelConfig, load_config
from afa.evaluation.calibration import CamImage, agreement
from afa.evaluation.diagnostics import BACKGROUND_SCORES
from afa.evaluation.metrics import SegmentationMetrics
from afa.labeling.inference import infer
from afa.labeling.labels import cam_labels, par_labels
from afa.model import load_model
from afa.run import CONFIG, MODEL

BINS = 100
RULES = ("agreement", "Otsu", "0.45")

CamOf = Callable[[int, Photo], torch.Tensor]
"""(number of the image, photo) -> CAMs [1, K, H, W]."""


def simulated(kind: str) -> CamOf:
    def cams(number: int, photo: Photo) -> torch.Tensor:
        photo.simulate(CAM_KINDS[kind], number)
        return photo.cams

    return cams


def of_run(run: Path) -> CamOf:
    config, (model, *_) = load_config(str(run / CONFIG)), load_model(run / MODEL, "cpu")
    model.eval()
    return lambda _, photo: infer(model, photo.image, config, {"cam"}).outputs.class_activation_maps(photo.classes)


def otsu(counts: np.ndarray[Any, Any]) -> float:
    """The upper edge of the bin that separates a histogram of values in [0, 1] with the largest variance between."""
    share = counts / counts.sum()
    below, moment = share.cumsum(), (share * np.arange(len(share))).cumsum()
    between = (moment[-1] * below - moment) ** 2 / np.maximum(below * (1 - below), 1e-12)
    return float((between.argmax() + 1) / len(share))


def compare(photos: Photos, cams_of: CamOf, settings: LabelConfig, title: str) -> dict[str, Any]:
    """mIoU of CAM and PAR labels over the background score, and at the scores of the rules."""
    metrics = {
        (row, score): SegmentationMetrics(photos.num_classes) for row in ("cam", "par") for score in BACKGROUND_SCORES
    }
    counts = np.zeros(BINS)

    def images() -> Iterator[CamImage]:
        for number, photo in tqdm(photos, desc=title, unit="img", leave=False):
            cams = cams_of(number, photo)
            counts[:] += np.histogram(cams.amax(1).numpy(), BINS, (0, 1))[0]
            for score in BACKGROUND_SCORES:
                both = (score, score)
                metrics["cam", score].update(cam_labels(cams, photo.classes, both), photo.mask)
                label = par_labels(photo.image, cams, photo.classes, settings, thresholds=both)
                metrics["par", score].update(label, photo.mask)
            yield photo.image, cams, photo.classes

    agreements = agreement(images(), photos.num_classes, settings)
    curves = {row: [metrics[row, score].compute()["miou"] for score in BACKGROUND_SCORES] for row in ("cam", "par")}
    chosen = {"agreement": BACKGROUND_SCORES[int(np.argmax(agreements))], "Otsu": otsu(counts), "0.45": 0.45}
    rules = {}
    for rule in RULES:
        nearest = int(np.argmin([abs(score - chosen[rule]) for score in BACKGROUND_SCORES]))
        rules[rule] = {"score": BACKGROUND_SCORES[nearest], **{row: curve[nearest] for row, curve in curves.items()}}
    return {"cam_kind": title, "images": len(photos), "curves": curves, "agreement": agreements, "rules": rules}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder in VOC layout, with masks")
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", type=int, default=100, help="number of images, evenly spaced")
    parser.add_argument("--run", type=Path, action="append", default=[], help="a trained run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args(arguments)
    photos = Photos(options.data, options.split, options.images)
    rows = [compare(photos, simulated(kind), LabelConfig(), kind) for kind in CAM_KINDS]
    for run in options.run:
        config = load_config(str(run / CONFIG))
        own = Photos(Path(config.data.root), config.data.val_split, options.images)
        rows.append(compare(own, of_run(run), config.labels, f"run {run.name}"))
    for labels in ("cam", "par"):
        lines = []
        for row in rows:
            curve = row["curves"][labels]
            cells = {"": row["cam_kind"], "best": f"{max(curve):.3f} at {BACKGROUND_SCORES[int(np.argmax(curve))]:.2f}"}
            cells |= {rule: f"{found[labels]:.3f} at {found['score']:.2f}" for rule, found in row["rules"].items()}
            lines.append(cells)
        print_table(f"mIoU of {labels.upper()} labels", lines)
    about = {"data": options.data.name, "background_scores": BACKGROUND_SCORES}
    path = write_results("background_scores", torch.device("cpu"), rows, options.out, about)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
