"""Charts of the training log: coordinates for the template that draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from afa.evaluation.diagnostics import Diagnosis
from afa.report.tables import ROWS, View

LOSSES = {
    "loss_cls": ("Classification", "tags of the whole image", "--cam"),
    "loss_seg": ("Segmentation", "pixels against pseudo labels", "--seg"),
    "loss_aff": ("Affinity", "pairs of tokens, same class or not", "--par"),
    "loss_energy": ("Dense energy", "pairs of pixels that are near and of similar color", "--crf"),
}
AFFINITY = {
    "affinity_object": ("one object", "--seg"),
    "affinity_background": ("background", "--cam"),
    "affinity_different": ("different", "--walk"),
    "affinity_auc": ("AUC of objects", "--par"),
}
PHASES = {"classify": "tags", "par": "PAR labels", "walk": "walk labels"}


_WIDTH, _HEIGHT = 330, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 12, 20, 24


def curves(log: Sequence[Mapping[str, Any]]) -> list[View]:
    """One panel per loss, one for the affinity, and one for the validation scores if there are several evaluations;
    empty without a log."""
    if not log:
        return []
    panels = []
    for key, (name, text, color) in LOSSES.items():
        if key == "loss_energy" and not any(key in row for row in log):  # only with train.energy_weight
            continue
        points = [(int(row["iteration"]), float(row[key])) for row in log if _active(row, key)]
        panels.append(_panel(f"{name} loss", {color: points}, log, noisy=True, text=text))
    means = {
        color: [(int(row["iteration"]), float(row[key])) for row in log if _active(row, key)]
        for key, (_, color) in AFFINITY.items()
    }
    if any(means.values()):
        names = [{"key": color[2:], "name": name} for name, color in AFFINITY.values()]
        panels.append(_panel("Affinity of token pairs", means, log, noisy=True, key=names))
    scores = {
        f"--{row}": [(int(line["iteration"]), float(line[f"val_{row}_miou"])) for line in log if _measured(line, row)]
        for row in ROWS
    }
    if any(len(points) > 1 for points in scores.values()):
        rows = [{"key": row, "name": ROWS[row][0]} for row in ROWS if scores[f"--{row}"]]
        panels.append(_panel("Validation mIoU", scores, log, noisy=False, key=rows))
    return panels


def background_curves(diagnosis: Diagnosis) -> View:
    """One panel: mIoU of CAM, walk and PAR by background score."""
    percent = [round(100 * score) for score in diagnosis.scores]
    series = {f"--{row}": list(zip(percent, miou, strict=True)) for row, miou in diagnosis.curves.items()}
    axis = [{"iteration": value} for value in percent]
    key = [{"key": row, "name": ROWS[row][0]} for row in diagnosis.curves]
    title = "mIoU by background score (%)"
    return _panel(title, series, axis, noisy=False, key=key, spoken=title)


def _measured(line: Mapping[str, Any], row: str) -> bool:
    value = line.get(f"val_{row}_miou")
    return isinstance(value, int | float) and math.isfinite(value)


def _active(row: Mapping[str, Any], key: str) -> bool:
    """Whether the loss was in use: values logged before its phase are not drawn."""
    value = row.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return key == "loss_cls" or row.get("phase") != "classify"


def _phases(log: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """(phase, first iteration, last iteration) in order; each phase extends to the start of the next."""
    spans: list[tuple[str, int, int]] = []
    for row in log:
        if "phase" not in row:  # an evaluation between two rows of losses
            continue
        phase, iteration = str(row["phase"]), int(row["iteration"])
        if spans and spans[-1][0] == phase:
            spans[-1] = (phase, spans[-1][1], iteration)
        else:
            if spans:
                spans[-1] = (spans[-1][0], spans[-1][1], iteration)
            spans.append((phase, iteration, iteration))
    return spans


Points = Sequence[tuple[int, float]]


def _panel(
    title: str,
    series: Mapping[str, Points],
    log: Sequence[Mapping[str, Any]],
    *,
    noisy: bool,
    text: str = "",
    key: Sequence[View] = (),
    spoken: str | None = None,
) -> View:
    """One chart; `series` maps a CSS color variable to (iteration, value) points.

    spoken: title for screen readers, by default the title "by iteration". Noisy series are drawn both as logged and
    smoothed, others as logged with a dot at each value.
    """
    first, last = int(log[0]["iteration"]), int(log[-1]["iteration"])
    values = [value for points in series.values() for _, value in points]
    # The dense energy is negative; 0 is always shown.
    low, top = (1.08 * float(np.quantile(values, share)) for share in (0.01, 0.99)) if values else (0.0, 1.0)
    low, top = min(low, 0.0), max(top, 0.0)
    if low == top:
        top = 1.0
    x_ticks, y_ticks = nice_ticks(first, max(last, first + 1)), nice_ticks(low, top)

    def x(iteration: float) -> float:
        return _LEFT + (iteration - first) / max(last - first, 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (1 - min(max((value - low) / (top - low), 0.0), 1.0)) * (_HEIGHT - _TOP - _BOTTOM)

    def path(points: Points) -> str:
        return "M" + "L".join(f"{x(i):.1f} {y(value):.1f}" for i, value in _thin(points))

    phases = []
    for number, (phase, start, end) in enumerate(_phases(log)):
        width, label = x(end) - x(start), PHASES.get(phase, phase)
        phases.append(
            {
                "number": number % 3,
                "x": f"{x(start):.1f}",
                "width": f"{width:.1f}",
                "label": label if width > 5.2 * len(label) else None,
                "label_x": f"{x(start) + 3:.1f}",
            }
        )
    lines = []
    for color, points in series.items():
        if not points:
            continue
        line = _smooth(points) if noisy else points
        end_x, end_y = x(line[-1][0]), y(line[-1][1])
        lines.append(
            {
                "color": color,
                "raw": path(points) if noisy else None,
                "path": path(line),
                # Lines also differ in their dashes, for readers who can't distinguish the colors.
                "dash": f" {color[2:]}" if len(series) > 1 else "",
                "dots": [{"x": f"{x(i):.1f}", "y": f"{y(value):.1f}"} for i, value in ([line[-1]] if noisy else line)],
                "end": {
                    "x": f"{end_x - 2:.1f}",
                    "y": f"{max(end_y - 8, _TOP + 10):.1f}",
                    "text": f"{line[-1][1]:.3g}",
                }
                if len(series) == 1
                else None,
            }
        )
    return {
        "title": title,
        "label": spoken or f"{title} by iteration",
        "text": text,
        "key": key,
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "top": _TOP,
        "plot_height": _HEIGHT - _TOP - _BOTTOM,
        "middle": (_LEFT + _WIDTH - _RIGHT) / 2,
        "phases": phases,
        "y_ticks": [
            {"y": f"{y(tick):.1f}", "text_y": f"{y(tick) + 3.5:.1f}", "label": f"{tick:g}"} for tick in y_ticks
        ],
        "x_ticks": [
            {"x": f"{x(tick):.1f}", "label": f"{tick / 1000:g}k" if last >= 10000 and tick else f"{tick:g}"}
            for tick in x_ticks
        ],
        "lines": lines,
    }


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About `about` round numbers from `low` to `high`, in steps of 1, 2 or 5 times a power of ten."""
    step = (high - low) / max(about - 1, 1)
    power = 10 ** math.floor(math.log10(step))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)
    # The small tolerance keeps a tick at either end in spite of rounding.
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _thin(points: Points, max_points: int = 400) -> list[tuple[float, float]]:
    """At most max_points points, each the mean of its neighbors."""
    if len(points) <= max_points:
        return [(float(i), v) for i, v in points]
    groups = np.array_split(np.asarray(points, np.float64), max_points)
    middle = [(float(group[:, 0].mean()), float(group[:, 1].mean())) for group in groups[1:-1]]
    # The end points are kept: a curve must reach the edges of its phase.
    return [(float(points[0][0]), points[0][1]), *middle, (float(points[-1][0]), points[-1][1])]


def _smooth(points: Points) -> list[tuple[int, float]]:
    """Exponential moving average over about a thirtieth of the run, with the bias toward 0 at the start corrected."""
    keep = 1 - 2 / (len(points) / 30 + 2)
    total = weight = 0.0
    smooth = []
    for iteration, value in points:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append((iteration, total / weight))
    return smooth
