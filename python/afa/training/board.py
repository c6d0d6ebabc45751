"""TensorBoard output: the log's values as scalars, and example images at every evaluation.

tensorboard --logdir runs
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from afa.data.classes import IGNORE
from afa.data.visualize import heat, overlay
from afa.errors import UserError
from afa.evaluation.result import Example
from afa.run import TENSORBOARD

PICTURES = 6
"""Number of example images per evaluation."""
PANELS = ("image", "CAM", "label", "prediction", "truth")
GAP = 4


class Board:
    """Writes to run/tensorboard. start: completed iterations; later entries of an earlier run are hidden."""

    def __init__(self, run: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / TENSORBOARD), purge_step=start + 1 if start else None)

    def record(self, record: dict[str, Any]) -> None:
        """Write a record of log.jsonl as scalars."""
        for name, value in record.items():
            if name != "iteration" and isinstance(value, int | float):
                kind, _, rest = name.partition("_")
                tag = f"{kind}/{rest}" if kind in ("val", "loss", "label", "pairs") else f"train/{name}"
                self.writer.add_scalar(tag, value, record["iteration"])
        self.writer.flush()

    def pictures(self, samples: Sequence[Example], iteration: int) -> None:
        """Write examples of `evaluate`: image, CAM, PAR label, prediction and truth side by side."""
        for sample in samples:
            self.writer.add_image(f"images/{sample['name']}", panels(sample), iteration, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def open_board(wanted: bool | None, run: Path, start: int) -> Board | None:
    """Open a board if `wanted`; None: only if the package is installed."""
    there = find_spec("tensorboard") is not None
    if wanted and not there:
        raise UserError(
            "train.tensorboard is true, but the package is not installed; run pip install tensorboard, or set "
            "train.tensorboard=false"
        )
    return Board(run, start) if there and wanted is not False else None


def panels(sample: Example) -> np.ndarray:
    """One example as uint8 [H, W, 3], in the order of PANELS; without the truth if there is no mask."""
    image = sample["image"]
    shown = [image, heat(image, sample["cam"])]
    shown += [overlay(image, label) for label in (sample["par_label"], sample["prediction"])]
    if (sample["truth"] != IGNORE).any():
        shown.append(overlay(image, sample["truth"]))
    gap = np.full((image.shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([part for picture in shown for part in (picture, gap)][:-1], axis=1)
