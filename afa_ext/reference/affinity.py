"""Affinity from attention, its labels and its loss (AFA, CVPR 2022) in plain PyTorch with dense N x N matrices."""

from __future__ import annotations

from collections.abc import Sequence

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
    """Reference implementation of `afa_ext.affinity_from_attention`."""
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
    label_map: Tensor,
    *,
    stride: int = 16,
    radius: int,
    ignore_index: int = 255,
    windowed: bool = False,
    offset: int = 0,
    background: int | None = None,
) -> Tensor:
    """Reference implementation of `afa_ext.affinity_labels`."""
    check_affinity_labels(label_map, stride, radius, ignore_index, windowed, offset, background)
    tokens = label_map[:, offset::stride, offset::stride]
    grid = (tokens.shape[1], tokens.shape[2])
    flat = tokens.flatten(1).long()
    same = flat.unsqueeze(2) == flat.unsqueeze(1)
    known = flat != ignore_index
    valid = known.unsqueeze(2) & known.unsqueeze(1) & window_mask(grid, radius, "square", tokens.device)
    labels = torch.where(valid, same.to(torch.uint8), 255)
    if background is not None:
        labels = labels.masked_fill((labels == 1) & (flat != background).unsqueeze(2), 2)
    if windowed and (2 * radius + 1) ** 2 != grid[0] * grid[1]:
        labels = windowed_pairs(labels, grid, radius, 255)
    return labels


def affinity_loss(
    affinity: Tensor,
    labels: Tensor,
    *,
    weights: Sequence[float] = (0.5, 0.5, 0.0),
    counts: Tensor | None = None,
) -> Tensor:
    """Reference implementation of `afa_ext.affinity_loss`."""
    return affinity_loss_and_sums(affinity, labels, weights=weights, counts=counts)[0]


def affinity_loss_and_sums(
    affinity: Tensor,
    labels: Tensor,
    *,
    weights: Sequence[float] = (0.5, 0.5, 0.0),
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference implementation of `afa_ext.affinity_loss_and_sums`."""
    weights = check_affinity_loss(affinity, labels, weights, counts)
    wide = affinity if affinity.dtype == torch.float64 else affinity.float()
    groups = [labels == group for group in range(3)]
    pairs = torch.stack([group.sum() for group in groups])
    errors = torch.stack([((wide if number == 0 else 1 - wide) * group).sum() for number, group in enumerate(groups)])
    loss = (errors * errors.new_tensor(weights) / ((pairs if counts is None else counts) + 1)).sum()
    inside = torch.stack([(wide * group).sum() for group in groups]).detach()
    return loss, torch.stack([inside, pairs.to(inside.dtype)])
