"""benchmarks/background_scores.py on the tiny tree."""

from __future__ import annotations

import json
from pathlib import Path

import background_scores
import numpy as np
import pytest
from refinements import CAM_KINDS


def test_otsu_separates_two_groups() -> None:
    counts = np.zeros(100)
    counts[5:15], counts[60:70] = 10, 4
    assert 0.15 <= background_scores.otsu(counts) <= 0.6


def test_writes_the_scores_of_all_rules(voc_root: Path, tmp_path: Path) -> None:
    background_scores.main(["--data", str(voc_root), "--images", "2", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("background_scores-*.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    assert [row["cam_kind"] for row in content["rows"]] == list(CAM_KINDS)
    scores = content["background_scores"]
    for row in content["rows"]:
        assert row["images"] == 2
        for rule in background_scores.RULES:
            found = row["rules"][rule]
            for labels in ("cam", "par"):
                assert found[labels] == row["curves"][labels][scores.index(found["score"])]
        best = row["agreement"].index(max(row["agreement"]))
        assert row["rules"]["agreement"]["score"] == scores[best]
    true = next(row for row in content["rows"] if row["cam_kind"] == "true mask")
    assert true["curves"]["cam"] == pytest.approx([1.0] * len(scores))
