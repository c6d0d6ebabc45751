from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import afa_ext
from afa.config import (
    Config,
    from_dict,
    json_schema,
    load_config,
    ready_names,
    resolve,
    to_dict,
    to_yaml,
    validate,
    with_overrides,
)
from afa.config.schema import PAR_DILATIONS
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
    assert PAR_DILATIONS == afa_ext.par.DILATIONS, "stated twice, as the configuration is read without torch"


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
    assert load_config(tmp_path) == config  # a run's folder contains its config.yaml


def test_ready_names_and_paths_resolve(tmp_path: Path) -> None:
    assert {"voc", "coco", "vit_b", "demo"} <= set(ready_names())
    assert resolve("voc").name == "voc.yaml"
    own = tmp_path / "mine.yaml"
    own.write_text("train: {iterations: 2007}\n")
    assert load_config(str(own)).train.iterations == 2007
    with pytest.raises(UserError, match=r"no such configuration: 'vocc'.*coco.*did you mean 'voc'"):
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
        ("model.backbone_args.depths=[1, 1]", "model", "backbone_args", {"drop_path_rate": 0.1, "depths": [1, 1]}),
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
        ("train.iterations", ["invalid override", "section.key=value"]),
        ("train.iterations=1.5", ["train.iterations", "a whole number", "1.5"]),
        ("train.iterations=true", ["train.iterations", "a whole number", "True"]),
        ("train.lr=fast", ["train.lr", "a number", "'fast'"]),
        ("train.lr=nan", ["train.lr", "a number"]),
        ("data.flip=2", ["data.flip", "true or false", "2"]),
        ("data.scale_range=1,2,3", ["data.scale_range", "a list of 2 numbers"]),
        ("labels.par_dilations=1,x", ["labels.par_dilations", "a list of whole numbers"]),
        ("model.freeze=some", ["model.freeze", "a whole number of 0 or more or 'all'"]),
        ("model.attention_blocks=few", ["model.attention_blocks", "a whole number of at least 1 or null"]),
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
        ("train.batch_size=0", ["train.batch_size", "from 1 to 65536", "got 0"]),
        ("train.par_until=5", ["train.par_until", "train.classify_until (2000)"]),
        ("train.precision=fp8", ["train.precision", "fp32, tf32, bf16"]),
        ("train.betas=0.9,1", ["train.betas"]),
        ("train.seed=-1", ["train.seed", "from 0 to 9223372036854775807"]),
        ("data.workers=-1", ["data.workers"]),
    ],
)
def test_an_invalid_override_is_reported(override: str, words: list[str]) -> None:
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
        ("train:\n  lr: 1\n  lr: 2\n", ["own.yaml", "line 3", "duplicate key 'lr'"]),
        ("data: {root: 12}", ["data.root", "text", "12"]),
    ],
)
def test_an_invalid_file_is_reported(text: str, words: list[str], tmp_path: Path) -> None:
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


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("train: {lr: fast, iteratons: 5}\ndata: {flip: 2}\n")
    with pytest.raises(UserError) as caught:
        load_config(path, ["labels.walk_radius=99", "labels.low", "nowhere.x=1"])
    text = str(caught.value)
    assert text.startswith("6 settings are wrong: ")
    for part in (
        f"train.lr in {path} must be a number above 0 and at most 1, got 'fast'",
        f"'train.iteratons' in {path}; did you mean 'train.iterations'?",
        f"data.flip in {path} must be true or false, got 2",
        "labels.walk_radius on the command line must be a whole number from 1 to 63, got 99",
        "invalid override 'labels.low'",
        "'nowhere.x' on the command line",
    ):
        assert part in text


def test_settings_that_do_not_fit_each_other_are_reported_at_once() -> None:
    with pytest.raises(UserError) as caught:
        load_config("voc", ["data.crop_size=100", "train.par_until=5", "eval.crf_gaussian=0,1"])
    text = str(caught.value)
    assert "data.crop_size" in text and "train.par_until" in text and "eval.crf_gaussian" in text


def test_files_of_older_versions_load(tmp_path: Path) -> None:
    written = tmp_path / "old.yaml"
    written.write_text("eval: {crf: true, crf_workers: 4, crf_iterations: 5}\n")
    assert load_config(written) == with_overrides(Config(), ["eval.crf=true", "eval.crf_iterations=5"])
    with pytest.raises(UserError, match=r"unknown configuration key 'eval.crf_workers' on the command line"):
        load_config(written, ["eval.crf_workers=4"])


def test_a_changed_config_is_checked() -> None:
    config = Config()
    config.train.lr = -1
    with pytest.raises(UserError, match=r"train\.lr in the configuration must be a number above 0"):
        validate(config)


def test_with_overrides_leaves_the_original_alone() -> None:
    config = load_config("voc")
    changed = with_overrides(config, ["model.backbone_args.depths=[1, 1]", "eval.scales=1,0.5"])
    assert changed.model.backbone_args["depths"] == [1, 1] and changed.eval.scales == (1.0, 0.5)
    assert config == load_config("voc")


def test_every_key_has_a_description_and_a_type_in_the_schema() -> None:
    schema = json.loads(json_schema())
    for section, values in to_dict(Config()).items():
        properties = schema["$defs"][f"{section.removesuffix('s').capitalize()}Config"]["properties"]
        assert properties.keys() == values.keys()
        for name, field in properties.items():
            assert field["description"], f"{section}.{name}"
            assert "\n" not in field["description"]
            assert "type" in field or "anyOf" in field
    assert schema["$defs"]["LabelConfig"]["properties"]["walk_radius"]["maximum"] == 63


def test_notes_report_unlikely_settings() -> None:
    assert load_config("voc").notes() == []
    assert load_config("demo").notes() == []
    (note,) = load_config("voc", ["data.crop_size=128"]).notes()
    assert "labels.walk_radius=8" in note and "8 x 8 tokens" in note and note.endswith("here 2")
    (note,) = load_config("voc", ["train.iterations=2001"]).notes()
    assert "no iteration trains the decoder" in note
