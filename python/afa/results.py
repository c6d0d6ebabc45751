"""What a measured run leaves on disk beside its model: metrics.json, samples.npz and the page made from them."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afa.config import Config
from afa.errors import UserError
from afa.evaluate import ROWS, EvalResult
from afa.files import atomic_path, write_json
from afa.report import write_report

METRICS, SAMPLES = "metrics.json", "samples.npz"


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
    """Write run/samples.npz, run/metrics.json and run/report.html, each whole or not at all; returns the page's path.

    `facts` (name, seconds, environment and the like) go into metrics.json as they are.
    """
    run = Path(run)
    names = ["background", *classes]
    scores = {row: getattr(result, row) for row in ROWS}
    _save_samples(run / SAMPLES, result.samples)
    metrics = {
        **{f"{row}_miou": scores[row]["miou"] for row in ROWS},
        "seconds": result.seconds,
        "eval_seconds": result.seconds,
        "classification_f1": result.f1,
        "images": result.images,
        "split": config.data.val_split,
        "per_class": {row: dict(zip(names, scores[row]["iou"], strict=True)) for row in ROWS},
        "pixel_acc": {row: scores[row]["pixel_acc"] for row in ROWS},
        "mean_acc": {row: scores[row]["mean_acc"] for row in ROWS},
        "classes": names,
        "data": config.data.root,
        "backbone": config.model.backbone,
        "iterations": config.train.iterations,
        "batch_size": config.train.batch_size,
        "crop_size": config.data.crop_size,
        **facts,
    }
    write_json(run / METRICS, metrics)
    return make_report(run)


def load_result(run: str | Path) -> tuple[EvalResult, list[str], dict[str, Any]]:
    """What `save_result` wrote: the result, the foreground class names and the whole of metrics.json.

    Confusion matrices are not kept. UserError when the run has not been measured.
    """
    run = Path(run)
    path = run / METRICS
    if not path.is_file():
        raise UserError(f"{path} does not exist: this run has not been measured; run `afa evaluate {run}` first")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        names = metrics["classes"]
        rows = {
            row: {
                "miou": _number(metrics[f"{row}_miou"]),
                "iou": [_number(metrics["per_class"][row][name]) for name in names],
                "pixel_acc": _number(metrics["pixel_acc"][row]),
                "mean_acc": _number(metrics["mean_acc"][row]),
            }
            for row in ROWS
        }
        result = EvalResult(
            **rows,
            f1=_number(metrics["classification_f1"]),
            seconds=_number(metrics["eval_seconds"]),
            images=metrics["images"],
            samples=_load_samples(run / SAMPLES),
        )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{path} or {SAMPLES} beside it is damaged ({error!r}); run `afa evaluate {run}` again"
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
        "Classifier": f"F1 of the tags {result.f1:.3f}",
        "Date": metrics.get("date", "unknown"),
    }
    return write_report(run, result, classes, facts=facts)


def duration(seconds: float) -> str:
    """'48 s', '6 min 40 s', '9 h 14 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


_ARRAYS = ("image", "cam", "cam_label", "walk_label", "par_label", "prediction", "truth")


def _save_samples(path: Path, samples: list[dict[str, Any]]) -> None:
    arrays: dict[str, np.ndarray] = {
        "about": np.array(json.dumps([{"name": sample["name"], "tags": sample["tags"]} for sample in samples]))
    }
    for index, sample in enumerate(samples):
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
        return [{**row, **{key: arrays[f"{i}_{key}"] for key in _ARRAYS}} for i, row in enumerate(about)]


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
