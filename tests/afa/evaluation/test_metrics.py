from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import afa_ext
from afa.evaluation.metrics import AffinityMetrics, SegmentationMetrics, classification_f1


def test_golden_scores(golden: Callable[[str], dict[str, Any]]) -> None:
    case = golden("loss_metric")
    metrics = SegmentationMetrics(case["num_classes"])
    # In two updates, since a split is measured batch by batch.
    for part in (slice(0, 1), slice(1, 3)):
        metrics.update(case["pred"][part], case["gt"][part])
    scores = metrics.compute()
    assert scores["pixel_acc"] == pytest.approx(case["pAcc"], rel=1e-9)
    assert scores["mean_acc"] == pytest.approx(case["mAcc"], rel=1e-9)
    assert scores["miou"] == pytest.approx(case["miou"], rel=1e-9)
    assert scores["iou"] == pytest.approx(case["iou"].tolist(), rel=1e-7)


def test_confusion_by_counting() -> None:
    rng = np.random.default_rng(0)
    pred, target = rng.integers(0, 3, (2, 5, 6)), rng.integers(0, 4, (2, 5, 6))
    target[target == 3] = 255
    metrics = SegmentationMetrics(3)
    metrics.update(torch.from_numpy(pred), torch.from_numpy(target))
    expected = [[int(((target == t) & (pred == p)).sum()) for p in range(3)] for t in range(3)]
    assert metrics.compute()["confusion"] == expected


def test_means_are_over_the_classes_present_in_the_truth() -> None:
    metrics = SegmentationMetrics(4)
    metrics.update(torch.tensor([[[0, 0, 1, 2]]]), torch.tensor([[[0, 0, 1, 1]]]))
    scores = metrics.compute()
    assert scores["iou"][:3] == [1.0, 0.5, 0.0]
    assert math.isnan(scores["iou"][3])
    assert scores["miou"] == pytest.approx(0.75)
    assert scores["mean_acc"] == pytest.approx(0.75)


def test_ignored_prediction_misses_its_class_and_harms_no_other() -> None:
    metrics = SegmentationMetrics(2)
    metrics.update(torch.tensor([[[1, 255, 0]]]), torch.tensor([[[1, 1, 0]]]))
    scores = metrics.compute()
    assert scores["iou"] == [1.0, 0.5]
    assert scores["pixel_acc"] == pytest.approx(2 / 3)


def test_nothing_counted_is_nan() -> None:
    metrics = SegmentationMetrics(2)
    assert math.isnan(metrics.compute()["miou"])
    metrics.update(torch.zeros(1, 2, 2, dtype=torch.uint8), torch.full((1, 2, 2), 255, dtype=torch.uint8))
    assert math.isnan(metrics.compute()["miou"])


def test_wrong_input_is_reported() -> None:
    metrics = SegmentationMetrics(2)
    with pytest.raises(ValueError, match=r"the same shape.*\(1, 2\).*\(1, 3\)"):
        metrics.update(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(TypeError, match="pred must contain integers"):
        metrics.update(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="num_classes"):
        SegmentationMetrics(0)


def test_classification_f1() -> None:
    tags = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    scores = torch.tensor([[2.0, -1.0, -1.0], [-1.0, -1.0, -1.0], [1.0, 1.0, -1.0]])
    # Images: precision 1 recall 1/2 -> 2/3; nothing to find and nothing found -> 1; precision 1/2 recall 1 -> 2/3.
    assert classification_f1(scores, tags) == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)


def test_affinity_metrics_by_hand() -> None:
    """Tokens: background, background, object, object."""
    pairs = afa_ext.affinity_labels(torch.tensor([[[0, 0, 1, 1]]]), stride=1, radius=3, background=0)
    affinity = torch.tensor([[[1, 0.8, 0.5, 0.1], [0.8, 1, 0.2, 0.2], [0.5, 0.2, 1, 0.4], [0.1, 0.2, 0.4, 1]]])
    metrics = AffinityMetrics()
    for _ in range(2):
        metrics.update(affinity, pairs)
    found = metrics.compute()
    assert found["background"] == pytest.approx(0.8)
    assert found["object"] == pytest.approx(0.4)
    assert found["different"] == pytest.approx((0.5 + 0.1 + 0.2 + 0.2) / 4)
    # From the objects: 0.4 to the same object; 0.5, 0.2, 0.1 and 0.2 to the background.
    assert found["auc"] == pytest.approx(3 / 4)


def test_affinity_metrics_without_objects() -> None:
    pairs = torch.ones(1, 4, 4, dtype=torch.uint8)
    metrics = AffinityMetrics()
    assert all(math.isnan(value) for value in metrics.compute().values())
    metrics.update(torch.rand(1, 4, 4), pairs)
    found = metrics.compute()
    assert math.isnan(found["auc"]) and math.isnan(found["object"]) and 0 < found["background"] < 1
