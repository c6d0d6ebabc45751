"""Diagnostics of the labels: ceilings of the walk, affinity and background scores."""

from __future__ import annotations

import pytest
import torch

from afa.config import Config
from afa.data.dataset import TaggedDataset
from afa.evaluation.diagnostics import (
    BACKGROUND_SCORES,
    CHECKS,
    Diagnosis,
    oracle_affinity,
    spread,
    token_affinity,
    token_classes,
)
from afa.evaluation.evaluate import evaluate
from afa.evaluation.metrics import AffinityMetrics, SegmentationMetrics
from afa.labeling.label_maker import LabelMaker
from afa.labeling.labels import walk_labels, walked_cam_labels
from afa.model import AFANet


def diagnose(setting: tuple[AFANet, TaggedDataset, Config]) -> Diagnosis:
    found = evaluate(*setting, progress=False).diagnosis
    assert found is not None
    return found


def test_equal_to_the_rows(setting: tuple[AFANet, TaggedDataset, Config]) -> None:
    """The curves contain the rows' values at the rows' background scores."""
    model, dataset, config = setting
    config.labels.cam_threshold, config.labels.walk_threshold = 0.45, 0.3
    result = evaluate(model, dataset, config, progress=False)
    found = result.diagnosis
    assert found is not None and found.images == 4
    for row, score in (("cam", 0.45), ("walk", 0.3), ("par", 0.45)):
        assert found.curves[row][BACKGROUND_SCORES.index(score)] == getattr(result, row)["miou"] == found.miou[row]
        assert len(set(found.curves[row])) > 3, "the score matters"
        score, miou = found.best(row)
        assert miou == max(found.curves[row]) == found.curves[row][BACKGROUND_SCORES.index(score)]
    assert set(found.miou) == {"cam", "walk", "par", *CHECKS}


def test_checks_are_those_of_each_image(setting: tuple[AFANet, TaggedDataset, Config]) -> None:
    model, dataset, config = setting
    found = diagnose(setting)
    metrics = {row: SegmentationMetrics(4) for row in CHECKS}
    affinity = AffinityMetrics()
    maker = LabelMaker.for_evaluation(config)
    at = (config.labels.walk_threshold,) * 2
    for item in (dataset[i] for i in range(4)):
        labels = maker.from_images(model, item["image"][None], item["tags"][None])
        assert labels.affinity is not None and labels.grid is not None
        truth = item["mask"][None]
        identity = torch.eye(labels.affinity.shape[1])[None]
        for row, pairs in (("walk_identity", identity), ("walk_oracle", oracle_affinity(truth, labels.grid))):
            label = walked_cam_labels(labels.cams, pairs, labels.grid, labels.classes, config.labels, at)
            metrics[row].update(label, truth)
        arguments = (item["image"][None], labels.cams, labels.affinity, labels.grid, labels.classes, config.labels)
        metrics["walk_par"].update(walk_labels(*arguments, thresholds=at), truth)
        tokens = token_classes(truth, labels.grid).flatten(1)
        places = torch.cartesian_prod(*(torch.arange(n) for n in labels.grid)).float()
        near = torch.cdist(places, places, p=torch.inf)
        same = (tokens[:, :, None] == tokens[:, None]).long() * (1 + (tokens > 0).long()[:, :, None])
        ignored = (tokens == 255)[:, :, None] | (tokens == 255)[:, None] | (near > config.labels.walk_radius)
        affinity.update(labels.affinity, same.masked_fill(ignored, 255))
    for row in CHECKS:
        assert found.miou[row] == metrics[row].compute()["miou"]
    assert found.affinity == pytest.approx(affinity.compute(), nan_ok=True)


def test_oracle_is_the_affinity_of_the_true_mask() -> None:
    truth = torch.zeros(1, 4, 8, dtype=torch.int64)
    truth[0, :, 4:] = 2
    truth[0, 3, 7] = 255
    assert token_classes(truth, (2, 4)).tolist() == [[[0, 0, 2, 2], [0, 0, 2, 255]]]
    pairs = oracle_affinity(truth, (2, 4))[0]
    labels = [0, 0, 2, 2, 0, 0, 2, 255]
    expected = [[float(i == j or (labels[i] == labels[j] != 255)) for j in range(8)] for i in range(8)]
    assert pairs.tolist() == expected


def test_token_affinity_is_a_row(setting: tuple[AFANet, TaggedDataset, Config]) -> None:
    model, dataset, config = setting
    item = dataset[1]
    labels = LabelMaker.for_evaluation(config).from_images(model, item["image"][None], item["tags"][None])
    assert labels.affinity is not None and labels.grid is not None
    cam = torch.zeros(48, 64)
    height, width = labels.grid
    cam[-(48 // height) :, : 64 // width] = 1  # the token in the bottom left
    (y, x), row = token_affinity(labels, cam)
    assert (y, x) == (1 - 0.5 / height, 0.5 / width)
    assert torch.equal(row.flatten(), labels.affinity[0, (height - 1) * width])
    sample = evaluate(model, dataset, config, progress=False, keep=1).samples[0]
    assert sample["affinity"].shape == labels.grid
    assert all(0 < share < 1 for share in sample["token"])


def test_limit(setting: tuple[AFANet, TaggedDataset, Config]) -> None:
    assert spread(list("abcdefg"), 3) == ["a", "d", "g"]
    assert spread(list("abc"), 5) == list("abc")
    assert spread(list("abc"), 0) == []
    assert spread([], 4) == []
    setting[2].eval.diagnostic_images = 2
    assert diagnose(setting).images == 2
    setting[2].eval.diagnostic_images = 0
    assert evaluate(*setting, progress=False).diagnosis is None
