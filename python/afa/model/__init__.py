"""The network: a timm backbone, its heads, and its file format."""

from afa.model.backbone import Backbone, Features
from afa.model.network import AFANet, Output, build_model, load_model, save_model
from afa.model.normalization import Normalization

__all__ = [
    "AFANet",
    "Backbone",
    "Features",
    "Normalization",
    "Output",
    "build_model",
    "load_model",
    "save_model",
]
