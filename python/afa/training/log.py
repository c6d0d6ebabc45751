"""What a run says of itself while it trains: log.jsonl, the line beside the progress bar, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afa import distributed
from afa.config import Config
from afa.errors import UserError
from afa.files import to_json, write_text, writing
from afa.metrics import IGNORE
from afa.training.schedule import phase_of
from afa.training.trainer import Step, Trainer

LOSSES = ("loss_cls", "loss_seg", "loss_aff")
SKIPS = 30
"""So many updates left out in a row end an fp16 run: the loss scale has been halved to nearly nothing by then."""
Record = dict[str, Any]


class RunLog:
    """Gathers losses on the device and writes their means every log_every iterations: a wait for the device a line.

    All processes gather and reduce; rank 0 alone writes, to log.jsonl, to `on_record` functions, in order.
    """

    def __init__(
        self, path: Path, config: Config, device: torch.device, on_record: Iterable[Callable[[Record], None]] = ()
    ) -> None:
        self.path = path
        self.config = config
        self.device = device
        self.on_record = list(on_record)
        self.rows: list[Tensor] = []
        self.first = 0
        self.last = 0
        self.step: Step | None = None
        self.rate = 0.0
        self.since = time.perf_counter()
        self.waited = 0.0
        self.skipped = 0
        """Updates left out since the last one made."""

    def add(self, iteration: int, step: Step, trainer: Trainer, waited: float) -> None:
        """Note a step, before which `waited` seconds passed until its batch was there."""
        if not self.rows:
            self.first = iteration
        assert step.grad_norm is not None
        self.rows.append(torch.cat([step.losses, step.grad_norm.view(1)]))
        self.last, self.step = iteration, step
        self.rate = trainer.optimizer.param_groups[0]["lr"]
        self.waited += waited

    def check(self) -> list[list[float]]:
        """Losses and gradient norm gathered, one row an iteration, over all processes. UserError names the first loss
        that is not finite, or the gradients where only they are not (under fp16: for many iterations in a row)."""
        if not self.rows:
            return []
        rows = (distributed.all_reduce_sum_(torch.stack(self.rows)) / distributed.world_size()).tolist()
        skipped = self.skipped
        for offset, row in enumerate(rows):
            iteration = self.first + offset + 1
            for name, value in zip(("classification", "segmentation", "affinity"), row[:3], strict=True):
                if not math.isfinite(value):
                    raise UserError(f"the {name} loss became {value} at iteration {iteration}; {self._advice()}")
            norm = row[3]
            skipped = 0 if math.isfinite(norm) else skipped + 1
            if self.config.train.precision != "fp16" and skipped:
                raise UserError(
                    f"the gradients became {norm} at iteration {iteration}, though its losses are finite; "
                    + self._advice()
                )
            if skipped >= SKIPS:
                raise UserError(
                    f"the gradients were not finite in {skipped} iterations in a row up to {iteration}, whatever the "
                    f"loss scale; {self._advice()}"
                )
        return rows

    def _advice(self) -> str:
        return (
            f"lower train.lr ({self.config.train.lr:g}), train with train.precision=fp32 if it is not, and start "
            "again in another folder (--run)"
        )

    def write(self) -> Record:
        """A line on the steps since the last one; called by all processes at the same iteration."""
        rows = self.check()
        assert self.step is not None
        seconds = time.perf_counter() - self.since
        train = self.config.train
        # The first phase has no segmentation and no affinity loss: a line that spans its end averages the rest.
        both = rows[max(0, train.classify_until - self.first) :]
        means = [_mean([row[i] for row in (rows if i == 0 else both)]) for i in range(3)]
        norms = [row[3] for row in rows if math.isfinite(row[3])]
        record: Record = {
            "iteration": self.last + 1,
            "phase": phase_of(train, self.last),
            **dict(zip(LOSSES, means, strict=True)),
            "lr": self.rate,
            "grad_norm": _mean(norms),
            "images_per_s": len(rows) * train.batch_size / seconds,
            "wait_share": round(min(1.0, self.waited / seconds), 4),
            **_label_statistics(self.step),
        }
        if train.precision == "fp16":
            record["skipped"] = len(rows) - len(norms)
            for row in rows:
                self.skipped = 0 if math.isfinite(row[3]) else self.skipped + 1
        if self.device.type == "cuda":
            record["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
        self.append(record)
        self.rows.clear()
        self.since, self.waited = time.perf_counter(), 0.0
        return record

    def append(self, record: Record) -> None:
        """A line of log.jsonl."""
        if not distributed.is_main():
            return
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")
        for tell in self.on_record:
            tell(record)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count in images per second."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.since += time.perf_counter() - started


def summary(record: Record) -> str:
    """What the progress bar says of a line of the log."""
    parts = [" ".join(f"{name[5:]} {record[name]:.3f}" for name in LOSSES if record[name] is not None)]
    parts.append(f"{record['images_per_s']:.1f} img/s")
    parts.append(f"wait {record['wait_share']:.0%}")
    if "peak_memory_gib" in record:
        parts.append(f"{record['peak_memory_gib']:.1f} GiB")
    return " | ".join(parts)


def trim_log(path: Path, iteration: int) -> None:
    """Drop what was logged after the checkpoint, which will be done again, and a line cut short by a crash."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["iteration"] <= iteration:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _label_statistics(step: Step) -> Record:
    """Of the last batch: shares of ignored and foreground pixels, and of like and unlike pairs among all pairs."""
    if step.labels is None or step.pairs is None:
        return {}
    ignored = step.labels == IGNORE
    shares = torch.stack(
        [
            ignored.float().mean(),
            ((step.labels != 0) & ~ignored).float().mean(),
            (step.pairs == 1).float().mean(),
            (step.pairs == 0).float().mean(),
        ]
    )
    distributed.all_reduce_sum_(shares)
    shares /= distributed.world_size()
    names = ("label_ignored", "label_foreground", "pairs_same", "pairs_different")
    return {name: round(value, 5) for name, value in zip(names, shares.tolist(), strict=True)}
