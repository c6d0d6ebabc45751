"""The operators in plain PyTorch: same names, same arguments, written to be read as their definition.

The tests hold the native kernels to these. They run on any device and are differentiable in every
floating-point input, at the price of time and memory.
"""

from .affinity import affinity_from_attention, affinity_labels, affinity_loss
from .crf import bilateral_filter, dense_crf, dense_energy_loss
from .labels import pseudo_labels, refine_labels
from .par import PAMR, PAR, pamr_affinity, pamr_refine, par_affinity, par_propagate, par_refine
from .walk import edge_affinity, feature_affinity, propagate_cams, propagate_to_edge, random_walk

__all__ = [
    "PAMR",
    "PAR",
    "affinity_from_attention",
    "affinity_labels",
    "affinity_loss",
    "bilateral_filter",
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
]
