"""`afa export`: programs that give the model's scores without this package, and model folders that are runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from afa.commands.cli import main
from afa.model import build_model, load_model, save_model
from afa.model.export import Exporter
from afa.run import MODEL
from tests.afa.conftest import TinyConfig

ROOT = Path(__file__).resolve().parents[3]
CLASSES = ["square", "disc", "stripes"]
PLAIN = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_args": {"img_size": 96, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "decoder": "single",
}


def make_run(folder: Path, tiny_config: TinyConfig, **model: Any) -> Path:
    """A run with random weights and without scores."""
    torch.manual_seed(0)
    config = tiny_config(**model)
    folder.mkdir()
    network = build_model(config.model, len(CLASSES))
    torch.nn.init.normal_(network.decoder.get_parameter("predict.weight"))  # scores that differ from pixel to pixel
    save_model(folder / MODEL, network, config, CLASSES)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [{}, {"refine_iterations": 2, "refine_dilations": (1, 2)}, PLAIN], ids=["pyramid", "with PAR", "plain"]
)
def test_onnx_file_has_the_models_scores(
    model: dict[str, Any], tiny_config: TinyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", tiny_config, **model)
    assert main(["export", str(run), "--to", "onnx"]) == 0
    assert "opset 20" in capsys.readouterr().out

    picture = np.random.default_rng(0).integers(0, 256, (80, 112, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    example = ROOT / "examples/onnx_predict.py"
    command = [sys.executable, str(example), str(run / "model.onnx"), "photo.png", "mask.png"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    mask = np.asarray(Image.open(tmp_path / "mask.png"))
    network, *_ = load_model(run)
    image = torch.from_numpy(picture.transpose(2, 0, 1)[None].copy())
    with torch.no_grad():
        scores = network(network.normalize(image)).seg_logits
        expected = torch.nn.functional.interpolate(scores, size=mask.shape, mode="bilinear").argmax(1)[0].numpy()
    assert (mask == expected).mean() > 0.999
    names = ["background", *CLASSES]
    assert shown.strip() == ", ".join(names[index] for index in np.unique(mask))
    assert len(np.unique(mask)) > 1


def test_the_file_names_the_size_of_the_segmentation(tiny_config: TinyConfig) -> None:
    model = build_model(tiny_config().model, len(CLASSES))
    assert Exporter(model, CLASSES, longer_side=160).metadata()["longer_side"] == "160"
    assert "longer_side" not in Exporter(model, CLASSES).metadata()


@pytest.mark.slow
def test_torch_program_runs_without_this_package(tiny_config: TinyConfig, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_config, refine_iterations=2, refine_dilations=(1, 2))
    assert main(["export", str(run), "--to", "torch-export", "--out", str(tmp_path / "model.pt2")]) == 0
    code = """
import json, sys, torch
about = {"afa.json": ""}
program = torch.export.load("model.pt2", extra_files=about).module()
scores, tags = program(torch.zeros(3, 3, 70, 99, dtype=torch.uint8))
print(json.loads(about["afa.json"])["classes"], tuple(scores.shape), tuple(tags.shape), "afa_ext" in sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == '["background", "square", "disc", "stripes"] (3, 4, 70, 99) (3, 3) False'


def test_model_folder_is_a_run(tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", tiny_config)
    folder = tmp_path / "shared"
    assert main(["export", str(run), "--to", "huggingface", "--out", str(folder)]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "background", "1": "square", "2": "disc", "3": "stripes"}
    images = json.loads((folder / "preprocessor_config.json").read_text())
    assert images["image_mean"] == [0.485, 0.456, 0.406]
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "image-segmentation"
    assert "Not evaluated" in card

    Image.new("RGB", (70, 50), (9, 90, 200)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "shared", "photo.png", "--quiet", "--device", "cpu"]) == 0
    assert (tmp_path / "predictions/masks/photo.png").is_file()


def test_model_of_the_hub(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for the download; it gets the repository, the revision and the files to fetch."""
    import huggingface_hub

    run = make_run(tmp_path / "run", tiny_config)
    asked = []

    def snapshot(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        if repository == "me/missing":
            raise OSError("404 Client Error")
        return str(run)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (70, 50), (9, 90, 200)).save(tmp_path / "photo.png")
    assert main(["predict", "hf://me/demo@v1", "photo.png", "--quiet", "--device", "cpu"]) == 0
    assert load_model("hf://me/demo")[1] == CLASSES
    assert asked == [("me/demo", revision, ["model.safetensors", "config.yaml"]) for revision in ("v1", None)]
    capsys.readouterr()
    for name, reason in (("hf://me/missing", "404 Client Error"), ("hf://demo", "not the name of a model")):
        assert main(["predict", name, "photo.png", "--quiet"]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["run", "--to", "onxx"], "did you mean 'onnx'"),
        (["elsewhere", "--to", "onnx"], "no such run"),
        (["run", "--to", "huggingface", "--out", "."], "other files"),
    ],
)
def test_errors(
    arguments: list[str],
    reason: str,
    tiny_config: TinyConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run(tmp_path / "run", tiny_config)
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) == 2
    assert reason in capsys.readouterr().err
