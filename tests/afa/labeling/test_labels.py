"""Pseudo labels against recorded outputs of the published code, and batches against single images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import afa_ext
from afa.config import LabelConfig
from afa.labeling.cam import ClassSet, pack_classes
from afa.labeling.labels import (
    cam_labels,
    par_labels,
    walk_labels,
    walk_scores,
    walked_cam_labels,
)

CONFIG = LabelConfig()


@pytest.fixture(scope="module")
def gold(golden: Any) -> dict[str, Tensor]:
    return golden("pseudo_label")


@pytest.fixture(scope="module")
def packed(gold: dict[str, Tensor]) -> tuple[ClassSet, Tensor]:
    classes = pack_classes(gold["cls_labels"])
    return classes, classes.gather(gold["cams"])


Packed = tuple[ClassSet, Tensor]


def test_par_label_golden(gold: dict[str, Tensor], packed: Packed) -> None:
    classes, cams = packed
    labels = par_labels(gold["images"], cams, classes, CONFIG, box=gold["img_box"])
    wrong = (labels != gold["refined_label"]).sum()
    assert wrong <= 2, f"{wrong} of {labels.numel()} pixels differ, and only ties may"
    assert labels.unique().tolist() == gold["refined_label"].unique().tolist()


def test_cam_label_golden(gold: dict[str, Tensor], packed: Packed) -> None:
    classes, cams = packed
    assert torch.equal(cam_labels(cams, classes, (0.45, 0.45)), gold["cam_label_nobox"].long())


def ragged() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """images, tags (0 to 3 per image), smooth CAMs, boxes, affinity on a 6 x 8 grid."""
    torch.manual_seed(1)
    images = F.interpolate(torch.rand(4, 3, 12, 16), size=(48, 64), mode="bicubic").clamp(0, 1).mul(255).byte()
    tags = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1]]).float()
    cams = F.interpolate(torch.rand(4, 5, 4, 5), size=(48, 64), mode="bicubic").clamp(0, 1)
    box = torch.tensor([[0, 48, 0, 64], [4, 40, 0, 50], [0, 48, 0, 64], [11, 48, 7, 64]])
    logits = torch.randn(4, 48, 48)
    return images, tags, cams, box, torch.sigmoid(logits + logits.transpose(1, 2))


def test_a_batch_equals_its_images_one_by_one() -> None:
    images, tags, cams, box, affinity = ragged()
    config = CONFIG.model_copy(update={"walk_radius": 3, "par_dilations": (1, 2, 4)})
    classes = pack_classes(tags)
    maps = classes.gather(cams)
    whole = {
        "par": par_labels(images, maps, classes, config, box=box),
        "walk": walk_labels(images, maps, affinity, (6, 8), classes, config, box=box),
        "par single": par_labels(images, maps, classes, config, thresholds=(0.45, 0.45)),
        "walk single": walked_cam_labels(maps, affinity, (6, 8), classes, config, (0.35, 0.35)),
    }
    for name in ("par", "walk"):
        assert {0, 255} < set(whole[name].unique().tolist()), (
            "the case must have background, ignored pixels and classes"
        )
    for i in range(4):
        # Packed among all five classes instead: packing must not matter either.
        one = pack_classes(tags[i : i + 1], 5)
        arguments = one.gather(cams[i : i + 1]), one
        alone = {
            "par": par_labels(images[i : i + 1], *arguments, config, box=box[i : i + 1]),
            "walk": walk_labels(
                images[i : i + 1], arguments[0], affinity[i : i + 1], (6, 8), one, config, box=box[i : i + 1]
            ),
            "par single": par_labels(images[i : i + 1], *arguments, config, thresholds=(0.45, 0.45)),
            "walk single": walked_cam_labels(arguments[0], affinity[i : i + 1], (6, 8), one, config, (0.35, 0.35)),
        }
        for name, labels in alone.items():
            wrong = (labels[0] != whole[name][i]).sum()
            assert wrong <= 1, f"{name}, image {i}: {wrong} pixels differ, and only a tie may"
            present = set(labels.unique().tolist()) - {0, 255}
            assert present <= {int(c) + 1 for c in tags[i].nonzero()}


def test_walk_label_by_definition() -> None:
    """Token grid, walk per threshold, full size, PAR on the crop at half size, argmax, three-way rule: one image."""
    images, tags, cams, box, affinity = ragged()
    i = 3
    y0, y1, x0, x1 = box[i].tolist()
    present = tags[i].nonzero()[:, 0]
    tokens = F.interpolate(cams[i : i + 1], size=(6, 8), mode="bilinear", align_corners=False)
    image = images[i : i + 1, :, y0:y1, x0:x1].float() / 255
    image = F.interpolate(image, size=((y1 - y0) // 2, (x1 - x0) // 2), mode="bilinear", align_corners=False)
    choices = []
    for background in (CONFIG.high, CONFIG.low):
        walked = afa_ext.propagate_cams(
            tokens, affinity[i : i + 1], tags[i : i + 1] > 0, radius=8, background=background, eps=0.1
        )
        walked = walked[:, [0, *(present + 1).tolist()]]
        walked = F.interpolate(walked, size=(48, 64), mode="bilinear", align_corners=False)[:, :, y0:y1, x0:x1]
        refined = afa_ext.par_refine(image, walked)
        refined = F.interpolate(refined, size=(y1 - y0, x1 - x0), mode="bilinear", align_corners=False)
        choices.append(torch.cat([torch.zeros(1, dtype=torch.long), present + 1])[refined.argmax(1)[0]])
    high, low = choices
    expected = torch.full((48, 64), 255)
    expected[y0:y1, x0:x1] = torch.where(high > 0, high, torch.where(low > 0, 255, 0))
    classes = pack_classes(tags)
    labels = walk_labels(images, classes.gather(cams), affinity, (6, 8), classes, CONFIG, box=box)
    wrong = (labels[i] != expected).sum()
    assert wrong <= 1, f"{wrong} pixels differ, and only a tie may"
    assert len(expected.unique()) >= 3


def test_walk_golden_through_packing(golden: Any) -> None:
    walk = golden("walk_train")
    classes = pack_classes(walk["cls_labels"])
    config = CONFIG.model_copy(update={"walk_radius": int(walk["radius"])})
    cams = walk["cams"]
    scores = walk_scores(
        classes.gather(cams),
        walk["affinity"],
        (cams.shape[2], cams.shape[3]),
        classes,
        config,
        float(walk["bkg_score"]),
    )
    ours = torch.cat([scores[:, :1], classes.scatter(scores[:, 1:], cams.shape[1])], 1)
    torch.testing.assert_close(ours, walk["with_bkg"], rtol=1e-4, atol=1e-6)


def test_image_without_tags_is_background() -> None:
    images, tags, cams, _, affinity = ragged()
    classes = pack_classes(tags)
    maps = classes.gather(cams)
    assert (par_labels(images, maps, classes, CONFIG)[2] == 0).all()
    assert (walk_labels(images, maps, affinity, (6, 8), classes, CONFIG)[2] == 0).all()
    assert (cam_labels(maps, classes, (0.45, 0.45))[2] == 0).all()


def test_the_higher_threshold_never_adds_foreground() -> None:
    _, tags, cams, _, _ = ragged()
    classes = pack_classes(tags)
    maps = classes.gather(cams)
    low, high = (cam_labels(maps, classes, (score, score)) > 0 for score in (0.35, 0.55))
    assert (low | ~high).all()


def test_two_thresholds_ignore_scores_between_them() -> None:
    """One rule for every kind of label, here of the CAM and of the walked CAM."""
    _, tags, cams, _, affinity = ragged()
    classes = pack_classes(tags)
    maps = classes.gather(cams)
    walked = (maps, affinity, (6, 8), classes, CONFIG)
    for both, low, high in (
        (cam_labels(maps, classes, (0.35, 0.55)), *(cam_labels(maps, classes, (x, x)) for x in (0.35, 0.55))),
        (walked_cam_labels(*walked, (0.05, 0.95)), *(walked_cam_labels(*walked, (x, x)) for x in (0.05, 0.95))),
    ):
        assert 255 in both
        assert torch.equal(both, torch.where((low > 0) & (high == 0), 255, high))


def test_lazy_walk_is_between_the_cam_and_the_walk() -> None:
    _, tags, cams, _, affinity = ragged()
    classes = pack_classes(tags)
    packed = classes.gather(cams)

    def scores(**settings: float) -> Tensor:
        config = CONFIG.model_copy(update=settings)
        return walk_scores(packed, affinity, (6, 8), classes, config, 0.4)

    walked, still, lazy = scores(), scores(walk_steps=0), scores(walk_weight=0.25)
    assert not torch.allclose(walked, still)
    torch.testing.assert_close(lazy, 0.25 * walked + 0.75 * still)
