"""Affinities between a node and the nodes of its window, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_edge_affinity, check_feature_affinity
from .window import window_offsets


def path_points(dy: int, dx: int) -> list[tuple[int, int]]:
    """Grid points in the bounding box of the segment from (0, 0) to (dy, dx), at distance less than 1 to its line."""
    length = dy * dy + dx * dx
    return [
        (y, x)
        for y in range(min(dy, 0), max(dy, 0) + 1)
        for x in range(min(dx, 0), max(dx, 0) + 1)
        if (dy * x - dx * y) ** 2 < length
    ]


def _shifted(planes: Tensor, dy: int, dx: int, reach: int) -> Tensor:
    """The value at node + (dy, dx) for each node, from planes padded by ``reach`` on every side."""
    height, width = planes.shape[-2] - 2 * reach, planes.shape[-1] - 2 * reach
    return planes[..., reach + dy : reach + dy + height, reach + dx : reach + dx + width]


def _within_grid(grid: tuple[int, int], radius: int, device: torch.device) -> Tensor:
    """bool [window, h, w]: True if the node's neighbor at that offset is in the grid."""
    inside = F.pad(torch.ones(grid, dtype=torch.bool, device=device), [radius] * 4)
    return torch.stack([_shifted(inside, dy, dx, radius) for dy, dx in window_offsets(radius, "disc")])


def edge_affinity(edge: Tensor, radius: int) -> Tensor:
    """Reference implementation of `afa_ext.edge_affinity`."""
    check_edge_affinity(edge, radius)
    edge = edge.flatten(0, -3)
    wide = edge if edge.dtype == torch.float64 else edge.float()
    padded = F.pad(wide, [radius] * 4, value=1.0)
    planes = []
    for dy, dx in window_offsets(radius, "disc"):
        if (dy, dx) == (0, 0):
            planes.append(torch.ones_like(wide))
            continue
        path = torch.stack([_shifted(padded, y, x, radius) for y, x in path_points(dy, dx)])
        planes.append(1 - path.amax(dim=0))
    inside = _within_grid((edge.shape[1], edge.shape[2]), radius, edge.device)
    affinity = torch.stack(planes, dim=1).masked_fill(~inside, 0)
    return affinity.flatten(2).mT.to(edge.dtype)


def feature_affinity(features: Tensor, radius: int) -> Tensor:
    """Reference implementation of `afa_ext.feature_affinity`."""
    check_feature_affinity(features, radius)
    wide = features if features.dtype == torch.float64 else features.float()
    padded = F.pad(wide, [radius] * 4)
    offsets = window_offsets(radius, "disc")
    distances = [(_shifted(padded, dy, dx, radius) - wide).abs().mean(dim=1) for dy, dx in offsets]
    inside = _within_grid((features.shape[2], features.shape[3]), radius, features.device)
    affinity = torch.exp(-torch.stack(distances, dim=1)).masked_fill(~inside, 0)
    return affinity.flatten(2).mT.to(features.dtype)
