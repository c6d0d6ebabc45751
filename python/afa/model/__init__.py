"""The network: a timm backbone, its heads, and its file format."""

from afa.model.backbone import Backbone, Features
from afa.model.network import (
    AFANet,
    Output,
    build_model,
    load_model,
    normalize,
    save_checkpoint_weights,
)

__all__ = [
    "AFANet",
    "Backbone",
    "Features",
    "Output",
    "build_model",
    "load_model",
    "normalize",
    "save_checkpoint_weights",
]
