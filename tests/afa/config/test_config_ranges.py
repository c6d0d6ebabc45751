"""Values outside a setting's range, which would silently change the run, and unusual keys that YAML allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from afa.config import load_config
from afa.errors import UserError


@pytest.mark.parametrize("seed", ["9223372036854775808", "99999999999999999999", "-1"])
def test_seed_out_of_range(seed: str) -> None:
    with pytest.raises(UserError, match=r"train\.seed"):
        load_config("voc", [f"train.seed={seed}"])


def test_largest_seed() -> None:
    assert load_config("voc", ["train.seed=9223372036854775807"]).train.seed == 2**63 - 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.iterations=2000"], ["train.classify_until (2000)", "the decoder trains only after it", "got 2000"]),
        (["train.iterations=100"], ["train.classify_until (2000)", "got 100"]),
        (["train.warmup=20000"], ["below train.iterations (20000)", "got 20000"]),
        (["train.lr=0"], ["above 0 and at most 1", "got 0"]),
        (["train.lr=1.001"], ["above 0 and at most 1", "got 1.001"]),
        (["train.lr=1e30"], ["above 0 and at most 1", "got '1e30'"]),
        (["train.warmup_ratio=-1"], ["from 0 to 1", "got -1"]),
        (["train.warmup_ratio=1.001"], ["from 0 to 1", "got 1.001"]),
        (["labels.cam_scales=0,1"], ["above 0 and at most 8", "got '0,1'"]),
        (["labels.cam_scales=1,8.1"], ["above 0 and at most 8", "got '1,8.1'"]),
        (["labels.walk_scale=0"], ["above 0 and at most 8", "got 0"]),
        (["eval.scales=-1"], ["above 0 and at most 8", "got -1"]),
        (["eval.scales=1,1000"], ["above 0 and at most 8", "got '1,1000'"]),
        (["data.scale_range=0,1"], ["above 0 and at most 16", "got '0,1'"]),
        (["data.scale_range=0.5,1e9"], ["above 0 and at most 16", "got '0.5,1e9'"]),
        (["data.scale_range=2,1"], ["0 < smallest <= largest <= 16", "got [2.0, 1.0]"]),
        (["data.workers=257"], ["to 256", "got 257"]),
        (["data.crop_size=4112"], ["to 4096", "got 4112"]),
        (["data.crop_size=4095", "model.output_stride=14"], ["multiple of model.output_stride (14)", "such as 4088,"]),
        (["train.batch_size=65537"], ["to 65536", "got 65537"]),
        (["model.decoder_width=8193"], ["from 1 to 8192", "got 8193"]),
        (["model.decoder_width=0"], ["from 1 to 8192", "got 0"]),
        (["eval.crf_preset=tocco"], ["afa, toco, dupl", "did you mean 'toco'"]),
        (["eval.crf_gaussian=0.4,3"], ["deviations of at least 0.5", "got [0.4, 3.0]"]),
        (["eval.crf_bilateral=80,13,-1"], ["a weight of 0 or more", "got [80.0, 13.0, -1.0]"]),
        (["eval.crf_bilateral=80,13"], ["a list of 3 numbers or null", "got '80,13'"]),
    ],
)
def test_out_of_range(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config("voc", overrides)
    message = str(caught.value)
    assert f"{overrides[0].partition('=')[0]} on the command line must be " in message
    for word in words:
        assert word in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "override",
    [
        "train.iterations=2001",
        "train.warmup=19999",
        "train.lr=1",
        "train.warmup_ratio=1",
        "labels.cam_scales=0.001,8",
        "eval.scales=0.001,8",
        "data.scale_range=0.001,16",
        "data.workers=256",
        "data.crop_size=4096",
        "train.batch_size=65536",
        "model.decoder_width=8192",
        "train.par_until=20000",
        "eval.crf_gaussian=0.5,0",
        "eval.crf_bilateral=null",
    ],
)
def test_largest_and_smallest_values(override: str) -> None:
    load_config("voc", [override])


def test_smoke_run_of_the_makefile() -> None:
    lines = (Path(__file__).parents[3] / "Makefile").read_text(encoding="utf-8").splitlines()
    (command,) = [line for line in lines if "afa train" in line and "train.iterations=" in line]
    config = load_config("demo", [word for word in command.split() if "=" in word])
    assert config.train.iterations < 100


def test_merge_keys(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path, "eval: {<<: {flip: true, batch_size: 3}, batch_size: 2}\n"))
    assert config.eval.flip and config.eval.batch_size == 2
    with pytest.raises(UserError, match="flip"):
        load_config(_write(tmp_path, "eval: {flip: true, flip: false}\n"))


@pytest.mark.parametrize(
    "text",
    ["? [a, b]\n: 1\n", "? {a: b}\n: 1\n", "1: 2\n", "null: {}\n", "on: {}\n", "train: {on: 1}\n", "train: {1.5: 1}\n"],
)
def test_unusual_keys_give_a_one_line_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(_write(tmp_path, text))
    assert "\n" not in str(caught.value)


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path
