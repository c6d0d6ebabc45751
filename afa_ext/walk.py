"""Random-walk propagation: spreads score maps over a token grid with a pairwise affinity.

With a radius, only the window of the affinity is read and every step costs O(N * window * C); the N x N transition
matrix is neither computed nor squared.

The walks of published methods:

- AFA: `random_walk` or `propagate_cams` on a learned affinity
- IRN: `propagate_to_edge`
- PSA, SEAM: `afa_ext.feature_affinity`, then `random_walk` with ``window="disc", radius=5, power=8,
  steps=2**8`` (SEAM: ``2**6``)
- CLIP-based methods (CLIP-ES, WeCLIP, ExCEL): `random_walk` with ``power=1, steps=2, normalize="sinkhorn", eps=0,
  direction="rows", boxes=...``
- MCTformer: `random_walk` with ``power=1, normalize=None, direction="rows"``
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native  # noqa: F401  (registers the operators)
from ._autocast import autocast_to_float32
from ._autograd import check_no_tangent, register_derivatives
from ._checks import (
    check_no_grad,
    check_propagate_cams,
    check_propagate_to_edge,
    check_random_walk,
)
from .pair_affinity import edge_affinity
from .window import window_offsets

__all__ = ["propagate_cams", "propagate_to_edge", "random_walk"]

_ops = torch.ops.afa_ext


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
    """``scores @ P**steps``, where P is the normalized elementwise power of the affinity.

    The defaults are those of AFA ("Learning Affinity from Attention", CVPR 2022, section 3.2); 2**k steps are
    equivalent to squaring P k times. Differentiable with respect to ``scores`` and ``affinity``.

    Args:
        scores: [B, C, h, w].
        affinity: dense [B, N, N] with N = h*w, entry (i, j) from node i to node j; or, with a radius, windowed
            [B, N, window], entry (i, k) from node i to node i + offset k in the order of
            `afa_ext.window_offsets` (if both sizes are equal, the affinity is dense).
            Same dtype and device as ``scores``.
        grid: (h, w), the size of the token grid.
        radius: None for the whole matrix; otherwise 0 to 63, and entries outside the window are treated as 0.
        window: ``"square"``, Chebyshev distance up to the radius (AFA); ``"disc"``, y*y + x*x < r*r (PSA, IRN).
        power: elementwise exponent, greater than 0. A fractional exponent requires a non-negative affinity.
        steps: number of applications, at least 0.
        normalize: ``"column"`` divides by column sum + eps, ``"row"`` by row sum + eps. ``"sinkhorn"`` normalizes
            columns, then rows, three times, and returns (P + P^T) / 2. None: no normalization.
        eps: added to each sum.
        direction: ``"columns"``: scores @ P**steps, a node sums over its column of P; ``"rows"``: P**steps @ scores, a
            node sums over its row (CLIP-based methods, MCTformer).
        boxes: int64 or int32 [B, C, 4], or [B, C, M, 4] for M boxes per class, in tokens: x0, y0, x1, y1; x1 and y1
            are exclusive. The columns of P**steps outside a class's boxes are 0 for that class (CLIP-based methods). A
            box without tokens is ignored, so it can be used as padding.

    Returns:
        [B, C, h, w] in the dtype of ``scores``; computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    scores, affinity = autocast_to_float32(scores, affinity)
    check_random_walk(scores, affinity, grid, radius, window, power, steps, normalize, eps, direction, boxes)
    if boxes is None:
        return _walk(scores, affinity, radius, window, power, steps, normalize, eps, direction, None)
    # A column of P is a target in scores @ P, and a source in P @ scores.
    inside = _inside_boxes(boxes, grid)
    if direction == "rows":
        scores = scores * inside
    out = _walk(scores, affinity, radius, window, power, steps, normalize, eps, direction, None)
    return out if direction == "rows" else out * inside


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
    """AFA's walk over class activation maps with a background map.

    A constant background map is prepended, the softmax is taken over it and the image's classes, and the result is
    propagated by `random_walk` (square window, columns normalized). Classes that an image does not have are not
    computed, and their result is 0. Differentiable with respect to ``cams`` and ``affinity``.

    Args:
        cams: [B, C, h, w].
        affinity: [B, N, N] or [B, N, window], as in `random_walk`.
        class_labels: [B, C], nonzero if the image has the class.
        radius: radius of the square window, or None.
        background: the background's score before the softmax (AFA: 0.35 low, 0.55 high).

    Returns:
        [B, C+1, h, w], background first.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    cams, affinity = autocast_to_float32(cams, affinity)
    check_propagate_cams(cams, class_labels, background)
    grid = (cams.shape[2], cams.shape[3])
    check_random_walk(cams, affinity, grid, radius, "square", power, steps, "column", eps, scores_name="cams")
    wide = cams if cams.dtype == torch.float64 else cams.float()
    with torch.autocast(cams.device.type, enabled=False):
        scores, present = _with_background(wide, class_labels, background)
    walked = _walk(scores, affinity, radius, "square", power, steps, "column", eps, "columns", present)
    return walked.to(cams.dtype)


def propagate_to_edge(x: Tensor, edge: Tensor, radius: int = 5, beta: float = 10, exp_times: int = 8) -> Tensor:
    """IRN's walk, a drop-in replacement for the published function: 2**exp_times steps from x * (1 - edge).

    Uses `afa_ext.edge_affinity` to the power ``beta``, with normalized columns. Differentiable with respect to
    ``x``.

    Args:
        x: [C, h, w] or [C, 1, h, w]; [B, C, h, w] for a batch.
        edge: [1, h, w], boundary probabilities; [B, 1, h, w] for a batch. Dtype and device of ``x``.
        radius: radius of the disc, 1 to 63.
        beta: elementwise exponent, greater than 0.
        exp_times: 0 to 30; the result is that of squaring the transition matrix this many times.

    Returns:
        [C, 1, h, w], as published; [B, C, h, w] for a batch. Has the dtype of ``x``; computed in float32 (float64 for
        float64).

    Raises:
        TypeError, ValueError: an argument is invalid, or ``edge`` requires grad.
    """
    x, edge = autocast_to_float32(x, edge)
    check_propagate_to_edge(x, edge, radius, beta, exp_times)
    check_no_grad("edge", edge)
    check_no_tangent("edge", edge)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    height, width = edge.shape[-2:]
    maps = (x if edge.dim() == 4 else x.reshape(1, -1, height, width)).to(wide)
    boundary = edge.to(wide)
    affinity = edge_affinity(boundary, radius)
    walked = _walk(maps * (1 - boundary), affinity, radius, "disc", beta, 2**exp_times, "column", 0.0, "columns", None)
    return (walked if edge.dim() == 4 else walked.transpose(0, 1)).to(x.dtype)


def _inside_boxes(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Boxes [B, C, 4] or [B, C, M, 4] -> bool [B, C, h, w], True for the tokens inside any of a class's boxes."""
    left, top, right, bottom = (boxes if boxes.dim() == 4 else boxes.unsqueeze(2)).unbind(-1)  # [B, C, M]
    rows, columns = (torch.arange(size, device=boxes.device) for size in grid)
    in_rows = (top.unsqueeze(-1) <= rows) & (rows < bottom.unsqueeze(-1))  # [B, C, M, h]
    in_columns = (left.unsqueeze(-1) <= columns) & (columns < right.unsqueeze(-1))  # [B, C, M, w]
    return (in_rows.unsqueeze(-1) & in_columns.unsqueeze(-2)).any(2)


