"""Native operators for weakly supervised segmentation on CPU and CUDA. The only dependencies are torch and numpy.

Every operator has a reference implementation of the same name in `afa_ext.reference`, in plain PyTorch.
"""

from . import reference as reference  # so that `import afa_ext` makes afa_ext.reference available
from ._native import build_info
from .affinity import affinity_from_attention, affinity_labels, affinity_loss, affinity_loss_and_sums
from .crf import CRF_PRESETS as CRF_PRESETS
from .crf import DenseEnergyLoss, bilateral_filter, dense_crf, dense_energy_loss
from .labels import pseudo_labels, refine_labels
from .pair_affinity import edge_affinity, feature_affinity
from .par import PAMR, PAR, pamr_affinity, pamr_refine, par_affinity, par_propagate, par_refine
from .walk import propagate_cams, propagate_to_edge, random_walk
from .window import window_offsets

__version__ = "0.1.0"
__all__ = [
    "PAMR",
    "PAR",
    "DenseEnergyLoss",
    "affinity_from_attention",
    "affinity_labels",
    "affinity_loss",
    "affinity_loss_and_sums",
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
