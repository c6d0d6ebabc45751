from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from afa.commands.cli import main
from afa.config import from_dict, load_config, ready_names
from afa.data import TaggedDataset
from afa.model import Backbone

MakeTree = Callable[..., Path]

SMALL = """\
data: {{root: {root}, crop_size: 32, workers: 0}}
model:
  backbone: pvt_v2_b0
  weights: null
  decoder_width: 16
  backbone_args: {{depths: [1, 1, 1, 1], embed_dims: [8, 16, 40, 64]}}
labels: {{cam_scales: [1], par_iterations: 1, walk_radius: 1}}
train: {{tensorboard: false, iterations: 3, classify_until: 0, par_until: 1, batch_size: 2, log_every: 1, warmup: 1}}
eval: {{report_images: 2}}
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With networks this small, several threads only slow each other down, especially on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(voc_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """small.yaml for the tiny tree, in a separate working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.format(root=voc_root))
    return path


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must fail as bad input."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("afa: error: ")
    return lines[0]


@pytest.mark.parametrize(("par_until", "notes"), [(1, 0), (2, 1), (4, 1)])
@pytest.mark.slow
def test_note_without_a_walk_phase(par_until: int, notes: int, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(small), f"train.par_until={par_until}", "--quiet", "--device=cpu"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "no walk phase" in line]
    assert len(lines) == notes
    for line in lines:
        assert line.startswith("note ")
        assert f"train.par_until ({par_until})" in line and "train.iterations (3)" in line


def test_background_score_is_chosen_from_training_images(
    small: Path, voc_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = "labels.cam_threshold=auto"
    assert main(["train", "small.yaml", auto, "--quiet", "--device", "cpu", "train.eval_every=2"]) == 0
    run = tmp_path / "runs/small"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("score")]
    scores = json.loads((run / "metrics.json").read_text())
    assert "cam_threshold: auto" in (run / "config.yaml").read_text()
    chosen = line.split(": ")[1].split(",")[0]
    for setting in (auto, f"labels.cam_threshold={chosen}"):
        assert main(["evaluate", str(run), setting, "--quiet", "--device", "cpu"]) == 0
        again = json.loads((run / "metrics.json").read_text())
        assert [again[f"{row}_miou"] for row in ("cam", "par")] == [scores[f"{row}_miou"] for row in ("cam", "par")]
    assert main(["pseudo-labels", str(run), "--source", "par", "--no-ignore", "--out", "labels", "--device=cpu"]) == 0
    thresholds = json.loads((tmp_path / "labels/labels.json").read_text())["thresholds"][0]
    assert thresholds[0] == thresholds[1] == float(chosen)
    assert "afa: error" not in capsys.readouterr().err


