"""Stopping at any time and resuming: complete and damaged checkpoints, SIGKILL and SIGTERM."""

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

import afa.training.loop
from afa.commands.cli import main
from afa.config import Config, load_config, to_yaml
from afa.errors import UserError
from afa.files import sha256
from afa.run import lock_run
from afa.training import checkpoint
from afa.training.loop import train
from afa.training.step import TrainStep
from afa.training.stopping import Stopped


@pytest.fixture
def config(tiny_config: Any, voc_root: Path) -> Config:
    config = tiny_config()
    config.data.root = str(voc_root)
    config.train.checkpoint_every = 2
    return config


def run_train(config: Config, run: Path, **options: Any) -> dict[str, torch.Tensor]:
    train(config, run, device="cpu", progress=False, **options)
    return load_file(run / "model.safetensors")


def _found(run: Path, config: Config) -> Path:
    found = checkpoint.find_checkpoint(run, config, ["square", "disc", "stripes"])
    assert found is not None
    return found


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert not [key for key in left if not torch.equal(left[key], right[key])]


@pytest.fixture
def cut(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run stopped after iteration 7, with the checkpoints of 4 and 6, an average and a loss scale."""
    config.train.ema, config.train.precision = 0.9, "fp16"
    real = TrainStep.update

    def killed(self: TrainStep, batch: Any, iteration: int) -> Any:
        if iteration == 7:
            raise KeyboardInterrupt
        return real(self, batch, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            run_train(config, tmp_path / "run")
    return tmp_path / "run"


def test_contents_of_a_checkpoint(cut: Path) -> None:
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


@pytest.mark.slow
def test_resumes_average_and_loss_scale(config: Config, cut: Path, tmp_path: Path) -> None:
    whole = run_train(config, tmp_path / "whole")
    assert_equal(whole, run_train(config, cut, resume=True))


@pytest.mark.parametrize("harm", ["cut short", "one bit", "missing", "sums"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(
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
    assert _found(cut, config).name == "00000004"
    said = capsys.readouterr().err
    assert f"the checkpoint {newest} is damaged: {victim.name}" in said and "resuming from 00000004" in said
    if harm == "one bit":
        whole = run_train(config, tmp_path / "whole")
        assert_equal(whole, run_train(config, cut, resume=True))


def test_no_valid_checkpoint_is_left(config: Config, cut: Path) -> None:
    for folder in (cut / "checkpoints").iterdir():
        (folder / "state.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"00000006 is damaged.*00000004 is damaged.*there is no valid checkpoint"):
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
def test_keeps_the_configured_number_of_checkpoints(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    config.train.keep_checkpoints = keep
    config.train.checkpoint_every = 1
    with monkeypatch.context() as patch:
        patch.setattr(afa.training.loop, "finish", _full)
        with pytest.raises(OSError, match="disk full"):
            run_train(config, tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == [f"{iteration:08d}" for iteration in range(9 - keep, 9)]


def _full(*_: Any) -> None:
    raise OSError("disk full")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_saves_and_stops(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    whole = run_train(config, tmp_path / "whole")
    real = TrainStep.update

    def told(self: TrainStep, batch: Any, iteration: int) -> Any:
        if iteration == 4:
            os.kill(os.getpid(), number)
        return real(self, batch, iteration)

    before = signal.getsignal(number)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "update", told)
        with pytest.raises(Stopped, match="after iteration 5") as stopped:
            run_train(config, run)
    assert stopped.value.iteration == 5 and stopped.value.signal == number
    assert signal.getsignal(number) is before
    assert (run / "checkpoints/00000005").is_dir() and not (run / "model.safetensors").exists()
    assert_equal(whole, run_train(config, run, resume=True))


KILLED = """
# One import for all: children are forked from here, each trains, and is killed at a random moment.
import os, random, signal, sys, time
from pathlib import Path

import torch
from afa.config import load_config
from afa.training.loop import train

torch.set_num_threads(1)
config, run, kills = load_config(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
dice = random.Random(sys.argv[4])
torch.utils.data.DataLoader([0])  # imported and ready

def attempt(longest):
    child = os.fork()
    if child == 0:
        try:
            done = any(run.glob("checkpoints/[0-9]*")) or (run / "model.safetensors").exists()
            train(config, run, resume=done, device="cpu", progress=False)
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
run.rename(run.parent / "whole")
killed = 0
while killed < kills:
    if (run / "model.safetensors").exists():
        run.rename(run.parent / f"finished{killed}")  # one got to the end: start again
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
    assert_equal(load_file(tmp_path / "whole/model.safetensors"), load_file(tmp_path / "run/model.safetensors"))
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
    assert f"by SIGTERM; saved the checkpoint of iteration {int(saved.name):,}" in out
    assert "afa train runs/long --resume" in out and "Traceback" not in err


STEPS = """
# A child is forked for every operation on files that saving, pruning and finishing do, and ends right before it.
import os, shutil, sys
from pathlib import Path

import torch
from afa.config import load_config, to_yaml
from afa.model.network import build_model
from afa.training import checkpoint
from afa.training.step import TrainStep
from afa.run import bring_back, put_aside

torch.set_num_threads(1)
config, start = load_config(sys.argv[1]), Path(sys.argv[2]).resolve()
classes = ["square", "disc", "stripes"]
torch.manual_seed(0)
train_step = TrainStep(build_model(config.model, 3), config, torch.device("cpu"))
start.mkdir()
(start / "config.yaml").write_text(to_yaml(config))
(start / "log.jsonl").write_text("")
checkpoint.save_checkpoint(start, train_step, classes, 1)
checkpoint.save_checkpoint(start, train_step, classes, 2)
WORK = {
    "save": lambda run: checkpoint.save_checkpoint(run, train_step, classes, 3),
    "finish": lambda run: checkpoint.finish(run, train_step, classes),
    "aside": lambda run: put_aside(run, ["checkpoints", "log.jsonl", "config.yaml"]),
}
EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
counting = 0  # operations left until the end; 0: no counting

def hook(event, arguments):
    global counting
    written = event == "open" and arguments[1] is not None and set("wax") & set(arguments[1])
    if counting and (event in EVENTS or written):
        counting -= 1
        if counting == 0:
            os._exit(9)

sys.addaudithook(hook)
for name, work in WORK.items():
    for step in range(1, 1000):
        run = start.with_name(f"{name}{step}")
        shutil.copytree(start, run)
        child = os.fork()
        if child == 0:
            counting = step
            work(run)
            counting = 0
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), (name, step, code)
        bring_back(run)
        if name == "aside" and not (run / "config.yaml").exists():
            run = run / "previous/1"
        found = checkpoint.find_checkpoint(run, config, classes)
        if found is None:
            assert name == "finish" and (run / "model.safetensors").exists(), (name, step)
        else:
            assert int(found.name) >= 2, (name, step, found)
            # What a killed run resumes with: everything once more, and nothing is in the way.
            if name == "finish":
                checkpoint.finish(run, train_step, classes)
                assert checkpoint.find_checkpoint(run, config, classes) is None, (name, step)
            if name == "save":
                checkpoint.save_checkpoint(run, train_step, classes, 3)
                assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["00000002", "00000003"], (name, step)
        shutil.rmtree(start.with_name(f"{name}{step}"))
        if code == 0:
            print(name, step)
            break
"""


@pytest.mark.slow
def test_killed_before_every_operation_on_files(config: Config, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "steps.py").write_text(STEPS)
    command = [sys.executable, "steps.py", "config.yaml", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = {name: int(step) for name, step in map(str.split, done.stdout.splitlines())}
    # Each file written takes a few operations, and so does each file deleted.
    assert steps["save"] > 15 and steps["finish"] > 20 and steps["aside"] > 4, steps


@pytest.mark.slow
def test_a_half_deleted_checkpoint_does_not_lose_a_finished_run(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    whole = run_train(config, run)
    (run / "checkpoints/00000009/state.pt").unlink()
    assert_equal(whole, run_train(config, run, resume=True))
    config.train.iterations = 12
    with pytest.raises(UserError, match=r"finished, but there is no valid checkpoint .* its model is unchanged"):
        run_train(config, run, resume=True)
    assert_equal(whole, load_file(run / "model.safetensors"))


@pytest.mark.slow
def test_a_finished_run_stays_and_can_be_extended(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = run_train(config, run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["00000009"]
    (run / "metrics.json").write_text("{}")
    assert_equal(first, run_train(config, run, resume=True))
    assert (run / "metrics.json").exists()
    config.train.iterations = 12
    longer = run_train(config, run, resume=True)
    assert not torch.equal(first["classifier.weight"], longer["classifier.weight"])
    assert_equal(first, load_file(run / "previous/1/model.safetensors"))
    assert not (run / "metrics.json").exists() and (run / "previous/1/metrics.json").exists()
    logged = [json.loads(line)["iteration"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert logged[-1] == 12 and logged == sorted(set(logged))
    config.train.iterations = 10
    with pytest.raises(UserError, match=r"train\.iterations is 10, but the run .* was started with 12"):
        run_train(config, run, resume=True)


def test_an_unfinished_run_is_not_extended(config: Config, cut: Path) -> None:
    config.train.iterations = 12
    with pytest.raises(UserError, match=r"train\.iterations is 12"):
        run_train(config, cut, resume=True)


@pytest.mark.slow
def test_earlier_runs_are_numbered_and_never_deleted(config: Config, tmp_path: Path) -> None:
    config.train.iterations, config.train.classify_until, config.train.par_until = 3, 1, 2
    models = []
    for seed in range(3):
        config.train.seed = seed
        models.append(run_train(config, tmp_path / "run"))
    for number in (1, 2):
        assert_equal(models[number - 1], load_file(tmp_path / f"run/previous/{number}/model.safetensors"))
    assert sorted(path.name for path in (tmp_path / "run/previous").iterdir()) == ["1", "2"]


@pytest.mark.parametrize("change", ["rename", "reorder"])
def test_resuming_with_other_classes_is_refused(config: Config, cut: Path, voc_root: Path, change: str) -> None:
    path = voc_root / "classes.txt"
    tags = voc_root / "tags.csv"
    if change == "rename":
        path.write_text("square\nround\nstripes\n")
        tags.write_text(tags.read_text().replace("disc", "round"))
    else:
        path.write_text("disc\nsquare\nstripes\n")
    before = {file: file.read_bytes() for file in cut.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"was started with the classes square, disc, stripes, but"):
        run_train(config, cut, resume=True)
    assert before == {file: file.read_bytes() for file in cut.rglob("*") if file.is_file()}


def test_a_running_run_owns_its_folder(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TrainStep.update
    refused = []

    def second(self: TrainStep, batch: Any, iteration: int) -> Any:
        if iteration == 1:
            for resume in (False, True):
                with pytest.raises(UserError, match="another process is using the run's folder") as caught:
                    train(config, tmp_path / "run", resume=resume, device="cpu", progress=False)
                refused.append(str(caught.value))
        return real(self, batch, iteration)

    monkeypatch.setattr(TrainStep, "update", second)
    run_train(config, tmp_path / "run")
    assert len(refused) == 2
    monkeypatch.undo()
    run_train(config, tmp_path / "run", resume=True)  # free again


def test_old_runs_without_a_last_checkpoint_are_finished(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    whole = run_train(config, run)
    (run / "checkpoints").rename(tmp_path / "away")
    assert_equal(whole, run_train(config, run, resume=True))


def test_evaluating_a_running_run_is_refused(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_train(config, tmp_path / "run")
    with lock_run(tmp_path / "run"):
        assert main(["evaluate", str(tmp_path / "run"), "--quiet", "--device", "cpu"]) == 2
    assert "another process is using the run's folder" in capsys.readouterr().err
