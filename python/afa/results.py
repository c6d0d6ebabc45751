"""What a measured run leaves on disk beside its model: metrics.json, CSV tables, samples.npz and the page of them."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afa.config import Config, to_dict
from afa.errors import UserError
from afa.evaluate import ROWS, EvalResult
from afa.files import atomic_path, write_json, write_text
from afa.report import write_report

METRICS, SAMPLES = "metrics.json", "samples.npz"
CLASS_TABLE, IMAGE_TABLE, CONFUSION = "metrics.csv", "images.csv", "confusion.csv"
RESULTS = (METRICS, SAMPLES, CLASS_TABLE, IMAGE_TABLE, CONFUSION, "report.html")
"""All that measuring writes into a run's folder."""


def environment(device: torch.device) -> dict[str, str]:
    """Machine and software, for the record beside the scores."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{_processor()}, {torch.get_num_threads()} threads"
    versions = {name: _version(name) for name in ("afa-ext", "torch", "timm", "numpy", "pillow")}
    return {
        "device": device.type,
        "hardware": hardware,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **versions,
    }


def save_result(
    run: str | Path, result: EvalResult, classes: list[str], config: Config, facts: Mapping[str, Any]
) -> Path:
    """Write what RESULTS names into the folder `run`, each file whole or not at all; returns the page's path.

    metrics.json has everything that is a score; metrics.csv the IoU of each class by row, confusion.csv the pixels of
    the final segmentation by true (row) and predicted class (column), images.csv each image's mean IoU over the classes
    it shows. Without masks there are no tables. `facts` (name, seconds, environment and the like) go into metrics.json
    as they are.
    """
    run = Path(run)
    names = ["background", *classes]
    scores = result.rows
    _save_samples(run / SAMPLES, result)
    _save_tables(run, result, names)
    metrics = {
        **{f"{row}_miou": scores[row]["miou"] for row in scores},
        "seconds": result.seconds,
        "eval_seconds": result.seconds,
        "classification_f1": result.f1,
        "images": result.images,
        "split": config.data.val_split,
        "has_masks": result.has_masks,
        "notes": result.notes,
        "per_class": {row: dict(zip(names, scores[row]["iou"], strict=True)) for row in scores},
        "pixel_acc": {row: scores[row]["pixel_acc"] for row in scores},
        "mean_acc": {row: scores[row]["mean_acc"] for row in scores},
        "classes": names,
        "data": config.data.root,
        "backbone": config.model.backbone,
        "iterations": config.train.iterations,
        "batch_size": config.train.batch_size,
        "crop_size": config.data.crop_size,
        "test_time": {name: to_dict(config)["eval"][name] for name in ("scales", "flip", "fusion", "crf")},
        **facts,
    }
    write_json(run / METRICS, metrics)
    return make_report(run)


def load_result(run: str | Path) -> tuple[EvalResult, list[str], dict[str, Any]]:
    """What `save_result` wrote: the result, the foreground class names and the whole of metrics.json.

    Of the confusion matrices only the final segmentation's is kept. UserError when the run has not been measured.
    """
    run = Path(run)
    path = run / METRICS
    if not path.is_file():
        raise UserError(f"{path} does not exist: this run has not been measured; run `afa evaluate {run}` first")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        names = metrics["classes"]
        rows: dict[str, dict[str, Any]] = {
            row: {
                "miou": _number(metrics[f"{row}_miou"]),
                "iou": [_number(metrics["per_class"][row][name]) for name in names],
                "pixel_acc": _number(metrics["pixel_acc"][row]),
                "mean_acc": _number(metrics["mean_acc"][row]),
            }
            for row in (*ROWS, "crf")
            if row in ROWS or f"{row}_miou" in metrics
        }
        if (run / CONFUSION).is_file():
            counts = _read_table(run / CONFUSION)[1:]
            rows["crf" if "crf" in rows else "seg"]["confusion"] = [[int(cell) for cell in row[1:]] for row in counts]
        images = _read_table(run / IMAGE_TABLE)[1:] if (run / IMAGE_TABLE).is_file() else []
        groups: dict[str, list[dict[str, Any]]] = {group: [] for group in _GROUPS}
        for sample in _load_samples(run / SAMPLES):
            groups[sample["group"]].append(sample)
        result = EvalResult(
            rows["cam"],
            rows["walk"],
            rows["par"],
            rows["seg"],
            crf=rows.get("crf"),
            f1=_number(metrics["classification_f1"]),
            seconds=_number(metrics["eval_seconds"]),
            images=metrics["images"],
            has_masks=metrics.get("has_masks", True),
            image_iou={name: float(iou or math.nan) for name, iou in images},
            samples=groups["samples"],
            best=groups["best"],
            worst=groups["worst"],
            notes=metrics.get("notes", []),
        )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{path} or one of {', '.join(RESULTS[1:-1])} beside it is damaged ({error!r}); run `afa evaluate {run}` "
            "again"
        ) from error
    return result, names[1:], metrics


def make_report(run: str | Path) -> Path:
    """Write run/report.html from what is on disk."""
    result, classes, metrics = load_result(run)
    about = metrics.get("environment", {})
    seconds = metrics["seconds"]
    facts = {
        "Configuration": metrics.get("config", Path(run).name),
        "Data": f"{metrics['data']}, {metrics['images']} images of '{metrics['split']}' measured",
        "Classes": f"{len(classes)} and background",
        "Backbone": metrics["backbone"],
        "Training": f"{metrics['iterations']:,} iterations of {metrics['batch_size']} crops, {metrics['crop_size']} px",
        "Time": f"{duration(seconds)} in all, {duration(result.seconds)} of it measuring",
        "Hardware": about.get("hardware", "unknown"),
        "Software": ", ".join(f"{name} {about.get(name, '?')}" for name in ("torch", "timm", "python")),
        "Test time": _test_time(metrics.get("test_time", {})),
        "Date": metrics.get("date", "unknown").replace("T", " ")[:16],
    }
    return write_report(run, result, classes, facts=facts)


def _test_time(settings: Mapping[str, Any]) -> str:
    scales = settings.get("scales", [1.0])
    text = "one scale" if scales == [1.0] else "scales " + ", ".join(f"{scale:g}" for scale in scales)
    if settings.get("flip"):
        text += " and flips"
    if scales != [1.0] or settings.get("flip"):
        text += f", fused by {settings.get('fusion', 'max')}"
    return text + (", dense CRF" if settings.get("crf") else ", no CRF")


def duration(seconds: float) -> str:
    """'48 s', '6 min 40 s', '9 h 14 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


