"""Edge cases: full disks, long names, missing packages, locales, untrusted files."""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from afa.commands.cli import main
from afa.config import Config, to_yaml
from afa.data import check_dataset, open_dataset
from afa.errors import UserError, printable
from afa.evaluation.evaluate import evaluate
from afa.files import atomic_path, check_space, check_writable, is_output, remove_tree, to_json, write_bytes, write_text
from afa.model import build_model, load_model
from afa.model.network import save_model
from afa.report.results import load_result, make_report, save_result
from afa.training.loop import train


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Files of more than `limit` bytes can't be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For models this small, more threads only slow each other down on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(tiny_config: Any, voc_root: Path) -> Config:
    config: Config = tiny_config()
    config.data.root = str(voc_root)
    config.train.iterations, config.train.classify_until, config.train.par_until = 3, 1, 2
    return config


# ---- files


def test_a_full_disk_gives_a_one_line_error(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with small_files(100), pytest.raises(UserError, match=r"a\.txt can't be written: File too large"):
        write_bytes(tmp_path / "a.txt", bytes(1000))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_full_disk_while_a_model_is_saved(config: Config, tmp_path: Path) -> None:
    model = build_model(config.model, 3)
    with small_files(1000), pytest.raises(UserError, match=r"model\.safetensors can't be written: File too large"):
        save_model(tmp_path / "model.safetensors", model, config, ["a", "b", "c"])
    assert [path.name for path in tmp_path.iterdir()] == ["voc"]


def test_a_full_disk_while_training(config: Config, tmp_path: Path) -> None:
    config.train.checkpoint_every = 1
    with small_files(20_000), pytest.raises(UserError, match=r"(safetensors|npz|state\.pt) can't be written"):
        train(config, tmp_path / "run", device="cpu", progress=False)


def test_free_space_is_checked_first(tmp_path: Path) -> None:
    check_space(tmp_path, 1000, "the checkpoints")
    with pytest.raises(UserError, match=r"the checkpoints in .* need about 1000000000000\.00 GB, but the disk has"):
        check_space(tmp_path, 10**21, "the checkpoints")


@pytest.mark.parametrize("suffix", [".png", ".npz", ""])
def test_the_longest_names_can_be_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / ("x" * (255 - len(suffix)) + suffix)
    write_bytes(path, b"1")
    assert path.read_bytes() == b"1"
    with pytest.raises(UserError, match="can't be written: File name too long"):
        write_bytes(tmp_path / ("x" * 256), b"1")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file/out can't be written: Not a directory"):
        check_writable(tmp_path / "file/out", "--out")
    assert check_writable(tmp_path / "new/out", "--out").is_dir()
    assert list((tmp_path / "new/out").iterdir()) == []


def test_a_deleted_folder_is_renamed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree/deep").mkdir(parents=True)
    (tmp_path / "tree/deep/file").write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed here
        remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists() and len(list(tmp_path.iterdir())) == 1
    remove_tree(tmp_path / "tree")  # sweeps what was left
    assert list(tmp_path.iterdir()) == []


def test_no_json_holds_nan(tmp_path: Path) -> None:
    content = {"a": [math.nan, 1.5], "b": (math.inf, -math.inf), "c": {"d": np.float64("nan")}}
    assert json.loads(to_json(content)) == {"a": [None, 1.5], "b": [None, None], "c": {"d": None}}


def test_an_error_inside_leaves_nothing(tmp_path: Path) -> None:
    def half() -> None:
        with atomic_path(tmp_path / "a.png") as path:
            path.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert list(tmp_path.iterdir()) == []


# ---- the command


def test_no_output_where_it_cannot_be_written(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    (tmp_path / "file").write_text("x")
    assert main(["train", "c.yaml", "--run", "file/run", "--quiet"]) == 2
    assert "the run's folder file/run can't be written: Not a directory" in capsys.readouterr().err
    assert main(["train", "c.yaml", "--run", "run", "--quiet", "--device", "cpu"]) == 0
    picture = Path(config.data.root) / "JPEGImages/v0.jpg"
    for arguments in (
        ["predict", "run", str(picture), "--out", "file/out"],
        ["pseudo-labels", "run", "--out", "file/out"],
    ):
        assert main([*arguments, "--quiet"]) == 2
        error = capsys.readouterr().err
        assert "--out file/out can't be written: Not a directory" in error and error.count("\n") == 1


def test_predict_continues_after_a_bad_image(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(config, tmp_path / "run", device="cpu", progress=False)
    pictures = tmp_path / "photos"
    (pictures / "more").mkdir(parents=True)
    for name in ("a.png", "more/c.png", ".hidden.png"):
        Image.new("RGB", (70, 50), (9, 90, 200)).save(pictures / name)
    (pictures / "b.png").write_bytes(b"no picture")
    (pictures / "more/loop").symlink_to(pictures, target_is_directory=True)
    command = ["predict", "run", "photos", "--out", "photos/found", "--quiet", "--device", "cpu"]
    for _ in range(2):  # the output of the first run is not an input of the second
        assert main(command) == 2
        shown = capsys.readouterr()
        assert "written  2 images" in shown.out
        assert "skipped  the image photos/b.png can't be decoded (not an image file)" in shown.out
        assert "1 of 3 images can't be read" in shown.err and shown.err.count("\n") == 1
        written = sorted(
            path.relative_to(pictures / "found").as_posix() for path in pictures.rglob("found/masks/**/*.png")
        )
        assert written == ["masks/a.png", "masks/more/c.png"]
    assert is_output(pictures / "found/masks")
    (pictures / "b.png").unlink()
    assert main(command) == 0
    (tmp_path / "album/masks").mkdir(parents=True)
    (tmp_path / "album/masks/truth.png").write_bytes(b"someone's work")
    assert main(["predict", "run", "photos/a.png", "--out", "album", "--quiet"]) == 2
    assert "album/masks contains files that `afa predict` did not write" in capsys.readouterr().err
    assert (tmp_path / "album/masks/truth.png").read_bytes() == b"someone's work"


def test_masks_without_classes_are_reported_everywhere(
    config: Config, voc_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (voc_root / "SegmentationClass").iterdir():
        mask = np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8)
        Image.fromarray(mask).save(path)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert main(["train", "c.yaml", "--run", "run", "--quiet", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "classes  square 3, disc 3, stripes 3" in shown
    note = "no mask contains any class, so the scores are for the background only"
    assert f"note     {note}" in shown and f"\nnote: {note}" in shown
    assert note in json.loads((tmp_path / "run/metrics.json").read_text())["notes"][0]
    assert note in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert load_result(tmp_path / "run")[0].notes
    assert main(["report", "run"]) == 0


def test_evaluating_other_classes_is_refused(config: Config, voc_root: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "run", device="cpu", progress=False)
    (voc_root / "classes.txt").write_text("disc\nsquare\nstripes\n")
    assert main(["evaluate", str(tmp_path / "run"), "--quiet", "--device", "cpu"]) == 2


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("yaml", "--help"),
        ("tqdm", "prepare own nowhere"),
        ("PIL", "prepare own nowhere"),
        ("timm", "train demo --run run"),
        ("safetensors", "train demo --run run"),
    ],
)
@pytest.mark.slow
def test_a_missing_package_gives_a_one_line_error(package: str, arguments: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules['{package}'] = None; from afa.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"afa: error: the package {package} is not installed; run pip install 'afa-ext[train]'\n"


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
@pytest.mark.slow
def test_any_locale(tmp_path: Path, locale: dict[str, str]) -> None:
    folder = os.fsencode(tmp_path) + "/caf\u00e9".encode()
    os.mkdir(folder)
    for number in range(3):
        Image.new("RGB", (20, 16)).save(tmp_path / f"{number}.jpg")
        os.rename(tmp_path / f"{number}.jpg", folder + f"/\u00fc{number}.jpg".encode())
    command = [sys.executable, "-m", "afa", "prepare", "own", str(tmp_path), "--quiet"]
    environment = {**os.environ, **locale}
    environment.pop("LANG", None)
    done = subprocess.run(command, capture_output=True, env=environment)
    assert b"Traceback" not in done.stderr and done.returncode in (0, 2), done.stderr
    if done.returncode:  # an ASCII file system can't name the class
        assert b"not UTF-8" in done.stderr
    else:
        assert b"3 images, tagged by one folder per class, 1 classes" in done.stdout


def test_printable() -> None:
    assert printable("a\x1b[31mb\x07\n\udce9\u00e9") == "ab\\x07\\n\\udce9\u00e9"


@pytest.mark.slow
def test_paths_from_anywhere(
    config: Config, voc_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for number, root in enumerate((voc_root.name, f"~/{voc_root.name}")):
        config.data.root = root
        (tmp_path / "c.yaml").write_text(to_yaml(config))
        assert main(["train", "c.yaml", f"--run=~/run{number}", "--quiet", "--device", "cpu"]) == 0
        with monkeypatch.context() as patch:
            patch.chdir("/")
            assert main(["evaluate", str(tmp_path / f"run{number}"), "--quiet", "--device", "cpu"]) == 0
            assert main(["train", str(tmp_path / f"run{number}"), "--resume", "--quiet", "--device", "cpu"]) == 0


# ---- other people's model files


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "/etc/passwd"},
        {"pretrained": True},
        {"pretrained_cfg": {"file": "/etc/passwd"}},
        {"pretrained_cfg_overlay": {"file": "/etc/passwd"}},
        {"cache_dir": "/tmp"},
    ],
)
def test_a_model_file_cannot_make_timm_read_others(config: Config, tmp_path: Path, arguments: dict[str, Any]) -> None:
    model = build_model(config.model, 3)
    config.model.backbone_args.update(arguments)
    save_model(tmp_path / "model.safetensors", model, config, ["a", "b", "c"])
    with pytest.raises(
        UserError, match=f"{next(iter(arguments))} is not allowed because it makes timm read other files"
    ):
        load_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/tmp/model", "/tmp/model"])
def test_a_backbone_must_be_a_timm_model(config: Config, name: str) -> None:
    config.model.backbone = name
    with pytest.raises(UserError, match="timm has no model named"):
        build_model(config.model, 3)


def test_a_model_file_with_bad_classes(config: Config, tmp_path: Path) -> None:
    model = build_model(config.model, 2)
    save_model(tmp_path / "model.safetensors", model, config, ["a", "a\u200b"])
    with pytest.raises(UserError, match=r"model\.safetensors: the class name .* invisible character"):
        load_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "args": argparse.Namespace(lr=1)},
        lambda state: {"state_dict": state, "best": np.float64(1), "epoch": np.int64(3)},
        lambda state: {"teacher": state, "student": state},
        lambda state: {"model_ema": {f"module.{key}": value for key, value in state.items()}},
    ],
)
def test_checkpoints_of_training_scripts(config: Config, tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    net = timm.create_model(config.model.backbone, num_classes=0, **config.model.backbone_args)
    torch.save(wrap(net.state_dict()), tmp_path / "w.pth")
    config.model.weights = str(tmp_path / "w.pth")
    built = build_model(config.model, 2).backbone.net.state_dict()
    assert all(torch.equal(value, built[key]) for key, value in net.state_dict().items())


def test_unknown_checkpoints_are_reported_with_their_keys(config: Config, tmp_path: Path) -> None:
    torch.save({"weights": {}, "step": 3}, tmp_path / "w.pth")
    config.model.weights = str(tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"no state dict of tensors \(its keys are weights, step; searched under"):
        build_model(config.model, 2)


def test_notes_of_an_evaluation(config: Config, voc_root: Path, tmp_path: Path) -> None:
    for path in (voc_root / "SegmentationClass").glob("v*.png"):
        mask = np.asarray(Image.open(path)).copy()
        mask[mask == 3] = 0
        Image.fromarray(mask).save(path)
    val = open_dataset(config.data, "val", train=False, with_mask=True, progress=False)
    check_dataset(val, progress=False)
    result = evaluate(build_model(config.model, 3), val, config, progress=False)
    assert result.notes == ["no mask contains stripes: the scores leave it out"]
    save_result(tmp_path, result, val.classes, config, {})
    assert "no mask contains stripes" in make_report(tmp_path).read_text(encoding="utf-8")
