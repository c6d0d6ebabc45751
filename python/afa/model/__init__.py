"""The network: a timm backbone, its heads, and its file format."""

from afa.model.backbone import Backbone, Features
from afa.model.heads import affinity_from_attention
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
    "affinity_from_attention",
    "build_model",
    "load_model",
    "normalize",
    "save_checkpoint_weights",
]
