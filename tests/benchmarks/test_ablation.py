"""benchmarks/ablation.py on the tiny tree: rows differ as expected, and finished runs are not repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ablation
import pytest
import torch

DEVICE = torch.device("cpu")


def settings(root: Path) -> list[str]:
    return [
        f"data.root={root}",
        "data.embedded=false",
        "data.crop_size=32",
        "data.workers=0",
        "model.weights=null",
        "model.backbone_args.embed_dims=[8, 16, 24, 32]",
        "model.backbone_args.depths=[1, 1, 1, 1]",
        "model.refine_iterations=0",
        "train.batch_size=3",
        "train.iterations=5",
        "train.classify_until=1",
        "train.par_until=3",
        "eval.diagnostic_images=3",
        "train.warmup=0",
    ]


@pytest.mark.slow
def test_rows_of_one_seed(voc_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int]] = []
    trained: dict[str, dict[str, torch.Tensor]] = {}
    run = ablation.run_steps

    def watched(trainer: Any, begin: int, end: int, title: str) -> None:
        steps.append((begin, end))
        run(trainer, begin, end, title)
        trained[title] = {key: value.clone() for key, value in trainer.model.state_dict().items()}

    monkeypatch.setattr(ablation, "run_steps", watched)
    base = settings(voc_root)
    scores = ablation.run_seed(0, base, tmp_path / "runs", DEVICE)
    assert list(scores) == list(ablation.ROWS)
    assert steps == [(0, 2)] + [(2, 5)] * len(ablation.ROWS), "the classification is shared"
    decoders = [trained[f"seed 0, {row}"]["decoder.predict.weight"] for row in ablation.ROWS]
    for first in range(len(ablation.ROWS)):
        for second in range(first):
            assert not torch.equal(decoders[first], decoders[second]), "two rows learned from the same labels"
    # The affinity loss moves its head in all rows but the first two and the last.
    heads = [trained[f"seed 0, {row}"]["affinity_head.weight"] for row in ablation.ROWS]
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[-1])
    assert not any(torch.equal(heads[0], head) for head in heads[2:-1])

    steps.clear()
    assert ablation.run_seed(0, base, tmp_path / "runs", DEVICE) == scores and not steps
    (tmp_path / "runs/seed0/3.json").unlink()
    assert ablation.run_seed(0, base, tmp_path / "runs", DEVICE)["+ walk"]["seg"] == scores["+ walk"]["seg"]
    assert steps == [(0, 2), (2, 5)]

    steps.clear()
    assert set(ablation.run_seed(2, base, tmp_path / "runs", DEVICE, rows=["+ walk"])) == {"+ walk"}
    assert steps == [(0, 2), (2, 5)]

    assert set(ablation.finished(0, base, tmp_path / "runs")) == set(ablation.ROWS)
    assert ablation.finished(1, base, tmp_path / "runs") == {}
    assert ablation.finished(0, [*base, "labels.low=0.2"], tmp_path / "runs") == {}, "scores of other settings"


@pytest.mark.parametrize("base", [ablation.SETTINGS, ablation.QUICK], ids=["whole", "quick"])
def test_settings_of_the_benchmark_are_valid(base: list[str]) -> None:
    for row, changes in ablation.ROWS.items():
        train = ablation.configuration(base, changes, 0).train
        assert (train.par_until < train.iterations) == ("+ walk" in row)


def test_mean_and_spread() -> None:
    def seed(value: float) -> dict[str, dict[str, Any]]:
        entry = {"seg": value, "settings": ["a=1"], **dict.fromkeys(ablation.SCORES, 0.3)}
        return {row: {**entry, "seg": value * (1 + number)} for number, row in enumerate(ablation.ROWS)}

    rows = ablation.summarize([seed(0.5), seed(0.6), seed(0.7)])
    assert [row["row"] for row in rows] == list(ablation.ROWS)
    assert rows[0]["mean"] == pytest.approx(0.6) and rows[0]["std"] == pytest.approx(0.1)
    assert rows[0]["seg_miou"] == [0.5, 0.6, 0.7]
    assert ablation.summarize([seed(0.5)])[0]["std"] is None
    assert rows[0]["gain"] is None and rows[1]["gain"] == pytest.approx(0.6)
    assert rows[1]["gain_std"] == pytest.approx(0.1)
    whole = list(ablation.ROWS).index(ablation.METHOD)
    assert rows[whole]["gain"] == pytest.approx(0.6)
    # Rows after the whole method are compared with it, not with each other.
    assert [row["gain"] for row in rows[whole + 1 :]] == pytest.approx([0.6, 1.2, 1.8])
    json.dumps(rows)


def test_summary_of_unfinished_seeds() -> None:
    first, _, third = list(ablation.ROWS)[:3]
    entry: dict[str, Any] = {"settings": [], **dict.fromkeys(ablation.SCORES, 0.3)}
    seeds = [{first: {**entry, "seg": 0.5}, third: {**entry, "seg": 0.7}}, {first: {**entry, "seg": 0.6}}]
    rows = ablation.summarize(seeds)
    assert [(row["row"], row["seg_miou"]) for row in rows] == [(first, [0.5, 0.6]), (third, [0.7])]
    assert rows[1]["gain"] == pytest.approx(0.2) and rows[1]["gain_std"] is None
    assert ablation.summarize([{}]) == []