def _with_background(cams: Tensor, class_labels: Tensor, background: float) -> tuple[Tensor, Tensor]:
    """The softmax over a constant background map and the maps of the image's classes, [B, C+1, h, w], and a mask of
    these maps, bool [B, C+1]."""
    active = F.pad(class_labels.ne(0), (1, 0), value=True)
    first = cams.new_full((cams.shape[0], 1, *cams.shape[2:]), background)
    maps = torch.cat([first, cams], dim=1)
    return torch.where(active[..., None, None], maps, float("-inf")).softmax(1), active


def _walk(
    scores: Tensor,
    affinity: Tensor,
    radius: int | None,
    window: str,
    power: float,
    steps: int,
    normalize: str | None,
    eps: float,
    direction: str,
    class_mask: Tensor | None,
) -> Tensor:
    if steps == 0:
        return scores.clone()
    wide = torch.float64 if affinity.dtype == torch.float64 else torch.float32
    if radius is None:
        with torch.autocast(scores.device.type, enabled=False):
            maps = _dense_walk(scores.to(wide).flatten(2), affinity.to(wide) ** power, steps, normalize, eps, direction)
            return maps.view(scores.shape).to(scores.dtype)
    settings = (radius, window, float(power), normalize == "column", float(eps))
    if steps == 1 and direction == "columns" and normalize in ("column", None):
        out: Tensor = _ops.walk_step(scores.to(wide), affinity, *settings, class_mask)
        return out.to(scores.dtype)
    p = _ops.walk_transition(affinity, scores.shape[2], scores.shape[3], *settings)
    if normalize == "row":
        # Its transpose is the transition of the other direction.
        p = _ops.walk_transpose(p, radius, window)
        p = p / (p.sum(dim=1, keepdim=True) + eps)
    elif normalize == "sinkhorn":
        p = _sinkhorn(p, radius, window, eps)
    if (direction == "rows") != (normalize == "row") and normalize != "sinkhorn":
        p = _ops.walk_transpose(p, radius, window)
    out = _ops.walk_propagate(scores.to(wide), p, radius, window, steps, class_mask)
    return out.to(scores.dtype)


