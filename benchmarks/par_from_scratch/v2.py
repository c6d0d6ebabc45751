"""Version 2: PAR in PyTorch, as published.

A convolution of a padded copy with eight one-hot 3x3 kernels gathers the neighbors of each dilation. All 48 copies of
the masks are stored in every iteration: they are written by the convolutions, copied by torch.cat, multiplied into a
third tensor, and summed. The next version does not store them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DILATIONS = (1, 2, 4, 8, 12, 24)
RING = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
W1, W2 = 0.3, 0.01


def neighbors(planes: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, 48, H, W]"""
    batch, channels, height, width = planes.shape
    one_hot = torch.zeros(8, 1, 3, 3)
    for k, (dy, dx) in enumerate(RING):
        one_hot[k, 0, dy + 1, dx + 1] = 1
    flat = planes.reshape(batch * channels, 1, height, width)
    rings = []
    for d in DILATIONS:
        padded = F.pad(flat, (d, d, d, d), mode="replicate")
        rings.append(F.conv2d(padded, one_hot, dilation=d).view(batch, channels, 8, height, width))
    return torch.cat(rings, dim=2)


def position_weights() -> Tensor:
    """w2 times the softmax of the position logits: 48 constants."""
    distances = torch.tensor([d * (dy * dy + dx * dx) ** 0.5 for d in DILATIONS for dy, dx in RING])
    return W2 * (-((distances / ((distances.std() + 1e-8) * W1)) ** 2)).softmax(0)


def weights_of(ring: Tensor, images: Tensor) -> Tensor:
    """The softmax: neighbors [B, 3, 48, H, W] and images [B, 3, H, W] -> [B, 48, H, W]."""
    difference = (ring - images.unsqueeze(2)).abs()
    sigma = ring.std(dim=2, keepdim=True)
    logits = -((difference / ((sigma + 1e-8) * W1)) ** 2)
    return logits.mean(dim=1).softmax(dim=1) + position_weights().view(1, -1, 1, 1)


def par_affinity(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> weights [B, 48, H, W]."""
    return weights_of(neighbors(images), images)


def par_propagate(weights: Tensor, masks: Tensor, num_iter: int = 10) -> Tensor:
    """weights [B, 48, H, W], masks [B, C, H, W] -> [B, C, H, W]."""
    for _ in range(num_iter):
        masks = (neighbors(masks) * weights.unsqueeze(1)).sum(dim=2)
    return masks
