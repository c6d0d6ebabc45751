"""Files of an evaluation in the run's folder: metrics.json, CSV tables, samples.npz and report.html."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afa.config import Config, to_dict
from afa.errors import UserError
from afa.evaluation.diagnostics import Diagnosis
from afa.evaluation.result import ROWS, EvalResult, Example
from afa.files import atomic_path, write_json, write_text
from afa.machine import processor_name
from afa.report.page import write_report
from afa.run import CLASS_TABLE, CONFUSION, EVALUATION_FILES, IMAGE_TABLE, METRICS, SAMPLES


def environment(device: torch.device) -> dict[str, str]:
    """Hardware and software, recorded with the scores."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{processor_name()}, {torch.get_num_threads()} threads"
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
    """Write run.EVALUATION_FILES into the folder `run`, each file atomically; returns the path of the page.

    metrics.json has all scores, metrics.csv the IoU of each class by row of the report, confusion.csv the pixel counts
    of the final segmentation by true (row) and predicted class (column), and images.csv each image's mean IoU over the
    classes in it. Without masks there are no tables. `facts` (name, seconds, environment, etc.) are written to
    metrics.json unchanged.
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
        "diagnosis": None if result.diagnosis is None else asdict(result.diagnosis),
        "per_class": {row: dict(zip(names, scores[row]["iou"], strict=True)) for row in scores},
        "pixel_acc": {row: scores[row]["pixel_acc"] for row in scores},
        "mean_acc": {row: scores[row]["mean_acc"] for row in scores},
        "classes": names,
        "data": config.data.root,
        "backbone": config.model.backbone,
        "iterations": config.train.iterations,
        "batch_size": config.train.batch_size,
        "crop_size": config.data.crop_size,
        "test_time": {
            name: to_dict(config)["eval"][name] for name in ("longer_side", "scales", "flip", "fusion", "crf")
        },
        **facts,
    }
    write_json(run / METRICS, metrics)
    return make_report(run)


def load_result(run: str | Path) -> tuple[EvalResult, list[str], dict[str, Any]]:
    """Read the files of `save_result`: the result, the foreground class names and the contents of metrics.json.

    Only the confusion matrix of the final segmentation is saved. Raises UserError when the run has not been evaluated.
    """
    run = Path(run)
    path = run / METRICS
    if not path.is_file():
        raise UserError(f"{path} does not exist: this run has not been evaluated; run `afa evaluate {run}` first")
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
        groups = _load_samples(run / SAMPLES)
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
            diagnosis=_diagnosis(metrics.get("diagnosis")),
        )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{path} or one of {', '.join(EVALUATION_FILES[1:-1])} next to it is damaged ({error!r}); run "
            f"`afa evaluate {run}` again"
        ) from error
    return result, names[1:], metrics


def _diagnosis(saved: dict[str, Any] | None) -> Diagnosis | None:
    """The diagnosis in metrics.json; None if there was none or an earlier version evaluated the run."""
    if saved is None:
        return None
    return Diagnosis(
        saved["images"],
        {row: _number(value) for row, value in saved["miou"].items()},
        {row: [_number(value) for value in values] for row, values in saved["curves"].items()},
        {name: _number(value) for name, value in saved["affinity"].items()},
        tuple(saved["scores"]),
    )


def make_report(run: str | Path) -> Path:
    """Write run/report.html from the files in the run's folder."""
    result, classes, metrics = load_result(run)
    about = metrics.get("environment", {})
    seconds = metrics["seconds"]
    facts = {
        "Configuration": metrics.get("config", Path(run).name),
        "Data": f"{metrics['data']}, {metrics['images']} images of '{metrics['split']}' evaluated",
        "Classes": f"{len(classes)} and background",
        "Backbone": metrics["backbone"],
        "Training": f"{metrics['iterations']:,} iterations of {metrics['batch_size']} crops, {metrics['crop_size']} px",
        "Time": f"{duration(seconds)} in total, including {duration(result.seconds)} of evaluation",
        "Hardware": about.get("hardware", "unknown"),
        "Software": ", ".join(f"{name} {about.get(name, '?')}" for name in ("torch", "timm", "python")),
        "Test time": describe_test_time(metrics.get("test_time", {})),
        "Date": metrics.get("date", "unknown").replace("T", " ")[:16],
    }
    return write_report(run, result, classes, facts=facts)


def describe_test_time(settings: Mapping[str, Any]) -> str:
    """metrics.json's test_time in words."""
    scales = settings.get("scales", [1.0])
    text = "one scale" if scales == [1.0] else "scales " + ", ".join(f"{scale:g}" for scale in scales)
    if settings.get("flip"):
        text += " and flips"
    if scales != [1.0]:
        text += f", fused by {settings.get('fusion', 'max')}"
    if settings.get("longer_side"):
        text += f", longer side {settings['longer_side']} px"
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
        {
            "group": group,
            "name": sample["name"],
            "tags": sample["tags"],
            "iou": _json_number(sample["iou"]),
            "token": sample.get("token"),
        }
        for group, sample in groups
    ]
    arrays: dict[str, np.ndarray] = {"about": np.array(json.dumps(about))}
    for index, (_, sample) in enumerate(groups):
        for key in _ARRAYS:
            # Labels fit in a byte; a heat map is only displayed, so half precision is enough.
            kind = np.float16 if key == "cam" else np.uint8
            arrays[f"{index}_{key}"] = np.asarray(sample[key]).astype(kind)
        if "affinity" in sample:
            arrays[f"{index}_affinity"] = np.asarray(sample["affinity"]).astype(np.float16)
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, allow_pickle=False, **arrays)


def _load_samples(path: Path) -> dict[str, list[Example]]:
    groups: dict[str, list[Example]] = {group: [] for group in _GROUPS}
    if not path.is_file():
        return groups
    with np.load(path, allow_pickle=False) as arrays:
        for i, row in enumerate(json.loads(str(arrays["about"]))):
            maps = {key: arrays[f"{i}_{key}"] for key in _ARRAYS}
            # Runs evaluated by an earlier version have one group and no IoU per image.
            example: Any = {"name": row["name"], "tags": row["tags"], "iou": _number(row.get("iou")), **maps}
            if row.get("token") is not None:
                example |= {"token": tuple(row["token"]), "affinity": arrays[f"{i}_affinity"]}
            groups[row.get("group", _GROUPS[0])].append(example)
    return groups


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
    """A table cell with a score: empty if there is none."""
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
    """A score read from JSON, where NaN is stored as null."""
    return math.nan if value is None else float(value)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
