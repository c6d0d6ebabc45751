"""Image-level tags: from a CSV of `image,labels`, or from the objects in VOC's XML annotations."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from afa.data.class_names import class_name, is_background
from afa.data.listing import PictureFinder, stem_of
from afa.errors import UserError, did_you_mean

HEADERS = (("image", "labels"), ("image", "label"), ("image", "tags"), ("filename", "labels"), ("filename", "label"))
"""Recognized header lines of a CSV."""


def read_tags(root: Path, names: Sequence[str], classes: Sequence[str], pictures: Mapping[str, Path]) -> Tensor:
    """Tags float32 [len(names), len(classes)], 1 if the image has the class; pictures: all images in the folder."""
    numbers = {name: number for number, name in enumerate(classes)}
    path = root / "tags.csv"
    labels_of = _csv_tags(path, numbers, pictures) if path.is_file() else _xml_tags(root)
    tags = torch.zeros(len(names), len(classes))
    for row, name in enumerate(names):
        labels, source = labels_of(name)
        for label in labels:
            if label not in numbers:
                raise UserError(
                    f"unknown class '{label}' in {source}{did_you_mean(label, classes)} "
                    f"(the {len(classes)} classes come from {_classes_source(root)})"
                )
            tags[row, numbers[label]] = 1
    return tags


def _classes_source(root: Path) -> str:
    path = root / "classes.txt"
    return str(path) if path.is_file() else f"PASCAL VOC, because there is no {path}"


TagReader = Callable[[str], tuple[list[str], str]]
"""Image name -> its labels, and a description of their location."""


def read_lines(path: Path) -> list[str]:
    """The stripped, non-empty lines of a UTF-8 text file; UserError if it can't be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as UTF-8 text ({error}); fix or replace it") from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def csv_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (image, labels, location) for every line of `image,labels` except the header."""
    for number, line in enumerate(read_lines(path), 1):
        where = f"line {number} of {path}"
        try:
            cells = [cell.strip() for cell in next(csv.reader([line], skipinitialspace=True, strict=True))]
        except csv.Error as error:
            raise UserError(f"{where} is not valid CSV ({error}); check for an unclosed quote") from error
        if number == 1 and tuple(cell.lower() for cell in cells) in HEADERS:
            continue
        if len(cells) != 2:
            raise UserError(
                f"{where} has {len(cells)} columns; expected image,labels, with labels separated by spaces or "
                "semicolons"
            )
        yield cells[0], cells[1], where


def split_labels(text: str, classes: Container[str], where: str) -> list[str]:
    """The labels in one cell, separated by semicolons or, if there are none, by spaces. background means no label."""
    # A cell with only 'traffic light' is one class, not two. Several names with spaces need semicolons.
    whole = class_name(text, where) if text.strip() and ";" not in text else ""
    parts = text.split(";") if ";" in text else [whole] if whole in classes else text.split()
    names = [class_name(part, where) for part in parts if part.strip()]
    return [name for name in names if not is_background(name)]


def _csv_tags(path: Path, numbers: dict[str, int], pictures: Mapping[str, Path]) -> TagReader:
    finder = PictureFinder(pictures)
    rows: dict[str, tuple[list[str], str]] = {}
    for image, text, where in csv_rows(path):
        labels = (split_labels(text, numbers, where), where)
        # Lines for missing images are allowed and have no effect.
        for name in finder.find(image) or [stem_of(image)]:
            if name in rows:
                raise UserError(f"{where} tags '{name}' a second time; keep one line per image")
            rows[name] = labels

    def labels_of(name: str) -> tuple[list[str], str]:
        if name not in rows:
            raise UserError(
                f"the image '{name}' has no line in {path}; add '{name},LABELS' (nothing after the comma "
                "when it shows no class)"
            )
        return rows[name]

    return labels_of


def _xml_tags(root: Path) -> TagReader:
    folder = root / "Annotations"

    def labels_of(name: str) -> tuple[list[str], str]:
        path = folder / f"{name}.xml"
        if not path.is_file():
            raise UserError(
                f"the image '{name}' has no tags: there is no {path} and no {root / 'tags.csv'}; add one of them"
            )
        return xml_labels(path), str(path)

    return labels_of


def xml_labels(path: Path) -> list[str]:
    """The names of all objects in a VOC annotation, including duplicates."""
    try:
        tree = ElementTree.parse(path)
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        raise UserError(f"the tag file {path} can't be read as XML ({error}); replace it") from error
    if tree.getroot().tag != "annotation":
        raise UserError(
            f"the root element of the tag file {path} must be VOC's <annotation>, got <{tree.getroot().tag}>; "
            "replace the file"
        )
    labels = []
    for item in tree.getroot().findall("object"):
        # Only the name of the object itself: parts of a person (head, hand) have names too.
        label = class_name(item.findtext("name") or "", f"an object of {path}")
        if not is_background(label):
            labels.append(label)
    return labels
