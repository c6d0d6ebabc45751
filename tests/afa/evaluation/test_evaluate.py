"""Evaluation: the four rows, samples, and batches."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import afa_ext
from afa.commands.cli import main
from afa.config import Config, to_yaml
from afa.data.dataset import TaggedDataset
from afa.evaluation.evaluate import evaluate
from afa.evaluation.result import ROWS, EvalResult
from afa.evaluation.store import EvalStore, evaluation_key
from afa.labeling.cam import pack_classes
from afa.labeling.inference import infer, run_scales
from afa.labeling.label_maker import LabelMaker, Labels
from afa.model import AFANet
from afa.model.network import save_model


def segment(model: AFANet, image: torch.Tensor, config: Config) -> torch.Tensor:
    logits = infer(model, image, config, {"seg"}).seg_logits
    assert logits is not None
    return logits


def scores(result: EvalResult) -> list[Any]:
    return [getattr(result, row)["confusion"] for row in ROWS] + [result.f1]


def test_rows_and_samples(setting: tuple[AFANet, TaggedDataset, Config]) -> None:
    model, dataset, config = setting
    model.train()
    result = evaluate(model, dataset, config, progress=False, keep=3)
    assert model.training, "the mode is restored"
    assert result.images == 4 and result.seconds > 0 and 0 <= result.f1 <= 1
    assert [sample["name"] for sample in result.samples] == ["v0", "v2", "v3"]
    confusion = {row: np.zeros((4, 4), int) for row in ROWS}
    for sample in evaluate(model, dataset, config, progress=False, keep=4).samples:
        assert sample["image"].shape == (48, 64, 3) and sample["image"].dtype == np.uint8
        assert sample["cam"].shape == (48, 64) and sample["cam"].min() >= 0 and sample["cam"].max() <= 1
        allowed = {0, *(1 + dataset.classes.index(tag) for tag in sample["tags"])}
        maps = (sample["cam_label"], sample["walk_label"], sample["par_label"], sample["prediction"])
        for row, labels in zip(ROWS, maps, strict=True):
            if row != "seg":
                assert set(np.unique(labels)) <= allowed, "labels use the image's tags"
            known = sample["truth"] != 255
            np.add.at(confusion[row], (sample["truth"][known], labels[known]), 1)
    for row in ROWS:
        assert getattr(result, row)["confusion"] == confusion[row].tolist(), (
            "the saved samples are those that were evaluated"
        )


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 1.5), (0.5,)])
@pytest.mark.parametrize("flip", [False, True])
def test_batch_size_does_not_matter(
    setting: tuple[AFANet, TaggedDataset, Config], scales: tuple[float, ...], flip: bool
) -> None:
    model, dataset, config = setting
    config.eval.scales, config.eval.flip = scales, flip
    one = evaluate(model, dataset, config, progress=False)
    config.eval.batch_size = 3
    three = evaluate(model, dataset, config, progress=False)
    for row in ROWS:
        moved = np.abs(np.subtract(getattr(one, row)["confusion"], getattr(three, row)["confusion"])).sum()
        assert moved <= 4, f"{row}: only ties may fall otherwise"
    assert one.f1 == three.f1


@pytest.mark.parametrize("longer_side", [None, 96])
def test_segmentation_is_the_largest_of_scales_with_flips_averaged(
    setting: tuple[AFANet, TaggedDataset, Config], longer_side: int | None
) -> None:
    """As published: flips averaged, scales fused on the decoder's grid of scale 1, then upsampled."""
    model, dataset, config = setting
    config.eval.scales, config.eval.flip, config.eval.longer_side = (1.5, 1.0), True, longer_side
    image = dataset[0]["image"][None]
    size = image.shape[2:]
    inputs = model.normalize(image)
    if longer_side is not None:
        inputs = torch.nn.functional.interpolate(inputs, size=(72, 96), mode="bilinear", antialias=True)
    parts = []
    with torch.no_grad():
        for scale in (1.0, 1.5):
            x = torch.nn.functional.interpolate(inputs, scale_factor=scale, mode="bilinear")
            parts.append((model(x).seg_logits + model(x.flip(3)).seg_logits.flip(3)) / 2)
    parts[1] = torch.nn.functional.interpolate(parts[1], size=parts[0].shape[2:], mode="bilinear")
    expected = torch.nn.functional.interpolate(torch.stack(parts).amax(0), size=size, mode="bilinear")
    torch.testing.assert_close(segment(model, image, config), expected, rtol=1e-4, atol=1e-4)


def test_tags_decide_the_label_rows(setting: tuple[AFANet, TaggedDataset, Config]) -> None:
    """Without tags every label row is background; the segmentation row does not use them."""
    model, dataset, config = setting
    before = evaluate(model, dataset, config, progress=False)
    dataset.tags = torch.zeros_like(dataset.tags)
    after = evaluate(model, dataset, config, progress=False)
    assert scores(after)[3] == scores(before)[3]
    for row in ("cam", "walk", "par"):
        columns = np.array(getattr(after, row)["confusion"]).sum(0)
        assert columns[0] > 0 and (columns[1:] == 0).all()
    assert np.array(before.cam["confusion"])[:, 1:].sum() > 0


