"""CAMs over scales and flips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afa.labeling.cam import pack_classes
from afa.labeling.inference import ScaleOutputs, run_scales
from afa.model import AFANet, build_model


@pytest.fixture(scope="module")
def model(tiny_config: Any) -> AFANet:
    torch.manual_seed(0)
    model = build_model(tiny_config().model, 5).eval()
    model.classifier.weight.data.normal_()
    return model


TAGS = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 1, 0]]).float()


def cams_of(outputs: ScaleOutputs, tags: Tensor) -> Tensor:
    """[B, C, H, W], zero for absent classes."""
    classes = pack_classes(tags)
    return classes.scatter(outputs.class_activation_maps(classes), tags.shape[1])


def by_definition(model: AFANet, image: Tensor, tags: Tensor, scales: tuple[float, ...]) -> Tensor:
    """One image [3, H, W], written out scale by scale."""
    size = image.shape[1:]
    total = torch.zeros(len(tags), *size)
    for scale in scales:
        scaled = F.interpolate(image[None], scale_factor=scale, mode="bilinear", align_corners=False)
        plain = model(scaled, want=("cam",)).cam
        mirrored = model(scaled.flip(3), want=("cam",)).cam.flip(3)
        cam = torch.maximum(plain, mirrored)
        total += F.interpolate(cam, size=size, mode="bilinear", align_corners=False)[0].relu()
    total -= total.amin((1, 2), keepdim=True)
    total /= total.amax((1, 2), keepdim=True) + 1e-5
    return total * tags[:, None, None]


@torch.no_grad()
def test_cams_match_the_definition(model: AFANet) -> None:
    images = torch.randn(4, 3, 64, 80)
    scales = (1.0, 0.5, 1.5)
    cams = cams_of(run_scales(model, images, cam_scales=scales), TAGS)
    expected = torch.stack([by_definition(model, *pair, scales) for pair in zip(images, TAGS, strict=True)])
    torch.testing.assert_close(cams, expected, rtol=1e-4, atol=1e-5)
    assert cams.min() >= 0 and 0.9 < cams.max() <= 1


@torch.no_grad()
def test_a_given_forward_pass_is_reused(model: AFANet) -> None:
    images = torch.randn(4, 3, 64, 64)
    plain = run_scales(model, images, cam_scales=(1.0, 0.5), affinity_scale=0.5)
    base = model(images, want=("cam",)).cam
    sizes = []
    hook = model.backbone.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    spared = run_scales(model, images, cam_scales=(1.0, 0.5), affinity_scale=0.5, base_cam=base)
    hook.remove()
    assert sizes == [4, 8], "at scale 1 only the mirror images remain"
    torch.testing.assert_close(cams_of(spared, TAGS), cams_of(plain, TAGS), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(spared.affinity, plain.affinity, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0])
def test_affinity_at_a_scale(model: AFANet, scale: float) -> None:
    """2.0 is not a CAM scale: it is only run for the affinity and must not contribute to the CAM."""
    images = torch.randn(2, 3, 64, 64)
    result = run_scales(
        model, images, cam_scales=(1.0, 1.5), affinity_scale=scale, base_cam=model(images, want=("cam",)).cam
    )
    scaled = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
    assert result.grid == (int(4 * scale), int(4 * scale))
    torch.testing.assert_close(result.affinity, model(scaled, want=("affinity",)).affinity, rtol=1e-4, atol=1e-5)
    plain = run_scales(model, images, cam_scales=(1.0, 1.5))
    torch.testing.assert_close(cams_of(result, TAGS[:2]), cams_of(plain, TAGS[:2]), rtol=1e-4, atol=1e-5)


def test_no_graph_is_kept(model: AFANet) -> None:
    result = run_scales(model, torch.randn(1, 3, 64, 64), cam_scales=(1.0,), affinity_scale=1.0)
    assert not cams_of(result, TAGS[:1]).requires_grad
    assert result.affinity is not None and not result.affinity.requires_grad


class TestPacking:
    def test_round_trip(self) -> None:
        classes = pack_classes(TAGS)
        assert classes.index.shape == (4, 3)
        assert classes.valid.sum(1).tolist() == [2, 1, 0, 3]
        assert classes.index[0, :2].tolist() == [1, 4] and classes.index[3].tolist() == [0, 1, 3]
        maps = torch.rand(4, 5, 6, 7)
        present = maps * TAGS[:, :, None, None]
        assert torch.equal(classes.scatter(classes.gather(maps), 5), present)

    def test_labels(self) -> None:
        classes = pack_classes(TAGS)
        choice = torch.tensor([0, 1, 2]).view(1, 1, 3).expand(4, 1, 3)
        assert classes.labels(choice)[0].tolist() == [[0, 2, 5]]

    def test_width(self) -> None:
        assert pack_classes(TAGS, 4).index.shape == (4, 4)
        assert pack_classes(TAGS, 9).index.shape == (4, 5)
        assert pack_classes(torch.zeros(2, 5)).index.shape == (2, 1)
        assert pack_classes(torch.zeros(0, 5)).index.shape == (0, 1)
