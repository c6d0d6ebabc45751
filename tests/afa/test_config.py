from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from afa.config import Config, from_dict, load_config, ready_names, resolve, to_yaml, validate
from afa.errors import UserError


def test_defaults_are_the_published_recipe_of_voc() -> None:
    config = load_config("voc")
    assert (config.train.iterations, config.train.classify_until, config.train.par_until) == (
        20000,
        2000,
        6000,
    )
    assert (config.data.crop_size, config.train.batch_size, config.train.lr) == (512, 4, 6e-5)
    assert (config.labels.low, config.labels.high, config.labels.walk_eps) == (0.35, 0.55, 0.1)
    assert config.labels.par_dilations == (1, 2, 4, 8, 12, 24)


def test_coco_differs_where_the_published_recipe_does() -> None:
    config = load_config("coco")
    assert (config.train.iterations, config.train.classify_until, config.train.par_until) == (
        80000,
        5000,
        15000,
    )
    assert config.labels.par_iterations == 15
    assert config.labels.affinity_from_walk


@pytest.mark.parametrize("name", ready_names())
def test_ready_files_load_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(config))
    assert load_config(written) == config
    assert load_config(tmp_path) == config  # the folder of a run holds its config.yaml


def test_ready_names_and_paths_resolve(tmp_path: Path) -> None:
    assert {"voc", "coco", "vit_b", "demo"} <= set(ready_names())
    assert resolve("voc").name == "voc.yaml"
    own = tmp_path / "mine.yaml"
    own.write_text("train: {iterations: 2007}\n")
    assert load_config(str(own)).train.iterations == 2007
    with pytest.raises(UserError, match=r"no configuration 'vocc'.*coco.*did you mean 'voc'"):
        resolve("vocc")


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("train.iterations=2001", "train", "iterations", 2001),
        ("train.iterations=2e4", "train", "iterations", 20000),
        ("train.lr=6e-5", "train", "lr", 6e-5),
        ("train.lr=1", "train", "lr", 1.0),
        ("data.flip=false", "data", "flip", False),
        ("data.root=2012", "data", "root", "2012"),
        ("data.root=a=b", "data", "root", "a=b"),
        ("model.weights=null", "model", "weights", None),
        ("model.attention_blocks=none", "model", "attention_blocks", None),
        ("model.attention_blocks=2", "model", "attention_blocks", 2),
        ("labels.cam_scales=1,0.5", "labels", "cam_scales", (1.0, 0.5)),
        ("labels.cam_scales=[1, 0.5]", "labels", "cam_scales", (1.0, 0.5)),
        ("eval.scales=1", "eval", "scales", (1.0,)),
        ("data.scale_range=0.5,1", "data", "scale_range", (0.5, 1.0)),
        ("model.backbone_args={depths: [1, 1]}", "model", "backbone_args", {"depths": [1, 1]}),
        ("model.backbone_args.depths=[1, 1]", "model", "backbone_args", {"depths": [1, 1]}),
    ],
)
def test_overrides_take_the_type_of_the_field(override: str, section: str, name: str, value: object) -> None:
    found = getattr(getattr(load_config("voc", [override]), section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.iteration=1", ["unknown", "'train.iteration'", "'train.iterations'"]),
        ("iterations=1", ["unknown", "'train.iterations'"]),
        ("data.lr=1", ["unknown", "'data.lr'", "'train.lr'"]),
        ("trian.lr=1", ["unknown", "'trian.lr'", "'train.lr'"]),
        ("train.zzzzzz=1", ["unknown", "'train.zzzzzz'", "iterations"]),
        ("nowhere.zz=1", ["unknown", "sections are data, model"]),
        ("train.lr.x=1", ["unknown", "'train.lr.x'"]),
        ("train=1", ["section", "train.iterations"]),
        ("train.iterations", ["no override", "section.key=value"]),
        ("train.iterations=1.5", ["train.iterations", "a whole number", "1.5"]),
        ("train.iterations=true", ["train.iterations", "a whole number", "True"]),
        ("train.lr=fast", ["train.lr", "a number", "'fast'"]),
        ("train.lr=nan", ["train.lr", "a number"]),
        ("data.flip=2", ["data.flip", "true or false", "2"]),
        ("data.scale_range=1,2,3", ["data.scale_range", "a list of 2 numbers"]),
        ("labels.par_dilations=1,x", ["labels.par_dilations", "a list of whole numbers"]),
        ("model.attention_blocks=few", ["model.attention_blocks", "a whole number or null"]),
        ("model.backbone_args=3", ["model.backbone_args", "mapping"]),
        ("data.crop_size=100", ["data.crop_size", "multiple of model.output_stride (16)", "96", "got 100"]),
        ("data.scale_range=2,1", ["data.scale_range", "smallest <= largest"]),
        ("model.decoder=mpl", ["model.decoder", "mlp, single", "did you mean 'mlp'"]),
        ("model.pooling=avg", ["model.pooling", "max, mean"]),
        ("model.refine_iterations=-1", ["model.refine_iterations", "0 or more"]),
        ("model.refine_dilations=0", ["model.refine_dilations", "at least 1"]),
        ("model.refine_downscale=0", ["model.refine_downscale", "at least 1"]),
        ("labels.high=1.2", ["labels.high", "between 0 and 1", "1.2"]),
        ("labels.low=0.9", ["labels.low", "labels.high"]),
        ("labels.par_dilations=0", ["labels.par_dilations", "at least 1"]),
        ("labels.cam_scales=[]", ["labels.cam_scales", "above 0"]),
        ("train.batch_size=0", ["train.batch_size", "at least 1", "0"]),
        ("train.par_until=5", ["train.par_until", "train.classify_until (2000)"]),
        ("train.precision=fp8", ["train.precision", "fp32, bf16"]),
        ("train.betas=0.9,1", ["train.betas"]),
        ("train.seed=-1", ["train.seed", "0 or more"]),
        ("data.workers=-1", ["data.workers"]),
    ],
)
def test_a_wrong_override_is_named(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config("voc", [override])
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {iteratons: 5}", ["unknown", "train.iteratons", "train.iterations", "own.yaml"]),
        ("trian: {iterations: 5}", ["unknown", "'trian'", "'train'", "own.yaml"]),
        ("train: {lr: fast}", ["train.lr", "own.yaml", "a number", "'fast'"]),
        ("train: 5", ["'train'", "own.yaml", "section"]),
        ("- a\n- b", ["own.yaml", "sections"]),
        ("train:\n  lr: [1", ["own.yaml", "not valid YAML", "line"]),
        ("train:\n  lr: 1\n  lr: 2\n", ["own.yaml", "line 3", "'lr' stands twice"]),
        ("data: {root: 12}", ["data.root", "text", "12"]),
    ],
)
def test_a_wrong_file_is_named(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("")
    assert load_config(path) == Config()
    path.write_text("train:\n")
    assert load_config(path) == Config()


def test_every_default_is_valid_and_plain_yaml() -> None:
    validate(Config())
    assert from_dict(yaml.safe_load(to_yaml(Config()))) == Config()
