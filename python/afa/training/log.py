"""Training log: log.jsonl, progress bar summary and TensorBoard records."""

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
from afa.data.classes import IGNORE
from afa.errors import UserError
from afa.evaluation.metrics import AffinityMetrics
from afa.files import to_json, write_text, writing
from afa.training.schedule import phase_of
from afa.training.step import StepResult

LOSSES = {
    "loss_cls": "classification",
    "loss_seg": "segmentation",
    "loss_aff": "affinity",
    "loss_energy": "dense energy",
}
"""Keys of the log and names. The last loss is logged only with train.energy_weight."""
SKIPS = 30
"""Maximum number of consecutive skipped fp16 updates; by then the loss scale is nearly zero."""
Record = dict[str, Any]


class RunLog:
    """Collects losses on the device and writes their means every log_every iterations, with one synchronization each.

    All processes collect and reduce. Only rank 0 writes to log.jsonl and calls the `on_record` functions in order.
    """

    def __init__(
        self, path: Path, config: Config, device: torch.device, on_record: Iterable[Callable[[Record], None]] = ()
    ) -> None:
        self.path = path
        self.config = config
        self.device = device
        self.on_record = list(on_record)
        self.rows: list[Tensor] = []
        self.affinity: list[Tensor] = []
        self.first = 0
        self.last = 0
        self.result: StepResult | None = None
        self.rate = 0.0
        self.since = time.perf_counter()
        self.waited = 0.0
        self.skipped = 0
        """Number of updates skipped since the last successful one."""

    def add(self, iteration: int, result: StepResult, rate: float, waited: float) -> None:
        """Add a step; rate: its learning rate, waited: seconds spent waiting for its batch."""
        if not self.rows:
            self.first = iteration
        assert result.grad_norm is not None
        self.rows.append(torch.cat([result.losses, result.grad_norm.view(1)]))
        if result.affinity_sums is not None:
            self.affinity.append(result.affinity_sums)
        self.last, self.result = iteration, result
        self.rate = rate
        self.waited += waited

    def check(self) -> list[list[float]]:
        """Losses and gradient norm, one row per iteration, averaged over all processes.

        Raises UserError for the first non-finite loss, or for non-finite gradients (with fp16: in many consecutive
        iterations).
        """
        if not self.rows:
            return []
        rows = (distributed.all_reduce_sum_(torch.stack(self.rows)) / distributed.world_size()).tolist()
        skipped = self.skipped
        for offset, row in enumerate(rows):
            iteration = self.first + offset + 1
            for name, value in zip(LOSSES.values(), row[:-1], strict=False):
                if not math.isfinite(value):
                    raise UserError(f"the {name} loss became {value} at iteration {iteration}; {self._advice()}")
            norm = row[-1]
            skipped = 0 if math.isfinite(norm) else skipped + 1
            if self.config.train.precision != "fp16" and skipped:
                raise UserError(
                    f"the gradients became {norm} at iteration {iteration}, although the losses are finite; "
                    + self._advice()
                )
            if skipped >= SKIPS:
                raise UserError(
                    f"the gradients were not finite in {skipped} consecutive iterations up to {iteration}, at every "
                    f"loss scale; {self._advice()}"
                )
        return rows

    def _advice(self) -> str:
        return (
            f"lower train.lr ({self.config.train.lr:g}), use train.precision=fp32, and start a new run in another "
            "folder (--run)"
        )

    def write(self) -> Record:
        """Write a record of the steps since the last one. All processes must call this at the same iteration."""
        rows = self.check()
        assert self.result is not None
        seconds = time.perf_counter() - self.since
        train = self.config.train
        # The first phase has only the classification loss; average the others only over later iterations.
        both = rows[max(0, train.classify_until + 1 - self.first) :]
        means = [_mean([row[i] for row in (rows if i == 0 else both)]) for i in range(len(rows[0]) - 1)]
        norms = [row[-1] for row in rows if math.isfinite(row[-1])]
        record: Record = {
            "iteration": self.last + 1,
            "phase": phase_of(train, self.last),
            **dict(zip(LOSSES, means, strict=False)),
            "lr": self.rate,
            "grad_norm": _mean(norms),
            "images_per_s": len(rows) * train.batch_size / seconds,
            "wait_share": round(min(1.0, self.waited / seconds), 4),
            **_label_statistics(self.result),
            **_affinity_statistics(self.affinity, self.result),
        }
        if train.precision == "fp16":
            record["skipped"] = len(rows) - len(norms)
            for row in rows:
                self.skipped = 0 if math.isfinite(row[-1]) else self.skipped + 1
        if self.device.type == "cuda":
            record["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
        self.append(record)
        self.rows.clear()
        self.affinity.clear()
        self.since, self.waited = time.perf_counter(), 0.0
        return record

    def append(self, record: Record) -> None:
        """Append a record to log.jsonl."""
        if not distributed.is_main():
            return
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")
        for tell in self.on_record:
            tell(record)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block from images per second."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.since += time.perf_counter() - started


def summary(record: Record) -> str:
    """Progress bar text for a record."""
    parts = [" ".join(f"{name[5:]} {record[name]:.3f}" for name in LOSSES if record.get(name) is not None)]
    parts.append(f"{record['images_per_s']:.1f} img/s")
    parts.append(f"wait {record['wait_share']:.0%}")
    if "peak_memory_gib" in record:
        parts.append(f"{record['peak_memory_gib']:.1f} GiB")
    return " | ".join(parts)


def trim_log(path: Path, iteration: int) -> None:
    """Remove records after the checkpoint's iteration, and a line truncated by a crash."""
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


def _label_statistics(result: StepResult) -> Record:
    """Statistics of the last batch: shares of ignored and foreground pixels, and of same and different pairs."""
    if result.labels is None or result.pairs is None:
        return {}
    ignored = result.labels == IGNORE
    shares = torch.stack(
        [
            ignored.float().mean(),
            ((result.labels != 0) & ~ignored).float().mean(),
            ((result.pairs == 1) | (result.pairs == 2)).float().mean(),
            (result.pairs == 0).float().mean(),
        ]
    )
    distributed.all_reduce_sum_(shares)
    shares /= distributed.world_size()
    names = ("label_ignored", "label_foreground", "pairs_same", "pairs_different")
    return {name: round(value, 5) for name, value in zip(names, shares.tolist(), strict=True)}


def _affinity_statistics(sums: list[Tensor], result: StepResult) -> Record:
    """Mean affinity of three groups of pairs over all logged iterations, and the AUC of the last batch. Without values
    that are not defined, such as the mean over objects in a batch without objects."""
    if not sums or result.affinity is None or result.pairs is None:
        return {}
    total, pairs = distributed.all_reduce_sum_(torch.stack(sums).sum(0)).tolist()
    metrics = AffinityMetrics()
    metrics.update(result.affinity, result.pairs)
    assert metrics.histograms is not None
    metrics.histograms = distributed.all_reduce_sum_(metrics.histograms)
    means = [value / count if count else math.nan for value, count in zip(total, pairs, strict=True)]
    values = {
        **dict(zip(("affinity_different", "affinity_background", "affinity_object"), means, strict=True)),
        "affinity_auc": metrics.compute()["auc"],
    }
    return {name: round(value, 5) for name, value in values.items() if math.isfinite(value)}
