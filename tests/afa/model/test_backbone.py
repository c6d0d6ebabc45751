"""Backbones by timm name: attention read with hooks, strides, weights, and rejected models."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from afa.errors import UserError
from afa.model.backbone import Backbone
from afa.model.weights import load_backbone_weights

PVT: dict[str, Any] = {
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 1, 1, 2),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 2, 2, 2),
}
VIT: dict[str, Any] = {"embed_dim": 48, "depth": 3, "num_heads": 3}


def pvt(**options: Any) -> Backbone:
    torch.manual_seed(0)
    return Backbone("pvt_v2_b0", PVT, **options).eval()


def net(backbone: Backbone) -> Any:
    """The timm model, whose parts have no types."""
    return backbone.net


def vit(name: str = "vit_tiny_patch16_224", output_stride: int = 16, **args: Any) -> Backbone:
    torch.manual_seed(0)
    return Backbone(name, {**VIT, **args}, output_stride=output_stride).eval()


BACKBONES = {
    "pvt": pvt,
    "vit": vit,
    "vit with qk norm": lambda: vit(qk_norm=True),
    "vit with registers": lambda: vit(reg_tokens=4),
    "deit distilled": lambda: vit("deit_tiny_distilled_patch16_224"),
    "dinov2 with registers": lambda: vit("vit_small_patch14_reg4_dinov2", output_stride=14),
    "dinov3": lambda: vit("vit_small_patch16_dinov3"),
}


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
def test_attention_logits_are_those_timm_computes(make: Any) -> None:
    """timm's own probabilities, from its unfused path, are the softmax of scale times the logits read."""
    backbone = make()
    # Larger queries and keys than at initialization: a flat softmax would hide mistakes.
    for path in backbone.attention_paths:
        for name, parameter in backbone.net.get_submodule(path).named_parameters():
            if name.startswith(("q", "kv")) and name.endswith("weight") and parameter.dim() == 2:
                parameter.data.mul_(20)
    side = backbone.reductions[-1]
    images = torch.randn(2, 3, 4 * side, 6 * side)
    features = backbone(images, record=True)
    logits = features.queries @ features.keys.transpose(-2, -1)

    seen = []
    for path in backbone.attention_paths:
        module = backbone.net.get_submodule(path)
        module.fused_attn = False
        module.attn_drop.register_forward_hook(lambda _, __, out: seen.append(out))
    backbone(images)
    own = torch.cat(seen, 1)[:, :, backbone.prefix_tokens :, backbone.prefix_tokens :]
    scaled = logits * backbone.net.get_submodule(backbone.attention_paths[0]).scale
    assert logits.shape == (2, backbone.maps, 24, 24) == own.shape
    assert own.std() > 0.01
    # Dropping the class token leaves rows that do not sum to 1: both are compared as renormalized rows.
    torch.testing.assert_close(scaled.softmax(-1), own / own.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)


def test_recording_changes_nothing_and_leaves_nothing() -> None:
    backbone = pvt()
    images = torch.randn(1, 3, 64, 64)
    plain, recorded = backbone(images), backbone(images, record=True)
    for before, after in zip(plain.maps, recorded.maps, strict=True):
        assert torch.equal(before, after)
    assert plain.queries is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())
    twin = copy.deepcopy(backbone)
    assert torch.equal(twin(images, record=True).keys, recorded.keys)


def test_gradient_reaches_q_and_k_and_not_v() -> None:
    backbone = pvt()
    features = backbone(torch.randn(1, 3, 64, 64), record=True)
    (features.queries @ features.keys.transpose(-2, -1)).sin().sum().backward()
    attention = net(backbone).stages[-1].blocks[-1].attn
    assert attention.q.weight.grad.abs().sum() > 0
    key, value = attention.kv.weight.grad.chunk(2)
    assert key.abs().sum() > 0
    assert value.abs().sum() == 0  # the last block's values only affect the map, which this loss does not use


