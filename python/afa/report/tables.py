"""The contents of the report's tiles, tables and bars, as plain data for the templates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from afa.data.visualize import class_color
from afa.evaluation.diagnostics import Diagnosis

ROWS = {
    "cam": ("CAM", "class activation maps with a single threshold; uses the image-level tags"),
    "walk": ("Walk", "the CAM propagated by the learned affinity; uses the tags"),
    "par": ("PAR label", "the CAM refined by color; the first labels for training; uses the tags"),
    "seg": ("Segmentation", "the decoder's prediction, from the image only"),
    "crf": ("Segmentation + CRF", "the segmentation refined along color edges by a dense CRF"),
}
"""Row of the table -> its name and description."""

Metrics = Mapping[str, Mapping[str, Any]]
View = dict[str, Any]
"""Arguments of a template macro."""
_MAX_CLASSES = 24
"""A larger confusion matrix is not drawn: only its largest entries are listed."""


def final_row(metrics: Metrics) -> str:
    """The row that is the run's result: the last one."""
    return list(metrics)[-1]


def number(value: float | None, digits: int = 3) -> str:
    """A score, or a dash if there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def tiles(metrics: Metrics, f1: float, images: int, has_masks: bool) -> list[View]:
    """The main numbers, shown at the top of the page."""
    if not has_masks:
        rows = [("main", number(f1), "F1 of the image tags"), ("", f"{images:,}", "images, all without masks")]
    else:
        last = final_row(metrics)
        best, cam = metrics[last]["miou"], metrics["cam"]["miou"]
        label = max(("cam", "walk", "par"), key=lambda row: _worst_if_nan(metrics[row]["miou"]))
        rows = [
            ("main", number(best), "mIoU of the segmentation" + (", with CRF" if last == "crf" else "")),
            ("", f"{best - cam:+.3f}" if math.isfinite(best - cam) else "–", "gain over the CAM"),
            ("", number(metrics[label]["miou"]), f"mIoU of the best labels: {ROWS[label][0]}"),
            ("", number(metrics[last]["pixel_acc"]), "pixel accuracy"),
            ("", number(f1), "F1 of the image tags"),
        ]
    return [{"kind": kind, "value": value, "text": text} for kind, value, text in rows]


def scores(metrics: Metrics) -> list[View]:
    """One entry per row; the run's result is last."""
    return [
        {
            "key": key,
            "name": ROWS[key][0],
            "text": ROWS[key][1],
            "width": _percent(row["miou"]),
            "miou": number(row["miou"]),
            "pixels": number(row["pixel_acc"]),
            "classes": number(row["mean_acc"]),
        }
        for key, row in metrics.items()
    ]


_CHECKS = (
    ("cam", "CAM", "as in the table above"),
    ("walk_identity", "Walk, identity", "the walk that stays at every token: only the resampling to tokens is left"),
    ("walk", "Walk", "with the learned affinity"),
    ("walk_oracle", "Walk, oracle", "with the affinity of the true masks: the ceiling of one walk on these CAMs"),
    ("par", "PAR label", "the CAM refined by color"),
    ("walk_par", "Walk + PAR", "the walked CAM refined by color, as in the last phase of training"),
)
_GROUPS = (
    ("object", "mean affinity of tokens of one object class"),
    ("background", "mean affinity of tokens of the background"),
    ("different", "mean affinity of tokens of different classes"),
    ("auc", "AUC: chance that a token's own class has the higher affinity"),
)


def checks(diagnosis: Diagnosis) -> list[View]:
    """One entry per kind of label on the diagnosed images."""
    colors = {"walk_identity": "walk", "walk_oracle": "walk", "walk_par": "par"}
    found = []
    for key, name, text in _CHECKS:
        miou = diagnosis.miou[key]
        entry = {"key": colors.get(key, key), "name": name, "text": text, "width": _percent(miou), "miou": number(miou)}
        if key in diagnosis.curves:
            score, best = diagnosis.best(key)
            entry["best"] = f"{number(best)} at {score:.2f}"
        found.append(entry)
    return found


def affinity_tiles(diagnosis: Diagnosis) -> list[View]:
    """The affinity's means and its AUC."""
    return [{"kind": "", "value": number(diagnosis.affinity[key]), "text": text} for key, text in _GROUPS]


def class_bars(metrics: Metrics, names: Sequence[str]) -> View:
    """IoU of each class: a bar for the run's result, a tick for each of the others."""
    last = final_row(metrics)
    others = [row for row in metrics if row != last]
    bars = []
    for index, name in enumerate(names):
        iou = {row: metrics[row]["iou"][index] for row in metrics}
        ticks = [
            {"key": row, "title": f"{ROWS[row][0]} {number(iou[row])}", "left": _percent(iou[row])}
            for row in others
            if not math.isnan(iou[row])
        ]
        bars.append(
            {
                "name": name,
                "color": class_color(index),
                "width": _percent(iou[last]),
                "value": number(iou[last]),
                "ticks": ticks,
            }
        )
    return {
        "final": {"key": last, "name": ROWS[last][0]},
        "others": [{"key": row, "name": ROWS[row][0]} for row in others],
        "bars": bars,
    }


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> View:
    """The confusion matrix, if it is small enough to draw, and its largest entries off the diagonal.

    counts: pixels by true (row) and predicted class (column).
    """
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    colors = [class_color(index) for index in range(len(names))]
    pairs = sorted(((shares[t][p], t, p) for t in range(len(names)) for p in range(len(names)) if t != p), reverse=True)
    matrix = [
        {
            "name": name,
            "color": colors[t],
            "cells": [_cell(shares[t][p], names[t], names[p]) for p in range(len(names))],
        }
        for t, name in enumerate(names)
    ]
    return {
        "names": names,
        "matrix": matrix if len(names) <= _MAX_CLASSES else None,
        "pairs": [
            {
                "share": f"{share:.1%}",
                "true": names[t],
                "true_color": colors[t],
                "predicted": names[p],
                "predicted_color": colors[p],
            }
            for share, t, p in pairs[:10]
            if share >= 0.001
        ],
    }


def _cell(share: float, true: str, predicted: str) -> View:
    percent = round(100 * share)
    # The square root keeps small shares visible.
    depth = round(100 * math.sqrt(share))
    return {
        "depth_class": " deepest" if depth > 83 else " deep" if depth > 65 else "",
        "depth": depth,
        "title": f"{share:.1%} of {true} predicted as {predicted}",
        "text": str(percent) if percent else "",
    }


def _worst_if_nan(value: float) -> float:
    return -1.0 if math.isnan(value) else value


def _percent(value: float) -> str:
    return f"{100 * min(max(_worst_if_nan(value), 0.0), 1.0):.2f}%"
