"""Reference implementations of the operators in plain PyTorch, with the same names and arguments.

They serve as the operators' definitions, and the tests compare the native kernels with them. They run on any device and
are differentiable with respect to every floating-point input, but need more time and memory.
"""

from .affinity import affinity_from_attention, affinity_labels, affinity_loss, affinity_loss_and_sums
from .crf import DenseEnergyLoss, bilateral_filter, dense_crf, dense_energy_loss
from .labels import pseudo_labels, refine_labels
from .pair_affinity import edge_affinity, feature_affinity
from .par import PAMR, PAR, pamr_affinity, pamr_refine, par_affinity, par_propagate, par_refine
from .walk import propagate_cams, propagate_to_edge, random_walk
from .window import window_offsets

__all__ = [
    "PAMR",
    "PAR",
    "DenseEnergyLoss",
    "affinity_from_attention",
    "affinity_labels",
    "affinity_loss",
    "affinity_loss_and_sums",
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
    "window_offsets",
]
