"""What an evaluation finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

ROWS = ("cam", "walk", "par", "seg")
"""What every measurement scores; `EvalResult.rows` adds "crf" where it was asked for."""

Scores = dict[str, Any]
"""As `SegmentationMetrics.compute` gives them."""


class Example(TypedDict):
    """An evaluated image that the report shows."""

    name: str
    image: NDArray[np.uint8]
    """[H, W, 3]."""
    tags: list[str]
    """Class names."""
    cam: NDArray[np.floating]
    """[H, W] in [0, 1], the largest over the tagged classes."""
    cam_label: NDArray[np.integer]
    """[H, W], as the following four."""
    walk_label: NDArray[np.integer]
    par_label: NDArray[np.integer]
    prediction: NDArray[np.integer]
    truth: NDArray[np.integer]
    """All ignored (255) where the image has no mask."""
    iou: float
    """Mean over the classes the image shows; nan without a mask."""


@dataclass
class EvalResult:
    """Scores, one dictionary per row; all nan when there are no masks.

    cam, walk and par see the images' tags (as published); seg and crf do not.
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
    """Images evenly spread over the split."""
    crf: Scores | None = None
    """The segmentation after the dense CRF, with eval.crf."""
    has_masks: bool = True
    image_iou: dict[str, float] = field(default_factory=dict)
    """Name -> mean IoU of the image's final segmentation over the classes it shows, in the split's order."""
    best: list[Example] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)
    """The images with the largest and the smallest `image_iou`, the most extreme first."""
    notes: list[str] = field(default_factory=list)
    """What makes the scores say less than they seem to, such as masks without any class."""

    @property
    def rows(self) -> dict[str, Scores]:
        """The rows that were measured, in the order of the table."""
        rows = {row: getattr(self, row) for row in ROWS}
        return rows if self.crf is None else {**rows, "crf": self.crf}
