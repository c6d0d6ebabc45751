"""Stopping at any moment and going on: whole checkpoints, damaged ones, SIGKILL and SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import afa.train
from afa.config import Config, load_config, to_yaml
from afa.errors import UserError
from afa.files import sha256
from afa.train import Stopped, Trainer, train
from afa.training import checkpoint


@pytest.fixture
def config(tiny_config: Any, voc_root: Path) -> Config:
    config = tiny_config()
    config.data.root = str(voc_root)
    config.train.checkpoint_every = 2
    return config


def run_train(config: Config, run: Path, **options: Any) -> dict[str, torch.Tensor]:
    train(config, run, device="cpu", progress=False, **options)
    return load_file(run / "model.safetensors")


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert not [key for key in left if not torch.equal(left[key], right[key])]


@pytest.fixture
def cut(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run stopped after iteration 7, with the checkpoints of 4 and 6, an average and a loss scale."""
    config.train.ema, config.train.precision = 0.9, "fp16"
    real = Trainer.step

    def killed(self: Trainer, batch: Any, iteration: int) -> Any:
        if iteration == 7:
            raise KeyboardInterrupt
        return real(self, batch, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            run_train(config, tmp_path / "run")
    return tmp_path / "run"


def test_what_a_checkpoint_holds(cut: Path) -> None:
    assert sorted(path.name for path in (cut / "checkpoints").iterdir()) == ["00000004", "00000006"]
    folder = cut / "checkpoints/00000006"
    names = ["ema.safetensors", "model.safetensors", "sha256.json", "state.pt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert sorted(json.loads((folder / "sha256.json").read_text())) == [name for name in names if "json" not in name]
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state["iteration"] == 6 and state["scaler"]["scale"] > 0
    raw, average = load_file(folder / "model.safetensors"), load_file(folder / "ema.safetensors")
    assert raw.keys() == average.keys()
    assert not torch.equal(raw["classifier.weight"], average["classifier.weight"])


def test_resumes_average_and_loss_scale(config: Config, cut: Path, tmp_path: Path) -> None:
    whole = run_train(config, tmp_path / "whole")
    assert_equal(whole, run_train(config, cut, resume=True))


@pytest.mark.parametrize("harm", ["cut short", "one bit", "missing", "sums"])
def test_damaged_is_named_and_the_one_before_used(
    config: Config, cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    newest = cut / "checkpoints/00000006"
    victim = newest / {"cut short": "state.pt", "sums": "sha256.json"}.get(harm, "model.safetensors")
    content = bytearray(victim.read_bytes())
    if harm == "one bit":
        content[-5] ^= 4
        victim.write_bytes(content)
    elif harm == "missing":
        victim.unlink()
    else:
        victim.write_bytes(content[: len(content) // 2])
    assert checkpoint.find_checkpoint(cut, config).name == "00000004"
    said = capsys.readouterr().err
    assert f"the checkpoint {newest} is damaged: {victim.name}" in said and "going on from 00000004" in said
    if harm == "one bit":
        whole = run_train(config, tmp_path / "whole")
        assert_equal(whole, run_train(config, cut, resume=True))


def test_none_whole_is_left(config: Config, cut: Path) -> None:
    for folder in (cut / "checkpoints").iterdir():
        (folder / "state.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"00000006 is damaged.*00000004 is damaged.*no whole one is left"):
        run_train(config, cut, resume=True)


def test_no_pickle_is_executed(config: Config, cut: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    folder = cut / "checkpoints/00000006"
    torch.save({"iteration": 6, "optimizer": Evil(), "scaler": {}}, folder / "state.pt")
    sums = json.loads((folder / "sha256.json").read_text())
    sums["state.pt"] = sha256(folder / "state.pt")
    (folder / "sha256.json").write_text(json.dumps(sums))
    with pytest.raises(UserError, match=r"the checkpoint .*00000006 can't be read"):
        run_train(config, cut, resume=True)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("keep", [1, 3])
def test_keeps_as_many_as_asked(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    config.train.keep_checkpoints = keep
    monkeypatch.setattr(afa.train.shutil, "rmtree", lambda *_, **__: None)  # the end's cleaning up
    config.train.checkpoint_every = 1
    with monkeypatch.context() as patch:
        patch.setattr(afa.train, "save_checkpoint_weights", _full)
        with pytest.raises(OSError, match="disk full"):
            run_train(config, tmp_path / "run")
    monkeypatch.undo()
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert len(names) >= keep and names[-1] == "00000008"


def _full(*_: Any) -> None:
    raise OSError("disk full")


def test_sigterm_saves_and_stops(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_train(config, tmp_path / "whole")
    real = Trainer.step

    def told(self: Trainer, batch: Any, iteration: int) -> Any:
        if iteration == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, iteration)

    before = signal.getsignal(signal.SIGTERM)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", told)
        with pytest.raises(Stopped, match="after iteration 5") as stopped:
            run_train(config, run)
    assert stopped.value.iteration == 5
    assert signal.getsignal(signal.SIGTERM) is before
    assert (run / "checkpoints/00000005").is_dir() and not (run / "model.safetensors").exists()
    assert_equal(whole, run_train(config, run, resume=True))


KILLED = """
# One import for all: children are forked from here, each trains, and is killed at a random moment.
import os, random, signal, sys, time
from pathlib import Path

import torch
from afa.config import load_config
from afa.train import train

torch.set_num_threads(1)
config, run, kills = load_config(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
dice = random.Random(sys.argv[4])
torch.utils.data.DataLoader([0])  # imported and ready

def attempt(longest):
    child = os.fork()
    if child == 0:
        try:
            train(config, run, resume=any(run.glob("checkpoints/[0-9]*")), device="cpu", progress=False)
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    if longest is not None:
        time.sleep(dice.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)

started = time.monotonic()
assert attempt(None) == 0
whole = time.monotonic() - started
(run / "model.safetensors").rename(run.parent / "whole.safetensors")
killed = 0
while killed < kills:
    if not any(run.glob("checkpoints/[0-9]*")) and (run / "model.safetensors").exists():
        (run / "model.safetensors").unlink()  # one got to the end: begin anew
    code = attempt(0.7 * whole)
    assert code in (0, -signal.SIGKILL), code
    killed += code != 0
assert (run / "model.safetensors").exists() or attempt(None) == 0
print("killed", killed)
"""


@pytest.mark.slow
def test_killed_at_any_moment(config: Config, tmp_path: Path) -> None:
    config.train.checkpoint_every, config.train.ema, config.train.log_every = 1, 0.9, 1
    config.model.backbone_args["drop_path_rate"] = 0.2
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), "config.yaml", "run", "8", "seed"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "killed 8" in done.stdout, done.stdout + done.stderr
    assert_equal(load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "run/model.safetensors"))
    assert load_config(tmp_path / "run/config.yaml") == config
    logged = [json.loads(line)["iteration"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert logged == list(range(1, 10))


@pytest.mark.slow
def test_command_line_on_sigterm(config: Config, tmp_path: Path) -> None:
    config.train.iterations, config.data.workers = 100000, 1
    (tmp_path / "long.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "afa", "train", "long.yaml", "--quiet", "--device", "cpu"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        log = tmp_path / "runs/long/log.jsonl"
        for _ in range(600):
            if (log.exists() and log.read_text()) or process.poll() is not None:
                break
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)  # to the loader's worker too, as clusters do
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, err
    saved = sorted((tmp_path / "runs/long/checkpoints").iterdir())[-1]
    assert f"by SIGTERM; the checkpoint of iteration {int(saved.name):,} is written" in out
    assert "afa train runs/long --resume" in out and "Traceback" not in err