def test_train_evaluate_report_predict(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Options may stand between the overrides.
    assert main(["train", "small.yaml", "train.lr=1e-4", "--quiet", "train.seed=3", "--device", "cpu"]) == 0
    run = tmp_path / "runs/small"
    shown = capsys.readouterr().out
    assert {path.name for path in run.iterdir() if path.name[0] != "."} == {
        "checkpoints",
        "config.yaml",
        "confusion.csv",
        "images.csv",
        "log.jsonl",
        "metrics.csv",
        "metrics.json",
        "model.safetensors",
        "report.html",
        "samples.npz",
        "snapshots",
    }
    assert [path.stem for path in sorted((run / "snapshots").iterdir())] == ["00000001", "00000002", "00000003"]
    assert "lr: 0.0001" in (run / "config.yaml").read_text()
    metrics = json.loads((run / "metrics.json").read_text())
    for row, name in (("cam", "CAM"), ("walk", "walk"), ("par", "PAR label"), ("seg", "segmentation")):
        assert 0 <= metrics[f"{row}_miou"] <= 1
        assert any(line.startswith(name) and f"{metrics[f'{row}_miou']:.3f}" in line for line in shown.splitlines())
    assert 0 < metrics["eval_seconds"] < metrics["train_seconds"] + metrics["eval_seconds"] <= metrics["seconds"]
    assert metrics["classes"] == ["background", "square", "disc", "stripes"]
    assert metrics["config"] == "small"
    assert metrics["environment"]["device"] == "cpu"

    assert main(["evaluate", str(run), "eval.report_images=1", "--quiet", "--device", "cpu"]) == 0
    again = json.loads((run / "metrics.json").read_text())
    assert again["seg_miou"] == pytest.approx(metrics["seg_miou"], abs=1e-6)
    assert again["seconds"] == metrics["seconds"]  # still what the whole run took

    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.partition("<h2>Examples")[2].count("<img") == 7
    grown = page.partition("<h2>How the labels develop")[2].partition("<h2>")[0]
    assert grown.count("<img") == 4 * (1 + 3 * 4 - 2), (
        "four images at the ends of three phases; two pictures come later"
    )

    pictures = tmp_path / "pictures"
    (pictures / "deep").mkdir(parents=True)
    Image.new("L", (70, 41), 90).save(pictures / "deep/gray.png")
    Image.new("RGBA", (33, 50), (10, 200, 30, 128)).save(pictures / "clear.png")
    (pictures / "notes.txt").write_text("no picture")
    photo = tmp_path / "voc/JPEGImages/v0.jpg"
    pattern = str(tmp_path / "voc/JPEGImages/t[01].jpg")
    capsys.readouterr()
    arguments = ["predict", str(run), str(photo), "--out", "out", str(pictures), pattern]
    assert main([*arguments, "--quiet", "--device", "cpu", "--largest-side", "64"]) == 0
    shown = capsys.readouterr().out
    names = {"v0", "clear", "deep/gray", "t0", "t1"}
    for folder in ("masks", "overlays", "cams"):
        found = {
            path.relative_to(tmp_path / "out" / folder).with_suffix("").as_posix()
            for path in (tmp_path / "out" / folder).rglob("*.png")
        }
        assert found == names
    mask = Image.open(tmp_path / "out/masks/deep/gray.png")
    assert (mask.mode, mask.size) == ("P", (70, 41))
    assert np.asarray(mask).max() <= 3
    assert all(name in shown for name in names)


@pytest.mark.slow
def test_stop_and_resume(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from afa.training.step import TrainStep

    step = TrainStep.update

    def stopped(train_step: TrainStep, batch: dict[str, Any], iteration: int) -> object:
        if iteration == 2:
            raise KeyboardInterrupt
        return step(train_step, batch, iteration)

    options = ["--quiet", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "update", stopped)
        assert main(["train", "small.yaml", "train.checkpoint_every=1", *options]) == 130
    shown = capsys.readouterr()
    assert "afa train runs/small --resume" in shown.out
    assert shown.err == "afa: interrupted\n"
    run = tmp_path / "runs/small"
    assert not (run / "metrics.json").exists()
    assert not (run / "model.safetensors").exists()
    assert main(["train", "runs/small", "--resume", *options]) == 0
    logged = [json.loads(line)["iteration"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert logged == [1, 2, 3]
    assert (run / "metrics.json").is_file()
    capsys.readouterr()
    model = (tmp_path / "runs/small/model.safetensors").read_bytes()
    assert main(["train", "runs/small", "--resume", *options]) == 0
    assert "finished runs/small is already trained" in capsys.readouterr().out
    assert (tmp_path / "runs/small/model.safetensors").read_bytes() == model


def test_data_without_masks_trains_and_evaluates_the_classifier(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "voc/SegmentationClass").iterdir():
        path.unlink()
    assert main(["train", "small.yaml", "--quiet", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "the split 'val' has no masks in" in shown
    run = tmp_path / "runs/small"
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"tag F1 {metrics['classification_f1']:.3f} on 4 images" in shown
    assert metrics["seg_miou"] is None
    assert (run / "report.html").is_file()
    assert main(["evaluate", str(run), "--quiet", "--device", "cpu"]) == 0


def test_bad_input_is_one_line_and_leaves_no_run(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ("train", "small.yaml", "--quiet", "--device", "cpu")
    assert "'train.iterations'" in _error(capsys, *train, "train.iteration=3")
    assert "section.key=value" in _error(capsys, *train, "iterations")
    line = _error(capsys, *train, "data.root=nowhere")
    assert "nowhere" in line
    assert "data.embedded=true" in line
    assert "trian.txt" in _error(capsys, *train, "data.train_split=trian")
    line = _error(capsys, *train, "model.backbone=resnet18", "model.backbone_args={}")
    assert "resnet18" in line
    assert "attention" in line
    assert "pvt_v2_b9" in _error(capsys, *train, "model.backbone=pvt_v2_b9", "model.backbone_args={}")
    assert "lost.safetensors" in _error(capsys, *train, "model.weights=lost.safetensors")
    assert "'gpu'" in _error(capsys, "train", "small.yaml", "--device", "gpu")
    (tmp_path / "voc/SegmentationClass/v2.png").write_bytes(b"garbage")
    assert "v2.png" in _error(capsys, *train)
    (tmp_path / "voc/JPEGImages/t4.jpg").write_bytes(b"garbage")
    assert "t4.jpg" in _error(capsys, *train)
    assert "small.yaml is a file" in _error(capsys, *train, "--run", "small.yaml")
    assert not (tmp_path / "runs").exists()


def test_bad_input_of_the_other_commands(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'train'" in _error(capsys, "trian", "demo")
    assert "did you mean 'voc'" in _error(capsys, "train", "vco")
    for command in (("evaluate", "runs/no"), ("predict", "runs/no", "x.jpg"), ("report", "runs/no")):
        assert "no such run: runs/no" in _error(capsys, *command)
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.yaml").write_text("")
    line = _error(capsys, "evaluate", "half")
    assert "model.safetensors" in line
    assert "--resume" in line
    (tmp_path / "half/model.safetensors").write_bytes(b"short")
    assert "half/model.safetensors" in _error(capsys, "predict", "half", str(tmp_path / "voc/JPEGImages/v0.jpg"))
    assert "'x*.jpg'" in _error(capsys, "predict", "half", "x*.jpg")
    assert "no images" in _error(capsys, "predict", "half", "half")
    twins = [str(tmp_path / "voc/JPEGImages/v0.jpg"), str(tmp_path / "voc/SegmentationClass/v0.png")]
    assert "the same output name 'v0'" in _error(capsys, "predict", "half", *twins)
    assert "metrics.json does not exist" in _error(capsys, "report", "half")


@pytest.mark.parametrize(
    "command", [[], ["prepare"], ["train"], ["evaluate"], ["predict"], ["pseudo-labels"], ["report"]]
)
def test_help_teaches_by_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"  afa {command[0] if command else 'train'} " in shown
    if command == ["train"]:
        assert all(name in shown for name in ready_names())


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "afa train demo" in capsys.readouterr().out


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, afa.commands.cli; afa.commands.cli.main([]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_status_and_stderr_of_the_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "afa.commands.cli", "train", "voc", "nonsense.key=1"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "nonsense.key" in done.stderr
    assert "Traceback" not in done.stderr


def test_config_show_prints_what_train_would_use(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "small.yaml", "train.lr=1e-4", "eval.scales=1,0.5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["train"]["lr"] == 1e-4 and shown["train"]["iterations"] == 3 and shown["eval"]["scales"] == [1.0, 0.5]
    assert from_dict(shown) == load_config("small.yaml", ["train.lr=1e-4", "eval.scales=1,0.5"])


def test_config_schema_is_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == {"data", "model", "labels", "train", "eval"}
    assert schema["$defs"]["TrainConfig"]["properties"]["lr"]["exclusiveMinimum"] == 0


def test_wrong_config_commands_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'show'?" in _error(capsys, "config", "shw", "voc")
    assert "needs a configuration" in _error(capsys, "config", "show")
    assert "takes no configuration" in _error(capsys, "config", "schema", "voc")
    assert "2 settings are wrong" in _error(capsys, "config", "show", "voc", "train.lr=fast", "data.flip=2")


@pytest.mark.slow
def test_data_are_opened_and_the_model_is_built_once(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    for kind in (TaggedDataset, Backbone):
        real = kind.__init__

        def counted(self: Any, *args: Any, real: Any = real, kind: Any = kind, **options: Any) -> None:
            made.append(kind.__name__)
            real(self, *args, **options)

        monkeypatch.setattr(kind, "__init__", counted)
    run = str(tmp_path / "runs/small")
    assert main(["train", "small.yaml", "--quiet", "--device=cpu"]) == 0
    assert made == ["TaggedDataset", "TaggedDataset", "Backbone"]
    made.clear()
    assert main(["evaluate", run, "--quiet", "--device=cpu"]) == 0
    assert made == ["TaggedDataset", "Backbone"]
    made.clear()
    assert main(["pseudo-labels", run, "--out", str(tmp_path / "labels"), "--quiet", "--device=cpu"]) == 0
    assert made == ["TaggedDataset", "Backbone"]


def test_unlikely_settings_are_reported(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "small.yaml", "labels.walk_radius=8", "--quiet", "--device=cpu"]
    assert main(arguments) == 0
    assert "note     the window of labels.walk_radius=8 covers 100% of a crop's 2 x 2 tokens" in capsys.readouterr().out
