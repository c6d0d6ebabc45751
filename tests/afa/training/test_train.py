"""The training loop: schedule, groups, phases, files, resuming."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import afa.labeling.label_maker as maker_module
import afa.training.loop
import afa_ext
from afa.config import Config, TrainConfig, load_config
from afa.errors import UserError
from afa.model import build_model, load_model
from afa.model.precision import tf32
from afa.training.checkpoint import best_model, forget_later_best, save_if_best
from afa.training.loop import train
from afa.training.schedule import learning_rate_factor, parameter_groups, phase_of
from afa.training.snapshots import load_snapshots
from afa.training.step import TrainStep


@pytest.fixture
def config(tiny_config: Any, voc_root: Path) -> Config:
    config = tiny_config()
    config.data.root = str(voc_root)
    return config


def batch_of(side: int = 64, boxes: str = "whole") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    box = torch.tensor([[0, side, 0, side]] * 3)
    if boxes == "ragged":
        box[1] = torch.tensor([4, side, 0, side - 10])
    return {
        "image": torch.randint(0, 256, (3, 3, side, side), generator=generator, dtype=torch.uint8),
        "tags": torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 1]]),
        "box": box,
        "name": ["a", "b", "c"],
    }


def run_train(config: Config, run: Path, **options: Any) -> dict[str, Tensor]:
    train(config, run, device="cpu", progress=False, **options)
    return load_file(run / "model.safetensors")


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different


def test_schedule() -> None:
    config = (
        TrainConfig()
    )  # as published: 20,000 iterations, 1,500 of warm-up from 1e-6 of the rate to the whole, power 1
    rate = [6e-5 * learning_rate_factor(config, i) for i in (0, 750, 1499, 1500, 10000, 19999)]
    expected = [6e-11, 3.000003e-5, 5.996e-5, 5.55e-5, 3e-5, 3e-9]
    assert rate == pytest.approx(expected, rel=1e-4)
    config.poly_power = 2.0
    assert learning_rate_factor(config, 10000) == pytest.approx(0.25)
    config.warmup = 0
    assert learning_rate_factor(config, 0) == 1
    # As published, a phase ends after its last iteration, not before it.
    phases = [phase_of(config, i) for i in (0, 2000, 2001, 6000, 6001)]
    assert phases == ["classify", "classify", "par", "par", "walk"]


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_parameter_groups(tiny_config: Any, factor: float) -> None:
    config = tiny_config()
    config.train.norm_lr_factor = factor
    model = build_model(config.model, 3)
    groups = {group["name"]: group for group in parameter_groups(model, config.train)}
    assert list(groups) == (["backbone", "norms", "heads"] if factor else ["backbone", "heads"])
    assert groups["backbone"]["lr"] == config.train.lr
    assert groups["heads"]["lr"] == 10 * config.train.lr
    norm = model.get_parameter("backbone.net.stages.0.norm.weight")
    assert norm.requires_grad == bool(factor)
    if factor:
        assert groups["norms"]["lr"] == 0.5 * config.train.lr
        assert groups["norms"]["weight_decay"] == 0
        assert any(p is norm for p in groups["norms"]["params"])
    assert groups["backbone"]["weight_decay"] == groups["heads"]["weight_decay"] == config.train.weight_decay == 0.01
    # The decoder's batch norm is part of a head and is trained.
    assert any(p is model.get_parameter("decoder.norm.weight") for p in groups["heads"]["params"])
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("freeze", [2, "all"])
def test_frozen_blocks_are_not_trained(tiny_config: Any, freeze: Any) -> None:
    config = tiny_config()
    config.model.freeze = freeze
    train_step = TrainStep(build_model(config.model, 3), config)
    before = copy.deepcopy(train_step.model.state_dict())
    for iteration in (2, 4, 7):
        train_step.update(batch_of(), iteration)
    trained = {name for name, value in train_step.model.state_dict().items() if not torch.equal(value, before[name])}
    frozen = {name for name, parameter in train_step.model.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert not trained & frozen
    assert {"classifier.weight", "decoder.predict.weight", "affinity_head.weight"} <= trained
    assert any(name.startswith("backbone.") for name in trained) == (freeze != "all")


def test_frozen_norms_stay(tiny_config: Any) -> None:
    config = tiny_config()
    config.train.norm_lr_factor = 0.0
    torch.manual_seed(0)
    train_step = TrainStep(build_model(config.model, 3), config)
    before = copy.deepcopy(train_step.model.state_dict())
    for iteration in (2, 4, 7):
        train_step.update(batch_of(), iteration)
    after = train_step.model.state_dict()
    assert torch.equal(after["backbone.net.stages.0.norm.weight"], before["backbone.net.stages.0.norm.weight"])
    assert not torch.equal(
        after["backbone.net.patch_embed.proj.weight"], before["backbone.net.patch_embed.proj.weight"]
    )


@pytest.mark.parametrize("boxes", ["whole", "ragged"])
def test_phases_compute_what_they_need(tiny_config: Any, monkeypatch: pytest.MonkeyPatch, boxes: str) -> None:
    config = tiny_config()
    config.labels.cam_scales = (1.0, 0.5)
    torch.manual_seed(0)
    train_step = TrainStep(build_model(config.model, 3), config)
    ran: list[str] = []
    for name in ("par_labels", "walk_labels", "par_weights"):
        real = getattr(maker_module, name)

        def spy(*args: Any, name: str = name, real: Any = real, **kw: Any) -> Any:
            ran.append(name)
            return real(*args, **kw)

        monkeypatch.setattr(maker_module, name, spy)
    train_step.model.decoder.register_forward_hook(lambda *_: ran.append("decoder"))
    train_step.model.backbone.register_forward_hook(lambda _, args, __: ran.append(f"backbone {len(args[0])}"))
    batch = batch_of(boxes=boxes)

    train_step.update(batch, 0)
    assert ran == ["backbone 3"]
    ran.clear()
    step = train_step.update(batch, 4)
    # One training forward pass, the mirror images at scale 1, and both at scale 0.5.
    assert ran == ["backbone 3", "decoder", "backbone 3", "backbone 6", "par_weights", "par_labels"]
    assert step.labels is not None and step.pairs is not None
    assert step.labels.shape == (3, 64, 64) and step.pairs.shape == (3, 16, 16)
    assert (step.losses > 0).all()
    ran.clear()
    train_step.update(batch, 7)
    # The largest scale is 1 here: its affinity is wanted with its CAM, from one forward of both directions.
    assert ran[:4] == ["backbone 3", "decoder", "backbone 6", "backbone 6"]
    assert ran[4:] == ["par_weights", "par_labels", "walk_labels"]
    ran.clear()
    config.labels.affinity_from_walk = True
    train_step.update(batch, 7)
    assert ran[4:] == (["par_weights", "walk_labels"] if boxes == "whole" else ["walk_labels"])


def test_affinity_target_follows_the_segmentation_only_if_configured(tiny_config: Any) -> None:
    config = tiny_config()
    torch.manual_seed(0)
    train_step = TrainStep(build_model(config.model, 3), config)
    train_step.model.classifier.weight.data.normal_()
    batch = batch_of()

    def pairs_of(phase: str) -> torch.Tensor:
        pairs = train_step.losses(batch, phase)[0].pairs
        assert pairs is not None
        return pairs

    pairs = {}
    for switched in (False, True):
        config.labels.affinity_from_walk = switched
        pairs[switched] = pairs_of("walk")
    assert torch.equal(pairs[False], pairs_of("par"))
    assert not torch.equal(pairs[True], pairs[False])


def test_drop_path_is_active_in_the_forward_passes_for_labels(tiny_config: Any) -> None:
    config = tiny_config()
    config.model.backbone_args["drop_path_rate"] = 0.9
    torch.manual_seed(0)
    train_step = TrainStep(build_model(config.model, 3), config)
    train_step.model.classifier.weight.data.normal_()
    first, second = (train_step.losses(batch_of(), "par")[0] for _ in range(2))
    assert first.labels is not None and second.labels is not None
    assert not torch.equal(first.labels, second.labels)
    assert not torch.equal(first.losses, second.losses)
    assert all(module.training for module in train_step.model.modules())


@pytest.mark.slow
def test_overfits_a_single_batch(tiny_config: Any) -> None:
    config = tiny_config()
    config.train.iterations, config.train.classify_until, config.train.par_until = 70, 30, 60
    config.train.poly_power, config.train.weight_seg, config.train.weight_affinity = 0.0, 1.0, 1.0
    torch.manual_seed(0)
    train_step = TrainStep(build_model(config.model, 3), config)
    batch = batch_of()
    losses = torch.stack([train_step.update(batch, i).losses for i in range(70)])
    assert losses.isfinite().all()
    assert losses[0, 0] > 0.6
    assert losses[27:30, 0].mean() < 0.1
    assert (losses[:31, 1:] == 0).all()
    assert losses[57:60, 1].mean() < 0.7 * losses[31, 1]
    assert losses[57:60, 2].mean() < losses[31, 2]


def test_bf16_is_near_fp32(tiny_config: Any) -> None:
    """In the first step of each phase, from the same weights; labels may flip at ties, so no closer."""
    found = {}
    for precision in ("fp32", "bf16"):
        config = tiny_config()
        config.train.precision = precision
        torch.manual_seed(0)
        train_step = TrainStep(build_model(config.model, 3), config)
        results = [train_step.losses(batch_of(), phase)[0] for phase in ("classify", "par")]
        found[precision] = torch.stack([result.losses for result in results])
        assert train_step.update(batch_of(), 7).losses.isfinite().all()
    torch.testing.assert_close(found["bf16"], found["fp32"], rtol=0.05, atol=0.01)


def test_adam_counts_steps_of_the_heads_from_the_start(tiny_config: Any) -> None:
    """As published, where they are in the graph with a loss weight of 0; so the first gradients cause larger steps."""
    config = tiny_config()
    config.train.weight_decay = 0.0
    torch.manual_seed(0)
    train_step = TrainStep(build_model(config.model, 3), config)
    predict, affinity = (
        train_step.model.get_parameter(name) for name in ("decoder.predict.weight", "affinity_head.weight")
    )
    before = predict.clone()
    for iteration in range(4):
        train_step.update(batch_of(), iteration)
    assert torch.equal(predict, before), "a gradient of 0 changes nothing"
    for parameter in (predict, affinity):
        state = train_step.optimizer.state[parameter]
        assert float(state["step"]) == 4 and not state["exp_avg_sq"].any()


def test_tf32_is_on_during_a_step_only(tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn: Any = torch.backends.cudnn  # its `conv` has no type
    backends = (torch.backends.cuda.matmul, cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    with tf32(False):
        assert [backend.fp32_precision for backend in backends] == before
    with tf32(True):
        assert [backend.fp32_precision for backend in backends] == ["tf32", "tf32"]
    assert [backend.fp32_precision for backend in backends] == before
    # On a CPU the setting changes nothing.
    losses = []
    for name in ("fp32", "tf32"):
        config = tiny_config()
        config.train.precision = name
        torch.manual_seed(0)
        losses.append(TrainStep(build_model(config.model, 3), config).update(batch_of(), 7).losses)
    assert torch.equal(*losses)


class TestRun:
    def test_files_and_log(self, config: Config, tmp_path: Path) -> None:
        seen: list[Any] = []
        run = tmp_path / "run"
        train(config, run, on_log=seen.append, progress=False)
        files = ["checkpoints", "config.yaml", "log.jsonl", "model.safetensors", "snapshots"]
        assert sorted(path.name for path in run.iterdir() if path.name[0] != ".") == files
        # Of the ends of the three phases.
        assert list(load_snapshots(run)) == [4, 7, 9]
        assert load_config(run / "config.yaml") == config
        records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert records == seen
        assert [r["iteration"] for r in records] == [2, 4, 6, 8, 9]
        assert [r["phase"] for r in records] == ["classify", "classify", "par", "walk", "walk"]
        assert [record["loss_seg"] is None for record in records[:2]] == [True, True]
        for record in records[2:]:
            # Walk labels of a model that has learned nothing may ignore every pixel.
            least = 0 if record["phase"] == "walk" else 1e-6
            assert record["loss_seg"] >= least and record["loss_aff"] > 0 and record["images_per_s"] > 0
            assert 0 <= record["label_ignored"] <= 1 and 0 <= record["pairs_same"] <= 1
        assert records[0]["lr"] == pytest.approx(config.train.lr * learning_rate_factor(config.train, 1))
        model, classes, _ = load_model(run / "model.safetensors")
        assert classes == ["square", "disc", "stripes"] and model.num_classes == 3

    @pytest.mark.slow
    def test_repeats_bit_for_bit(self, config: Config, tmp_path: Path) -> None:
        first = run_train(config, tmp_path / "a")
        torch.rand(7)  # another state of the global generator must not matter
        config.data.workers = 1
        assert_equal(first, run_train(config, tmp_path / "b"))
        config.train.seed = 1
        other = run_train(config, tmp_path / "c")
        assert not torch.equal(first["classifier.weight"], other["classifier.weight"])

    @pytest.mark.parametrize("killed_at", [5, 8])
    @pytest.mark.slow
    def test_resumes_as_if_never_stopped(
        self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
    ) -> None:
        config.model.backbone_args["drop_path_rate"] = 0.2  # so that random state matters
        config.train.checkpoint_every, config.train.log_every = 3, 1
        whole = run_train(config, tmp_path / "whole")
        real = TrainStep.update

        def killed(self: TrainStep, batch: Any, iteration: int) -> Any:
            if iteration == killed_at:
                raise KeyboardInterrupt
            return real(self, batch, iteration)

        run = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr(TrainStep, "update", killed)
            with pytest.raises(KeyboardInterrupt):
                run_train(config, run)
        assert not (run / "model.safetensors").exists()
        saved = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert saved == [f"{done:08d}" for done in range(3, killed_at, 3)]
        with open(run / "log.jsonl", "a") as file:
            file.write('{"iterat')  # a line the kill cut short
        assert_equal(whole, run_train(config, run, resume=True))

        def losses(folder: Path) -> list[Any]:
            lines = (folder / "log.jsonl").read_text().splitlines()
            return [[json.loads(line)[key] for key in ("iteration", "loss_cls", "loss_aff")] for line in lines]

        assert losses(run) == losses(tmp_path / "whole")

    def test_an_incomplete_checkpoint_is_ignored(self, config: Config, tmp_path: Path) -> None:
        run = tmp_path / "run"
        (run / "checkpoints" / ".00000003.tmp").mkdir(parents=True)
        with pytest.raises(UserError, match="no checkpoint"):
            run_train(config, run, resume=True)

    def test_resume_refuses_another_configuration(
        self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config.train.checkpoint_every = 3
        monkeypatch.setattr(afa.training.loop, "finish", _full)
        with pytest.raises(RuntimeError, match="disk full"):
            run_train(config, tmp_path / "run")
        config.train.lr = 5e-4
        with pytest.raises(UserError, match=r"train\.lr is 0\.0005.*started with 0\.001"):
            run_train(config, tmp_path / "run", resume=True)

    def test_an_earlier_run_is_moved_away(self, config: Config, tmp_path: Path) -> None:
        config.train.iterations = 1
        run = tmp_path / "run"
        first = run_train(config, run)
        (run / "metrics.json").write_text("{}")
        config.train.seed = 5
        run_train(config, run)
        assert not (run / "metrics.json").exists()
        assert_equal(load_file(run / "previous" / "1" / "model.safetensors"), first)
        assert len((run / "log.jsonl").read_text().splitlines()) == 1

    @pytest.mark.parametrize(("name", "column"), [("classification", 0), ("segmentation", 1), ("affinity", 2)])
    def test_a_loss_that_is_not_finite_is_reported(
        self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, column: int
    ) -> None:
        real = TrainStep.update

        def spoilt(self: TrainStep, batch: Any, iteration: int) -> Any:
            step = real(self, batch, iteration)
            if iteration == 6:
                step.losses[column] = float("nan")
            return step

        monkeypatch.setattr(TrainStep, "update", spoilt)
        config.train.log_every = 5
        with pytest.raises(UserError, match=f"the {name} loss became nan at iteration 7; lower train.lr"):
            run_train(config, tmp_path / "run")
        assert not (tmp_path / "run" / "model.safetensors").exists()

    def test_evaluates_during_training(self, config: Config, tmp_path: Path) -> None:
        config.train.eval_every = 4
        records: list[Any] = []
        train(config, tmp_path / "run", on_log=records.append, progress=False)
        measured = [record for record in records if "val_seg_miou" in record]
        assert [record["iteration"] for record in measured] == [4, 8]
        assert all(0 <= record[f"val_{row}_miou"] <= 1 for record in measured for row in ("cam", "walk", "par", "seg"))

    def test_keeps_the_best(self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The evaluation after iteration 3 is made the best one: its weights are saved, whatever the later scores."""
        config.train.eval_every, config.train.checkpoint_every, config.train.keep_best = 3, 3, "seg"
        config.train.ema = 0.5
        real = afa.training.loop.evaluate
        calls: list[int] = []

        def evaluated(*args: Any, **options: Any) -> Any:
            result = real(*args, **options)
            result.seg["miou"] = [0.9, 0.4, 0.8][len(calls)]
            calls.append(1)
            return result

        monkeypatch.setattr(afa.training.loop, "evaluate", evaluated)
        run = tmp_path / "run"
        model = train(config, run, device="cpu", progress=False)
        assert len(calls) == 3, "the last iteration is evaluated too"
        (best,) = (run / "best").iterdir()
        assert best.name == "00000003_0.900000.safetensors"
        saved = load_file(run / "model.safetensors")
        assert_equal(saved, load_file(best))
        assert model is not None
        assert_equal(saved, dict(model.state_dict()))

    def test_no_best_without_masks(self, config: Config, tmp_path: Path) -> None:
        for path in (Path(config.data.root) / "SegmentationClass").glob("v*.png"):
            path.unlink()
        config.train.keep_best = "walk"
        with pytest.raises(UserError, match=r"train\.keep_best is walk, but the split 'val' has no masks"):
            train(config, tmp_path / "run", device="cpu", progress=False)

    def test_a_later_best_model_is_removed_when_resuming_before_it(self, config: Config, tmp_path: Path) -> None:
        train_step = TrainStep(build_model(config.model, 3), config)
        for iteration, score in ((3, 0.5), (6, 0.4), (9, 0.7)):
            save_if_best(tmp_path, train_step, ["a", "b", "c"], iteration, score)
        best = best_model(tmp_path)
        assert best is not None and best[1:] == (9, 0.7)
        forget_later_best(tmp_path, 6)
        assert best_model(tmp_path) is None

    def test_bad_backbone_leaves_the_folder_alone(self, config: Config, tmp_path: Path) -> None:
        config.model.backbone, config.model.backbone_args = "resnet18", {}
        with pytest.raises(UserError, match="resnet18"):
            run_train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def _full(*_: Any) -> None:
    raise RuntimeError("disk full")


def test_affinity_labels_follow_their_settings(tiny_config: Any) -> None:
    """Tokens take the label of their corner or of their center."""
    config = tiny_config()
    torch.manual_seed(0)
    train_step = TrainStep(build_model(config.model, 3), config)
    train_step.model.classifier.weight.data.normal_()
    stride = train_step.model.stride
    for sampling, offset in (("corner", 0), ("center", stride // 2)):
        config.labels.affinity_sampling = sampling
        result = train_step.losses(batch_of(), "par")[0]
        assert result.labels is not None and result.pairs is not None and result.affinity_sums is not None
        expected = afa_ext.affinity_labels(
            result.labels, stride=stride, offset=offset, radius=config.labels.walk_radius, background=0
        )
        assert torch.equal(result.pairs, expected)
        assert result.affinity_sums[1].tolist() == [int((expected == group).sum()) for group in range(3)]
