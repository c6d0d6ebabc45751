"""Weights for a backbone: timm's, those bundled with the package, or a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from afa.errors import UserError, one_line
from afa.model.backbone import Backbone, create_timm

_WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema", "ema", "teacher")
"""Keys under which training scripts save the weights; the first one present is used."""


def load_backbone_weights(backbone: Backbone, weights: str | None, args: Mapping[str, Any] | None = None) -> None:
    """Load weights into the backbone: 'timm', 'bundled:<name>', a .safetensors or .pth path, or null (random weights).

    A file can use timm's tensor names, or those of the network's authors where timm can rename them: SegFormer's
    mit_b*.pth, PVTv2's, DeiT's, DINOv2's and DINOv3's. Position embeddings of another size are interpolated. Only
    tensors, settings and NumPy numbers are unpickled. A classifier in the file is ignored; any other missing,
    unexpected or wrong-shaped tensor raises a UserError that lists it.
    """
    if weights is None:
        return
    if weights == "timm":
        state = create_timm(backbone.name, args or {}, pretrained=True).state_dict()
        source = f"timm's {backbone.name}"
    else:
        path = _weights_path(weights)
        state, source = _as_timm(backbone.net, _strip(read_tensors(path))), str(path)
    _load_strict(backbone, state, source)


def _weights_path(weights: str) -> Path:
    folder = Path(__file__).parent.parent / "weights"
    kind, colon, name = weights.partition(":")
    if colon and kind == "bundled":
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            there = sorted(file.stem for file in folder.glob("*.safetensors"))
            raise UserError(
                f"model.weights: unknown bundled weights '{name}'; "
                + (f"available: {', '.join(there)}" if there else "this installation has none")
            )
        return path
    path = Path(weights).expanduser()
    if not path.is_file():
        raise UserError(
            f"model.weights: the file {weights} does not exist; give 'timm', 'bundled:<name>', the path of a "
            ".safetensors or .pth file, or null"
        )
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file by name, on the CPU; UserError when it is neither."""
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_harmless()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} can't be read as weights ({one_line(error)}); it must be a .safetensors file or a torch file "
            "that contains only tensors and settings"
        ) from error
    content = dict(content) if isinstance(content, dict) else {}
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        keys = ", ".join(list(map(str, content))[:8]) or "none"
        raise UserError(
            f"{path} contains no state dict of tensors (its keys are {keys}; searched under {', '.join(_WRAPPERS)}); "
            "save one with torch.save(model.state_dict(), ...)"
        )
    return content


def _harmless() -> list[Any]:
    """Types that training scripts save with the weights but torch.load rejects: settings and NumPy numbers."""
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    # The function that creates a NumPy number has moved between NumPy versions.
    return [argparse.Namespace, np.dtype, np.float64().__reduce__()[0], *kinds]


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's tensor names: without the prefix that a wrapping model added."""
    for prefix in ("module.", "backbone.net.", "backbone.", "net."):
        if any(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    return state


def _as_timm(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published checkpoint's tensors, renamed and resized by timm's rules for the network, if it has any."""
    own = net.state_dict()
    if all(key in state and state[key].shape == value.shape for key, value in own.items()):
        return state
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        converted: dict[str, Tensor] = convert(dict(state), net)
    except Exception:  # the file is for another network: the comparison below reports the mismatched tensors
        return state
    return converted


def _load_strict(backbone: Backbone, state: dict[str, Tensor], source: str) -> None:
    own = backbone.net.state_dict()
    heads = ("head.", "head_dist.", "fc.", "fc_norm.", "classifier.")
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own and not key.startswith(heads)]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise UserError(
            f"model.weights: {source} does not match {backbone.name}: of its {len(own)} tensors "
            + ", ".join(problems)
            + "; "
            "give the file that belongs to this backbone, or set model.backbone and model.backbone_args to match it"
        )
    backbone.net.load_state_dict({key: state[key] for key in own})
