"""The VOC and COCO recipes have the published values, and docs/recipe.md names settings that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from afa.config import Config, EvalConfig, load_config, to_dict, with_overrides

PAGE = (Path(__file__).parents[3] / "docs" / "recipe.md").read_text(encoding="utf-8")
VOC = {
    "data.crop_size": 512,
    "data.scale_range": [0.5, 2.0],
    "data.flip": True,
    "model.output_stride": 16,
    "model.decoder": "mlp",
    "model.decoder_width": 256,
    "model.pooling": "max",
    "model.refine_iterations": 0,
    "model.backbone_args": {"drop_path_rate": 0.1},
    "labels.cam_scales": [1.0, 0.5, 1.5],
    "labels.low": 0.35,
    "labels.high": 0.55,
    "labels.cam_threshold": 0.45,
    "labels.walk_threshold": 0.35,
    "labels.walk_scale": 1.0,
    "labels.walk_radius": 8,
    "labels.walk_power": 2,
    "labels.walk_steps": 1,
    "labels.walk_eps": 0.1,
    "labels.par_dilations": [1, 2, 4, 8, 12, 24],
    "labels.par_iterations": 10,
    "labels.par_downscale": 2,
    "labels.walk_par_iterations": None,
    "labels.affinity_from_walk": False,
    "train.iterations": 20000,
    "train.batch_size": 4,
    "train.classify_until": 2000,
    "train.par_until": 6000,
    "train.weight_seg": 0.1,
    "train.weight_affinity": 0.1,
    "train.lr": 6e-5,
    "train.head_lr_factor": 10.0,
    "train.norm_lr_factor": 0.0,
    "train.weight_decay": 0.01,
    "train.betas": [0.9, 0.999],
    "train.warmup": 1500,
    "train.warmup_ratio": 1e-6,
    "train.poly_power": 1.0,
    "train.keep_best": None,
    "train.ema": 0.0,
    "train.clip_grad": 0.0,
    "eval.fusion": "max",
    "eval.crf_preset": "afa",
    "eval.crf_iterations": None,
    "eval.crf_gaussian": None,
    "eval.crf_bilateral": None,
}
COCO = {
    **VOC,
    "labels.par_iterations": 15,
    "labels.affinity_from_walk": True,
    "train.iterations": 80000,
    "train.batch_size": 8,
    "train.classify_until": 5000,
    "train.par_until": 15000,
}


@pytest.mark.parametrize(("name", "published"), [("voc", VOC), ("coco", COCO)])
def test_published_values(name: str, published: dict[str, object]) -> None:
    content = to_dict(load_config(name))
    found = {key: content[key.split(".")[0]][key.split(".")[1]] for key in published}
    assert found == published


def test_settings_of_the_page_exist() -> None:
    config = to_dict(Config())
    named = re.findall(r"`(data|model|labels|train|eval)\.(\w+)", PAGE)
    assert len(named) > 30
    for section, name in named:
        assert name in config[section], f"{section}.{name}"


def test_the_multi_scale_test_of_the_page_is_the_published_one() -> None:
    line = next(line for line in PAGE.splitlines() if line.startswith("| multi-scale test"))
    overrides = line.split("`")[1].split()
    evaluation = with_overrides(load_config("voc"), overrides).eval
    expected = EvalConfig(longer_side=512, scales=(1.0, 0.5, 0.75), flip=True, crf=True)
    assert evaluation == expected.model_copy(update={"batch_size": evaluation.batch_size})


def test_demo_walks_with_its_largest_scale() -> None:
    labels = load_config("demo").labels
    assert labels.walk_scale == max(labels.cam_scales)
