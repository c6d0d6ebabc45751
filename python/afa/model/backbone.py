"""Any timm Transformer as a backbone: feature maps, and the queries and keys of its last self-attentions.

No timm code is copied or patched. When a forward pass requests queries and keys, forward hooks on the linear layers
that compute them record both; every other forward pass runs unchanged, including fused attention. The recorded tensors
are checked once, when the backbone is created: softmax(scale * q @ k^T) @ v must equal the attention module's output.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import timm
import timm.models
import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from afa.errors import UserError, one_line
from afa.model.normalization import Normalization

WORKING = "pvt_v2_b1, vit_small_patch16_224, deit_tiny_patch16_224"
"""Names quoted in error messages: backbones of both families that are known to work."""

_RESIZABLE = ("vision_transformer", "deit", "eva")
"""timm's modules of plain ViTs whose position embeddings can follow the image's size (DINOv3 is in `eva`)."""
_MIT = {f"mit_b{size}": f"pvt_v2_b{size}" for size in range(6)}
"""SegFormer's MiT is PVTv2's network with an MLP ratio of 4 in every stage."""
_DEFAULT_PLAIN_BLOCKS = 2
_PROBE_SIZE = 64


@dataclass
class Features:
    """Outputs of one forward pass of the backbone."""

    maps: list[Tensor]
    """One [B, channels, h, w] map per level, finest first; the last one feeds the classifier."""
    queries: Tensor | None = None
    """[B, K, N, d]: all heads of the selected blocks, unscaled, without class and register tokens."""
    keys: Tensor | None = None
    """[B, K, N, d]; the raw attention logits are queries @ keys^T."""


@dataclass
class _Recorded:
    """Intermediate results of one attention module during one forward pass."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    """Outputs of its layers, by layer name."""
    rope: Tensor | None = None
    """Rotary position embedding applied to its queries and keys."""


class Backbone(nn.Module):
    """The timm model `name`, created with `args` and random weights (see afa.model.weights).

    `channels`, `reductions`: one per level, finest first (a plain ViT has one level); reductions in pixels per token.
    `normalization`: of the images that the model was pretrained on.
    `maps`: number of attention maps in `queries @ keys^T` (heads times blocks). `head_dim`: d, the size of one head.

    Raises UserError when the model is unknown, its attention can't be read, or the output stride is not available.
    All of this is checked before any weights are downloaded.
    """

    def __init__(
        self,
        name: str,
        args: Mapping[str, Any] | None = None,
        *,
        output_stride: int = 16,
        attention_blocks: int | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.net = create_timm(name, args or {})
        settings = getattr(self.net, "pretrained_cfg", None)
        self.normalization = Normalization.of_timm(settings if isinstance(settings, Mapping) else None)
        info = getattr(self.net, "feature_info", None) or [{"reduction": 0, "module": ""}]
        # Only inside the levels: attention pooling at the end does not relate tokens to each other.
        inside = tuple(f"{level['module']}." if level["module"] else "" for level in info)
        attentions = {path: module for path, module in _find_attentions(self.net).items() if path.startswith(inside)}
        if not attentions:
            raise UserError(
                f"model.backbone: {name} has no self-attention that can be read (no q and k layers were found), but "
                f"AFA learns affinity from attention; choose a Transformer such as {WORKING}"
            )
        if not hasattr(self.net, "forward_intermediates"):
            raise UserError(
                f"model.backbone: timm's {name} can't return its feature maps (it has no forward_intermediates); "
                f"choose a Transformer such as {WORKING}"
            )
        self._blocks = [path.rpartition(".")[0] + "." for path in attentions]
        self.pyramid = len({level["reduction"] for level in info}) > 1
        self._least_side = info[-1]["reduction"] if self.pyramid else 1
        self.prefix_tokens = int(getattr(self.net, "num_prefix_tokens", 0))
        if self.pyramid:
            _unstride(self.net, name, [level["module"] for level in info], output_stride)
            last = info[-1]["module"] + "."
            attentions = {path: module for path, module in attentions.items() if path.startswith(last)}
            if not attentions:
                raise UserError(
                    f"model.backbone: no attention can be read in the last stage of {name}; choose a Transformer "
                    f"such as {WORKING}"
                )
        self.attention_paths = self._choose(list(attentions), attention_blocks)
        self._frozen: list[nn.Module] = []
        self._probe(output_stride)

    def _choose(self, paths: list[str], count: int | None) -> list[str]:
        if count is None:
            count = len(paths) if self.pyramid else min(_DEFAULT_PLAIN_BLOCKS, len(paths))
        if not 1 <= count <= len(paths):
            where = "last stage" if self.pyramid else "model"
            raise UserError(
                f"model.attention_blocks must be 1 to {len(paths)}, the blocks in the {where} of {self.name}, "
                f"got {count}"
            )
        return paths[-count:]

    def freeze(self, blocks: int | Literal["all"]) -> None:
        """Freeze the first Transformer blocks and everything before them, or the whole backbone.

        Frozen parameters don't require gradients, so no graph is recorded up to the first trainable block, and frozen
        modules stay in evaluation mode (no drop path). UserError if there are fewer blocks.
        """
        if blocks != "all" and blocks > len(self._blocks):
            raise UserError(
                f"model.freeze must be 0 to {len(self._blocks)}, the number of blocks of {self.name}, or all; "
                f"got {blocks}"
            )
        # Parameters are registered in the order of execution.
        named = list(self.net.named_parameters())
        until = len(named) if blocks == "all" else 0
        if blocks != "all" and blocks:
            until = 1 + max(i for i, (name, _) in enumerate(named) if name.startswith(self._blocks[blocks - 1]))
        for _, parameter in named[:until]:
            parameter.requires_grad_(False)
        self._frozen = [
            module
            for module in self.net.modules()
            if (own := list(module.parameters())) and not any(parameter.requires_grad for parameter in own)
        ]
        self.train(self.training)

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, images: Tensor, record: bool = False) -> Features:
        """Normalized images [B, 3, H, W] -> feature maps, and queries and keys if `record` is set.

        A plain ViT needs sides that are multiples of its patch size: other sizes are resized to the nearest multiple.
        A pyramid's attention downsamples its keys, which needs sides of at least 32 pixels in the PVTv2 family: smaller
        images are enlarged.
        """
        images = self._fit(images)
        if not record:
            return Features(self._maps(images))
        with self._recording() as recorded:
            maps = self._maps(images)
        pairs = [self._queries_keys(path, recorded[path]) for path in self.attention_paths]
        prefix = self.prefix_tokens
        queries = torch.cat([q[:, :, prefix:] for q, _ in pairs], dim=1)
        keys = torch.cat([k[:, :, prefix:] for _, k in pairs], dim=1)
        return Features(maps, queries, keys)

    def _maps(self, images: Tensor) -> list[Tensor]:
        forward: Callable[..., list[Tensor]] = self.net.forward_intermediates  # type: ignore[assignment]
        if self.pyramid:
            return forward(images, intermediates_only=True)
        return forward(images, indices=1, norm=True, intermediates_only=True)

    def _fit(self, images: Tensor) -> Tensor:
        if self.pyramid:
            size = [max(self._least_side, side) for side in images.shape[-2:]]
        else:
            patch = self.reductions[-1]
            size = [max(patch, (side + patch // 2) // patch * patch) for side in images.shape[-2:]]
        if size == list(images.shape[-2:]):
            return images
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)

    @contextmanager
    def _recording(self) -> Iterator[dict[str, _Recorded]]:
        """Hooks for one forward pass, removed afterwards so that the module can be copied and saved as usual."""
        recorded = {path: _Recorded() for path in self.attention_paths}
        with ExitStack() as stack:
            for path in self.attention_paths:
                module = self.net.get_submodule(path)
                outputs = recorded[path].outputs
                for layer in ("qkv", "q", "kv", "k", "v", "q_norm", "k_norm"):
                    child = getattr(module, layer, None)
                    if isinstance(child, nn.Module) and not isinstance(child, nn.Identity):

                        def keep(
                            _: nn.Module, __: Any, out: Tensor, *, to: dict[str, Tensor] = outputs, at: str = layer
                        ) -> None:
                            to[at] = out

                        stack.callback(child.register_forward_hook(keep).remove)

                def keep_rope(
                    _: nn.Module, args: tuple[Any, ...], options: dict[str, Any], *, to: _Recorded = recorded[path]
                ) -> None:
                    to.rope = options.get("rope")

                stack.callback(module.register_forward_pre_hook(keep_rope, with_kwargs=True).remove)
            yield recorded

    def _queries_keys(self, path: str, recorded: _Recorded) -> tuple[Tensor, Tensor]:
        query, key, _ = _split_heads(self.net.get_submodule(path), recorded)
        return query, key

    @torch.no_grad()
    def _probe(self, output_stride: int) -> None:
        """Run one small forward pass to measure the levels and verify that the recorded attention is the one used."""
        was_training = self.net.training
        self.net.eval()
        side = _PROBE_SIZE
        patch = getattr(getattr(self.net, "patch_embed", None), "patch_size", None)
        if not self.pyramid and patch:
            side = 4 * max(patch if isinstance(patch, tuple) else (patch,))
        images = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side).sin()
        inputs: dict[str, Tensor] = {}
        try:
            with ExitStack() as stack:
                for path in self.attention_paths:
                    proj = self.net.get_submodule(path).get_submodule("proj")

                    def keep(_: nn.Module, args: tuple[Tensor, ...], *, at: str = path) -> None:
                        inputs[at] = args[0]

                    stack.callback(proj.register_forward_pre_hook(keep).remove)
                recorded = stack.enter_context(self._recording())
                maps = self._maps(images)
            self.channels = tuple(level.shape[1] for level in maps)
            self.reductions = tuple(side // level.shape[3] for level in maps)
            tokens = maps[-1].shape[2] * maps[-1].shape[3] + self.prefix_tokens
            heads, dims = 0, set()
            for path in self.attention_paths:
                module = self.net.get_submodule(path)
                query, key, value = _split_heads(module, recorded[path])
                if query.shape[2] != tokens or key.shape[2] != tokens or query.shape[0] != 1:
                    raise ValueError(
                        f"{path} attends from {query.shape[2]} to {key.shape[2]} tokens in {query.shape[0]} windows, "
                        f"not among the {tokens} tokens of the last feature map"
                    )
                own = inputs[path].reshape(1, tokens, -1)
                ours = (query @ key.transpose(-2, -1) * float(module.scale)).softmax(-1) @ value  # type: ignore[arg-type]
                ours = ours.transpose(1, 2).reshape(1, tokens, -1)
                if own.shape != ours.shape or not torch.allclose(
                    own, ours, rtol=1e-3, atol=1e-4 * float(own.abs().max())
                ):
                    raise ValueError(f"softmax(q k^T) v differs from what {path} computes")
                heads += query.shape[1]
                dims.add(query.shape[3])
            if len(dims) > 1:
                raise ValueError(f"the chosen blocks have heads of different sizes {sorted(dims)}")
        except Exception as error:
            raise UserError(
                f"model.backbone: the attention of {self.name} can't be read ({one_line(error)}); choose a Transformer "
                f"with plain global self-attention in its last blocks, such as {WORKING}"
            ) from error
        finally:
            self.net.train(was_training)
        self.maps, self.head_dim = heads, dims.pop()
        if self.reductions[-1] != output_stride:
            raise UserError(
                f"model.output_stride is {output_stride}, but {self.name} has {self.reductions[-1]} pixels per token "
                f"and a plain ViT can't change that; set model.output_stride={self.reductions[-1]} or choose another "
                "backbone"
            )


def create_timm(name: str, args: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """`timm.create_model` without the classifier; UserError for an unknown name or an invalid argument."""
    base = name.partition(".")[0]
    if base in _MIT:
        if pretrained:
            raise UserError(
                f"model.weights: timm has no weights for {base}; use SegFormer's file with model.weights={base}.pth, "
                f"or timm's ImageNet weights of the related network with model.backbone={_MIT[base]}"
            )
        name = base = _MIT[base]
        args = {"mlp_ratios": (4, 4, 4, 4), **args}
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, [*timm.list_models(), *_MIT], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"working examples: {WORKING}"
        raise UserError(f"model.backbone: timm has no model named '{name}'; {hint}")
    _refuse_files(args)
    options: dict[str, Any] = {"num_classes": 0}
    if timm.models.is_model_in_modules(base, _RESIZABLE):
        options["dynamic_img_size"] = True  # position embeddings follow the image size
    options.update(args)
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        if pretrained:
            raise UserError(
                f"model.weights: timm's pretrained weights for {name} could not be loaded ({one_line(error)}); check "
                "the network connection, use a file with model.weights=PATH, or start from random weights with "
                "model.weights=null"
            ) from error
        raise UserError(
            f"model.backbone_args: timm can't create {name} with {dict(args)} ({one_line(error)}); correct them"
        ) from error


def _refuse_files(args: Mapping[str, Any]) -> None:
    """UserError for arguments that make timm read or download files, as a saved model stores its own arguments."""
    for key in args:
        if key in ("checkpoint_path", "cache_dir") or key.startswith("pretrained"):
            raise UserError(
                f"model.backbone_args: {key} is not allowed because it makes timm read other files; give weights with "
                "model.weights=PATH"
            )


def _find_attentions(net: nn.Module) -> dict[str, nn.Module]:
    """Attention modules in execution order: modules with heads and with layers that compute q and k."""
    found = {}
    for path, module in net.named_modules():
        has_layers = any(
            all(isinstance(getattr(module, layer, None), nn.Module) for layer in layers)
            for layers in (("qkv",), ("q", "kv"), ("q", "k", "v"))
        )
        if has_layers and hasattr(module, "num_heads") and hasattr(module, "scale") and hasattr(module, "proj"):
            found[path] = module
    return found


def _split_heads(module: nn.Module, recorded: _Recorded) -> tuple[Tensor, Tensor, Tensor]:
    """Recorded layer outputs [B, N, parts*heads*d] -> q, k, v, each [B, heads, N, d], as used in the attention."""
    heads = int(module.num_heads)  # type: ignore[arg-type]
    outputs = recorded.outputs

    def parts(layer: str, count: int) -> tuple[Tensor, ...]:
        out = outputs[layer]
        return out.reshape(*out.shape[:2], count, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    if "qkv" in outputs:
        query, key, value = parts("qkv", 3)
    elif "kv" in outputs:
        (query,), (key, value) = parts("q", 1), parts("kv", 2)
    elif {"q", "k", "v"} <= outputs.keys():
        (query,), (key,), (value,) = parts("q", 1), parts("k", 1), parts("v", 1)
    else:
        raise ValueError("its q, k and v layers are not called as modules")
    query, key = outputs.get("q_norm", query), outputs.get("k_norm", key)
    if recorded.rope is not None:
        query, key = (_turn(module, x, recorded.rope) for x in (query, key))
    return query, key, value


def _turn(module: nn.Module, tokens: Tensor, rope: Tensor) -> Tensor:
    """Queries or keys [B, heads, N, d] with the rotary embedding applied to all but the class and register tokens."""
    prefix = int(getattr(module, "num_prefix_tokens", 0))
    turned = apply_rot_embed_cat(tokens[:, :, prefix:], rope, half=bool(getattr(module, "rotate_half", False)))
    return torch.cat([tokens[:, :, :prefix], turned], dim=2).type_as(tokens)


def _unstride(net: nn.Module, name: str, stages: list[str], output_stride: int) -> None:
    """Set the last stages' downsampling to stride 1 until the last map has `output_stride` pixels per token."""
    reductions = [level["reduction"] for level in net.feature_info]  # type: ignore[union-attr]
    if output_stride not in reductions:
        raise UserError(
            f"model.output_stride must be one of {', '.join(map(str, reductions))} for {name}, got {output_stride}"
        )
    for level in range(len(stages) - 1, reductions.index(output_stride), -1):
        stage = net.get_submodule(stages[level])
        inside = tuple(path + "." for path in _find_attentions(stage))
        strided = [
            module
            for path, module in stage.named_modules()
            # Attention has its own strided convolutions, which downsample the keys, not the map.
            if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and not path.startswith(inside)
        ]
        if len(strided) != 1 or strided[0].kernel_size != (3, 3):
            raise UserError(
                f"model.output_stride: {name} has no overlapping patch embedding in {stages[level]} whose stride could "
                f"be set to 1; set model.output_stride={reductions[-1]}"
            )
        strided[0].stride = (1, 1)
