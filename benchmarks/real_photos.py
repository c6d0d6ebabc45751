"""AFA on real photographs with masks: refinements of class activation maps (CAMs) alone, and the whole training.

    python benchmarks/real_photos.py refine --data DIR               # all images of the split val, about an hour
    python benchmarks/real_photos.py refine --data DIR --images 40   # some minutes
    python benchmarks/real_photos.py train --data DIR --config benchmarks/photos.yaml --run runs/photos

DIR has PASCAL VOC's layout (docs/own_data.md).

refine: The CAMs are simulated from the true masks, so that their quality is known: averaged over the tokens of a grid,
eroded, blurred, with false peaks. Every refinement has its own background score, chosen on images of the training
split. Reported are the mean IoU, the F-score of the boundaries, and images per second, on the images of the validation
split.

train: Trains from tags, as `afa train` does, and the same network with the same schedule from the true masks of the
training images. Reported are the labels' and both segmentations' mean IoU. A run that was stopped is resumed, and the
scores from true masks are kept in the run's folder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from refinements import CAM_KINDS, PAR_VARIANTS, REFINEMENTS, CamKind, Photo, Refinement, boundary_f
from supervised import Supervised, run_steps
from timing import RESULTS, print_table, write_results
from torch import Tensor
from tqdm import tqdm

from afa.config import Config, load_config, to_dict
from afa.data import TaggedDataset
from afa.evaluation.diagnostics import CHECKS, CURVES, spread
from afa.evaluation.evaluate import evaluate
from afa.evaluation.metrics import SegmentationMetrics
from afa.evaluation.result import ROWS
from afa.files import write_json
from afa.model import build_model, load_model
from afa.run import MODEL
from afa.training import loop as training
from afa.training.loop import Splits, open_splits

TRUE_MASKS = "true_masks.json"
BACKGROUND_SCORES = (0.15, 0.25, 0.35, 0.45, 0.55)


@cache
def bundled_backbone() -> Callable[[Tensor], Tensor]:
    """uint8 [1, 3, H, W] -> last feature map of the small backbone in the package, pretrained on generated images."""
    model = build_model(load_config("demo").model, 1).eval()

    @torch.inference_mode()
    def features(image: Tensor) -> Tensor:
        return model.backbone(model.normalize(image)).maps[-1]

    return features


class Photos:
    """Evenly spaced images of a split, without repeated decoding."""

    def __init__(self, root: Path, split: str, limit: int | None) -> None:
        self.dataset = TaggedDataset(root, split, train=False, with_mask=True)
        if not self.dataset.has_masks:
            raise SystemExit(f"the split {split} of {root} has no masks")
        names = self.dataset.names
        wanted = set(spread(names, limit or len(names)))
        self.indices = [i for i, name in enumerate(names) if name in wanted and self.dataset.tags[i].any()]
        self.num_classes = len(self.dataset.classes) + 1

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Any:
        """(number of the image in the data set, `Photo`)."""
        for index in self.indices:
            item = self.dataset[index]
            yield index, Photo(item["image"][None], item["mask"][None], item["tags"][None], bundled_backbone())


class Score:
    """Mean IoU, boundary F-score and time of one refinement."""

    def __init__(self, num_classes: int) -> None:
        self.metrics = SegmentationMetrics(num_classes)
        self.boundaries: list[float] = []
        self.seconds = 0.0

    def add(self, refinement: Refinement, photo: Photo, background: float, *, boundaries: bool) -> None:
        begin = time.perf_counter()
        label = refinement(photo, background)
        self.seconds += time.perf_counter() - begin
        self.metrics.update(label[None], photo.mask)
        if boundaries:
            for number in (photo.classes.index[0] + 1).tolist():
                self.boundaries.append(boundary_f(label, photo.filled[0], number))

    @property
    def miou(self) -> float:
        return float(self.metrics.compute()["miou"])


def compare(
    photos: Photos, calibration: Photos, kind: CamKind | None, refinements: Mapping[str, Refinement], title: str
) -> list[dict[str, Any]]:
    """One row per refinement of the CAMs of one kind."""
    tried = {(name, b): Score(photos.num_classes) for name in refinements for b in BACKGROUND_SCORES}
    for seed, photo in tqdm(calibration, desc=f"{title}: background scores", unit="img", leave=False):
        photo.simulate(kind, seed)
        for (name, background), score in tried.items():
            score.add(refinements[name], photo, background, boundaries=False)
    curves = {name: [tried[name, b].miou for b in BACKGROUND_SCORES] for name in refinements}
    chosen = {name: BACKGROUND_SCORES[curve.index(max(curve))] for name, curve in curves.items()}
    scores = {name: Score(photos.num_classes) for name in refinements}
    for seed, photo in tqdm(photos, desc=title, unit="img", leave=False):
        photo.simulate(kind, seed)
        for name, score in scores.items():
            score.add(refinements[name], photo, chosen[name], boundaries=True)
    return [
        {
            "cam": title,
            "refinement": name,
            "miou": score.miou,
            "boundary_f": sum(score.boundaries) / len(score.boundaries),
            "images_per_s": len(photos) / score.seconds,
            "background": chosen[name],
            "calibration": curves[name],
        }
        for name, score in scores.items()
    ]


def refine(options: argparse.Namespace) -> None:
    photos = Photos(options.data, options.split, options.images)
    calibration = Photos(options.data, options.calibration_split, options.calibration_images)
    rows = []
    for study, refinements in (("refinements", REFINEMENTS), ("variants of PAR", PAR_VARIANTS)):
        for title, kind in CAM_KINDS.items():
            found = compare(photos, calibration, kind, refinements, title)
            rows += [{"study": study, **row} for row in found]
            print_rows(f"{study}, {title}, {len(photos)} images", found)
    about = {
        "data": options.data.name,
        "classes": photos.dataset.classes,
        "images": len(photos),
        "calibration_images": len(calibration),
        "background_scores": BACKGROUND_SCORES,
    }
    print(f"\nwritten to {write_results('real_photos', torch.device('cpu'), rows, options.out, about)}")


def train(options: argparse.Namespace) -> None:
    everything = "eval.diagnostic_images=1000000"  # so that all rows are over the same images
    config = load_config(str(options.config), [f"data.root={options.data}", everything, *options.settings])
    device = torch.device(options.device)
    splits = open_splits(config.data)
    if not splits.val.has_masks:
        raise SystemExit(f"the split {config.data.val_split} of {options.data} has no masks")
    trained = training.train(config, options.run, resume=options.run.exists(), device=device)
    model = trained if trained is not None else load_model(options.run / MODEL, device)[0]
    result = evaluate(model, splits.val, config)
    assert result.diagnosis is not None
    best = {name: result.diagnosis.best(name) for name in CURVES}
    tags = {
        "labels": "tags",
        **{name: getattr(result, name)["miou"] for name in ROWS},
        **{name: result.diagnosis.miou[name] for name in CHECKS},
        **{f"{name}_best": {"background": score, "miou": miou} for name, (score, miou) in best.items()},
        "f1": result.f1,
        "affinity": result.diagnosis.affinity,
    }
    rows = [tags, from_masks(config, splits, options.run / TRUE_MASKS, device)]
    lines = [
        {"": str(row["labels"]), **{name: f"{row[name]:.3f}" if name in row else "–" for name in (*ROWS, "f1")}}
        for row in rows
    ]
    print_table(f"mIoU on {len(splits.val)} images, by labels of the training", lines)
    print(f"  share of the segmentation from true masks: {tags['seg'] / rows[1]['seg']:.0%}")
    about = {
        "data": options.data.name,
        "classes": splits.val.classes,
        "images": len(splits.val),
        "training_images": len(splits.train),
        "config": to_dict(config),
    }
    name = f"real_photos_train-{options.config.stem}"
    print(f"\nwritten to {write_results(name, device, rows, options.out, about)}")


def from_masks(config: Config, splits: Splits, file: Path, device: torch.device) -> dict[str, Any]:
    """Scores of the network trained from true masks. They are kept in `file`, for the same configuration."""
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if kept.get("config") != to_dict(config):
        torch.manual_seed(config.train.seed)
        step = Supervised(build_model(config.model, len(splits.train.classes)), config, device)
        run_steps(step, 0, config.train.iterations, "true masks")
        result = evaluate(step.model, splits.val, config, diagnose=False)
        row = {"labels": "true masks", "seg": result.seg["miou"], "f1": result.f1}
        kept = {"config": to_dict(config), "row": row}
        write_json(file, kept)
    return dict(kept["row"])


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [
        {
            "": row["refinement"],
            "mIoU": f"{row['miou']:.3f}",
            "gain": f"{row['miou'] - rows[0]['miou']:+.3f}",
            "boundary F": f"{row['boundary_f']:.3f}",
            "background": f"{row['background']:.2f}",
            "images/s": f"{row['images_per_s']:.0f}",
        }
        for row in rows
    ]
    print_table(title, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("refine", help="refine simulated CAMs")
    one.add_argument("--data", type=Path, required=True, help="folder in VOC layout, with masks")
    one.add_argument("--split", default="val", help="images to report on")
    one.add_argument("--images", type=int, help="number of images, evenly spaced; default: all")
    one.add_argument("--calibration-split", default="train", help="images to choose background scores on")
    one.add_argument("--calibration-images", type=int, default=30, help="number of these images")
    one.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    one.set_defaults(command=refine)
    two = commands.add_parser("train", help="train from tags and from true masks")
    two.add_argument("--data", type=Path, required=True, help="folder in VOC layout, with masks in both splits")
    two.add_argument("--config", type=Path, required=True, help="configuration file")
    two.add_argument("--run", type=Path, required=True, help="folder for the run from tags")
    two.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    two.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    two.add_argument("settings", nargs="*", help="section.key=value")
    two.set_defaults(command=train)
    options = parser.parse_args(arguments)
    options.command(options)


if __name__ == "__main__":
    main()
