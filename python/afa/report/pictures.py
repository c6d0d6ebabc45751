"""Pictures: examples, the best and the worst images, and how labels grow through the phases."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from afa.data.classes import IGNORE
from afa.data.visualize import data_uri, heat, overlay
from afa.report.curves import PHASES
from afa.report.tables import number, swatch

Sample = Mapping[str, Any]
_LABELS = {"walk_label": "walk label", "par_label": "PAR label", "prediction": "prediction", "truth": "truth"}
_HATCH = "repeating-linear-gradient(135deg,#d7d7d7 0 3px,#a0a0a0 3px 6px)"


def class_key(samples: Sequence[Sample], keys: Sequence[str], names: Sequence[str]) -> str:
    """The colours of the classes that the label maps `keys` of the samples show."""
    shown = {int(label) for sample in samples for key in keys for label in np.unique(sample[key])}
    key = "".join(
        f"<span>{swatch(index)}{html.escape(names[index])}</span>" for index in range(1, len(names)) if index in shown
    )
    if IGNORE in shown:
        key += f'<span><i class="swatch" style="background:{_HATCH}"></i>ignored</span>'
    return f'<div class="key">{key}</div>'


def examples(samples: Sequence[Sample], names: Sequence[str]) -> str:
    """A table of pictures, one row an image; truth and scores only where there are masks."""
    with_truth = any((np.asarray(sample["truth"]) != IGNORE).any() for sample in samples)
    heads = ["Image", "Tags", "CAM", "Walk", "PAR label", "Prediction", *(["Truth"] if with_truth else [])]
    head = "".join(f'<th scope="col" class="{"tags" if name == "Tags" else ""}">{name}</th>' for name in heads)
    rows = "".join(_example(sample, names, with_truth) for sample in samples)
    return f'<div class="card wide samples"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _example(sample: Sample, names: Sequence[str], with_truth: bool) -> str:
    image, name = sample["image"], html.escape(str(sample["name"]))
    iou = sample.get("iou", math.nan)
    cells = [
        f"<td>{_picture(image, f'image {name}', name)}</td>",
        f'<td class="tags">{_chips(sample["tags"], names)}</td>',
        f"<td>{_picture(heat(image, sample['cam']), f'CAM of {name}')}</td>",
    ]
    for key, text in _LABELS.items():
        if key == "truth" and not with_truth:
            continue
        caption = f"IoU {number(iou, 2)}" if key == "prediction" and not math.isnan(iou) else ""
        cells.append(f"<td>{_picture(overlay(image, sample[key]), f'{text} of {name}', caption)}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def evolution(snapshots: Mapping[int, Sequence[Sample]], names: Sequence[str]) -> str:
    """A card an image: its labels (downwards) at the end of each phase (to the right)."""
    everything = [item for items in snapshots.values() for item in items]
    cards = []
    for place, item in enumerate(next(iter(snapshots.values()))):
        images = [(end, snapshots[end][place]) for end in sorted(snapshots) if place < len(snapshots[end])]
        head = "".join(f'<div class="when"><b>{PHASES[shown["phase"]]}</b>{end:,}</div>' for end, shown in images)
        rows = "".join(
            f'<div class="what">{title}</div>' + "".join(_grown(key, title, *image) for image in images)
            for key, title in (
                ("cam", "CAM"),
                ("par", "PAR label"),
                ("walk", "Walk label"),
                ("prediction", "Prediction"),
            )
        )
        name = html.escape(str(item["name"]))
        cards.append(
            f'<div class="card grown"><div class="who">{_picture(item["image"], f"training image {name}", name)}'
            f'<div class="chips">{_chips(item["tags"], names)}</div></div>'
            f'<div class="stages" style="--stages:{len(images)}"><div class="what"></div>{head}{rows}</div></div>'
        )
    key = class_key(everything, ("par", "walk", "prediction"), names)
    return f'{key}<div class="growth">{"".join(cards)}</div>'


def _grown(key: str, title: str, end: int, item: Sample) -> str:
    if item["phase"] == "classify" and key in ("walk", "prediction"):
        return '<div class="none">not trained yet</div>'
    image = item["image"]
    picture = heat(image, item[key]) if key == "cam" else overlay(image, item[key])
    name = html.escape(str(item["name"]))
    return f"<div>{_picture(picture, f'{title} of {name} after {end:,} iterations')}</div>"


def _chips(tags: Sequence[str], names: Sequence[str]) -> str:
    return "".join(
        f'<div class="chip">{swatch(names.index(tag) if tag in names else 0)}{html.escape(tag)}</div>' for tag in tags
    )


def _picture(picture: np.ndarray, alt: str, caption: str = "") -> str:
    height, width = picture.shape[:2]
    below = f'<div class="name">{caption}</div>' if caption else ""
    return f'<img src="{data_uri(picture)}" alt="{alt}" width="{width}" height="{height}">{below}'
