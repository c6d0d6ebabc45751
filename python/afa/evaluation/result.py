"""Evaluation results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from afa.evaluation.diagnostics import Diagnosis

ROWS = ("cam", "walk", "par", "seg")
"""Rows of every evaluation; `EvalResult.rows` adds "crf" if the CRF was enabled."""

Scores = dict[str, Any]
"""The result of `SegmentationMetrics.compute`."""


class _TokenAffinity(TypedDict, total=False):
    """Missing in runs evaluated by an earlier version."""

    token: tuple[float, float]
    """Center (y, x) of the token with the highest CAM, as shares of height and width."""
    affinity: NDArray[np.floating]
    """[h, w] on the token grid: affinity of all tokens to that token."""


class Example(_TokenAffinity):
    """An evaluated image that the report shows."""

    name: str
    image: NDArray[np.uint8]
    """[H, W, 3]."""
    tags: list[str]
    """Class names."""
    cam: NDArray[np.floating]
    """[H, W] in [0, 1], the maximum over the tagged classes."""
    cam_label: NDArray[np.integer]
    """[H, W], like the following four."""
    walk_label: NDArray[np.integer]
    par_label: NDArray[np.integer]
    prediction: NDArray[np.integer]
    truth: NDArray[np.integer]
    """All pixels 255 (ignored) if the image has no mask."""
    iou: float
    """Mean IoU over the classes in the image; nan without a mask."""


@dataclass
class EvalResult:
    """Scores, one dictionary per row; all nan if there are no masks.

    cam, walk and par use image-level tags (as published); seg and crf do not.
    """

    cam: Scores
    walk: Scores
    par: Scores
    seg: Scores
    f1: float
    """Mean over images of the classifier's F1 against the tags."""
    seconds: float
    images: int
    samples: list[Example] = field(default_factory=list)
    """Evenly spaced images of the split."""
    crf: Scores | None = None
    """The segmentation after the dense CRF; None without eval.crf."""
    has_masks: bool = True
    image_iou: dict[str, float] = field(default_factory=dict)
    """Name -> mean IoU of the final segmentation over the classes in the image, in the order of the split."""
    best: list[Example] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)
    """Images with the highest and lowest `image_iou`, most extreme first."""
    notes: list[str] = field(default_factory=list)
    """Warnings about the validity of the scores, such as masks without any class."""
    diagnosis: Diagnosis | None = None
    """What the walk gains and could gain, and more; None without masks or with eval.diagnostic_images=0."""

    @property
    def rows(self) -> dict[str, Scores]:
        """The evaluated rows in the order of the table."""
        rows = {row: getattr(self, row) for row in ROWS}
        return rows if self.crf is None else {**rows, "crf": self.crf}