def test_cam_row_is_the_multi_scale_cam(setting: tuple[AFANet, TaggedDataset, Config]) -> None:
    model, dataset, config = setting
    sample = evaluate(model, dataset, config, progress=False, keep=1).samples[0]
    item = dataset[0]
    with torch.no_grad():
        outputs = run_scales(model, model.normalize(item["image"][None]), cam_scales=config.labels.cam_scales)
    classes = pack_classes(item["tags"][None], 3)
    cams = classes.scatter(outputs.class_activation_maps(classes), 3)[0]
    np.testing.assert_allclose(sample["cam"], cams.amax(0).numpy(), rtol=1e-3, atol=1e-4)
    score = config.labels.cam_threshold
    assert score != "auto"
    label = torch.cat([torch.full((1, 48, 64), score), cams]).argmax(0)
    assert (label.numpy() != sample["cam_label"]).sum() <= 1


def test_mean_fusion_is_the_mean(setting: tuple[AFANet, TaggedDataset, Config]) -> None:
    model, dataset, config = setting
    image = dataset[0]["image"][None]

    config.eval.fusion, config.eval.scales, config.eval.flip = "mean", (1.0, 1.5), True
    outputs = infer(model, image, config, {"seg"}).outputs
    (_, small), (_, large) = outputs.seg_logits
    large = torch.nn.functional.interpolate(large, size=small.shape[2:], mode="bilinear")
    expected = torch.nn.functional.interpolate((small + large) / 2, size=image.shape[2:], mode="bilinear")
    torch.testing.assert_close(segment(model, image, config), expected, rtol=1e-5, atol=1e-5)


def test_image_scores_and_extremes(setting: tuple[AFANet, TaggedDataset, Config]) -> None:
    model, dataset, config = setting
    result = evaluate(model, dataset, config, progress=False, keep=3)
    assert list(result.image_iou) == dataset.names
    samples = evaluate(model, dataset, config, progress=False, keep=4).samples
    for sample in samples:
        iou = []
        truth, known = sample["truth"], sample["truth"] != 255
        for label in np.unique(truth[known]):
            both = ((truth == label) & (sample["prediction"] == label) & known).sum()
            iou.append(both / (((truth == label) | (sample["prediction"] == label)) & known).sum())
        assert result.image_iou[sample["name"]] == sample["iou"] == pytest.approx(np.mean(iou))
    order = sorted(dataset.names, key=lambda name: result.image_iou[name])
    assert [sample["name"] for sample in result.worst] == order[:1]
    assert [sample["name"] for sample in result.best] == order[-1:]


def test_crf_row_is_the_crf_of_the_segmentation(setting: tuple[AFANet, TaggedDataset, Config]) -> None:
    model, dataset, config = setting
    without = evaluate(model, dataset, config, progress=False)
    config.eval.crf, config.eval.crf_preset, config.eval.crf_iterations = True, "psa", 2
    result = evaluate(model, dataset, config, progress=False, keep=4)
    assert list(result.rows) == [*ROWS, "crf"]
    assert scores(result) == scores(without)
    expected = np.zeros((4, 4), int)
    for number, sample in enumerate(result.samples):
        image = dataset[number]["image"][None]
        probabilities = segment(model, image, config).softmax(1)
        refined = afa_ext.dense_crf(image, probabilities, num_iter=2, gaussian=(3, 3), bilateral=(80, 13, 10))
        labels = refined[0].argmax(0).numpy()
        assert np.array_equal(labels, sample["prediction"])
        known = sample["truth"] != 255
        np.add.at(expected, (sample["truth"][known], labels[known]), 1)
    assert result.rows["crf"]["confusion"] == expected.tolist()
    assert expected.tolist() != result.seg["confusion"]
    config.eval.batch_size = 4
    batched = evaluate(model, dataset, config, progress=False).rows["crf"]["confusion"]
    assert np.abs(np.subtract(batched, expected)).sum() <= 4, "only ties may fall otherwise"


