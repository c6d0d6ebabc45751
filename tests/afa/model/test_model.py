"""AFANet: outputs of a forward pass, decoders, and the model's file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from afa.config import Config
from afa.errors import UserError
from afa.model import AFANet, Normalization, build_model, load_model, save_model
from afa.model.heads import MLPDecoder
from afa_ext import affinity_from_attention, reference

Make = Callable[..., tuple[AFANet, Config]]


@pytest.fixture
def make(tiny_config: Any) -> Make:
    """make(key=value, ...) -> a tiny model and its configuration; keys override the model section."""

    def build(**options: Any) -> tuple[AFANet, Config]:
        torch.manual_seed(0)
        config = tiny_config(**options)
        return build_model(config.model, 3), config

    return build


@pytest.mark.parametrize("decoder", ["mlp", "single"])
def test_shapes(make: Make, decoder: str) -> None:
    model, _ = make(decoder=decoder)
    out = model(torch.randn(2, 3, 64, 96), want=("class", "cam", "seg", "affinity", "qk"))
    assert out.class_logits.shape == (2, 3)
    assert out.cam.shape == (2, 3, 4, 6)
    assert out.seg_logits.shape == ((2, 4, 16, 24) if decoder == "mlp" else (2, 4, 4, 6))
    assert out.grid == (4, 6)
    assert out.queries.shape[:3] == out.keys.shape[:3] == (2, model.backbone.maps, 24)
    assert out.affinity.shape == (2, 24, 24)
    attention = out.queries @ out.keys.transpose(-2, -1)
    expected = affinity_from_attention(attention, model.affinity_head.weight, model.affinity_head.bias)
    torch.testing.assert_close(out.affinity, expected)


def test_only_requested_outputs_are_computed(make: Make) -> None:
    model, _ = make()
    ran = []
    for name in ("decoder", "affinity_head", "classifier"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: ran.append(name))
    out = model(torch.randn(1, 3, 64, 64), want=("cam",))
    assert ran == ["classifier"]
    assert out.cam is not None and out.seg_logits is None and out.affinity is None and out.class_logits is None
    with pytest.raises(ValueError, match="want must be a subset of affinity, cam"):
        model(torch.randn(1, 3, 64, 64), want=("cams",))


def test_cam_is_the_classifier_on_the_last_map(make: Make) -> None:
    for pooling in ("max", "mean"):
        model, _ = make(pooling=pooling)
        images = torch.randn(2, 3, 64, 64)
        last = model.backbone(images).maps[-1]
        out = model(images)
        weight = model.classifier.weight[:, :, 0, 0]
        assert model.classifier.bias is None
        torch.testing.assert_close(out.cam, torch.einsum("kc,bchw->bkhw", weight, last), rtol=1e-4, atol=1e-5)
        pooled = last.amax((2, 3)) if pooling == "max" else last.mean((2, 3))
        torch.testing.assert_close(out.class_logits, pooled @ weight.T, rtol=1e-4, atol=1e-5)


def test_mlp_decoder_is_the_plain_one() -> None:
    """Linear layers, upsampling, concatenation and the fusing convolution in their order; values and gradients."""
    torch.manual_seed(0)
    decoder = MLPDecoder((4, 6, 8, 10), (4, 8, 16, 16), 5, 12).double().train()
    decoder.dropout.p = 0.0
    maps = [torch.randn(2, c, s, s, dtype=torch.float64) for c, s in ((4, 16), (6, 8), (8, 4), (10, 4))]

    def plain() -> torch.Tensor:
        parts = []
        for level, linear in zip(maps, decoder.linears, strict=True):
            x = linear(level.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, level.shape[2:])
            parts.append(F.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False))
        return decoder.predict(F.relu(decoder.norm(decoder.fuse(torch.cat(parts, 1)))))

    torch.testing.assert_close(decoder(maps), plain())
    probe = torch.randn(2, 5, 16, 16, dtype=torch.float64)
    parameters = list(decoder.parameters())
    ours = torch.autograd.grad((decoder(maps) * probe).sum(), parameters)
    theirs = torch.autograd.grad((plain() * probe).sum(), parameters)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_refinement_is_par_inside_the_network(make: Make) -> None:
    """Logits of refined probabilities at half the image's size; the decoder learns through it."""
    plain, _ = make()
    model, _ = make(refine_iterations=3, refine_dilations=(1, 4))
    images = torch.randn(2, 3, 64, 96)
    before, after = plain.eval()(images).seg_logits, model.eval()(images).seg_logits
    assert after.shape == (2, 4, 32, 48)
    small, maps = (F.interpolate(x, size=(32, 48), mode="bilinear", align_corners=False) for x in (images, before))
    expected = reference.par_refine(small, maps.softmax(1), dilations=(1, 4), num_iter=3)
    torch.testing.assert_close(after.exp(), expected, rtol=1e-4, atol=1e-6)

    target = torch.randint(4, (2, 32, 48))
    F.cross_entropy(model.train()(images).seg_logits, target).backward()
    gradient = model.get_parameter("decoder.predict.weight").grad
    assert gradient is not None and bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).seg_logits.dtype == torch.float32


