"""report.html: one page, without scripts or outside files, that shows what a run learnt."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from afa.files import write_text
from afa.metrics import IGNORE
from afa.visualize import class_colour, data_uri, heat, overlay

if TYPE_CHECKING:
    from afa.evaluate import EvalResult

ROWS = {
    "cam": ("CAM", "where the classifier looked, cut at one threshold; knows the image's tags"),
    "walk": ("Walk", "the CAM spread by the learnt affinity; knows the tags"),
    "par": ("PAR label", "the CAM refined by colour; what training starts from; knows the tags"),
    "seg": ("Segmentation", "the decoder's own answer; sees the image alone"),
}
"""Row of the table -> its name and what it is."""

LOSSES = {
    "loss_cls": ("Classification", "tags of the whole image", "--cam"),
    "loss_seg": ("Segmentation", "pixels against pseudo labels", "--seg"),
    "loss_aff": ("Affinity", "pairs of tokens, same class or not", "--par"),
}
PHASES = {"classify": "tags", "par": "PAR labels", "walk": "walk labels"}


def write_report(
    run: str | Path,
    result: EvalResult,
    classes: Sequence[str],
    *,
    facts: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Path:
    """Write run/report.html from run/log.jsonl (when there) and the evaluation; returns its path.

    `classes` are the foreground names; `facts` are shown in the header in their order.
    """
    run = Path(run)
    names = ["background", *classes]
    template = Template((Path(__file__).parent / "templates" / "report.html").read_text(encoding="utf-8"))
    log = read_log(run / "log.jsonl")
    metrics = {row: getattr(result, row) for row in ROWS}
    page = template.substitute(
        title=html.escape(title or f"AFA run {run.name}"),
        lead=(
            "Semantic segmentation learnt from image tags alone: which classes an image shows, never where. "
            "All scores are on the validation split, against masks that training did not see."
        ),
        tiles=_tiles(metrics),
        facts="".join(
            f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>"
            for key, value in (facts or {}).items()
        ),
        scores_note=(
            "mIoU is the mean over classes, background included, of intersection over union; "
            "1 is perfect. The first three rows are labels made for training, given the tags."
        ),
        scores=_scores(metrics),
        curves=_curves(log),
        classes=_class_bars(metrics, names),
        samples=_samples(result.samples, names),
        footer="Written by afa report. Colours are PASCAL VOC's, brightened for the screen.",
    )
    path = run / "report.html"
    write_text(path, page)
    return path


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The rows of log.jsonl by iteration; what is logged twice of one iteration is merged, the later value counting.

    A last line cut short by a killed run is passed over.
    """
    path = Path(path)
    rows: dict[int, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                rows.setdefault(int(row["iteration"]), {}).update(row)
            except (ValueError, KeyError, TypeError):
                continue
    return [rows[iteration] for iteration in sorted(rows)]


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _tiles(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    seg, cam = metrics["seg"]["miou"], metrics["cam"]["miou"]
    best = max(("cam", "walk", "par"), key=lambda row: _worst_if_nan(metrics[row]["miou"]))
    tiles = [
        ("main", _number(seg), "mIoU of the segmentation"),
        ("", f"{seg - cam:+.3f}" if math.isfinite(seg - cam) else "–", "over its own CAM"),
        ("", _number(metrics[best]["miou"]), f"best of its labels: {ROWS[best][0]}"),
        ("", _number(metrics["seg"]["pixel_acc"]), "of all pixels right"),
    ]
    return "".join(
        f'<div class="tile card {kind}"><b>{value}</b><span>{text}</span></div>' for kind, value, text in tiles
    )


def _worst_if_nan(value: float) -> float:
    return -1.0 if math.isnan(value) else value


def _percent(value: float) -> str:
    return f"{100 * min(max(_worst_if_nan(value), 0.0), 1.0):.2f}%"


def _scores(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for key, (name, text) in ROWS.items():
        scores = metrics[key]
        bar = f'<div class="fill" style="width:{_percent(scores["miou"])};background:var(--{key})"></div>'
        rows.append(
            f'<tr class="{"main" if key == "seg" else ""}"><td><b>{name}</b><small>{text}</small></td>'
            f'<td class="bar"><div class="track">{bar}</div></td>'
            f'<td class="n"><b>{_number(scores["miou"])}</b></td><td class="n">{_number(scores["pixel_acc"])}</td>'
            f'<td class="n">{_number(scores["mean_acc"])}</td></tr>'
        )
    head = (
        '<tr><th>What</th><th class="bar"></th><th class="n">mIoU</th><th class="n">pixel accuracy</th>'
        '<th class="n">class accuracy</th></tr>'
    )
    return f'<table class="score"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def _class_bars(metrics: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    key = (
        f'<div class="key"><span><i style="background:var(--seg)"></i>{ROWS["seg"][0]}</span>'
        + "".join(
            f'<span><i class="tick" style="background:var(--{row})"></i>{ROWS[row][0]}</span>'
            for row in ("cam", "walk", "par")
        )
        + "</div>"
    )
    bars = []
    for index, name in enumerate(names):
        value = metrics["seg"]["iou"][index]
        ticks = "".join(
            f'<i title="{ROWS[row][0]} {_number(metrics[row]["iou"][index])}" '
            f'style="left:{_percent(metrics[row]["iou"][index])};background:var(--{row})"></i>'
            for row in ("cam", "walk", "par")
            if not math.isnan(metrics[row]["iou"][index])
        )
        bars.append(
            f'<div class="class"><div class="name">{_swatch(index)}<span>{html.escape(name)}</span></div>'
            f'<div class="iou"><div class="fill" style="width:{_percent(value)};background:var(--seg)"></div>{ticks}'
            f'</div><div class="value">{_number(value)}</div></div>'
        )
    return f'{key}<div class="card classes">{"".join(bars)}</div>'


def _swatch(index: int) -> str:
    return f'<i class="swatch" style="background:{class_colour(index)}"></i>'


# ---- curves

_WIDTH, _HEIGHT = 330, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 12, 20, 24


def _curves(log: Sequence[Mapping[str, Any]]) -> str:
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
        key = "".join(f'<span><i style="background:var(--{row})"></i>{ROWS[row][0]}</span>' for row in ROWS)
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
        parts.append(f'<path class="curve" stroke="var({colour})" d="{drawn}"/>')
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


# ---- examples


def _samples(samples: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    if not samples:
        return '<p class="note">No example was kept; set eval.report_images above 0 and evaluate again.</p>'
    shown = {int(label) for sample in samples for key in _LABELS for label in np.unique(sample[key])}
    key = "".join(
        f"<span>{_swatch(index)}{html.escape(names[index])}</span>" for index in range(1, len(names)) if index in shown
    )
    hatch = "repeating-linear-gradient(135deg,#d7d7d7 0 3px,#a0a0a0 3px 6px)"
    if IGNORE in shown:
        key += f'<span><i class="swatch" style="background:{hatch}"></i>ignored</span>'
    heads = ["Image", "Tags", "CAM", "Walk", "PAR label", "Prediction", "Truth"]
    head = "".join(f'<th class="{"tags" if name == "Tags" else ""}">{name}</th>' for name in heads)
    rows = "".join(_sample(sample, names) for sample in samples)
    return (
        f'<p class="note">Spread evenly over the validation split, not chosen. The number under a prediction is its '
        "share of right pixels. Point at a picture to enlarge it.</p>"
        f'<div class="key">{key}</div><div class="card wide samples"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


_LABELS = {"walk_label": "walk label", "par_label": "PAR label", "prediction": "prediction", "truth": "truth"}


def _sample(sample: Mapping[str, Any], names: Sequence[str]) -> str:
    image, truth, prediction = sample["image"], np.asarray(sample["truth"]), np.asarray(sample["prediction"])
    name = html.escape(str(sample["name"]))
    chips = "".join(
        f'<div class="chip">{_swatch(names.index(tag) if tag in names else 0)}{html.escape(tag)}</div>'
        for tag in sample["tags"]
    )
    counted = truth != IGNORE
    right = f"{(prediction == truth)[counted].mean():.2f}" if counted.any() else "–"
    cells = [
        _picture(image, f"image {name}", name),
        f'<td class="tags">{chips}</td>',
        _picture(heat(image, sample["cam"]), f"CAM of {name}"),
    ]
    for key, text in _LABELS.items():
        caption = right if key == "prediction" else ""
        cells.append(_picture(overlay(image, sample[key]), f"{text} of {name}", caption))
    return f"<tr>{''.join(cells)}</tr>"


def _picture(picture: np.ndarray, alt: str, caption: str = "") -> str:
    below = f'<div class="name">{caption}</div>' if caption else ""
    return f'<td><img src="{data_uri(picture)}" alt="{alt}">{below}</td>'
