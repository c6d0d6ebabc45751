"""AFANet: a timm Transformer with classifier, CAM, segmentation decoder and affinity head (AFA, CVPR 2022)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import afa_ext
from afa.config import Config, ModelConfig, from_dict, to_dict
from afa.data.class_names import check_class_list
from afa.errors import UserError, one_line
from afa.files import atomic_path
from afa.model import hub
from afa.model.backbone import Backbone
from afa.model.heads import DECODERS, AffinityHead, refine_along_colors
from afa.model.normalization import Normalization
from afa.model.weights import load_backbone_weights
from afa.run import MODEL

WANTS = frozenset({"class", "cam", "seg", "qk", "affinity"})
FORMAT = "afa-model-2"


@dataclass
class Output:
    """Outputs of one forward pass; outputs that were not requested are None. float32 except under autocast."""

    class_logits: Tensor | None = None
    """[B, C]."""
    cam: Tensor | None = None
    """[B, C, h, w] raw class activation maps on the token grid, before ReLU."""
    seg_logits: Tensor | None = None
    """[B, C+1, hs, ws] on the decoder's grid (or the refinement's), background first."""
    affinity: Tensor | None = None
    """[B, N, N] in (0, 1), symmetric, N = h*w."""
    queries: Tensor | None = None
    """[B, K, N, d]; `AFANet.affinity_head` takes `queries` and `keys`."""
    keys: Tensor | None = None
    """[B, K, N, d]."""
    grid: tuple[int, int] | None = None
    """Token grid (h, w) of the last feature map."""

    def tensors(self) -> dict[str, Tensor]:
        """The computed outputs by field name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def split(self, count: int) -> tuple[Output, Output]:
        """The outputs of the first `count` images and of the others."""
        found = self.tensors()
        first: dict[str, Any] = {name: value[:count] for name, value in found.items()}
        others: dict[str, Any] = {name: value[count:] for name, value in found.items()}
        return replace(self, **first), replace(self, **others)


class AFANet(nn.Module):
    """Backbone and heads for `num_classes` foreground classes."""

    def __init__(
        self, backbone: Backbone, num_classes: int, config: ModelConfig, normalization: Normalization | None = None
    ) -> None:
        """normalization: that of the backbone if None; a saved model stores the one it was trained with."""
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1 (foreground classes), got {num_classes}")
        self.backbone = backbone
        self.num_classes = num_classes
        self.config = config
        self.normalization = normalization or backbone.normalization
        # No bias: it would shift every pixel of a class's CAM equally.
        self.classifier = nn.Conv2d(backbone.channels[-1], num_classes, 1, bias=False)
        self.decoder = DECODERS[config.decoder](
            backbone.channels, backbone.reductions, num_classes + 1, config.decoder_width
        )
        self.affinity_head = AffinityHead(
            backbone.maps, backbone.head_dim, standardized=config.affinity_logits == "standardized"
        )
        self.par_refine: Callable[..., Tensor] = afa_ext.par_refine
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)

    @property
    def stride(self) -> int:
        """Pixels per token of the last level."""
        return self.backbone.reductions[-1]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] -> float32 as the backbone expects them, channels last in memory."""
        return self.normalization(images)

    def forward(self, images: Tensor, want: Collection[str] = ("class", "cam", "seg")) -> Output:
        """Normalized images [B, 3, H, W] -> the outputs listed in `want`; the others are not computed.

        want: any of class, cam, seg, qk (queries and keys), affinity.
        """
        if not WANTS.issuperset(want):
            raise ValueError(f"want must be a subset of {', '.join(sorted(WANTS))}, got {want!r}")
        record = not {"qk", "affinity"}.isdisjoint(want)
        features = self.backbone(images, record=record)
        last = features.maps[-1]
        out = Output(grid=(last.shape[2], last.shape[3]))
        if "class" in want:
            pooled = last.amax((2, 3), keepdim=True) if self.config.pooling == "max" else last.mean((2, 3), True)
            out.class_logits = self.classifier(pooled).flatten(1)
        if "cam" in want:
            out.cam = self.classifier(last)
        if "seg" in want:
            out.seg_logits = self.decoder(features.maps)
            if self.config.refine_iterations:
                out.seg_logits = refine_along_colors(
                    out.seg_logits,
                    images,
                    iterations=self.config.refine_iterations,
                    dilations=self.config.refine_dilations,
                    downscale=self.config.refine_downscale,
                    par_refine=self.par_refine,
                )
        if record:
            assert features.queries is not None and features.keys is not None
            if "qk" in want:
                out.queries, out.keys = features.queries, features.keys
            if "affinity" in want:
                out.affinity = self.affinity_head(features.queries, features.keys)
        return out


def build_model(config: ModelConfig, num_classes: int, *, normalization: Normalization | None = None) -> AFANet:
    """The model of a configuration: the backbone has the weights `config.weights`, the heads are random.

    normalization: see AFANet. Raises UserError when the backbone, its output stride, its attention blocks or its
    weights are not available.
    """
    backbone = Backbone(
        config.backbone,
        config.backbone_args,
        output_stride=config.output_stride,
        attention_blocks=config.attention_blocks,
    )
    load_backbone_weights(backbone, config.weights, config.backbone_args)
    backbone.freeze(config.freeze)
    # Convolutions and linear layers then share one memory layout, which saves about a quarter of a forward pass on the
    # CPU.
    return AFANet(backbone, num_classes, config, normalization).to(memory_format=torch.channels_last)


def save_model(path: str | Path, model: AFANet, config: Config, classes: Collection[str]) -> None:
    """Atomically write the model to a .safetensors file, including its configuration, class names and
    normalization."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    content = {
        "format": FORMAT,
        "config": to_dict(config),
        "classes": list(classes),
        "normalization": {"mean": model.normalization.mean, "std": model.normalization.std},
    }
    with atomic_path(path) as temporary, _as_os_error():
        # A single key: safetensors writes several keys in random order, and equal models should give equal files.
        save_file(tensors, temporary, {"afa": json.dumps(content)})


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Convert safetensors' own error for a full disk, which has the errno in its text, to an OSError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def load_classes(path: str | Path) -> list[str]:
    """The class names in a model saved by `save_model`, without reading its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {}).get("afa", "{}"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"the model {path} can't be read as a safetensors file ({one_line(error)})") from error
    return list(content.get("classes", []))


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[AFANet, list[str], Config]:
    """A model saved by `save_model`, in evaluation mode, with its class names and configuration.

    path: the file, the folder of a run or of a Hugging Face model, or 'hf://owner/name', which is downloaded. Nothing
    is unpickled. Raises UserError when the file is missing or is not such a model.
    """
    from safetensors import SafetensorError, safe_open

    path = hub.download(path) if isinstance(path, str) and path.startswith(hub.PREFIX) else Path(path)
    path = path / MODEL if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"the model {path} does not exist; `afa train` writes it at the end of a run")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("afa", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the model {path} can't be read as a safetensors file ({one_line(error)}); train it again"
        ) from error
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path} was not saved by this program (its format is {metadata.get('format')!r}, expected {FORMAT!r}); "
            "give the model.safetensors of a run"
        )
    config = from_dict(metadata["config"], where=f"in {path}")
    classes = check_class_list(metadata["classes"], str(path))
    normalization = Normalization(*(tuple(metadata["normalization"][name]) for name in ("mean", "std")))
    without_weights = config.model.model_copy(update={"weights": None})
    model = build_model(without_weights, len(classes), normalization=normalization)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not match its own configuration ({one_line(error)}); train it again") from error
    return model.to(device).eval(), classes, config
