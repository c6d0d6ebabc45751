"""Native operators for weakly-supervised segmentation, on CPU and CUDA; torch and numpy are all they need.

Every operator has a twin of the same name in :mod:`afa_ext.reference`, in plain PyTorch.
"""

from . import tuning  # noqa: F401  (puts the shipped launch plans in force)
from ._native import build_info
from .affinity import affinity_from_attention, affinity_labels, affinity_loss
from .crf import CRF_PRESETS as CRF_PRESETS
from .crf import DenseEnergyLoss, bilateral_filter, dense_crf, dense_energy_loss
from .labels import pseudo_labels, refine_labels
from .par import PAMR, PAR, pamr_affinity, pamr_refine, par_affinity, par_propagate, par_refine
from .walk import (
    edge_affinity,
    feature_affinity,
    propagate_cams,
    propagate_to_edge,
    random_walk,
    window_offsets,
)

__version__ = "0.1.0"
__all__ = [
    "PAMR",
    "PAR",
    "DenseEnergyLoss",
    "affinity_from_attention",
    "affinity_labels",
    "affinity_loss",
    "bilateral_filter",
    "build_info",
    "dense_crf",
    "dense_energy_loss",
    "edge_affinity",
    "feature_affinity",
    "pamr_affinity",
    "pamr_refine",
    "par_affinity",
    "par_propagate",
    "par_refine",
    "propagate_cams",
    "propagate_to_edge",
    "pseudo_labels",
    "random_walk",
    "refine_labels",
    "window_offsets",
]
