"""Export of pseudo labels and the snapshots saved during training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import afa_ext
from afa.commands.cli import main
from afa.config import Config, to_yaml
from afa.data import TaggedDataset
from afa.data.visualize import PALETTE
from afa.evaluation.evaluate import evaluate
from afa.evaluation.metrics import SegmentationMetrics
from afa.labeling.inference import infer
from afa.labeling.label_maker import SOURCES, LabelMaker
from afa.model import AFANet, Backbone, build_model
from afa.model.network import save_model
from afa.training.loop import train
from afa.training.snapshots import load_snapshots, snapshot
from afa.training.step import TrainStep


@pytest.fixture
def run(tiny_config: Any, voc_root: Path, tmp_path: Path) -> Path:
    """A run folder with a model of random weights for the tiny tree."""
    torch.manual_seed(0)
    config = tiny_config()
    config.data.root = str(voc_root)
    model = build_model(config.model, 3).eval()
    model.classifier.weight.data.normal_()
    model.get_parameter("decoder.predict.weight").data.normal_()
    save_model(tmp_path / "run/model.safetensors", model, config, ["square", "disc", "stripes"])
    (tmp_path / "run/config.yaml").write_text(to_yaml(config))
    return tmp_path / "run"


def _loaded(run: Path) -> tuple[AFANet, Config, TaggedDataset]:
    from afa.model import load_model

    model, _, config = load_model(run / "model.safetensors")
    return model, config, TaggedDataset(config.data.root, "train", train=False, with_mask=False)


def _export(run: Path, out: Path, *more: str) -> dict[str, np.ndarray]:
    assert main(["pseudo-labels", str(run), "--out", str(out), "--device=cpu", "--quiet", *more]) == 0
    return {path.stem: np.array(Image.open(path)) for path in out.glob("*.png")}


@pytest.mark.parametrize("source", SOURCES)
def test_files_are_the_labels(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    model, config, dataset = _loaded(run)
    config.labels.low, config.labels.high = 0.3, 0.6
    settings = ["labels.low=0.3", "labels.high=0.6"]
    found = _export(run, tmp_path / "out", "--source", source, *settings)
    assert found.keys() == set(dataset.names)
    shown = capsys.readouterr().out
    assert "6 labels of 'train'" in shown and "images per second" in shown
    metrics = SegmentationMetrics(4)
    ignored = 0
    for number, name in enumerate(dataset.names):
        item = dataset[number]
        made = LabelMaker.for_training(config).from_images(model, item["image"][None], item["tags"][None], (source,))
        label = made.maps[source][0].numpy()
        assert np.array_equal(found[name], label)
        assert set(np.unique(label)) <= {0, 255, *(1 + np.flatnonzero(item["tags"]))}, "only the image's tags"
        ignored += (label == 255).sum()
        truth = dataset.mask(number, label.shape).astype(np.int64)
        truth[label == 255] = 255
        metrics.update(torch.from_numpy(label)[None], torch.from_numpy(truth)[None])
    assert (ignored > 0) == (source != "seg")
    assert f"mIoU {metrics.compute()['miou']:.3f} on 6 images" in shown
    picture = Image.open(tmp_path / "out/t0.png")
    assert picture.mode == "P" and np.array_equal(np.asarray(picture.convert("RGB")), PALETTE[found["t0"]])
    if source != "seg":
        known = _export(run, tmp_path / "known", "--source", source, "--no-ignore", *settings)
        assert all((label != 255).all() for label in known.values())


def test_labels_are_those_of_training(run: Path) -> None:
    """The walk and PAR labels of a whole image are the targets that a training step computes for it."""
    model, config, dataset = _loaded(run)
    item = dataset[0]
    image, tags = item["image"][None, :, :48, :48].contiguous(), item["tags"][None]
    train_step = TrainStep(model, config)
    model.eval()
    ours = LabelMaker.for_training(config).from_images(model, image, tags, ("par", "walk")).maps
    batch = {"image": image, "tags": tags, "box": torch.tensor([[0, 48, 0, 48]])}
    with torch.no_grad():
        inputs = model.normalize(image)
        cam = model(inputs, want=("cam",)).cam
        for phase in ("par", "walk"):
            targets = train_step.targets(batch, image, inputs, cam, phase)
            assert torch.equal(targets.labels, ours[phase])


def _logits(model: AFANet, images: torch.Tensor, config: Config) -> torch.Tensor:
    logits = infer(model, images, config, {"seg"}).seg_logits
    assert logits is not None
    return logits


def test_seg_is_the_best_of_the_tagged(run: Path) -> None:
    model, config, dataset = _loaded(run)
    item = dataset[0]
    logits = _logits(model, item["image"][None], config)[0].clone()
    logits[1:][item["tags"] == 0] = -torch.inf
    made = LabelMaker.for_training(config).from_images(model, item["image"][None], item["tags"][None], ("seg",))
    ours = made.maps["seg"][0]
    assert (ours != logits.argmax(0)).sum() <= 1
    assert (ours > 0).any()


def test_crf_of_the_tagged_classes(run: Path, tmp_path: Path) -> None:
    model, config, dataset = _loaded(run)
    plain = _export(run, tmp_path / "plain")
    # Images with one and with two tags in one batch.
    smooth = _export(run, tmp_path / "smooth", "eval.crf=true", "eval.crf_iterations=3", "eval.batch_size=6")
    assert smooth.keys() == plain.keys()
    for number, name in enumerate(dataset.names):
        own = np.array([0, *(1 + np.flatnonzero(dataset.tags[number]))])
        image = dataset[number]["image"][None]
        probabilities = _logits(model, image, config)[:, own].softmax(1)
        refined = afa_ext.dense_crf(image, probabilities, num_iter=3, gaussian=(3, 3), bilateral=(64, 5, 4))
        assert (smooth[name] != own[refined[0].argmax(0).numpy()]).sum() <= 1
    assert any((smooth[name] != plain[name]).any() for name in plain)


def test_crf_settings_of_a_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels of other CRF settings are refused; the same settings can be given as a preset or one by one."""
    out = tmp_path / "out"
    preset = ("eval.crf=true", "eval.crf_preset=psa")
    _export(run, out, "--shard=1/3", *preset)
    same = ("eval.crf=true", "eval.crf_preset=irn", "eval.crf_bilateral=80,13,10")
    assert len(_export(run, out, "--shard=2/3", *same)) == 4
    for other in (preset[:1], (*preset, "eval.crf_iterations=2"), ()):
        assert main(["pseudo-labels", str(run), "--out", str(out), "--device=cpu", "--quiet", *other]) == 2
        assert "different eval" in capsys.readouterr().err