def _dense_walk(maps: Tensor, a: Tensor, steps: int, normalize: str | None, eps: float, direction: str) -> Tensor:
    """maps [B, C, N], powers a [B, N, N]. P is always diag(rows) @ a @ diag(columns); it is never computed itself."""
    one = a.new_ones(())
    rows = columns = one
    if normalize == "column":
        columns = 1 / (a.sum(dim=1, keepdim=True) + eps)
    elif normalize == "row":
        rows = 1 / (a.sum(dim=2).unsqueeze(1) + eps)
    elif normalize == "sinkhorn":
        start = a.new_ones(a.shape[0], 1, a.shape[1])
        rows, columns = _sinkhorn_scales(start, lambda v: v @ a, lambda v: v @ a.mT, eps)
    for _ in range(steps):
        if normalize == "sinkhorn":  # (P + P^T) / 2
            maps = (((maps * rows) @ a) * columns + ((maps * columns) @ a.mT) * rows) / 2
        elif direction == "columns":
            maps = ((maps * rows) @ a) * columns
        else:
            maps = ((maps * columns) @ a.mT) * rows
    return maps


def _sinkhorn_scales(
    start: Tensor, to_columns: Callable[[Tensor], Tensor], to_rows: Callable[[Tensor], Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """Factors of the rows and of the columns after three rounds of column, then row normalization.

    ``to_columns(v)`` is v @ A, ``to_rows(v)`` is v @ A^T; ``start`` is a tensor of ones.
    """
    rows = columns = start
    for _ in range(3):
        columns = columns / (columns * to_columns(rows) + eps)
        rows = rows / (rows * to_rows(columns) + eps)
    return rows, columns


def _sinkhorn(p: Tensor, radius: int, window: str, eps: float) -> Tensor:
    """p [B, window, h, w] by target node -> (P + P^T) / 2 after three rounds of column, then row normalization."""
    transposed = _ops.walk_transpose(p, radius, window)

    def apply(v: Tensor, matrix: Tensor) -> Tensor:
        out: Tensor = _ops.walk_propagate(v, matrix, radius, window, 1, None)
        return out

    start = p.new_ones(p.shape[0], 1, p.shape[2], p.shape[3])
    rows, columns = _sinkhorn_scales(start, lambda v: apply(v, p), lambda v: apply(v, transposed), eps)
    p = _ops.walk_transpose(transposed * rows, radius, window) * columns
    return (p + _ops.walk_transpose(p, radius, window)) / 2


def _transition_fake(affinity: Tensor, height: int, width: int, radius: int, window: str) -> Tensor:
    wide = torch.float64 if affinity.dtype == torch.float64 else torch.float32
    size = len(window_offsets(radius, window))
    return affinity.new_empty(affinity.shape[0], size, height, width, dtype=wide)


@torch.library.register_fake("afa_ext::walk_transition")
def _(
    affinity: Tensor,
    height: int,
    width: int,
    radius: int,
    window: str,
    power: float,
    normalize: bool,
    eps: float,
) -> Tensor:
    return _transition_fake(affinity, height, width, radius, window)


@torch.library.register_fake("afa_ext::walk_transition_backward")
def _(grad: Tensor, affinity: Tensor, *settings: Any) -> Tensor:
    return affinity.new_empty(affinity.shape)


@torch.library.register_fake("afa_ext::walk_transpose")
def _(transition: Tensor, radius: int, window: str) -> Tensor:
    return transition.new_empty(transition.shape)


@torch.library.register_fake("afa_ext::walk_step")
def _(scores: Tensor, affinity: Tensor, *settings: Any) -> Tensor:
    return scores.new_empty(scores.shape)


@torch.library.register_fake("afa_ext::walk_propagate")
def _(scores: Tensor, transition: Tensor, radius: int, window: str, steps: int, class_mask: Tensor | None) -> Tensor:
    return scores.new_empty(scores.shape)


@torch.library.register_fake("afa_ext::walk_propagate_backward_scores")
def _(grad: Tensor, transition: Tensor, radius: int, window: str, steps: int, class_mask: Tensor | None) -> Tensor:
    return grad.new_empty(grad.shape)


@torch.library.register_fake("afa_ext::walk_propagate_backward_transition")
def _(
    grad: Tensor,
    scores: Tensor,
    transition: Tensor,
    radius: int,
    window: str,
    steps: int,
    class_mask: Tensor | None,
) -> Tensor:
    return transition.new_empty(transition.shape)


def _transition_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    affinity, *ctx.settings = inputs
    ctx.save_for_backward(affinity)


def _transition_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (affinity,) = ctx.saved_tensors
    return _ops.walk_transition_backward(grad, affinity, *ctx.settings), *[None] * len(ctx.settings)


def _transpose_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.radius, ctx.window = inputs


def _transpose_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _ops.walk_transpose(grad, ctx.radius, ctx.window), None, None


def _step_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, affinity, *ctx.settings, class_mask = inputs
    ctx.save_for_backward(scores, affinity, class_mask)


def _step_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Backward pass with the transition, which the forward pass does not compute."""
    scores, affinity, class_mask = ctx.saved_tensors
    of_transition = (scores.shape[2], scores.shape[3], *ctx.settings)
    of_propagation = (*ctx.settings[:2], 1, class_mask)
    p = _ops.walk_transition(affinity, *of_transition)
    grad_scores = grad_affinity = None
    if ctx.needs_input_grad[0]:
        grad_scores = _ops.walk_propagate_backward_scores(grad, p, *of_propagation)
    if ctx.needs_input_grad[1]:
        grad_p = _ops.walk_propagate_backward_transition(grad, scores, p, *of_propagation)
        grad_affinity = _ops.walk_transition_backward(grad_p, affinity, *of_transition)
    return grad_scores, grad_affinity, *[None] * 6


def _propagate_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, transition, ctx.radius, ctx.window, ctx.steps, class_mask = inputs
    ctx.save_for_backward(scores, transition, class_mask)


def _propagate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    scores, transition, class_mask = ctx.saved_tensors
    settings = (ctx.radius, ctx.window, ctx.steps, class_mask)
    grad_scores = grad_transition = None
    if ctx.needs_input_grad[0]:
        grad_scores = _ops.walk_propagate_backward_scores(grad, transition, *settings)
    if ctx.needs_input_grad[1]:
        grad_transition = _ops.walk_propagate_backward_transition(grad, scores, transition, *settings)
    return grad_scores, grad_transition, None, None, None, None


register_derivatives("walk_transition", backward=_transition_backward, setup_context=_transition_context)
register_derivatives("walk_transition_backward", linear=("grad",))
register_derivatives(
    "walk_transpose", linear=("transition",), backward=_transpose_backward, setup_context=_transpose_context
)
register_derivatives("walk_step", linear=("scores",), backward=_step_backward, setup_context=_step_context)
register_derivatives(
    "walk_propagate", linear=("scores",), backward=_propagate_backward, setup_context=_propagate_context
)
register_derivatives("walk_propagate_backward_scores", linear=("grad",))
register_derivatives("walk_propagate_backward_transition", linear=("grad", "scores"))
