"""Options off by default: half precision, micro-batches, processes, averages, clipping, compiling, TensorBoard."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import afa.training.loop
import afa_ext
from afa.config import Config, load_config, to_yaml
from afa.errors import UserError
from afa.evaluation.result import Example
from afa.model import build_model
from afa.training import compiling
from afa.training.board import panels
from afa.training.compiling import compile_network
from afa.training.dropout import SharedDropout2d
from afa.training.log import SKIPS, RunLog, summary
from afa.training.loop import train
from afa.training.losses import affinity_loss, segmentation_loss, target_counts
from afa.training.schedule import ema_decay
from afa.training.step import StepResult, TrainStep


@pytest.fixture
def config(tiny_config: Any, voc_root: Path) -> Config:
    config = tiny_config()
    config.data.root = str(voc_root)
    return config


def batch_of(images: int = 4, side: int = 64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    tags = torch.zeros(images, 3)
    tags[torch.arange(images), torch.arange(images) % 3] = 1
    tags[0] = 1  # packs of classes differ between micro-batches
    box = torch.tensor([[0, side, 0, side]] * images)
    box[1] = torch.tensor([4, side, 0, side - 10])
    return {
        "image": torch.randint(0, 256, (images, 3, side, side), generator=generator, dtype=torch.uint8),
        "tags": tags,
        "box": box,
        "name": [str(i) for i in range(images)],
    }


def train_step_of(config: Config) -> TrainStep:
    torch.manual_seed(0)
    train_step = TrainStep(build_model(config.model, 3), config)
    # CAMs of random weights are all similar, and so are labels computed from them.
    train_step.model.classifier.weight.data.normal_()
    return train_step


# ---- a batch in parts


def test_losses_of_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 3, 6, 6, generator=generator)
    labels = torch.randint(0, 3, (4, 12, 12), generator=generator)
    labels[:, :2] = 255
    labels[2:][labels[2:] == 0] = 255  # the second half has no background
    affinity = torch.rand(4, 9, 9, generator=generator, dtype=torch.float64)
    pairs = torch.tensor([0, 1, 2, 255], dtype=torch.uint8)[torch.randint(0, 4, (4, 9, 9), generator=generator)]
    counts = target_counts(labels, pairs)
    assert counts.tolist() == [int((labels == 0).sum()), int(((labels == 1) | (labels == 2)).sum())] + [
        int((pairs == kind).sum()) for kind in (0, 1, 2)
    ]
    for whole, parts in (
        (segmentation_loss(logits, labels), [segmentation_loss(logits[i], labels[i], counts) for i in HALVES]),
        (
            afa_ext.affinity_loss(affinity, pairs.masked_fill(pairs == 2, 1)),
            [affinity_loss(affinity[i], pairs[i], counts)[0] for i in HALVES],
        ),
        (
            afa_ext.affinity_loss(affinity, pairs, weights=(0.5, 0.1, 0.4)),
            [affinity_loss(affinity[i], pairs[i], counts, object_share=0.8)[0] for i in HALVES],
        ),
    ):
        torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)
    # Treating each half as a separate batch, as published, would give a different loss.
    alone = sum(segmentation_loss(logits[i], labels[i]) for i in HALVES) / 2
    assert abs(alone - segmentation_loss(logits, labels)) > 0.01


HALVES = (slice(0, 2), slice(2, 4))


def test_dropout_of_parts_is_that_of_the_whole() -> None:
    x = torch.rand(6, 5, 2, 2)
    torch.manual_seed(9)
    whole = F.dropout2d(x, 0.4)
    shared = SharedDropout2d(0.4)
    shared.seed, shared.whole = 9, 6
    parts = []
    for shared.first in (0, 2, 4):
        parts.append(shared(x[shared.first : shared.first + 2]))
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(shared.eval()(x), x)


@pytest.mark.parametrize("phase", ["classify", "par", "walk"])
def test_micro_batches_give_the_gradients_of_the_whole_batch(config: Config, phase: str) -> None:
    """Exactly, to rounding: losses, labels, dropout. Batch norm, which sees only a micro-batch, is set to evaluate."""
    iteration = {"classify": 1, "par": 4, "walk": 7}[phase]
    config.train.batch_size = 4
    found = {}
    for micro_batches in (1, 2, 4):
        config.train.accumulate = micro_batches
        train_step = train_step_of(config)
        train_step.model.get_submodule("decoder.norm").eval()
        step = train_step.update(batch_of(), iteration)
        gradients = {n: p.grad.clone() for n, p in train_step.model.named_parameters() if p.grad is not None}
        found[micro_batches] = (step.losses, step.grad_norm, gradients)
    for micro_batches in (2, 4):
        torch.testing.assert_close(found[micro_batches][0], found[1][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[micro_batches][1], found[1][1], rtol=1e-4, atol=0)
        assert found[micro_batches][2].keys() == found[1][2].keys()
        for name, gradient in found[micro_batches][2].items():
            scale = float(found[1][2][name].abs().max())
            torch.testing.assert_close(gradient, found[1][2][name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


def test_an_indivisible_batch_is_rejected(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    with pytest.raises(UserError, match=r"train.accumulate .* must be a divisor of train.batch_size \(3\), got 2"):
        load_config(tmp_path / "c.yaml", ["train.accumulate=2"])
    monkeypatch.setattr("afa.distributed.world_size", lambda: 2)
    with pytest.raises(
        UserError, match=r"train\.batch_size \(3 images .* among 2 processes; set it to a multiple of 2"
    ):
        train(config, tmp_path / "run", progress=False)
    config.train.accumulate = 3
    with pytest.raises(UserError, match=r"2 processes x 3 micro-batches; set it to a multiple of 6"):
        train(config, tmp_path / "run", progress=False)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(config: Config, tmp_path: Path) -> None:
    """`torchrun -m afa train` from data to report: losses and scores of one process, within rounding."""
    # Phases end, measurements and checkpoints fall between two lines of the log too.
    config.train.batch_size, config.train.log_every, config.train.eval_every = 4, 2, 5
    config.train.checkpoint_every, config.train.lr, config.train.tensorboard = 4, 1e-4, True
    (tmp_path / "small.yaml").write_text(to_yaml(config))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    shown = {}
    for name, launcher in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launcher, "-m", "afa", "train", "small.yaml", "--run-dir", name, "--device", "cpu"]
        done = subprocess.run([*command, "--quiet"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        shown[name] = done.stdout
    assert "9 iterations of 4 crops on 2 processes on cpu" in shown["two"]
    lines = [[line.split()[0] for line in text.splitlines() if line] for text in shown.values()]
    assert lines[0] == lines[1]  # only rank 0 prints
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [record["iteration"] for record in one] == [record["iteration"] for record in two]
    for ours, theirs in zip(one, two, strict=True):
        for key in (
            "loss_cls",
            "loss_seg",
            "loss_aff",
            "grad_norm",
            "label_ignored",
            "label_foreground",
            "affinity_background",
        ):
            if ours.get(key) is not None:
                # The first steps are equal; then a pixel at a tie may fall to the other side.
                assert theirs[key] == pytest.approx(ours[key], rel=2e-3, abs=2e-3), (ours, theirs)
        for key in ("val_cam_miou", "val_walk_miou", "val_par_miou", "val_seg_miou"):
            if key in ours:
                assert theirs[key] == pytest.approx(ours[key], abs=0.005)
    scores = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    for row in ("cam", "walk", "par", "seg"):
        assert scores[1][f"{row}_miou"] == pytest.approx(scores[0][f"{row}_miou"], abs=0.005)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name in ("decoder.norm.running_mean", "decoder.norm.running_var"):
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-3, atol=1e-4)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
    assert len(list((tmp_path / "two/tensorboard").iterdir())) == 1


# ---- precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.slow
def test_half_precision_learns(config: Config, precision: Literal["bf16", "fp16"]) -> None:
    config.train.precision, config.train.iterations = precision, 40
    config.train.classify_until, config.train.par_until, config.train.poly_power = 20, 40, 0.0
    train_step = train_step_of(config)
    batch = batch_of(3)
    steps = [train_step.update(batch, i) for i in range(40)]
    losses = torch.stack([step.losses for step in steps])
    assert losses.isfinite().all()
    assert losses[17:20, 0].mean() < 0.6 * losses[0, 0]
    assert losses[37:, 1].mean() < losses[21, 1]
    assert train_step.scaler.is_enabled() == (precision == "fp16")
    # What is learned stays in float32.
    assert {p.dtype for p in train_step.model.parameters()} == {torch.float32}


def test_fp16_is_near_fp32(config: Config) -> None:
    found = {}
    for precision in ("fp32", "fp16"):
        config.train.precision = precision
        train_step = train_step_of(config)
        found[precision] = torch.stack(
            [train_step.losses(batch_of(), phase)[0].losses for phase in ("classify", "par")]
        )
    torch.testing.assert_close(found["fp16"], found["fp32"], rtol=0.02, atol=0.005)


def test_fp16_skips_an_update_that_overflows(config: Config) -> None:
    config.train.precision = "fp16"
    train_step = train_step_of(config)
    train_step.scaler.load_state_dict({**train_step.scaler.state_dict(), "scale": 2.0**60})
    before = copy.deepcopy(train_step.model.state_dict())
    step = train_step.update(batch_of(), 1)
    assert step.losses.isfinite().all() and step.grad_norm is not None and not step.grad_norm.isfinite()
    changed = [n for n, p in train_step.model.named_parameters() if not torch.equal(p, before[n])]
    assert not changed and train_step.scaler.get_scale() == 2.0**59
    train_step.scaler.load_state_dict({**train_step.scaler.state_dict(), "scale": 1024.0})
    norm = train_step.update(batch_of(), 1).grad_norm
    assert norm is not None and norm.isfinite()
    assert not torch.equal(train_step.model.classifier.weight, before["classifier.weight"])


def log_of(config: Config, norms: list[float], path: Path, first: int = 0) -> RunLog:
    log = RunLog(path, config, torch.device("cpu"))
    for offset, norm in enumerate(norms):
        log.add(first + offset, StepResult(torch.zeros(3), grad_norm=torch.tensor(norm)), 0.1, 0.0)
    return log


def test_gradients_that_are_not_finite_are_reported(config: Config, tmp_path: Path) -> None:
    log = log_of(config, [1.0, float("inf")], tmp_path / "log")
    with pytest.raises(
        UserError, match="the gradients became inf at iteration 2, although the losses are finite; lower"
    ):
        log.write()
    config.train.precision = "fp16"
    log = log_of(config, [1.0, float("inf"), 2.0, float("nan")], tmp_path / "log")
    record = log.write()
    assert record["skipped"] == 2 and record["grad_norm"] == 1.5
    for iteration in range(4, 2 + SKIPS):  # a row of them that reaches over several lines
        log.add(iteration, StepResult(torch.zeros(3), grad_norm=torch.tensor(float("inf"))), 0.1, 0.0)
        assert log.write()["grad_norm"] is None
    log.add(50, StepResult(torch.zeros(3), grad_norm=torch.tensor(float("inf"))), 0.1, 0.0)
    log.add(51, StepResult(torch.zeros(3), grad_norm=torch.tensor(float("inf"))), 0.1, 0.0)
    with pytest.raises(UserError, match=f"not finite in {SKIPS} consecutive iterations up to"):
        log.write()
    log = RunLog(tmp_path / "log", config, torch.device("cpu"))
    log.add(0, StepResult(torch.tensor([0.1, float("inf"), 0.2]), grad_norm=torch.tensor(float("nan"))), 0.1, 0.0)
    with pytest.raises(UserError, match="the segmentation loss became inf at iteration 1"):
        log.check()


# ---- average, clipping


def test_average_of_weights(config: Config, tmp_path: Path) -> None:
    config.train.ema = 0.6
    train_step = train_step_of(config)
    expected = copy.deepcopy(train_step.eval_model.state_dict())
    decays = [ema_decay(config.train, i) for i in range(8)]
    assert decays[:2] == [1 / 10, 2 / 11] and decays[7] == pytest.approx(8 / 17) and ema_decay(config.train, 99) == 0.6
    for iteration in range(8):
        train_step.update(batch_of(3), iteration)
        for name, value in train_step.model.state_dict().items():
            old, share = expected[name], decays[iteration]
            moving = name in dict(train_step.model.named_parameters())
            expected[name] = share * old + (1 - share) * value if moving else value.clone()
    for name, value in train_step.eval_model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert train_step.ema is not None
    assert train_step.eval_model is train_step.ema.module and not train_step.eval_model.training
    assert not any(parameter.requires_grad for parameter in train_step.ema.parameters())


@pytest.mark.slow
def test_the_average_is_evaluated_and_saved(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []
    real = afa.training.loop.evaluate

    def spy(model: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(model)
        return real(model, *arguments, **options)

    monkeypatch.setattr(afa.training.loop, "evaluate", spy)
    config.train.eval_every = 8
    raw = run(config, tmp_path / "raw")
    config.train.ema = 0.9
    average = run(config, tmp_path / "ema")
    assert raw.keys() == average.keys() and not torch.equal(raw["classifier.weight"], average["classifier.weight"])
    assert not seen[1].training and not any(parameter.requires_grad for parameter in seen[1].parameters())


def run(config: Config, folder: Path) -> dict[str, Tensor]:
    train(config, folder, device="cpu", progress=False)
    return load_file(folder / "model.safetensors")


def grad_norm_of(train_step: TrainStep) -> float:
    norm = train_step.update(batch_of(), 1).grad_norm
    assert norm is not None
    return float(norm)


def test_clips_gradients(config: Config) -> None:
    train_step = train_step_of(config)
    norm = grad_norm_of(train_step)
    whole = torch.cat([p.grad.flatten() for p in train_step.model.parameters() if p.grad is not None])
    assert float(whole.norm()) == pytest.approx(norm, rel=1e-5)
    config.train.clip_grad = norm / 3
    train_step = train_step_of(config)
    assert grad_norm_of(train_step) == pytest.approx(norm, rel=1e-5)
    clipped = torch.cat([p.grad.flatten() for p in train_step.model.parameters() if p.grad is not None])
    torch.testing.assert_close(clipped, whole / 3, rtol=1e-3, atol=1e-6)


# ---- compiling


@pytest.mark.slow
@pytest.mark.parametrize("family", ["pyramid", "plain"])
def test_compiled_network_reads_the_same_attention(
    config: Config, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Through all phases, running the captured graphs: code generation is tested by torch."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    config.labels.cam_scales = (1.0,)
    config.model.backbone_args["depths"] = [1, 1, 1, 1]
    if family == "plain":
        config.model.backbone, config.model.decoder, config.model.attention_blocks = "vit_tiny_patch16_224", "single", 1
        config.model.backbone_args = {"embed_dim": 24, "depth": 3, "num_heads": 2}
    found = {}
    for compiled in (False, True):
        config.train.compile = compiled
        train_step = train_step_of(config)
        losses = [train_step.update(batch_of(), iteration).losses for iteration in (1, 7)]
        found[compiled] = torch.stack(losses), train_step.model.state_dict()
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-3, atol=1e-4)
    assert found[True][1].keys() == found[False][1].keys()


def test_compiled_parts(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)
    model = build_model(config.model, 3)
    names = compile_network(model)
    assert {"decoder", "backbone.net.stages.0", "backbone.net.stages.2"} <= set(names)
    assert "backbone.net.stages.3.blocks.0.mlp" in names
    for path in model.backbone.attention_paths:
        assert not any(f"backbone.net.{path}".startswith(name + ".") or name.endswith(path) for name in names)


# ---- printed output


def test_summary_next_to_the_progress_bar() -> None:
    record = {"loss_cls": 0.5, "loss_seg": None, "loss_aff": None, "images_per_s": 12.34, "wait_share": 0.071}
    assert summary(record) == "cls 0.500 | 12.3 img/s | wait 7%"
    record = {**record, "loss_seg": 1.0, "loss_aff": 0.25, "peak_memory_gib": 7.89}
    assert summary(record) == "cls 0.500 seg 1.000 aff 0.250 | 12.3 img/s | wait 7% | 7.9 GiB"


@pytest.mark.slow
def test_share_of_time_waiting_is_logged(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from afa.data.dataset import TaggedDataset

    real = TaggedDataset.__getitem__

    def late(self: TaggedDataset, key: Any) -> Any:
        time.sleep(0.3)
        return real(self, key)

    monkeypatch.setattr(TaggedDataset, "__getitem__", late)
    config.train.iterations, config.train.log_every, config.data.workers = 2, 1, 0
    records: list[Any] = []
    train(config, tmp_path / "run", on_log=records.append, device="cpu", progress=False)
    assert len(records) == 2
    for record in records:
        waited = record["wait_share"] / record["images_per_s"]  # seconds an image, however long the steps took
        assert waited > 0.29 and record["wait_share"] <= 1


@pytest.mark.slow
def test_tensorboard(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config.train.tensorboard, config.train.eval_every = None, 4  # installed: so it writes
    train(config, tmp_path / "run", device="cpu", progress=False)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    tags = events.Tags()
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    for tag, key in (("loss/cls", "loss_cls"), ("loss/seg", "loss_seg"), ("train/lr", "lr"), ("val/seg_miou", None)):
        expected = [
            (r["iteration"], r[key or "val_seg_miou"]) for r in records if r.get(key or "val_seg_miou") is not None
        ]
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [
            (i, pytest.approx(v, rel=1e-6)) for i, v in expected
        ]
    assert {"label/ignored", "pairs/same", "train/images_per_s", "train/wait_share"} <= set(tags["scalars"])
    assert sorted(tags["images"]) == [f"images/v{i}" for i in range(4)]
    pictures = events.Images("images/v1")
    assert [picture.step for picture in pictures] == [4, 8]
    assert (pictures[0].height, pictures[0].width) == (48, 5 * 64 + 4 * 4)

    config.train.tensorboard = False
    train(config, tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run/tensorboard").exists() and (tmp_path / "run/previous/1/tensorboard").is_dir()


def test_missing_tensorboard_is_reported(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afa.training.board.find_spec", lambda _: None)
    config.train.iterations, config.train.tensorboard = 1, None
    train(config, tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run/tensorboard").exists()
    config.train.tensorboard = True
    with pytest.raises(UserError, match=r"train\.tensorboard is true, but the package is not installed"):
        train(config, tmp_path / "run", device="cpu", progress=False)


def test_panels_without_truth() -> None:
    import numpy as np

    label = np.zeros((6, 8), np.int64)
    sample = Example(
        name="one",
        image=np.zeros((6, 8, 3), np.uint8),
        tags=[],
        cam=np.zeros((6, 8)),
        cam_label=label,
        walk_label=label,
        par_label=label,
        prediction=label,
        truth=label + 255,
        iou=0.0,
    )
    assert panels(sample).shape == (6, 4 * 8 + 3 * 4, 3)
    sample["truth"] = label
    assert panels(sample).shape == (6, 5 * 8 + 4 * 4, 3)
