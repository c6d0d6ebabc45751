"""Weakly-supervised semantic segmentation from image-level labels (AFA, CVPR 2022), trained end to end.

The command line is `afa`; in Python start from `afa.config.load_config`, `afa.training.loop.train` and
`afa.evaluation.evaluate.evaluate`.
"""

from afa.errors import UserError

__all__ = ["UserError"]
