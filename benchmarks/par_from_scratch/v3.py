"""Version 3: PAR in PyTorch, with views of one padded copy.

A neighbor at (dy, dx) is the same tensor at another address, so that a view is enough: nothing is gathered. Each of the
48 neighbors is multiplied and added in one pass. Every pass still reads the sum, a view and a weight from memory and
writes the sum back. The next version is C++, where a sum can stay in a register.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .v2 import DILATIONS, RING, weights_of

REACH = max(DILATIONS)


def neighbors(planes: Tensor) -> list[Tensor]:
    """[B, C, H, W] -> 48 views [B, C, H, W] of one padded copy."""
    height, width = planes.shape[2:]
    padded = F.pad(planes, (REACH, REACH, REACH, REACH), mode="replicate")
    return [padded[..., REACH + d * dy :, REACH + d * dx :][..., :height, :width] for d in DILATIONS for dy, dx in RING]


def par_affinity(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> weights [B, 48, H, W]."""
    return weights_of(torch.stack(neighbors(images), dim=2), images)


def par_propagate(weights: Tensor, masks: Tensor, num_iter: int = 10) -> Tensor:
    """weights [B, 48, H, W], masks [B, C, H, W] -> [B, C, H, W]."""
    for _ in range(num_iter):
        total = torch.zeros_like(masks)
        for k, view in enumerate(neighbors(masks)):
            total.addcmul_(weights[:, k : k + 1], view)
        masks = total
    return masks
