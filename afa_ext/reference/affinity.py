"""Affinity from attention, its labels and its loss (AFA, CVPR 2022) in plain PyTorch with dense N x N matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_affinity_from_attention, check_affinity_labels, check_affinity_loss
from .window import window_mask, window_offsets


def windowed_pairs(dense: Tensor, grid: tuple[int, int], radius: int, outside: float) -> Tensor:
    """[B, N, N] -> [B, N, (2*radius+1)**2]: entry [b, i, k] is the pair (i, i + offset k); `outside` off the grid."""
    height, width = grid
    batch, nodes, _ = dense.shape
    dy, dx = torch.tensor(window_offsets(radius), device=dense.device).unbind(1)
    node = torch.arange(nodes, device=dense.device).unsqueeze(1)
    y, x = node // max(width, 1) + dy, node % max(width, 1) + dx
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    target = torch.where(inside, y * width + x, 0).expand(batch, -1, -1)
    return dense.gather(2, target).masked_fill(~inside, outside)


def affinity_from_attention(
    attention: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    radius: int | None = None,
) -> Tensor:
    """Reference implementation of :func:`afa_ext.affinity_from_attention`."""
    grid = check_affinity_from_attention(attention, weight, bias, grid, radius)
    wide = torch.float64 if attention.dtype == torch.float64 else torch.float32
    symmetric = attention.to(wide) + attention.to(wide).mT
    affinity = torch.sigmoid((symmetric * weight.to(wide).view(1, -1, 1, 1)).sum(dim=1) + bias.to(wide).view(1, 1, 1))
    if radius is not None:
        if (2 * radius + 1) ** 2 != grid[0] * grid[1]:
            affinity = windowed_pairs(affinity, grid, radius, 0)
        else:
            affinity = affinity.masked_fill(~window_mask(grid, radius, "square", affinity.device), 0)
    return affinity.to(attention.dtype)


def affinity_labels(
    label_map: Tensor, *, stride: int = 16, radius: int, ignore_index: int = 255, windowed: bool = False
) -> Tensor:
    """Reference implementation of :func:`afa_ext.affinity_labels`."""
    check_affinity_labels(label_map, stride, radius, ignore_index, windowed)
    tokens = label_map[:, ::stride, ::stride]
    grid = (tokens.shape[1], tokens.shape[2])
    flat = tokens.flatten(1).long()
    same = flat.unsqueeze(2) == flat.unsqueeze(1)
    known = flat != ignore_index
    valid = known.unsqueeze(2) & known.unsqueeze(1) & window_mask(grid, radius, "square", tokens.device)
    labels = torch.where(valid, same.to(torch.uint8), 255)
    if windowed and (2 * radius + 1) ** 2 != grid[0] * grid[1]:
        labels = windowed_pairs(labels, grid, radius, 255)
    return labels


def affinity_loss(affinity: Tensor, labels: Tensor) -> Tensor:
    """Reference implementation of :func:`afa_ext.affinity_loss`."""
    check_affinity_loss(affinity, labels)
    wide = affinity if affinity.dtype == torch.float64 else affinity.float()
    same, different = labels == 1, labels == 0
    loss_same = ((1 - wide) * same).sum() / (same.sum() + 1)
    loss_different = (wide * different).sum() / (different.sum() + 1)
    return (loss_same + loss_different) / 2