@pytest.mark.slow
def test_shards_and_restarts_give_the_same_files(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _export(run, tmp_path / "whole", "--source=par", "--cams")
    out = tmp_path / "parts"
    assert len(_export(run, out, "--source=par", "--cams", "--shard=1/4")) == 1
    part = _export(run, out, "--source=par", "--cams", "--shard=4/4")
    assert len(part) == 3
    stamp = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    lost = out / f"{min(part)}.png"
    lost.write_bytes(lost.read_bytes()[:60])  # cut short by another program
    (out / f"cams/{max(part)}.npz").unlink()
    capsys.readouterr()
    again = _export(run, out, "--source=par", "--cams")
    assert "written  5 labels of 'train'" in (shown := capsys.readouterr().out) and "(1 already existed)" in shown
    assert "on 6 images" in shown, "what was there is measured too"
    kept = [name for name, when in stamp.items() if (out / name).stat().st_mtime_ns == when]
    assert len(kept) == 1
    assert again.keys() == whole.keys()
    for name, label in whole.items():
        assert np.array_equal(again[name], label)
        first, second = (np.load(folder / f"cams/{name}.npz") for folder in (tmp_path / "whole", out))
        assert np.array_equal(first["classes"], second["classes"]) and np.array_equal(first["cams"], second["cams"])
        assert first["cams"].dtype == np.float16 and first["cams"].shape == (len(first["classes"]), *label.shape)
        assert 0.9 < first["cams"].max() <= 1


def test_labels_have_the_size_of_the_picture(run: Path, tmp_path: Path) -> None:
    found = _export(run, tmp_path / "out", "data.largest_side=32")
    assert all(label.shape == (48, 64) for label in found.values())


def test_images_without_masks_are_reported(
    run: Path, voc_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (voc_root / "SegmentationClass").glob("t*.png"):
        path.unlink()
    _export(run, tmp_path / "out")
    assert "no masks, so the labels can't be evaluated" in capsys.readouterr().out


def test_mistakes_give_a_one_line_error(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*more: str) -> str:
        assert main(["pseudo-labels", str(run), "--device=cpu", "--quiet", *more]) == 2
        return capsys.readouterr().err

    assert "did you mean 'walk'" in error("--out", "x", "--source=wlak")
    for shard in ("0/2", "3/2", "2", "a/b"):
        assert "--shard must be I/N" in error("--out", "x", f"--shard={shard}")
    out = tmp_path / "out"
    _export(run, out, "--source=cam", "--shard=1/6")
    assert "different source" in error("--out", str(out), "--source=par")
    assert "different labels" in error("--out", str(out), "--source=cam", "labels.low=0.2")
    assert json.loads((out / "labels.json").read_text())["source"] == "cam"
    (out / "labels.json").unlink()
    assert "did not write" in error("--out", str(out), "--source=cam")
    assert "Segmentation/all.txt" in error("--out", "x", "--split=all")


def test_snapshot(run: Path, tmp_path: Path) -> None:
    model, config, _ = _loaded(run)
    dataset = TaggedDataset(config.data.root, "train", train=True, crop_size=64, with_mask=False)
    model.train()
    state = torch.get_rng_state()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = snapshot(model, dataset, config, tmp_path / "kept", 30, count=3)
    assert path == tmp_path / "kept/snapshots/00000030.npz"
    assert model.training and torch.equal(torch.get_rng_state(), state), "training continues as without it"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    (tmp_path / "kept/snapshots/00000040.npz").write_bytes(b"cut")
    found = load_snapshots(tmp_path / "kept")
    assert list(found) == [30]
    assert [item["name"] for item in found[30]] == ["t0", "t2", "t4"]
    assert {item["phase"] for item in found[30]} == {"walk"}
    snapshot(model, dataset, config, tmp_path / "kept", config.train.classify_until, count=1)
    assert load_snapshots(tmp_path / "kept")[3][0]["phase"] == "classify"
    model.eval()
    for item in found[30]:
        number = dataset.names.index(item["name"])
        assert item["tags"] == [dataset.classes[i] for i in np.flatnonzero(dataset.tags[number])]
        image = torch.from_numpy(item["image"].transpose(2, 0, 1).copy())[None]
        labels = LabelMaker.for_training(config).from_images(model, image, dataset.tags[number][None])
        assert np.array_equal(item["walk"], labels.maps["walk"][0])
        assert np.array_equal(item["par"], labels.maps["par"][0])
        assert np.array_equal(item["prediction"], _logits(model, image, config)[0].argmax(0))
        assert np.abs(item["cam"] - labels.cams[0].amax(0).numpy()).max() < 1 / 200
    assert load_snapshots(tmp_path / "none") == {}


def test_cam_label_of_one_threshold_is_that_of_evaluation(run: Path) -> None:
    model, config, _ = _loaded(run)
    maker = LabelMaker.for_training(config, ignore=False)
    dataset = TaggedDataset(config.data.root, "val", train=False, with_mask=True)
    for sample in evaluate(model, dataset, config, progress=False, keep=4).samples:
        number = dataset.names.index(sample["name"])
        item = dataset[number]
        labels = maker.from_images(model, item["image"][None], item["tags"][None], ("cam", "par")).maps
        assert (labels["cam"][0].numpy() != sample["cam_label"]).sum() <= 1
        assert (labels["par"][0].numpy() != sample["par_label"]).sum() <= 1


def test_snapshots_do_not_change_training(
    tiny_config: Any, voc_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    config.data.root = str(voc_root)
    train(config, tmp_path / "with", progress=False)
    monkeypatch.setattr("afa.training.loop.snapshot", lambda *_: None)
    train(config, tmp_path / "without", progress=False)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without"))
    assert one == other


def test_predict_upright_at_several_scales(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that its EXIF data turns is predicted as it is seen, and options change the mask."""
    monkeypatch.chdir(tmp_path)
    _, config, dataset = _loaded(run)
    upright = Image.open(dataset.paths[0]).convert("RGB")
    upright.save("upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise when shown
    upright.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)

    def mask(*more: str) -> np.ndarray:
        options = ["upright.png", "turned.png", "--out=out", "--device=cpu", "--quiet", *more]
        assert main(["predict", str(run), *options]) == 0
        found = [np.array(Image.open(f"out/masks/{name}.png")) for name in ("upright", "turned")]
        for folder in ("overlays", "cams"):
            assert Image.open(f"out/{folder}/turned.png").size == upright.size
        assert found[0].shape == (48, 64) and np.array_equal(found[0], found[1])
        return found[0]

    plain, several = mask(), mask("--scales", "1,0.5", "--flip")
    assert (plain != several).any()
    model, config, _ = _loaded(run)
    config.eval.scales, config.eval.flip = (1.0, 0.5), True
    pixels = torch.from_numpy(np.array(upright).transpose(2, 0, 1).copy())[None]
    expected = _logits(model, pixels, config)
    assert np.array_equal(several, expected[0].argmax(0))
    config.eval.scales, config.eval.flip = (1.0,), False
    refined = afa_ext.dense_crf(pixels, _logits(model, pixels, config).softmax(1), **afa_ext.CRF_PRESETS["afa"])
    smooth = mask("--crf")
    assert np.array_equal(smooth, refined[0].argmax(0)) and (smooth != plain).any()


def test_predict_in_batches_and_other_formats(
    run: Path, voc_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of one size share forward passes, without an effect on the masks, and every format has the same masks."""
    monkeypatch.chdir(tmp_path)
    photos = [str(voc_root / f"JPEGImages/t{i}.jpg") for i in range(5)]
    Image.open(photos[0]).resize((40, 56)).save("other.png")
    sizes = []

    def counted(model: Any, pixels: torch.Tensor, *more: Any, **options: Any) -> Any:
        sizes.append(len(pixels))
        return infer(model, pixels, *more, **options)

    monkeypatch.setattr("afa.commands.predict.infer", counted)

    def predict(kind: str, *more: str) -> Path:
        out = tmp_path / f"{kind}{len(more)}"
        images = [*photos[:3], "other.png", *photos[3:]]
        options = ["--out", str(out), "--format", kind, "--device=cpu", "--quiet", *more]
        assert main(["predict", str(run), *images, *options]) == 0
        assert re.search(r"written  6 images to .* \([\d.e-]+ images/s", capsys.readouterr().out)
        return out / "masks"

    names = [*(f"t{i}" for i in range(5)), "other"]
    alone = predict("palette")
    single = {name: np.array(Image.open(alone / f"{name}.png")) for name in names}
    assert sizes == [1] * 6
    sizes.clear()
    together = predict("index", "--batch-size", "2")
    assert sizes == [2, 1, 1, 2]
    for name in names:
        mask = np.array(Image.open(together / f"{name}.png"))
        assert mask.shape == single[name].shape and (mask != single[name]).mean() < 0.001
    content = json.loads((predict("coco") / "coco.json").read_text())
    assert {image["file_name"] for image in content["images"]} == {*(f"t{i}.jpg" for i in range(5)), "other.png"}
    pixels = sum(one["area"] for one in content["annotations"])
    assert pixels == sum((mask > 0).sum() for mask in single.values()) > 0
    polygons = predict("labelme")
    assert {path.name for path in polygons.glob("*.json")} == {f"{name}.json" for name in names}


def test_predict_reports_wrong_options(run: Path, voc_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["predict", str(run), str(voc_root / "JPEGImages/t0.jpg"), "--device=cpu", "--quiet"]
    assert main([*command, "--format", "labelmy"]) == 2
    assert "did you mean 'labelme'" in capsys.readouterr().err
    assert main([*command, "--batch-size", "0"]) == 2
    assert "eval.batch_size" in capsys.readouterr().err


def test_predict_reports_invalid_scales(run: Path, voc_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for scales in ("0", "big"):
        photo = str(voc_root / "JPEGImages/t0.jpg")
        assert main(["predict", str(run), photo, "--scales", scales, "--device=cpu", "--quiet"]) == 2
        assert "eval.scales" in capsys.readouterr().err


def test_predict_runs_each_scale_and_direction_once(
    run: Path, voc_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes, CAM and segmentation of a scale come from one forward; with --flip both directions from one batch."""
    sizes: list[tuple[int, int]] = []
    real = Backbone.forward

    def counted(self: Backbone, images: torch.Tensor, record: bool = False) -> Any:
        sizes.append((len(images), images.shape[3]))
        return real(self, images, record)

    monkeypatch.setattr(Backbone, "forward", counted)
    picture = str(voc_root / "JPEGImages/t0.jpg")
    command = ["predict", str(run), picture, "--out", str(tmp_path / "out"), "--device=cpu", "--quiet"]
    assert main(command) == 0
    # CAM scales 1, 0.5 and 1.5 with mirror images; at scale 1 the classes and the segmentation of the image as well.
    assert sizes == [(1, 64), (1, 64), (2, 32), (2, 96)]
    sizes.clear()
    assert main([*command, "--scales", "0.5,1.5", "--flip"]) == 0
    assert sizes == [(1, 64), (1, 64), (2, 32), (2, 96)]


def test_rules_of_training_and_of_evaluation() -> None:
    """Published: two scores, 0.35 and 0.55, to learn from; 0.45 for CAM and PAR and 0.35 for the walk to be scored."""
    config = Config()
    learned, scored = LabelMaker.for_training(config), LabelMaker.for_evaluation(config)
    assert (learned.thresholds, learned.walk_thresholds) == ((0.35, 0.55), (0.35, 0.55))
    assert (scored.thresholds, scored.walk_thresholds) == ((0.45, 0.45), (0.35, 0.35))
    assert (learned.walk_scale, scored.walk_scale) == (1.5, 1.0)
    assert learned.refine_walk and not scored.refine_walk
    plain = LabelMaker.for_training(config, ignore=False)
    assert (plain.thresholds, plain.walk_thresholds) == (scored.thresholds, scored.walk_thresholds)
    config.labels.walk_scale = 1.5
    assert LabelMaker.for_evaluation(config).walk_scale == 1.5
