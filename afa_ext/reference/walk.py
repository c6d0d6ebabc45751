"""Random-walk propagation of score maps over a learned affinity, in plain PyTorch with dense N x N matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_propagate_cams, check_random_walk, window_offsets


def window_mask(grid: tuple[int, int], radius: int, window: str, device: torch.device) -> Tensor:
    """bool [N, N]: True where node j lies in the window around node i."""
    y = torch.arange(grid[0], device=device).repeat_interleave(grid[1])
    x = torch.arange(grid[1], device=device).repeat(grid[0])
    dy, dx = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    if window == "square":
        return (dy <= radius) & (dx <= radius)
    return dy**2 + dx**2 < radius**2


def dense_affinity(affinity: Tensor, grid: tuple[int, int], radius: int, window: str) -> Tensor:
    """[B, N, window] -> [B, N, N] with zeros outside the window; [b, i, k] is the pair (i, i + offset k)."""
    height, width = grid
    batch, nodes, _ = affinity.shape
    dy, dx = torch.tensor(window_offsets(radius, window), device=affinity.device).unbind(1)
    source = torch.arange(nodes, device=affinity.device).unsqueeze(1)
    y, x = source // width + dy, source % width + dx
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    target = torch.where(inside, y * width + x, nodes)  # a spare column takes what leaves the grid
    dense = affinity.new_zeros(batch, nodes, nodes + 1)
    return dense.scatter(2, target.expand(batch, -1, -1), affinity)[:, :, :nodes]


def transition_matrix(
    affinity: Tensor, power: float, normalize: str | None, eps: float, inside: Tensor | None = None
) -> Tensor:
    """Elementwise power of a dense [B, N, N], 0 where ``inside`` [N, N] is False, then normalisation."""
    p = affinity**power
    if inside is not None:
        p = p.masked_fill(~inside, 0)
    if normalize == "column":
        p = p / (p.sum(dim=1, keepdim=True) + eps)
    elif normalize == "row":
        p = p / (p.sum(dim=2, keepdim=True) + eps)
    elif normalize == "sinkhorn":
        for _ in range(3):
            p = p / (p.sum(dim=1, keepdim=True) + eps)
            p = p / (p.sum(dim=2, keepdim=True) + eps)
        p = (p + p.mT) / 2
    return p


def random_walk(
    scores: Tensor,
    affinity: Tensor,
    *,
    grid: tuple[int, int],
    radius: int | None = None,
    window: str = "square",
    power: float = 2,
    steps: int = 1,
    normalize: str | None = "column",
    eps: float = 1e-4,
) -> Tensor:
    """Twin of :func:`afa_ext.random_walk`."""
    check_random_walk(scores, affinity, grid, radius, window, power, steps, normalize, eps)
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    dense = affinity.to(wide)
    inside = None
    if radius is not None:
        inside = window_mask(grid, radius, window, scores.device)
        if affinity.shape[2] != inside.shape[1]:
            dense = dense_affinity(dense, grid, radius, window)
    p = transition_matrix(dense, power, normalize, eps, inside)
    maps = scores.to(wide).flatten(2)
    for _ in range(steps):
        maps = maps @ p
    return maps.view(scores.shape).to(scores.dtype)


def class_scores(cams: Tensor, class_labels: Tensor, background: float) -> tuple[Tensor, Tensor]:
    """[B, C+1, h, w], a constant background map and the present classes' maps, softmax over those; bool [B, C+1]."""
    scores = F.pad(cams, (0, 0, 0, 0, 1, 0), value=background)
    present = F.pad(class_labels != 0, (1, 0), value=True)
    return scores.masked_fill(~present[:, :, None, None], float("-inf")).softmax(dim=1), present


def propagate_cams(
    cams: Tensor,
    affinity: Tensor,
    class_labels: Tensor,
    *,
    radius: int | None,
    background: float,
    power: float = 2,
    steps: int = 1,
    eps: float = 0.1,
) -> Tensor:
    """Twin of :func:`afa_ext.propagate_cams`."""
    check_propagate_cams(cams, class_labels, background)
    grid = (cams.shape[2], cams.shape[3])
    check_random_walk(cams, affinity, grid, radius, "square", power, steps, "column", eps, "cams")
    wide = torch.float64 if cams.dtype == torch.float64 else torch.float32
    scores, _ = class_scores(cams.to(wide), class_labels, background)
    walked = random_walk(scores, affinity.to(wide), grid=grid, radius=radius, power=power, steps=steps, eps=eps)
    return walked.to(cams.dtype)
