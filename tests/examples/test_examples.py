"""Every file in examples/ runs, and its result is right. tests/afa/commands/test_export.py runs onnx_predict.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from afa.data.synthetic import make_dataset
from afa.data.synthetic.embedded import draw_labeled

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(folder: Path, name: str, *arguments: str) -> str:
    """Run an example in a folder and return its output."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


@pytest.fixture
def scene(tmp_path: Path) -> np.ndarray:
    """photo.png with an object, and its mask."""
    for number in range(50):
        image, mask = draw_labeled("val", number, 144, 0)
        if 0.1 < (mask > 0).mean() < 0.4 and len(np.unique(mask)) == 2:
            break
    Image.fromarray(image).save(tmp_path / "photo.png")
    return mask > 0


def test_use_par(scene: np.ndarray, tmp_path: Path) -> None:
    for arguments in ([], ["photo.png"]):
        shown = run(tmp_path, "use_par_in_your_code.py", *arguments)
        assert all(float(value) < 1e-3 for value in re.findall(r"\d\.\de[+-]\d+", shown.splitlines()[0]))
        before, after = read(tmp_path / "before.png"), read(tmp_path / "after.png")
        assert before.shape == after.shape and (before != after).any()


def test_refine_masks(scene: np.ndarray, tmp_path: Path) -> None:
    """A mask of 16 x 16 pixels per cell gets better, in each of the three forms of a mask."""
    cells = scene.reshape(9, 16, 9, 16).mean((1, 3))
    Image.fromarray((255 * (cells > 0.5)).astype(np.uint8)).save(tmp_path / "mask.png")
    np.save(tmp_path / "logits.npy", (8 * cells - 4).astype(np.float32))
    np.save(tmp_path / "classes.npy", np.stack([4 - 8 * cells, 8 * cells - 4]).astype(np.float32))
    coarse = np.kron(cells > 0.5, np.ones((16, 16), bool))
    for mask in ("mask.png", "logits.npy", "classes.npy"):
        shown = run(tmp_path, "refine_masks.py", "photo.png", mask, "refined.png", "--dilations", "1,2,4,8")
        assert re.fullmatch(r"[\d.]+% of the pixels changed\n", shown)
        refined = read(tmp_path / "refined.png")
        assert refined.shape == scene.shape and iou(refined > 0, scene) > iou(coarse, scene) + 0.02, mask


def test_refine_masks_keeps_class_indices(scene: np.ndarray, tmp_path: Path) -> None:
    mask = np.where(scene, 7, 0).astype(np.uint8)
    mask[:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    run(tmp_path, "refine_masks.py", "photo.png", "mask.png", "refined.png")
    assert set(np.unique(read(tmp_path / "refined.png"))) == {0, 7}
    np.save(tmp_path / "square.npy", np.pad(np.where(scene, 4.0, -4.0)[:72], ((0, 72), (0, 0))).astype(np.float32))
    Image.open(tmp_path / "photo.png").crop((0, 0, 144, 72)).save(tmp_path / "half.png")
    run(tmp_path, "refine_masks.py", "half.png", "square.npy", "refined.png", "--padded")
    assert iou(read(tmp_path / "refined.png") > 0, scene[:72]) > 0.8


def test_refine_masks_of_soft_images_and_large_indices(scene: np.ndarray, tmp_path: Path) -> None:
    soft = Image.fromarray(np.where(scene, 240, 10).astype(np.uint8)).resize((18, 18), Image.Resampling.BOX)
    soft.save(tmp_path / "mask.png")
    run(tmp_path, "refine_masks.py", "photo.png", "mask.png", "refined.png", "--threshold", "127")
    refined = read(tmp_path / "refined.png")
    assert set(np.unique(refined)) == {0, 255} and iou(refined > 0, scene) > 0.9
    np.save(tmp_path / "large.npy", np.full((9, 9), 300))
    command = [sys.executable, str(EXAMPLES / "refine_masks.py"), "photo.png", "large.npy", "refined.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "from 0 to 255, got 300 to 300" in done.stderr


@pytest.mark.slow
def test_minimal_train(tmp_path: Path) -> None:
    shown = run(tmp_path, "minimal_train.py", "--iterations", "24", "--images", "32", "--data", "data")
    losses = [float(value) for value in re.findall(r"tags (\d+\.\d+)", shown)]
    assert len(losses) >= 2 and losses[-1] < losses[0]
    scores = dict(re.findall(r"^(CAM|walk|PAR label|segmentation)\s+(\d\.\d+)", shown, re.MULTILINE))
    assert set(scores) == {"CAM", "walk", "PAR label", "segmentation"}
    assert all(0 < float(score) < 1 for score in scores.values())


@pytest.mark.slow
def test_second_stage(tmp_path: Path) -> None:
    """A network learns from label files. Their names come from `afa pseudo-labels`; here they are the true masks."""
    make_dataset(tmp_path / "data", train=24, val=8, size=96, progress=False)
    shown = run(
        tmp_path,
        "second_stage.py",
        *("--images", "data/JPEGImages", "--labels", "data/SegmentationClass"),
        *("--val-masks", "data/SegmentationClass", "--classes", "9", "--random"),
        *("--iterations", "50", "--batch-size", "4", "--crop", "96"),
    )
    loss = float(re.findall(r"loss ([\d.]+)", shown)[-1])
    score = float(re.findall(r"mIoU ([\d.]+)", shown)[0])
    assert loss < np.log(9) and 1 / 9 < score < 1
    assert (tmp_path / "second_stage.pt").is_file()
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "second_stage.py"), "--images", "data", "--labels", str(tmp_path / "none")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "no label in" in done.stderr


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebook(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The code cells run from top to bottom, and PAR improves the maps. Committed without outputs."""
    shown: list[Image.Image] = []
    stub = ModuleType("IPython.display")
    vars(stub)["display"] = shown.append
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", stub)
    variables: dict[str, object] = {}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), variables)
    scores = dict(re.findall(r"^(\S.*?)\s+(\d\.\d{3})$", capsys.readouterr().out, re.MULTILINE))
    assert float(scores["CAM + PAR"]) > float(scores["CAM"])
    assert len(shown) >= 3 and all(picture.width == 4 * 144 for picture in shown)
