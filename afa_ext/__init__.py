"""Native operators for weakly-supervised segmentation."""

from .reference import PAR, par_affinity, par_propagate, par_refine, propagate_cams, random_walk

__version__ = "0.1.0"
__all__ = ["PAR", "par_affinity", "par_propagate", "par_refine", "propagate_cams", "random_walk"]
