"""Random-walk propagation: score maps spread over a token grid along a pairwise affinity.

With a radius only the window of the affinity is read and every step costs O(N * window * C); the N x N transition
matrix is neither formed nor squared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native  # noqa: F401  (registers the operators)
from ._autocast import autocast_to_float32
from ._checks import check_propagate_cams, check_random_walk, window_offsets
from .reference.walk import class_scores, transition_matrix

__all__ = ["propagate_cams", "random_walk", "window_offsets"]

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
) -> Tensor:
    """``scores @ P**steps`` with P the normalised elementwise power of the affinity.

    The defaults are AFA's ("Learning Affinity from Attention", CVPR 2022, section 3.2); 2**k steps are k squarings
    of P. Differentiable in ``scores`` and ``affinity``.

    Args:
        scores: [B, C, h, w].
        affinity: dense [B, N, N] with N = h*w, entry (i, j) from node i to node j; or, with a radius, windowed
            [B, N, window], entry (i, k) from node i to node i + offset k in the order of
            :func:`window_offsets` (where both sizes are equal it is read as dense).
            Same type and device as ``scores``.
        grid: (h, w), the two sizes of the token grid.
        radius: None for the whole matrix; else 0 to 63, and entries outside the window count as 0.
        window: ``"square"``, Chebyshev distance up to the radius (AFA); ``"disc"``, y*y + x*x < r*r (PSA, IRN).
        power: elementwise exponent, greater than 0. A fractional one needs a non-negative affinity.
        steps: number of applications, at least 0.
        normalize: ``"column"`` divides by column sum + eps, ``"row"`` by row sum + eps, ``"sinkhorn"`` does three
            rounds of column then row and ends with (P + P^T) / 2, None leaves the powers.
        eps: added to each sum.

    Returns:
        [B, C, h, w] in the type of ``scores``; computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    scores, affinity = autocast_to_float32(scores, affinity)
    check_random_walk(scores, affinity, grid, radius, window, power, steps, normalize, eps)
    return _walk(scores, affinity, radius, window, power, steps, normalize, eps, None)


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

    A constant background map is put first, softmax is taken over it and the image's own classes, and the result walks
    as in :func:`random_walk` (square window, columns normalised); classes an image lacks come out 0 and are not
    computed. Differentiable in ``cams`` and ``affinity``.

    Args:
        cams: [B, C, h, w].
        affinity: [B, N, N] or [B, N, window], as in :func:`random_walk`.
        class_labels: [B, C], nonzero where the image has the class.
        radius: of the square window, or None.
        background: the background's score before the softmax (AFA: 0.35 low, 0.55 high).

    Returns:
        [B, C+1, h, w], the background first.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    cams, affinity = autocast_to_float32(cams, affinity)
    check_propagate_cams(cams, class_labels, background)
    grid = (cams.shape[2], cams.shape[3])
    check_random_walk(cams, affinity, grid, radius, "square", power, steps, "column", eps, "cams")
    wide = cams if cams.dtype == torch.float64 else cams.float()
    with torch.autocast(cams.device.type, enabled=False):
        scores, present = class_scores(wide, class_labels, background)
    walked = _walk(scores, affinity, radius, "square", power, steps, "column", eps, present)
    return walked.to(cams.dtype)


def _walk(
    scores: Tensor,
    affinity: Tensor,
    radius: int | None,
    window: str,
    power: float,
    steps: int,
    normalize: str | None,
    eps: float,
    class_mask: Tensor | None,
) -> Tensor:
    if steps == 0:
        return scores.clone()
    wide = torch.float64 if affinity.dtype == torch.float64 else torch.float32
    if radius is None:
        with torch.autocast(scores.device.type, enabled=False):
            p = transition_matrix(affinity.to(wide), power, normalize, eps)
            maps = scores.to(wide).flatten(2)
            for _ in range(steps):
                maps = maps @ p
            return maps.view(scores.shape).to(scores.dtype)
    p = _transition(affinity, scores.shape[2], scores.shape[3], radius, window, power, normalize, eps)
    out: Tensor = _ops.walk_propagate(scores.to(wide), p, radius, window, steps, class_mask)
    return out.to(scores.dtype)


def _transition(
    affinity: Tensor,
    height: int,
    width: int,
    radius: int,
    window: str,
    power: float,
    normalize: str | None,
    eps: float,
) -> Tensor:
    """[B, window, h, w] by target node: what each takes from the node that its k-th offset leads here from."""
    by_column = normalize == "column"
    p: Tensor = _ops.walk_transition(affinity, height, width, radius, window, float(power), by_column, float(eps))
    if normalize == "row":
        return _normalize_rows(p, radius, window, eps)
    if normalize == "sinkhorn":
        for _ in range(3):
            p = p / (p.sum(dim=1, keepdim=True) + eps)
            p = _normalize_rows(p, radius, window, eps)
        p = (p + _ops.walk_transpose(p, radius, window)) / 2
    return p


def _normalize_rows(p: Tensor, radius: int, window: str, eps: float) -> Tensor:
    rows = _ops.walk_transpose(p, radius, window)
    return _ops.walk_transpose(rows / (rows.sum(dim=1, keepdim=True) + eps), radius, window)


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


torch.library.register_autograd("afa_ext::walk_transition", _transition_backward, setup_context=_transition_context)
torch.library.register_autograd("afa_ext::walk_transpose", _transpose_backward, setup_context=_transpose_context)
torch.library.register_autograd("afa_ext::walk_propagate", _propagate_backward, setup_context=_propagate_context)
