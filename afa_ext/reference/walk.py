"""Random-walk propagation of score maps over a pairwise affinity, in plain PyTorch with dense N x N matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_propagate_cams, check_propagate_to_edge, check_random_walk
from .pair_affinity import edge_affinity
from .window import window_mask, window_offsets


def dense_affinity(affinity: Tensor, grid: tuple[int, int], radius: int, window: str) -> Tensor:
    """[B, N, window] -> [B, N, N] with zeros outside the window; [b, i, k] is the pair (i, i + offset k)."""
    height, width = grid
    batch, nodes, _ = affinity.shape
    dy, dx = torch.tensor(window_offsets(radius, window), device=affinity.device).unbind(1)
    source = torch.arange(nodes, device=affinity.device).unsqueeze(1)
    y, x = source // width + dy, source % width + dx
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    target = torch.where(inside, y * width + x, nodes)  # an extra column receives the entries outside the grid
    dense = affinity.new_zeros(batch, nodes, nodes + 1)
    return dense.scatter(2, target.expand(batch, -1, -1), affinity)[:, :, :nodes]


def transition_matrix(
    affinity: Tensor, power: float, normalize: str | None, eps: float, inside: Tensor | None = None
) -> Tensor:
    """Elementwise power of a dense [B, N, N], set to 0 where ``inside`` [N, N] is False, then normalized."""
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
    direction: str = "columns",
    boxes: Tensor | None = None,
) -> Tensor:
    """Reference implementation of `afa_ext.random_walk`."""
    check_random_walk(scores, affinity, grid, radius, window, power, steps, normalize, eps, direction, boxes)
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    dense = affinity.to(wide)
    inside = None
    if radius is not None:
        inside = window_mask(grid, radius, window, scores.device)
        if affinity.shape[2] != inside.shape[1]:
            dense = dense_affinity(dense, grid, radius, window)
    p = transition_matrix(dense, power, normalize, eps, inside)
    kept = None if boxes is None else box_mask(boxes, grid)
    # Zeroing columns of P**steps: at the targets of scores @ P, at the sources of P @ scores.
    maps = scores.to(wide)
    if kept is not None and direction == "rows":
        maps = maps * kept
    maps = maps.flatten(2)
    for _ in range(steps):
        maps = maps @ (p if direction == "columns" else p.mT)
    maps = maps.view(scores.shape)
    if kept is not None and direction == "columns":
        maps = maps * kept
    return maps.to(scores.dtype)


def box_mask(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, C, 4] or [B, C, M, 4] as x0, y0, x1, y1 -> bool [B, C, h, w]: the tokens inside any box."""
    if boxes.dim() == 3:
        boxes = boxes.unsqueeze(2)
    x0, y0, x1, y1 = boxes[..., None, None].unbind(3)
    y = torch.arange(grid[0], device=boxes.device)[:, None]
    x = torch.arange(grid[1], device=boxes.device)
    return ((y >= y0) & (y < y1) & (x >= x0) & (x < x1)).any(dim=2)


def propagate_to_edge(x: Tensor, edge: Tensor, radius: int = 5, beta: float = 10, exp_times: int = 8) -> Tensor:
    """Reference implementation of `afa_ext.propagate_to_edge`; squares the transition matrix, as published."""
    check_propagate_to_edge(x, edge, radius, beta, exp_times)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    grid = (edge.shape[-2], edge.shape[-1])
    dense = dense_affinity(edge_affinity(edge.to(wide), radius), grid, radius, "disc")
    p = transition_matrix(dense, beta, "column", 0.0)
    for _ in range(exp_times):
        p = p @ p
    maps = x if edge.dim() == 4 else x.reshape(1, -1, *grid)
    walked = (maps.to(wide) * (1 - edge.to(wide))).flatten(2) @ p
    return walked.view(x.shape if edge.dim() == 4 else (maps.shape[1], 1, *grid)).to(x.dtype)


def class_scores(cams: Tensor, class_labels: Tensor, background: float) -> tuple[Tensor, Tensor]:
    """Softmax over a constant background map and the present classes' maps, [B, C+1, h, w]; their mask [B, C+1]."""
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
    """Reference implementation of `afa_ext.propagate_cams`."""
    check_propagate_cams(cams, class_labels, background)
    grid = (cams.shape[2], cams.shape[3])
    check_random_walk(cams, affinity, grid, radius, "square", power, steps, "column", eps, scores_name="cams")
    wide = torch.float64 if cams.dtype == torch.float64 else torch.float32
    scores, present = class_scores(cams.to(wide), class_labels, background)
    walked = random_walk(scores, affinity.to(wide), grid=grid, radius=radius, power=power, steps=steps, eps=eps)
    return walked.masked_fill(~present[:, :, None, None], 0).to(cams.dtype)
