"""Image-level tags: from a CSV of `image,labels`, or from the objects in VOC's XML annotations."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from afa.data.lists import read_lines, stem_of
from afa.errors import UserError, did_you_mean


def read_tags(root: Path, names: Sequence[str], classes: Sequence[str]) -> Tensor:
    """float32 [len(names), len(classes)], 1 where the image holds the class."""
    numbers = {name: number for number, name in enumerate(classes)}
    path = root / "tags.csv"
    labels_of = _csv_tags(path, numbers) if path.is_file() else _xml_tags(root)
    tags = torch.zeros(len(names), len(classes))
    for row, name in enumerate(names):
        labels, source = labels_of(name)
        for label in labels:
            if label not in numbers:
                raise UserError(
                    f"the tag '{label}' in {source} names no class{did_you_mean(label, classes)} "
                    f"(the {len(classes)} classes come from {_classes_source(root)})"
                )
            tags[row, numbers[label]] = 1
    return tags


def _classes_source(root: Path) -> str:
    path = root / "classes.txt"
    return str(path) if path.is_file() else f"PASCAL VOC, as there is no {path}"


TagReader = Callable[[str], tuple[list[str], str]]
"""Image name -> its labels, and where they stand in words."""


def csv_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """(image, labels, where it stands in words) of every line of `image,labels`, but for the header."""
    for number, line in enumerate(read_lines(path), 1):
        cells = [cell.strip() for cell in next(csv.reader([line]))]
        if number == 1 and [cell.lower() for cell in cells] == ["image", "labels"]:
            continue
        where = f"line {number} of {path}"
        if len(cells) != 2:
            raise UserError(
                f"{where} has {len(cells)} columns: it must be image,labels with the labels "
                "separated by spaces or semicolons"
            )
        yield cells[0], cells[1], where


def split_labels(text: str, classes: Container[str]) -> list[str]:
    """The labels in one cell: separated by semicolons, or by spaces when it has none."""
    # 'traffic light' alone is one class and not two; several such need semicolons.
    parts = text.split(";") if ";" in text or text in classes else text.split()
    return [part.strip() for part in parts if part.strip()]


def _csv_tags(path: Path, numbers: dict[str, int]) -> TagReader:
    rows: dict[str, tuple[list[str], str]] = {}
    for image, text, where in csv_rows(path):
        name = stem_of(image)
        if name in rows:
            raise UserError(f"{where} tags '{name}' a second time; keep one line an image")
        rows[name] = (split_labels(text, numbers), where)

    def labels_of(name: str) -> tuple[list[str], str]:
        if name not in rows:
            raise UserError(
                f"the image '{name}' has no line in {path}; add '{name},LABELS' (nothing after the comma "
                "when it "
                "shows no class)"
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
    """The names of the objects in one of VOC's annotations, as often as they stand there."""
    try:
        tree = ElementTree.parse(path)
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise UserError(f"the tag file {path} can't be read as XML ({error}); replace it") from error
    # 'object/name' and not any 'name': parts of a person (head, hand) have names too.
    return [(node.text or "").strip() for node in tree.getroot().findall("object/name")]
