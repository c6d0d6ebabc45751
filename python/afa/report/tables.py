"""Tiles, tables and bars of the scores."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from afa.data.visualize import class_colour

ROWS = {
    "cam": ("CAM", "where the classifier looked, cut at one threshold; knows the image's tags"),
    "walk": ("Walk", "the CAM spread by the learnt affinity; knows the tags"),
    "par": ("PAR label", "the CAM refined by colour; what training starts from; knows the tags"),
    "seg": ("Segmentation", "the decoder's own answer; sees the image alone"),
    "crf": ("Segmentation + CRF", "the same, its borders drawn along colours by a dense CRF"),
}
"""Row of the table -> its name and what it is."""

Metrics = Mapping[str, Mapping[str, Any]]
_MOST_CLASSES = 24
"""A larger confusion matrix is not drawn: only its largest entries are listed."""


def final_row(metrics: Metrics) -> str:
    """The row that is the run's answer: the last one."""
    return list(metrics)[-1]


def number(value: float | None, digits: int = 3) -> str:
    """A score, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def swatch(index: int) -> str:
    """A square in the colour of the class."""
    return f'<i class="swatch" style="background:{class_colour(index)}"></i>'


def tiles(metrics: Metrics, f1: float, images: int, has_masks: bool) -> str:
    """The few numbers to see first."""
    if not has_masks:
        return _tiles([("main", number(f1), "F1 of the image tags"), ("", f"{images:,}", "images, none with a mask")])
    last = final_row(metrics)
    best, cam = metrics[last]["miou"], metrics["cam"]["miou"]
    label = max(("cam", "walk", "par"), key=lambda row: _worst_if_nan(metrics[row]["miou"]))
    return _tiles(
        [
            ("main", number(best), "mIoU of the segmentation" + (", with CRF" if last == "crf" else "")),
            ("", f"{best - cam:+.3f}" if math.isfinite(best - cam) else "–", "over its own CAM"),
            ("", number(metrics[label]["miou"]), f"best of its labels: {ROWS[label][0]}"),
            ("", number(metrics[last]["pixel_acc"]), "of all pixels right"),
            ("", number(f1), "F1 of the image tags"),
        ]
    )


def _tiles(rows: Sequence[tuple[str, str, str]]) -> str:
    return "".join(
        f'<div class="tile card {kind}"><b>{value}</b><span>{text}</span></div>' for kind, value, text in rows
    )


def scores(metrics: Metrics) -> str:
    """One row a kind of label, the run's answer last."""
    rows = []
    for key, row in metrics.items():
        name, text = ROWS[key]
        bar = f'<div class="fill" style="width:{_percent(row["miou"])};background:var(--{key})"></div>'
        rows.append(
            f'<tr class="{"main" if key == final_row(metrics) else ""}"><th scope="row"><b>{name}</b><small>{text}'
            f'</small></th><td class="bar"><div class="track">{bar}</div></td>'
            f'<td class="n"><b>{number(row["miou"])}</b></td><td class="n">{number(row["pixel_acc"])}</td>'
            f'<td class="n">{number(row["mean_acc"])}</td></tr>'
        )
    head = (
        '<tr><th scope="col">Row</th><th class="bar"></th><th class="n" scope="col">mIoU</th>'
        '<th class="n" scope="col">pixels</th><th class="n" scope="col">classes</th></tr>'
    )
    return f'<table class="score"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def class_bars(metrics: Metrics, names: Sequence[str]) -> str:
    """IoU of each class: a bar for the run's answer, a tick for each of the others."""
    last = final_row(metrics)
    others = [row for row in metrics if row != last]
    key = (
        f'<div class="key"><span><i style="background:var(--{last})"></i>{ROWS[last][0]}</span>'
        + "".join(f'<span><i class="tick" style="background:var(--{row})"></i>{ROWS[row][0]}</span>' for row in others)
        + "</div>"
    )
    bars = []
    for index, name in enumerate(names):
        value = metrics[last]["iou"][index]
        ticks = "".join(
            f'<i title="{ROWS[row][0]} {number(metrics[row]["iou"][index])}" '
            f'style="left:{_percent(metrics[row]["iou"][index])};background:var(--{row})"></i>'
            for row in others
            if not math.isnan(metrics[row]["iou"][index])
        )
        bars.append(
            f'<div class="class"><div class="name">{swatch(index)}<span>{html.escape(name)}</span></div>'
            f'<div class="iou"><div class="fill" style="width:{_percent(value)};background:var(--{last})"></div>{ticks}'
            f'</div><div class="value">{number(value)}</div></div>'
        )
    return f'{key}<div class="card classes">{"".join(bars)}</div>'


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Which class is taken for which: the matrix when it is small, and its largest entries off the diagonal."""
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    pairs = sorted(((shares[t][p], t, p) for t in range(len(names)) for p in range(len(names)) if t != p), reverse=True)
    rows = "".join(
        f'<tr><td class="n">{share:.1%}</td><td>{swatch(t)}{html.escape(names[t])}</td>'
        f"<td>{swatch(p)}{html.escape(names[p])}</td></tr>"
        for share, t, p in pairs[:10]
        if share >= 0.001
    )
    listed = (
        '<div class="card wide confused"><h3>Most often taken for another</h3><table><thead><tr>'
        '<th class="n" scope="col">share</th><th scope="col">of</th><th scope="col">taken for</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    if len(names) > _MOST_CLASSES:
        return f'<div class="pair">{listed}</div>'
    heads = "".join(f'<th scope="col"><span>{html.escape(name)}</span></th>' for name in names)
    body = "".join(
        f'<tr><th scope="row"><span>{swatch(t)}<b>{html.escape(name)}</b></span></th>'
        + "".join(_share(shares[t][p], names[t], names[p]) for p in range(len(names)))
        + "</tr>"
        for t, name in enumerate(names)
    )
    matrix = (
        '<div class="card wide"><table class="matrix"><thead><tr><td></td>'
        f"{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    return f'<div class="pair">{matrix}{listed}</div>'


def _share(share: float, true: str, predicted: str) -> str:
    percent = round(100 * share)
    text = str(percent) if percent else ""
    # The eye compares squares of lightness: the root keeps small shares visible.
    depth = round(100 * math.sqrt(share))
    dark = " deepest" if depth > 83 else " deep" if depth > 65 else ""
    title = html.escape(f"{share:.1%} of {true} taken for {predicted}")
    return f'<td class="cell{dark}" style="--depth:{depth}%" title="{title}">{text}</td>'


def _worst_if_nan(value: float) -> float:
    return -1.0 if math.isnan(value) else value


def _percent(value: float) -> str:
    return f"{100 * min(max(_worst_if_nan(value), 0.0), 1.0):.2f}%"
