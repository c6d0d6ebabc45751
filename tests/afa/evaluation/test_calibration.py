"""The background score chosen without masks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from afa.config import Config, LabelConfig
from afa.data.dataset import TaggedDataset
from afa.errors import UserError
from afa.evaluation import calibration
from afa.evaluation.calibration import agreement, background_score, with_background_score
from afa.evaluation.diagnostics import BACKGROUND_SCORES
from afa.labeling.cam import pack_classes
from afa.model import AFANet

Setting = tuple[AFANet, TaggedDataset, Config]
SETTINGS = LabelConfig(par_dilations=(1, 2, 4), par_iterations=10)


def scene(power: float) -> tuple[calibration.CamImage, torch.Tensor]:
    """A disk on a background of another color, and its blurred mask to a power: the larger the power, the narrower the
    CAM and the lower the right background score. Also the true mask [1, H, W]."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    disk = ((y - 32) ** 2 + (x - 32) ** 2 < 14**2).float()
    image = (60 + 120 * disk + 8 * torch.rand(3, 64, 64)).byte()[None]
    blurred = F.avg_pool2d(disk[None, None], 15, stride=1, padding=7)
    cams = (blurred / blurred.max()) ** power
    return (image, cams, pack_classes(torch.tensor([[0.0, 1.0]]))), 2 * disk.long()[None]


@pytest.mark.parametrize("power", [0.6, 1, 2])
def test_labels_agree_best_near_the_best_score(power: float) -> None:
    torch.manual_seed(0)
    images, mask = scene(power)
    scores = agreement([images], 3, SETTINGS)
    assert len(scores) == len(BACKGROUND_SCORES)
    _, cams, _ = images

    def iou(score: float) -> float:
        label, truth = cams[0, 0] > score, mask[0] > 0
        return float((label & truth).sum() / (label | truth).sum())

    chosen = BACKGROUND_SCORES[scores.index(max(scores))]
    best = max(BACKGROUND_SCORES, key=iou)
    assert abs(chosen - best) <= 0.1
    assert iou(chosen) > iou(best) - 0.07
    assert min(map(iou, BACKGROUND_SCORES)) < iou(best) - 0.2, "the choice matters"


def test_reads_no_masks(setting: Setting, voc_root: Path) -> None:
    model, _, config = setting
    train = TaggedDataset(voc_root, "train", train=True, crop_size=32, with_mask=False)
    chosen = background_score(model, train, config)
    assert chosen in BACKGROUND_SCORES
    shutil.rmtree(voc_root / "SegmentationClass")
    train = TaggedDataset(voc_root, "train", train=True, crop_size=32, with_mask=False)
    assert background_score(model, train, config) == chosen


def test_keeps_the_mode_of_the_model_and_the_random_numbers(setting: Setting) -> None:
    model, data, config = setting
    before = torch.get_rng_state()
    for mode in (True, False):
        model.train(mode)
        background_score(model, data, config)
        assert model.training is mode
    assert torch.equal(torch.get_rng_state(), before)


def test_a_number_is_kept(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, config = setting
    assert with_background_score(config, model, data) is config
    config.labels.cam_threshold = "auto"
    monkeypatch.setattr(calibration, "background_score", lambda *_: 0.2)
    found = with_background_score(config, model, data)
    assert found.labels.cam_threshold == 0.2
    assert config.labels.cam_threshold == "auto"
    assert found.labels.low == config.labels.low


def test_damaged_images_are_skipped(setting: Setting) -> None:
    model, data, config = setting
    data.paths[0].write_bytes(b"")
    background_score(model, data, config)
    for path in data.paths:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="needs tagged images"):
        background_score(model, data, config)


def test_images_without_tags_are_not_used(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, config = setting
    data.tags[1:] = 0
    seen: list[int] = []

    def counted(images: Any, *_: Any) -> list[float]:
        seen.append(len(list(images)))
        return [0.0, 1.0] + [0.0] * (len(BACKGROUND_SCORES) - 2)

    monkeypatch.setattr(calibration, "agreement", counted)
    assert background_score(model, data, config) == BACKGROUND_SCORES[1]
    assert seen == [1]
