"""Version 1: the equations of PAR as loops in plain Python, one pixel at a time.

Every number is a Python object, so a multiplication costs about a hundred times as much as in compiled code. The next
version leaves the loops to PyTorch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DILATIONS = (1, 2, 4, 8, 12, 24)
W1, W2 = 0.3, 0.01
OFFSETS = [(d * dy, d * dx) for d in DILATIONS for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers]


def deviation(values: list[float]) -> float:
    """The unbiased standard deviation."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def position_weights() -> list[float]:
    """w2 times the softmax of the position logits: 48 constants."""
    distances = [math.hypot(dy, dx) for dy, dx in OFFSETS]
    scale = (deviation(distances) + 1e-8) * W1
    return [W2 * weight for weight in softmax([-((distance / scale) ** 2) for distance in distances])]


def clamp(index: int, size: int) -> int:
    return min(max(index, 0), size - 1)


def par_affinity(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> weights [B, 48, H, W]."""
    batch, channels, height, width = images.shape
    weights = torch.empty(batch, len(OFFSETS), height, width)
    position = position_weights()
    for b, image in enumerate(images.tolist()):
        for y in range(height):
            for x in range(width):
                logits = [0.0] * len(OFFSETS)
                for plane in image:
                    ring = [plane[clamp(y + dy, height)][clamp(x + dx, width)] for dy, dx in OFFSETS]
                    scale = (deviation(ring) + 1e-8) * W1
                    for k, value in enumerate(ring):
                        logits[k] -= ((value - plane[y][x]) / scale) ** 2 / channels
                color = softmax(logits)
                weights[b, :, y, x] = torch.tensor([c + p for c, p in zip(color, position, strict=True)])
    return weights


def par_propagate(weights: Tensor, masks: Tensor, num_iter: int = 10) -> Tensor:
    """weights [B, 48, H, W], masks [B, C, H, W] -> [B, C, H, W]."""
    batch, classes, height, width = masks.shape
    refined = []
    for b in range(batch):
        weight = weights[b].tolist()
        now = masks[b].tolist()
        for _ in range(num_iter):
            following = torch.zeros(classes, height, width).tolist()
            for c in range(classes):
                for y in range(height):
                    for x in range(width):
                        total = 0.0
                        for k, (dy, dx) in enumerate(OFFSETS):
                            total += weight[k][y][x] * now[c][clamp(y + dy, height)][clamp(x + dx, width)]
                        following[c][y][x] = total
            now = following
        refined.append(torch.tensor(now))
    return torch.stack(refined)
