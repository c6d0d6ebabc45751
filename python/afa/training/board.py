"""TensorBoard: the log's numbers as scalars, and pictures of some validation images at every measurement.

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
"""Images shown at a measurement."""
PANELS = ("image", "CAM", "label", "prediction", "truth")
GAP = 4


class Board:
    """Writes to the folder run/tensorboard. `start`: the iterations already done; what an earlier run that went
    beyond them wrote is then hidden."""

    def __init__(self, run: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / TENSORBOARD), purge_step=start + 1 if start else None)

    def record(self, record: dict[str, Any]) -> None:
        """A line of log.jsonl; what training and what measurement found under one heading each."""
        for name, value in record.items():
            if name != "iteration" and isinstance(value, int | float):
                kind, _, rest = name.partition("_")
                tag = f"{kind}/{rest}" if kind in ("val", "loss", "label", "pairs") else f"train/{name}"
                self.writer.add_scalar(tag, value, record["iteration"])
        self.writer.flush()

    def pictures(self, samples: Sequence[Example], iteration: int) -> None:
        """Samples of `evaluate`: image, CAM, PAR label, prediction and truth side by side."""
        for sample in samples:
            self.writer.add_image(f"images/{sample['name']}", panels(sample), iteration, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def open_board(wanted: bool | None, run: Path, start: int) -> Board | None:
    """A board where it is `wanted`, or None given and the package is installed."""
    there = find_spec("tensorboard") is not None
    if wanted and not there:
        raise UserError(
            "train.tensorboard is true, but the package is not installed; pip install tensorboard, or set "
            "train.tensorboard=false"
        )
    return Board(run, start) if there and wanted is not False else None


def panels(sample: Example) -> np.ndarray:
    """One sample as uint8 [H, W, 3], in the order of PANELS; the truth only where it is known."""
    image = sample["image"]
    shown = [image, heat(image, sample["cam"])]
    shown += [overlay(image, label) for label in (sample["par_label"], sample["prediction"])]
    if (sample["truth"] != IGNORE).any():
        shown.append(overlay(image, sample["truth"]))
    gap = np.full((image.shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([part for picture in shown for part in (picture, gap)][:-1], axis=1)