@pytest.mark.parametrize(("stride", "grids"), [(32, (16, 8, 4, 2)), (16, (16, 8, 4, 4)), (8, (16, 8, 8, 8))])
def test_output_stride_of_a_pyramid(stride: int, grids: tuple[int, ...]) -> None:
    backbone = pvt(output_stride=stride)
    features = backbone(torch.randn(1, 3, 64, 64), record=True)
    assert tuple(level.shape[-1] for level in features.maps) == grids
    assert tuple(level.shape[1] for level in features.maps) == backbone.channels == PVT["embed_dims"]
    assert backbone.reductions == tuple(64 // side for side in grids)
    assert features.queries.shape == (1, 8, grids[-1] ** 2, 8)  # 2 blocks x 4 heads of 8


def test_pyramid_takes_any_size() -> None:
    features = pvt()(torch.randn(1, 3, 75, 50), record=True)
    assert features.maps[-1].shape[2:] == (5, 4)
    assert features.queries.shape[2] == 20
    tiny = pvt()(torch.randn(1, 3, 40, 17), record=True)
    assert tiny.maps[-1].shape[2:] == (3, 2) and tiny.queries.shape[2] == 6


def test_plain_vit() -> None:
    backbone = vit()
    features = backbone(torch.randn(2, 3, 70, 100), record=True)  # nearest multiples of 16: 64 x 96
    assert backbone.channels == (48,) and backbone.reductions == (16,)
    assert features.maps[0].shape == (2, 48, 4, 6)
    assert backbone.maps == 6, "3 heads of the last 2 blocks"
    assert Backbone("vit_tiny_patch16_224", VIT, attention_blocks=3).maps == 9


@pytest.mark.parametrize(
    ("blocks", "first"), [(0, "patch_embed"), (3, "stages.2.norm"), (5, "stages.3.norm"), ("all", None)]
)
def test_frozen_blocks_record_no_graph(blocks: Any, first: str | None) -> None:
    backbone = Backbone("pvt_v2_b0", {**PVT, "drop_path_rate": 0.5}).train()
    backbone.freeze(blocks)
    trainable = [name for name, parameter in backbone.net.named_parameters() if parameter.requires_grad]
    assert trainable[0].startswith(first) if first else not trainable
    recorded = []
    for block in (m for name, m in backbone.named_modules() if re.fullmatch(r"net\.stages\.\d\.blocks\.\d", name)):
        block.register_forward_hook(lambda module, _, out: recorded.append((out.requires_grad, module.training)))
    backbone.eval().train()  # train() must not undo the freezing
    maps = backbone(torch.randn(2, 3, 64, 64)).maps
    frozen = 5 if blocks == "all" else blocks
    assert recorded == [(False, False)] * frozen + [(True, True)] * (5 - frozen)
    assert maps[-1].requires_grad == (blocks != "all")


def test_freezing_a_plain_vit_includes_the_embeddings() -> None:
    backbone = vit()
    backbone.freeze(2)
    trainable = {name for name, parameter in backbone.net.named_parameters() if parameter.requires_grad}
    assert trainable and all(name.startswith(("blocks.2.", "norm.")) for name in trainable)
    with pytest.raises(UserError, match=r"model\.freeze must be 0 to 3"):
        backbone.freeze(4)


@pytest.mark.parametrize(
    ("name", "args", "options", "words"),
    [
        ("resnet18", {}, {}, ["resnet18", "self-attention", "pvt_v2_b1", "vit_small_patch16_224"]),
        ("convnext_atto", {}, {}, ["convnext_atto", "self-attention", "pvt_v2_b1"]),
        ("pvt_v2_b0", {**PVT, "linear": True}, {}, ["pvt_v2_b0", "49 tokens", "pvt_v2_b1"]),
        ("pvt_v2_b0", {**PVT, "sr_ratios": (8, 4, 2, 2)}, {}, ["pvt_v2_b0", "4 tokens"]),
        ("pvt_v2_b9", {}, {}, ["timm", "pvt_v2_b9", "did you mean"]),
        ("pvt_v2_b0", {"embed_dim": 3}, {}, ["model.backbone_args", "embed_dim"]),
        ("pvt_v2_b0", PVT, {"output_stride": 12}, ["model.output_stride", "4, 8, 16, 32", "12"]),
        ("vit_tiny_patch16_224", VIT, {"output_stride": 8}, ["model.output_stride", "16"]),
        ("pvt_v2_b0", PVT, {"attention_blocks": 3}, ["model.attention_blocks", "1 to 2", "3"]),
    ],
)
def test_refused(name: str, args: dict[str, Any], options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Backbone(name, args, **options)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


class TestWeights:
    @pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.net."])
    @pytest.mark.parametrize("suffix", ["safetensors", "pth"])
    def test_round_trip(self, tmp_path: Path, suffix: str, prefix: str) -> None:
        source, target = pvt(), Backbone("pvt_v2_b0", PVT)
        state = {prefix + key: value for key, value in source.net.state_dict().items()}
        state[prefix + "head.weight"] = torch.zeros(10, 32)  # a classifier is allowed
        path = tmp_path / f"weights.{suffix}"
        save_file(state, path) if suffix == "safetensors" else torch.save({"model": state}, path)
        load_backbone_weights(target, str(path))
        for key, value in source.net.state_dict().items():
            assert torch.equal(value, target.net.state_dict()[key])

    def test_official_mit_file(self, tmp_path: Path) -> None:
        """Tensors with the names and shapes of SegFormer's mit_b0.pth give the network that their values were taken
        from."""
        source = Backbone("mit_b0").eval()
        assert source.channels == (32, 64, 160, 256) and net(source).stages[0].blocks[0].mlp.fc1.out_features == 128
        official: dict[str, torch.Tensor] = {}
        for stage in range(1, 5):
            embedding = "patch_embed" if stage == 1 else f"stages.{stage - 1}.downsample"
            names = {f"patch_embed{stage}.{n}": f"{embedding}.{n}" for n in ("proj.weight", "proj.bias")}
            names |= {f"patch_embed{stage}.norm.{n}": f"{embedding}.norm.{n}" for n in ("weight", "bias")}
            names |= {f"norm{stage}.{n}": f"stages.{stage - 1}.norm.{n}" for n in ("weight", "bias")}
            for block in range(2):
                layers = ["norm1", "attn.q", "attn.kv", "attn.proj", "norm2", "mlp.fc1", "mlp.dwconv", "mlp.fc2"]
                layers += ["attn.sr", "attn.norm"] if stage < 4 else []
                for layer in layers:
                    theirs = "mlp.dwconv.dwconv" if layer == "mlp.dwconv" else layer
                    for n in ("weight", "bias"):
                        ours = f"stages.{stage - 1}.blocks.{block}.{layer}.{n}"
                        names[f"block{stage}.{block}.{theirs}.{n}"] = ours
            official |= {theirs: torch.randn_like(source.net.get_parameter(ours)) for theirs, ours in names.items()}
            with torch.no_grad():
                for theirs, ours in names.items():
                    source.net.get_parameter(ours).copy_(official[theirs])
        official |= {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}
        torch.save(official, tmp_path / "mit_b0.pth")
        target = Backbone("mit_b0").eval()
        load_backbone_weights(target, str(tmp_path / "mit_b0.pth"))
        images = torch.randn(1, 3, 64, 64)
        for ours, theirs in zip(source(images).maps, target(images).maps, strict=True):
            assert torch.equal(ours, theirs)
        with pytest.raises(UserError, match=r"timm has no weights for mit_b0; use SegFormer's file"):
            load_backbone_weights(target, "timm")

    def test_positions_learned_at_another_size_are_interpolated(self, tmp_path: Path) -> None:
        source = vit("vit_small_patch14_reg4_dinov2", output_stride=14, img_size=56)
        torch.save(source.net.state_dict(), tmp_path / "small.pth")
        target = vit("vit_small_patch14_reg4_dinov2", output_stride=14, img_size=98)
        assert net(target).pos_embed.shape[1] == 49 and net(source).pos_embed.shape[1] == 16
        load_backbone_weights(target, str(tmp_path / "small.pth"))
        rows = net(source).pos_embed.reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(rows, size=(7, 7), mode="bicubic", antialias=True)
        torch.testing.assert_close(net(target).pos_embed.reshape(1, 7, 7, -1).permute(0, 3, 1, 2), expected)
        assert torch.equal(net(source).blocks[1].attn.qkv.weight, net(target).blocks[1].attn.qkv.weight)

    def test_without_weights_the_backbone_stays_random(self) -> None:
        backbone = pvt()
        before = copy.deepcopy(backbone.state_dict())
        load_backbone_weights(backbone, None)
        assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())

    def test_a_mismatched_file_is_reported_with_its_tensors(self, tmp_path: Path) -> None:
        state = pvt().net.state_dict()
        del state["patch_embed.proj.bias"]
        state["stages.9.what"] = torch.zeros(1)
        state["patch_embed.proj.weight"] = torch.zeros(1)
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(UserError) as caught:
            load_backbone_weights(pvt(), str(tmp_path / "w.safetensors"))
        for word in ("w.safetensors", "1 missing (patch_embed.proj.bias)", "1 unexpected (stages.9.what)", "(1,)"):
            assert word in str(caught.value)

    def test_no_code_in_a_file_is_run(self, tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "ran",)

        (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": Bomb()}))
        torch.save({"a": Bomb()}, tmp_path / "w2.pth")
        for name in ("w.pth", "w2.pth"):
            with pytest.raises(UserError, match=name):
                load_backbone_weights(pvt(), str(tmp_path / name))
        assert not (tmp_path / "ran").exists()

    def test_missing_files(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"nowhere\.pth does not exist"):
            load_backbone_weights(pvt(), str(tmp_path / "nowhere.pth"))
        with pytest.raises(UserError, match="unknown bundled weights 'nothing'"):
            load_backbone_weights(pvt(), "bundled:nothing")
        (tmp_path / "half.safetensors").write_bytes(b"\x10")
        with pytest.raises(UserError, match=r"half\.safetensors can't be read"):
            load_backbone_weights(pvt(), str(tmp_path / "half.safetensors"))
