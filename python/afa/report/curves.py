"""Charts of the training log, as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from afa.report.tables import ROWS

LOSSES = {
    "loss_cls": ("Classification", "tags of the whole image", "--cam"),
    "loss_seg": ("Segmentation", "pixels against pseudo labels", "--seg"),
    "loss_aff": ("Affinity", "pairs of tokens, same class or not", "--par"),
}
PHASES = {"classify": "tags", "par": "PAR labels", "walk": "walk labels"}


_WIDTH, _HEIGHT = 330, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 12, 20, 24


def curves(log: Sequence[Mapping[str, Any]]) -> str:
    """One panel a loss, and the validation scores when they were measured more than once."""
    if not log:
        return '<p class="note">This run has no log of its training.</p>'
    panels = []
    for key, (name, text, colour) in LOSSES.items():
        points = [(int(row["iteration"]), float(row[key])) for row in log if _active(row, key)]
        panels.append(_panel(f"{name} loss", text, {colour: points}, log, noisy=True))
    scores = {
        f"--{row}": [(int(line["iteration"]), float(line[f"val_{row}_miou"])) for line in log if _measured(line, row)]
        for row in ROWS
    }
    if any(len(points) > 1 for points in scores.values()):
        key = "".join(f'<span><i class="dash {row}"></i>{ROWS[row][0]}</span>' for row in ROWS if scores[f"--{row}"])
        panels.append(_panel("Validation mIoU", f'<span class="key">{key}</span>', scores, log, noisy=False))
    note = (
        '<p class="note">Thin: as logged; thick: smoothed. Shaded: the phase, by what the segmentation learns from. '
        "Values above the 99th percentile are cut.</p>"
    )
    return f'{note}<div class="panels">{"".join(panels)}</div>'


def _measured(line: Mapping[str, Any], row: str) -> bool:
    value = line.get(f"val_{row}_miou")
    return isinstance(value, int | float) and math.isfinite(value)


def _active(row: Mapping[str, Any], key: str) -> bool:
    """Whether the loss was in use: before its phase there is nothing to draw, whatever stands in the log."""
    value = row.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return key == "loss_cls" or row.get("phase") != "classify"


def _phases(log: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """(phase, first iteration, last iteration) in order; each reaches to the start of the next."""
    spans: list[tuple[str, int, int]] = []
    for row in log:
        if "phase" not in row:  # a measurement between two rows of losses
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
    title: str, text: str, series: Mapping[str, Points], log: Sequence[Mapping[str, Any]], *, noisy: bool
) -> str:
    """One chart in its card; `series` maps a CSS colour variable to (iteration, value) points.

    Noisy series are drawn as logged and smoothed, others as they are, with a dot at each value.
    """
    first, last = int(log[0]["iteration"]), int(log[-1]["iteration"])
    values = [value for points in series.values() for _, value in points]
    top = float(np.quantile(values, 0.99)) * 1.08 if values else 1.0
    x_ticks, y_ticks = nice_ticks(first, max(last, first + 1)), nice_ticks(0.0, top if top > 0 else 1.0)
    top = max(top, y_ticks[-1])

    def x(iteration: float) -> float:
        return _LEFT + (iteration - first) / max(last - first, 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (1 - min(max(value / top, 0.0), 1.0)) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)} by iteration">']
    for number, (phase, start, end) in enumerate(_phases(log)):
        width = x(end) - x(start)
        parts.append(
            f'<rect class="phase-{number % 3}" x="{x(start):.1f}" y="{_TOP}" width="{width:.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM}"/>'
        )
        label = PHASES.get(phase, phase)
        if width > 5.2 * len(label):
            parts.append(f'<text class="phase" x="{x(start) + 3:.1f}" y="{_TOP - 6}">{html.escape(label)}</text>')
    for tick in y_ticks:
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text class="axis" x="{_LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in x_ticks:
        label = f"{tick / 1000:g}k" if last >= 10000 and tick else f"{tick:g}"
        parts.append(f'<text class="axis" x="{x(tick):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{label}</text>')
    for colour, points in series.items():
        if not points:
            continue
        line = _smooth(points) if noisy else points
        if noisy:
            drawn = _path((x(i), y(value)) for i, value in _thin(points))
            parts.append(f'<path class="raw" stroke="var({colour})" d="{drawn}"/>')
        drawn = _path((x(i), y(value)) for i, value in _thin(line))
        # Several lines differ by their dashes too, for eyes that can't tell the colours.
        dash = f" {colour[2:]}" if len(series) > 1 else ""
        parts.append(f'<path class="curve{dash}" stroke="var({colour})" d="{drawn}"/>')
        for i, value in [line[-1]] if noisy else line:
            parts.append(f'<circle cx="{x(i):.1f}" cy="{y(value):.1f}" r="3" fill="var({colour})"/>')
        if len(series) == 1:
            label_y = max(y(line[-1][1]) - 8, _TOP + 10)
            parts.append(
                f'<text class="end" x="{x(line[-1][0]) - 2:.1f}" y="{label_y:.1f}" text-anchor="end">'
                f"{line[-1][1]:.3g}</text>"
            )
    if not values:
        parts.append(
            f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT / 2}" text-anchor="middle">'
            "not in use during this run</text>"
        )
    chart = "".join([*parts, "</svg>"])
    return f'<div class="panel card"><h3>{html.escape(title)}</h3><p>{text}</p>{chart}</div>'


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, steps of 1, 2 or 5 times a power of ten, near `about` of them."""
    step = (high - low) / max(about - 1, 1)
    power = 10 ** math.floor(math.log10(step))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)
    # The small allowance keeps a tick that falls on an end in spite of rounding.
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _thin(points: Points, most: int = 400) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of its neighbours."""
    if len(points) <= most:
        return [(float(i), v) for i, v in points]
    groups = np.array_split(np.asarray(points, np.float64), most)
    middle = [(float(group[:, 0].mean()), float(group[:, 1].mean())) for group in groups[1:-1]]
    # The ends stay where they are: a curve must reach the edges of its phase.
    return [(float(points[0][0]), points[0][1]), *middle, (float(points[-1][0]), points[-1][1])]


def _smooth(points: Points) -> list[tuple[int, float]]:
    """Exponential mean over about a thirtieth of the run, without the pull to 0 at its start."""
    keep = 1 - 2 / (len(points) / 30 + 2)
    total = weight = 0.0
    smooth = []
    for iteration, value in points:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append((iteration, total / weight))
    return smooth