@pytest.mark.parametrize("crf", [False, True])
def test_a_stopped_evaluation_resumes(
    setting: tuple[AFANet, TaggedDataset, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crf: bool
) -> None:
    model, dataset, config = setting
    config.eval.crf, config.eval.crf_iterations = crf, 1
    whole = evaluate(model, dataset, config, progress=False)
    computed: list[int] = []
    make = LabelMaker.from_images

    def interrupted(*arguments: Any) -> Labels:
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(1)
        return make(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LabelMaker, "from_images", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, dataset, config, progress=False, store=EvalStore(tmp_path / "store", "one"))
    kept = sorted((tmp_path / "store/one").iterdir())
    assert [path.name for path in kept] == ["v0.png", "v1.png"]
    assert all(path.stat().st_size < 4000 for path in kept)
    kept[1].write_bytes(kept[1].read_bytes()[:200])  # damaged: evaluated again
    (tmp_path / "store/other").mkdir()

    computed.clear()

    def counted(*arguments: Any) -> Labels:
        computed.append(1)
        return make(*arguments)

    monkeypatch.setattr(LabelMaker, "from_images", counted)
    store = EvalStore(tmp_path / "store", "one")
    found: list[int] = []
    again = evaluate(model, dataset, config, progress=False, store=store, on_resume=found.append)
    assert found == [1]
    assert len(computed) == 3, "all except the image that was complete"
    assert scores(again) == scores(whole)
    assert again.image_iou == whole.image_iou
    assert whole.diagnosis is not None
    assert str(again.diagnosis) == str(whole.diagnosis)  # as text, because it contains nan
    if crf:
        assert again.rows["crf"]["confusion"] == whole.rows["crf"]["confusion"]
    assert not (tmp_path / "store").exists(), "a complete evaluation leaves no state to resume from"


def test_the_store_depends_on_model_and_settings(tmp_path: Path) -> None:
    config = Config()
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"weights")
    keys = [evaluation_key(model, config)]
    for section, name, value in (
        ("eval", "crf", True),
        ("eval", "crf_preset", "toco"),
        ("eval", "scales", (0.5,)),
        ("labels", "cam_threshold", 0.4),
        ("data", "val_split", "test"),
    ):
        setattr(getattr(config, section), name, value)
        keys.append(evaluation_key(model, config))
    model.write_bytes(b"other weights")
    keys.append(evaluation_key(model, config))
    assert len(set(keys)) == len(keys)
    config.eval.batch_size = 7
    assert evaluation_key(model, config) == keys[-1]


@pytest.mark.parametrize("crf", [False, True])
def test_without_masks_only_the_classifier_is_evaluated(
    setting: tuple[AFANet, TaggedDataset, Config], crf: bool
) -> None:
    model, dataset, config = setting
    with_masks = evaluate(model, dataset, config, progress=False)
    for path in (dataset.root / "SegmentationClass").glob("v*.png"):
        path.unlink()
    dataset = TaggedDataset(dataset.root, "val", train=False, with_mask=True)
    config.eval.crf = crf
    result = evaluate(model, dataset, config, progress=False, keep=3)
    assert not result.has_masks
    assert result.f1 == with_masks.f1
    assert all(np.isnan(row["miou"]) for row in result.rows.values())
    assert result.diagnosis is None
    assert result.image_iou == {} and result.best == result.worst == []
    assert [sample["name"] for sample in result.samples] == ["v0", "v2", "v3"], "there is still something to look at"
    assert (result.samples[0]["truth"] == 255).all()


@pytest.mark.slow
def test_two_processes_count_the_same_as_one(
    setting: tuple[AFANet, TaggedDataset, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command as torchrun starts it, over gloo; five images, so that the shares differ."""
    model, dataset, config = setting
    (dataset.root / "ImageSets/Segmentation/val.txt").write_text("v0\nv1\nv2\nv3\nt1\n")
    config.data.root = str(dataset.root)
    run = tmp_path / "run"
    save_model(run / "model.safetensors", model, config, dataset.classes)
    (run / "config.yaml").write_text(to_yaml(config))

    def measured() -> tuple[list[str], dict[str, Any]]:
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["images"] == 5 and not (run / "evaluation").exists()
        tables = [(run / name).read_text() for name in ("metrics.csv", "images.csv", "confusion.csv")]
        wanted = ("_miou", "_f1", "_acc", "diagnosis")
        return tables, {key: value for key, value in metrics.items() if key.endswith(wanted)}

    arguments = ["evaluate", str(run), "--device=cpu", "--quiet"]
    assert main(arguments) == 0
    one = measured()
    labels = ["pseudo-labels", str(run), "--out", str(tmp_path / "labels"), "--device=cpu", "--quiet"]
    assert (run / "report.html").is_file() and "report.html" in capsys.readouterr().out
    # Two commands of one start, to save the time of another: the connection is kept between them.
    both = f"""\
from afa import distributed
from afa.commands import cli
distributed.teardown = lambda: None
exit(cli.main({arguments}) or cli.main({labels}))"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", both],
            env={
                **os.environ,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert "report.html" in said[0] and "6 labels of 'train'" in said[0] and not said[1], "one process speaks"
    assert measured() == one
    assert "on 6 images" in said[0] and len(list((tmp_path / "labels").glob("*.png"))) == 6


def test_a_complete_store_needs_no_computation(
    setting: tuple[AFANet, TaggedDataset, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if an evaluation is stopped between its last image and its report; names may contain folders."""
    model, dataset, config = setting
    dataset.names = [f"deep/{name}" for name in dataset.names]
    monkeypatch.setattr(dataset, "mask_path", lambda index: dataset.root / f"SegmentationClass/v{index}.png")
    dataset.__dict__["has_masks"] = True
    store = EvalStore(tmp_path / "store", "one")
    monkeypatch.setattr(store, "clear", lambda: None)
    first = evaluate(model, dataset, config, progress=False, store=store)
    assert store.done() == set(dataset.names)
    monkeypatch.setattr(LabelMaker, "from_images", None)
    again = evaluate(model, dataset, config, progress=False, store=store)
    assert scores(again) == scores(first) and again.image_iou == first.image_iou