def test_plain_vit_model(tiny_config: Any) -> None:
    config = tiny_config(backbone="vit_tiny_patch16_224", backbone_args={"embed_dim": 48, "depth": 2, "num_heads": 3})
    out = build_model(config.model, 3)(torch.randn(1, 3, 64, 64), want=("cam", "seg", "affinity"))
    assert out.cam.shape == (1, 3, 4, 4) and out.seg_logits.shape == (1, 4, 4, 4)
    assert out.affinity.shape == (1, 16, 16)


def test_normalize() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(Normalization()(images), (images / 255 - mean) / std)


@pytest.mark.parametrize(
    ("backbone", "mean"),
    [("vit_tiny_patch16_224", 0.5), ("vit_base_patch16_clip_224.openai", 0.48145466), ("deit_tiny_patch16_224", 0.485)],
)
def test_images_are_normalized_as_the_backbone_was_pretrained(tiny_config: Any, backbone: str, mean: float) -> None:
    config = tiny_config(backbone=backbone, backbone_args={"embed_dim": 48, "depth": 2, "num_heads": 3})
    model = build_model(config.model, 3)
    assert model.normalization.mean[0] == mean
    assert model.normalization.std != model.normalization.mean or mean == 0.5
    black = model.normalize(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    torch.testing.assert_close(black[0, 0], torch.full((2, 2), -mean / model.normalization.std[0]))


class TestFile:
    def test_normalization_travels_with_the_model(self, make: Make, tmp_path: Path) -> None:
        """Not with timm's settings, which may change."""
        model, config = make()
        model.normalization = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        save_model(tmp_path / "m.safetensors", model, config, ["a", "b", "c"])
        assert load_model(tmp_path / "m.safetensors")[0].normalization == model.normalization

    def test_round_trip(self, make: Make, tmp_path: Path) -> None:
        model, config = make()
        images = torch.randn(1, 3, 64, 64)
        model.train()(images.repeat(2, 1, 1, 1))  # running statistics must be saved, too
        save_model(tmp_path / "m.safetensors", model, config, ["a", "b", "c"])
        loaded, classes, back = load_model(tmp_path / "m.safetensors")
        assert classes == ["a", "b", "c"] and back == config and not loaded.training
        assert torch.equal(loaded(images).seg_logits, model.eval()(images).seg_logits)
        assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
        save_model(tmp_path / "n.safetensors", loaded, back, classes)
        assert (tmp_path / "n.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()

    def test_permissions_are_those_of_other_new_files(self, make: Make, tmp_path: Path) -> None:
        """safetensors 0.8 alone makes files that only their owner can read, so a colleague could not use the model."""
        model, config = make()
        save_model(tmp_path / "m.safetensors", model, config, ["a", "b", "c"])
        (tmp_path / "other").touch()
        assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode

    def test_refused(self, make: Make, tmp_path: Path) -> None:
        path = tmp_path / "m.safetensors"
        with pytest.raises(UserError, match="does not exist"):
            load_model(path)
        path.write_bytes(b"not tensors at all, only text")
        with pytest.raises(UserError, match="can't be read as a safetensors file"):
            load_model(path)
        save_file({"a": torch.zeros(1)}, path)
        with pytest.raises(UserError, match="was not saved by this program"):
            load_model(path)
        model, config = make()
        save_model(path, model, config, ["a", "b", "c"])
        tensors = load_file(path)
        tensors.pop("classifier.weight")
        content = {
            "format": "afa-model-2",
            "config": {"model": vars(config.model)},
            "classes": ["a", "b", "c"],
            "normalization": {"mean": [0.5] * 3, "std": [0.5] * 3},
        }
        save_file(tensors, path, {"afa": json.dumps(content)})
        with pytest.raises(UserError, match=r"does not match its own configuration.*classifier\.weight"):
            load_model(path)
