"""Measurement: the four rows, samples, and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from afa.cam import multi_scale_cam
from afa.config import Config
from afa.data.voc import VOCDataset
from afa.evaluate import ROWS, EvalResult, evaluate, segment
from afa.model import AFANet, build_model, normalize


@pytest.fixture
def setting(tiny_config: Any, voc_root: Path) -> tuple[AFANet, VOCDataset, Config]:
    torch.manual_seed(0)
    config = tiny_config()
    model = build_model(config.model, 3).eval()
    model.classifier.weight.data.normal_()
    model.decoder.predict.weight.data.normal_()
    return model, VOCDataset(voc_root, "val", train=False, with_mask=True), config


def scores(result: EvalResult) -> list[Any]:
    return [getattr(result, row)["confusion"] for row in ROWS] + [result.f1]


def test_rows_and_samples(setting: tuple[AFANet, VOCDataset, Config]) -> None:
    model, dataset, config = setting
    model.train()
    result = evaluate(model, dataset, config, progress=False, keep=3)
    assert model.training, "the mode is put back"
    assert result.images == 4 and result.seconds > 0 and 0 <= result.f1 <= 1
    assert [sample["name"] for sample in result.samples] == ["v0", "v2", "v3"]
    confusion = {row: np.zeros((4, 4), int) for row in ROWS}
    for sample in evaluate(model, dataset, config, progress=False, keep=4).samples:
        assert sample["image"].shape == (48, 64, 3) and sample["image"].dtype == np.uint8
        assert sample["cam"].shape == (48, 64) and sample["cam"].min() >= 0 and sample["cam"].max() <= 1
        allowed = {0, *(1 + dataset.classes.index(tag) for tag in sample["tags"])}
        for row, key in zip(ROWS, ("cam_label", "walk_label", "par_label", "prediction"), strict=True):
            if row != "seg":
                assert set(np.unique(sample[key])) <= allowed, "labels use the image's tags"
            known = sample["truth"] != 255
            np.add.at(confusion[row], (sample["truth"][known], sample[key][known]), 1)
    for row in ROWS:
        assert getattr(result, row)["confusion"] == confusion[row].tolist(), "the kept pictures are those measured"


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 1.5), (0.5,)])
@pytest.mark.parametrize("flip", [False, True])
def test_batch_size_does_not_matter(
    setting: tuple[AFANet, VOCDataset, Config], scales: tuple[float, ...], flip: bool
) -> None:
    model, dataset, config = setting
    config.eval.scales, config.eval.flip = scales, flip
    one = evaluate(model, dataset, config, progress=False)
    config.eval.batch_size = 3
    three = evaluate(model, dataset, config, progress=False)
    for row in ROWS:
        moved = np.abs(np.subtract(getattr(one, row)["confusion"], getattr(three, row)["confusion"])).sum()
        assert moved <= 4, f"{row}: only ties may fall otherwise"
    assert one.f1 == three.f1


def test_segmentation_is_the_largest_of_scales_and_flips(setting: tuple[AFANet, VOCDataset, Config]) -> None:
    model, dataset, config = setting
    config.eval.scales, config.eval.flip = (1.0, 1.5), True
    image = dataset[0]["image"][None]
    size = image.shape[2:]
    parts = []
    with torch.no_grad():
        for scale in (1.0, 1.5):
            x = torch.nn.functional.interpolate(normalize(image), scale_factor=scale, mode="bilinear")
            for mirrored in (False, True):
                y = model(x.flip(3) if mirrored else x).seg_logits
                y = torch.nn.functional.interpolate(y, size=size, mode="bilinear")
                parts.append(y.flip(3) if mirrored else y)
    expected = torch.stack(parts).amax(0)
    torch.testing.assert_close(segment(model, image, config), expected, rtol=1e-4, atol=1e-4)


def test_tags_decide_the_label_rows(setting: tuple[AFANet, VOCDataset, Config]) -> None:
    """Without tags every label row is background; the segmentation row does not look at them."""
    model, dataset, config = setting
    before = evaluate(model, dataset, config, progress=False)
    dataset.tags = torch.zeros_like(dataset.tags)
    after = evaluate(model, dataset, config, progress=False)
    assert scores(after)[3] == scores(before)[3]
    for row in ("cam", "walk", "par"):
        columns = np.array(getattr(after, row)["confusion"]).sum(0)
        assert columns[0] > 0 and (columns[1:] == 0).all()
    assert np.array(before.cam["confusion"])[:, 1:].sum() > 0


def test_cam_row_is_the_multi_scale_cam(setting: tuple[AFANet, VOCDataset, Config]) -> None:
    model, dataset, config = setting
    sample = evaluate(model, dataset, config, progress=False, keep=1).samples[0]
    item = dataset[0]
    with torch.no_grad():
        result = multi_scale_cam(model, normalize(item["image"][None]), item["tags"][None], config.labels.cam_scales)
    np.testing.assert_allclose(sample["cam"], result.cams[0].amax(0).numpy(), rtol=1e-3, atol=1e-4)
    label = torch.cat([torch.full((1, 48, 64), config.labels.cam_threshold), result.cams[0]]).argmax(0)
    assert (label.numpy() != sample["cam_label"]).sum() <= 1
