"""benchmarks/real_photos.py: the simulated CAMs, the scores, and a run on the tiny tree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import real_photos
import torch
from refinements import (
    CAM_KINDS,
    PAR_VARIANTS,
    REFINEMENTS,
    CamKind,
    Photo,
    boundary_f,
    color_affinity,
    fill_void,
    gaussian_blur,
    threshold,
    true_affinity,
)

from tests.benchmarks.test_ablation import settings


def square(side: int = 96, number: int = 1) -> torch.Tensor:
    """A mask [1, side, side] with an object of one class in the middle."""
    mask = torch.zeros(1, side, side, dtype=torch.int64)
    mask[:, side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = number
    return mask


def photo(mask: torch.Tensor, classes: int = 3) -> Photo:
    """A photograph whose colors are those of the mask, tagged with its classes."""
    tags = torch.stack([(mask == c + 1).any() for c in range(classes)]).float()[None]
    image = (mask * 60).byte().expand(3, -1, -1)[None].contiguous()
    return Photo(image, mask, tags, lambda image: image.float())


@pytest.mark.parametrize("name", CAM_KINDS)
def test_simulated_cams(name: str) -> None:
    one = photo(square(number=2))
    one.simulate(CAM_KINDS[name], seed=3)
    assert one.cams.shape == (1, 1, 96, 96)
    assert one.cams.min() >= 0
    assert one.cams.max() == pytest.approx(1, abs=0.05)
    assert one.cams[0, 0, 48, 48] > 0.5
    first = one.cams
    one.simulate(CAM_KINDS[name], seed=3)
    assert torch.equal(one.cams, first)
    one.simulate(CAM_KINDS[name], seed=4)
    kind = CAM_KINDS[name]
    assert torch.equal(one.cams, first) == (kind is None or not kind.false_peaks)


def test_thresholding_the_true_mask_restores_it() -> None:
    one = photo(square())
    one.simulate(None, seed=0)
    assert torch.equal(threshold(one, 0.35)[None], one.mask)


def test_erosion_shrinks_the_cam_and_keeps_small_objects() -> None:
    one = photo(square())
    sizes = []
    for erode in (False, True):
        one.simulate(CamKind(8, 0.5, erode=erode), seed=0)
        sizes.append(int((one.cams > 0.5).sum()))
    assert sizes[1] < sizes[0]
    tiny = torch.zeros(1, 96, 96, dtype=torch.int64)
    tiny[:, 40:46, 40:46] = 1
    one = photo(tiny)
    one.simulate(CamKind(16, 0.5, erode=True), seed=0)
    assert one.cams.max() == pytest.approx(1, abs=0.05)


def test_blur_keeps_sums_inside() -> None:
    maps = torch.zeros(1, 2, 21, 21)
    maps[:, 0, 10, 10], maps[:, 1] = 1, 0.5
    blurred = gaussian_blur(maps, 1.0)
    assert blurred[0, 0].sum() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(blurred[0, 1], maps[0, 1])
    assert blurred[0, 0, 10, 11] / blurred[0, 0, 10, 10] == pytest.approx(0.6065, abs=1e-3)  # exp(-1/2)


def test_void_is_filled_from_both_sides() -> None:
    mask = torch.tensor([[[1, 255, 255, 255, 255, 0]]])
    assert fill_void(mask, 2).tolist() == [[[1, 1, 1, 0, 0, 0]]]
    assert fill_void(mask, 1).tolist() == [[[1, 1, 255, 255, 0, 0]]]


def test_boundary_score() -> None:
    truth = square()[0]
    assert boundary_f(truth, truth, 1) == 1
    moved = truth.roll(1, dims=1)
    assert boundary_f(moved, truth, 1) == 1  # within the tolerance of 2 pixels
    assert 0.3 < boundary_f(truth.roll(8, dims=1), truth, 1) < 0.7  # two of four sides coincide, but for the ends
    assert boundary_f(torch.zeros_like(truth), truth, 1) == 0
    assert boundary_f(torch.zeros_like(truth), truth, 2) == 1, "neither has the class"


def test_ignored_pixels_do_not_count_in_the_boundary_score() -> None:
    truth = square()[0]
    wrong = truth.clone()
    wrong[:10, :10] = 1
    assert boundary_f(wrong, truth, 1) < 1
    truth[:12, :12] = 255
    assert boundary_f(wrong, truth, 1) == 1


def test_affinities() -> None:
    one = photo(square())
    one.simulate(CamKind(8, 0.5), seed=0)
    for affinity in (true_affinity(one), color_affinity(one)):
        assert affinity.shape == (1, 144, 144)
        assert affinity[0, 0, 1] > 0.99, "two tokens of the background"
        assert affinity[0, 0, 78] < 0.02, "background and object"
        torch.testing.assert_close(affinity, affinity.transpose(1, 2))


@pytest.mark.parametrize("name", [*REFINEMENTS, *PAR_VARIANTS])
def test_refinements_find_a_clear_object(name: str) -> None:
    mask = square(96, number=3)
    one = photo(mask)
    one.simulate(CamKind(8, 0.5), seed=0)
    label = (REFINEMENTS.get(name) or PAR_VARIANTS[name])(one, 0.35)
    assert label.shape == (96, 96)
    assert set(label.unique().tolist()) == {0, 3}
    # The flat stand-in for features of the test separates object and background like the colors.
    inside, outside = label[32:64, 32:64], label[:16]
    assert (inside == 3).float().mean() > 0.9
    assert (outside == 0).float().mean() > 0.9


def test_writes_all_rows(voc_root: Path, tmp_path: Path) -> None:
    arguments = ["refine", "--data", str(voc_root), "--images", "2", "--calibration-split", "val"]
    real_photos.main([*arguments, "--calibration-images", "1", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("real_photos-*.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["images"] == 2
    assert content["data"] == voc_root.name
    assert len(content["rows"]) == len(CAM_KINDS) * (len(REFINEMENTS) + len(PAR_VARIANTS))
    for row in content["rows"]:
        assert 0 <= row["miou"] <= 1
        assert 0 <= row["boundary_f"] <= 1
        assert row["background"] in content["background_scores"]
    perfect = next(row for row in content["rows"] if row["cam"] == "true mask" and row["refinement"] == "none")
    assert perfect["miou"] == 1
    assert perfect["boundary_f"] == 1


@pytest.mark.slow
def test_trains_from_tags_and_from_masks(voc_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train", "--data", str(voc_root), "--config", "demo", "--run", str(tmp_path / "run")]
    arguments += ["--out", str(tmp_path / "out"), *settings(voc_root), "train.tensorboard=false"]
    real_photos.main(arguments)
    (file,) = (tmp_path / "out").glob("real_photos_train-demo-*.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    tags, masks = content["rows"]
    assert content["images"] == 4
    assert content["training_images"] == 6
    assert content["config"]["train"]["iterations"] == 5
    for name in ("cam", "walk", "par", "seg", "walk_identity", "walk_oracle", "walk_par"):
        assert 0 <= tags[name] <= 1
    assert tags["cam_best"]["miou"] >= tags["cam"] - 1e-9
    assert masks["seg"] != tags["seg"]
    file.unlink()
    monkeypatch.setattr(real_photos, "run_steps", None)
    real_photos.main(arguments)  # the finished run is evaluated again, not trained again
    (file,) = (tmp_path / "out").glob("*.json")
    assert json.loads(file.read_text(encoding="utf-8"))["rows"] == content["rows"]
