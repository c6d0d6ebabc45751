"""benchmarks/train_step.py: both implementations agree, every part is timed, and the README's tool reads the result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import train_step

from afa.labeling import label_maker
from tools import update_tables

SMALL = ["data.crop_size=64", "train.batch_size=2", "labels.par_iterations=1", "model.refine_iterations=1"]


@pytest.mark.slow
def test_both_implementations_and_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "peak", lambda name, *_: {train_step.OURS: 10, train_step.PLAIN: 25}[name])
    arguments = ["--config", "demo", "--seconds", "0.01", "--device", "cpu", "--out", str(tmp_path), *SMALL]
    monkeypatch.setattr(sys, "argv", ["train_step", *arguments])
    before = (label_maker.par_labels, torch.Tensor.backward)
    train_step.main()
    assert (label_maker.par_labels, torch.Tensor.backward) == before  # nothing stays replaced
    (file,) = tmp_path.glob("train_step-*.json")
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    whole = {row["candidate"]: row for row in rows if row["times_ours"] is not None}
    assert set(whole) == {train_step.OURS, train_step.PLAIN}
    for name, row in whole.items():
        parts = {part["part"]: part["median_ms"] for part in rows if part["candidate"] == name and "part" in part}
        assert list(parts) == list(train_step.PARTS)
        assert all(parts[part] > 0 for part in train_step.PARTS if part != "other")
        assert parts["other"] < 0.5 * row["median_ms"]
    monkeypatch.setattr(update_tables, "RESULTS", tmp_path)
    (line,) = [line for line in update_tables.benchmark_table().splitlines() if "training step" in line]
    assert "walk phase" in line and "2×3×64×64 float32" in line and train_step.PLAIN in line and "2.5×" in line


def test_a_step_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = train_step.settings("demo", SMALL)
    candidates = {
        name: train_step.Candidate(name, config, 3, "par", torch.device("cpu"))
        for name in (train_step.OURS, train_step.PLAIN)
    }
    assert "0.0000% of labels" in train_step.check(candidates, config)
    real = train_step.plain_par_labels
    monkeypatch.setitem(train_step.PLAIN_LABELS, "par_labels", lambda *a, **kw: real(*a, **kw).flip(-1))
    with pytest.raises(SystemExit, match="the steps differ"):
        train_step.check(candidates, config)
