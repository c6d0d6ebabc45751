"""What `afa app` shows, without its page."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from afa.app.analysis import SOURCES, analyze
from afa.labeling.inference import infer
from afa.labeling.label_maker import LabelMaker
from afa.model import build_model
from tests.afa.conftest import TinyConfig


@pytest.fixture
def photograph() -> Image.Image:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return small.resize((128, 96), Image.Resampling.BICUBIC)


def test_labels_equal_those_of_the_label_maker(tiny_config: TinyConfig, photograph: Image.Image) -> None:
    """With the run's settings, the page shows the labels of evaluation and of training."""
    torch.manual_seed(0)
    config = tiny_config()
    config.labels.cam_threshold = config.labels.walk_threshold = 0.3
    config.labels.walk_scale, config.labels.walk_radius = 1.5, 2
    model = build_model(config.model, 3).eval()
    found = analyze(model, config, photograph, 512)
    assert found.labels.shape == (96, 128)
    pixels = torch.from_numpy(np.asarray(photograph).copy()).permute(2, 0, 1)[None]
    tags = torch.tensor([[1, 0, 1]])
    evaluation = LabelMaker.for_evaluation(config).from_images(model, pixels, tags)
    training = LabelMaker.for_training(config, ignore=False).from_images(model, pixels, tags, {"walk"})
    expected = {**evaluation.maps, "walk_par": training.maps["walk"]}
    for source in SOURCES:
        label = found.pseudo_label([0, 2], config, source, 0.3, config.labels.par_iterations)
        np.testing.assert_array_equal(label, expected[source][0].numpy(), err_msg=source)
    assert set(np.unique(label)) <= {0, 1, 3}
    np.testing.assert_array_equal(found.labels, evaluation.maps["seg"][0].numpy())
    scores = infer(model, pixels, config, {"class"}).outputs.class_logits
    assert scores is not None
    np.testing.assert_allclose(found.probabilities, scores[0].sigmoid(), atol=1e-6)


def test_settings_change_the_label(tiny_config: TinyConfig, photograph: Image.Image) -> None:
    torch.manual_seed(0)
    config = tiny_config()
    found = analyze(build_model(config.model, 3).eval(), config, photograph, 512)

    def share(background: float) -> float:
        return float((found.pseudo_label([1], config, "par", background, 3) > 0).mean())

    assert share(0.05) > share(0.5) > share(0.95)
    few, many = (found.pseudo_label([1], config, "par", 0.4, iterations) for iterations in (0, 20))
    assert (few != many).any()


def test_large_photographs(tiny_config: TinyConfig, photograph: Image.Image) -> None:
    config = tiny_config()
    found = analyze(build_model(config.model, 3).eval(), config, photograph.resize((640, 480)), 128)
    assert found.picture.shape == (96, 128, 3)
    assert found.labels.shape == (480, 640)
    tags = [0, 1]
    for maps in (found.cams(tags), found.walked(tags, config, 0.4)):
        assert list(maps) == tags
        assert all(picture.shape == (96, 128, 3) for picture in maps.values())
