"""Pictures for the report: examples, the best and the worst images, and how labels develop over the phases."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from afa.data.classes import IGNORE
from afa.data.visualize import Picture, class_color, heat, overlay
from afa.evaluation.result import Example
from afa.report.curves import PHASES
from afa.report.tables import View, number

LABELS = ("walk_label", "par_label", "prediction", "truth")
_NAMES = {"walk_label": "walk label", "par_label": "PAR label", "prediction": "prediction", "truth": "truth"}
_STAGES = (("cam", "CAM"), ("par", "PAR label"), ("walk", "Walk label"), ("prediction", "Prediction"))


def with_key(samples: Sequence[Example], names: Sequence[str]) -> View:
    """A table of examples and the colors of its classes."""
    return {"key": class_key(samples, LABELS, names), "table": examples(samples, names)}


def class_key(samples: Sequence[Mapping[str, Any]], keys: Sequence[str], names: Sequence[str]) -> View:
    """The colors of the classes that occur in the label maps `keys` of the samples."""
    shown = {int(label) for sample in samples for key in keys for label in np.unique(sample[key])}
    classes = [{"color": class_color(index), "name": names[index]} for index in range(1, len(names)) if index in shown]
    return {"classes": classes, "ignored": IGNORE in shown}


def examples(samples: Sequence[Example], names: Sequence[str]) -> View:
    """A table of pictures, one row per image; truth and scores only where there are masks."""
    with_truth = any((np.asarray(sample["truth"]) != IGNORE).any() for sample in samples)
    with_affinity = all("affinity" in sample for sample in samples)
    heads = ["Image", "Tags", "CAM", *(["Affinity"] if with_affinity else []), *_NAMES.values()]
    heads = [head[0].upper() + head[1:] for head in heads if head != "truth" or with_truth]
    return {"heads": heads, "rows": [_example(sample, names, with_truth, with_affinity) for sample in samples]}


def _example(sample: Example, names: Sequence[str], with_truth: bool, with_affinity: bool) -> View:
    image, name, iou = sample["image"], sample["name"], sample["iou"]
    cells = [{"picture": _picture(heat(image, sample["cam"]), f"CAM of {name}"), "caption": ""}]
    if with_affinity:
        drawn = affinity_map(image, sample["affinity"], sample["token"])
        cells.append({"picture": _picture(drawn, f"affinity to one token of {name}"), "caption": ""})
    for key, text in _NAMES.items():
        if key == "truth" and not with_truth:
            continue
        caption = f"IoU {number(iou, 2)}" if key == "prediction" and not math.isnan(iou) else ""
        drawn = overlay(image, sample[key])  # type: ignore[literal-required]
        cells.append({"picture": _picture(drawn, f"{text} of {name}"), "caption": caption})
    return {
        "name": name,
        "image": _picture(image, f"image {name}"),
        "tags": _tags(sample["tags"], names),
        "cells": cells,
    }


def affinity_map(image: Picture, affinity: NDArray[np.floating], token: tuple[float, float]) -> Picture:
    """The affinity [h, w] to a token as a heat map over the image, with a ring around the token."""
    height, width = image.shape[:2]
    grid = Image.fromarray(np.asarray(affinity, np.float32))
    drawn = Image.fromarray(heat(image, np.asarray(grid.resize((width, height), Image.Resampling.NEAREST))))
    y, x = token[0] * height, token[1] * width
    radius = max(2.0, 0.03 * max(height, width))
    box = (x - radius, y - radius, x + radius, y + radius)
    ImageDraw.Draw(drawn).ellipse(box, outline=(255, 255, 255), width=max(1, round(radius / 3)))
    return np.asarray(drawn)


def evolution(snapshots: Mapping[int, Sequence[Mapping[str, Any]]], names: Sequence[str]) -> View | None:
    """A card per image: one row per kind of label, one column per phase end; None without snapshots."""
    if not snapshots:
        return None
    everything = [item for items in snapshots.values() for item in items]
    cards = []
    for position, item in enumerate(next(iter(snapshots.values()))):
        images = [(end, snapshots[end][position]) for end in sorted(snapshots) if position < len(snapshots[end])]
        cards.append(
            {
                "name": item["name"],
                "image": _picture(item["image"], f"training image {item['name']}"),
                "tags": _tags(item["tags"], names),
                "ends": [{"phase": PHASES[shown["phase"]], "iteration": f"{end:,}"} for end, shown in images],
                "rows": [
                    {"title": title, "cells": [_grown(key, title, *image) for image in images]}
                    for key, title in _STAGES
                ],
            }
        )
    return {"key": class_key(everything, ("par", "walk", "prediction"), names), "cards": cards}


def _grown(key: str, title: str, end: int, item: Mapping[str, Any]) -> View | None:
    """One picture of a card; None if that part of the network is not trained yet."""
    if item["phase"] == "classify" and key in ("walk", "prediction"):
        return None
    image = item["image"]
    picture = heat(image, item[key]) if key == "cam" else overlay(image, item[key])
    return _picture(picture, f"{title} of {item['name']} after {end:,} iterations")


def _tags(tags: Sequence[str], names: Sequence[str]) -> list[View]:
    return [{"name": tag, "color": class_color(names.index(tag) if tag in names else 0)} for tag in tags]


def _picture(picture: Picture, alt: str) -> View:
    height, width = picture.shape[:2]
    return {"uri": data_uri(picture), "alt": alt, "width": width, "height": height}


def data_uri(picture: Picture, longest: int = 320) -> str:
    """The picture [H, W, 3] as a `data:` URI, shrunk when its longer side exceeds `longest` pixels.

    JPEG at quality 92 without chroma subsampling: a tenth of the size of a PNG, with sharp class borders.
    """
    image = Image.fromarray(np.ascontiguousarray(picture))
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