_ARRAYS = ("image", "cam", "cam_label", "walk_label", "par_label", "prediction", "truth")
_GROUPS = ("samples", "best", "worst")


def _save_samples(path: Path, result: EvalResult) -> None:
    groups = [(group, sample) for group in _GROUPS for sample in getattr(result, group)]
    about = [
        {"group": group, "name": sample["name"], "tags": sample["tags"], "iou": _json_number(sample["iou"])}
        for group, sample in groups
    ]
    arrays: dict[str, np.ndarray] = {"about": np.array(json.dumps(about))}
    for index, (_, sample) in enumerate(groups):
        for key in _ARRAYS:
            # Labels fit in a byte, and a heat map is looked at and not computed with.
            kind = np.float16 if key == "cam" else np.uint8
            arrays[f"{index}_{key}"] = np.asarray(sample[key]).astype(kind)
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, allow_pickle=False, **arrays)


def _load_samples(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with np.load(path, allow_pickle=False) as arrays:
        about = json.loads(str(arrays["about"]))
        return [
            # Runs measured by an earlier version have one group and no IoU an image.
            {
                "group": _GROUPS[0],
                **row,
                "iou": _number(row.get("iou")),
                **{key: arrays[f"{i}_{key}"] for key in _ARRAYS},
            }
            for i, row in enumerate(about)
        ]


def _save_tables(run: Path, result: EvalResult, names: list[str]) -> None:
    if not result.has_masks:
        for name in (CLASS_TABLE, IMAGE_TABLE, CONFUSION):
            (run / name).unlink(missing_ok=True)
        return
    rows = result.rows
    by_class = [["class", *rows]]
    by_class += [[name, *(_cell(scores["iou"][i]) for scores in rows.values())] for i, name in enumerate(names)]
    for score in ("miou", "pixel_acc", "mean_acc"):
        by_class.append([f"({score})", *(_cell(scores[score]) for scores in rows.values())])
    _write_table(run / CLASS_TABLE, by_class)
    _write_table(
        run / IMAGE_TABLE, [["image", "miou"], *([name, _cell(iou)] for name, iou in result.image_iou.items())]
    )
    counts = list(rows.values())[-1]["confusion"]
    _write_table(run / CONFUSION, [["true", *names], *([n, *row] for n, row in zip(names, counts, strict=True))])


def _cell(value: float) -> str:
    """A score in a table: empty where there is none."""
    return "" if math.isnan(value) else f"{value:.6f}"


def _write_table(path: Path, rows: Iterable[list[Any]]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    write_text(path, buffer.getvalue())


def _read_table(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))


def _json_number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number(value: float | None) -> float:
    """A score back from JSON, where nan is null."""
    return math.nan if value is None else float(value)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or f"{os.cpu_count()} cores"
