"""The window of a random walk, from its definition."""

from __future__ import annotations

import torch
from torch import Tensor


def window_offsets(radius: int, window: str = "square") -> list[tuple[int, int]]:
    """Reference implementation of `afa_ext.window_offsets`."""
    offsets = []
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            near = max(abs(dy), abs(dx)) <= radius if window == "square" else dy**2 + dx**2 < radius**2
            if near:
                offsets.append((dy, dx))
    return offsets


def window_mask(grid: tuple[int, int], radius: int, window: str, device: torch.device) -> Tensor:
    """bool [N, N]: True if node j is in the window around node i."""
    y = torch.arange(grid[0], device=device).repeat_interleave(grid[1])
    x = torch.arange(grid[1], device=device).repeat(grid[0])
    dy, dx = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    if window == "square":
        return (dy <= radius) & (dx <= radius)
    return dy**2 + dx**2 < radius**2
