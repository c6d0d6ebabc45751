"""Affinity of token pairs learned from attention: the weighted sum of attention maps, its labels and its loss.

"Learning Affinity from Attention" (AFA), CVPR 2022, section 3.2. The layout of pairs is dense, [B, N, N], or windowed,
[B, N, (2*radius+1)**2]: entry (i, k) is the pair of node i and node i + offset k, in the order of
`afa_ext.window_offsets`. `afa_ext.random_walk` uses the same layouts. If both sizes are equal,
(2*radius+1)**2 == N, the layout is dense in all functions; pairs outside the window are then 0 (labels: 255).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native  # noqa: F401  (registers the operators)
from ._autocast import autocast_to_float32
from ._autograd import register_derivatives
from ._checks import check_affinity_from_attention, check_affinity_labels, check_affinity_loss

_ops = torch.ops.afa_ext


def affinity_from_attention(
    attention: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    radius: int | None = None,
) -> Tensor:
    """``sigmoid(sum_k weight_k (S_k + S_k^T) + bias)``: a 1x1 convolution over symmetrized attention maps.

    Differentiable with respect to all three tensors. The largest temporary tensor has the size of the result; the
    backward pass also allocates the gradient of ``attention``. With a radius only the window's pairs are computed and
    stored: the gradient of ``attention`` is 0 elsewhere.

    Args:
        attention: [B, K, N, N], raw logits q k^T of K maps (layers times heads), before any softmax.
        weight: [K], or [1, K, 1, 1] like a convolution's weight; dtype and device of ``attention``.
        bias: [1] or []; dtype and device of ``attention``.
        grid: (h, w), the token grid with N = h*w; required with a radius.
        radius: None for all pairs; otherwise 0 to 63, the window's Chebyshev radius in tokens (AFA: 8).

    Returns:
        [B, N, N], symmetric; with a radius [B, N, (2*radius+1)**2], windowed, 0 where the offset is outside the grid.
        Has the dtype of ``attention``. Sums are accumulated in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    attention, weight, bias = autocast_to_float32(attention, weight, bias)
    height, width = check_affinity_from_attention(attention, weight, bias, grid, radius)
    windowed = radius is not None and (2 * radius + 1) ** 2 != height * width
    affinity: Tensor = _ops.affinity_from_attention(
        attention, weight.reshape(-1), bias.reshape(1), height, width, radius, windowed
    )
    return affinity


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
    """Labels of token pairs from a map of pixel labels: 1 same class, 0 different classes, 255 ignored.

    The map is sampled at every ``stride``-th pixel (nearest) from pixel ``offset`` on, so
    N = ceil((H - offset) / stride) * ceil((W - offset) / stride). A pair is 255 if either token is ignored, if it is
    outside the window, or (windowed) if the offset is outside the grid. With ``background``, pairs of the same
    foreground class are 2 instead of 1, so that `affinity_loss` can give them a weight of their own.

    Args:
        label_map: [B, H, W], uint8, int16, int32 or int64.
        stride: pixels per token, at least 1.
        radius: Chebyshev radius of the window in tokens, 0 to 63.
        ignore_index: the label of ignored pixels.
        windowed: return the windowed layout.
        offset: first sampled row and column, at least 0 and below ``stride``. The published code uses 0; stride // 2
            is the center of a token.
        background: the label of background pixels, or None to label all pairs of the same class 1.

    Returns:
        uint8 [B, N, N], or [B, N, (2*radius+1)**2] if ``windowed``.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    check_affinity_labels(label_map, stride, radius, ignore_index, windowed, offset, background)
    tokens = label_map[:, offset::stride, offset::stride].to(torch.int64)
    windowed = windowed and (2 * radius + 1) ** 2 != tokens.shape[1] * tokens.shape[2]
    labels: Tensor = _ops.affinity_labels(tokens, radius, ignore_index, windowed, background)
    return labels


def affinity_loss(
    affinity: Tensor,
    labels: Tensor,
    *,
    weights: Sequence[float] = (0.5, 0.5, 0.0),
    counts: Tensor | None = None,
) -> Tensor:
    """``sum_g weights[g] * error_g / (n_g + 1)`` over three groups of pairs, counted over the whole batch.

    The groups are the values of ``labels``: 0 different classes (the error is the sum of A), 1 the same class and 2 the
    same foreground class (the error is the sum of 1 - A); all other pairs are ignored. The default is the published
    loss, ``1/2 sum_same(1 - A) / (n_same + 1) + 1/2 sum_different(A) / (n_different + 1)``. Most pairs of the same
    class are pairs of background; ``weights=(0.5, 0.25, 0.25)`` with labels made with a ``background`` gives objects
    the same weight.

    Differentiable with respect to ``affinity``. Sums are accumulated in blocks of fixed size, so the result doesn't
    depend on the number of threads.

    Args:
        affinity: values in [0, 1], any shape: dense or windowed.
        labels: uint8, same shape and device, from `affinity_labels`.
        weights: three weights of at least 0, one per group.
        counts: int64 [3] on the same device: the numbers of pairs n_g to divide by, for a part of a larger batch. The
            losses of all parts then add up to the loss of the batch. None: those of ``labels``.

    Returns:
        Scalar, float32 (float64 for float64), in [0, sum(weights)) without ``counts``.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    return _loss_sums(affinity, labels, weights, counts)[0]


def affinity_loss_and_sums(
    affinity: Tensor,
    labels: Tensor,
    *,
    weights: Sequence[float] = (0.5, 0.5, 0.0),
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`affinity_loss`, and the sums that it is made of, at no extra cost.

    Arguments and errors are those of `affinity_loss`.

    Returns:
        The loss, and a [2, 3] tensor of its dtype without gradient: the sums of A over the pairs of each group, and the
        numbers of these pairs. Their quotient is the mean affinity of a group; both can be added up over batches.
    """
    sums = _loss_sums(affinity, labels, weights, counts)
    errors, pairs = sums[4:7].detach(), sums[7:10].detach()
    like = torch.cat([errors[:1], pairs[1:] - errors[1:]])
    return sums[0], torch.stack([like, pairs])


def _loss_sums(affinity: Tensor, labels: Tensor, weights: Sequence[float], counts: Tensor | None) -> Tensor:
    """[10]: the loss, and what `finish_loss` in csrc/affinity/affinity.h writes after it."""
    (affinity,) = autocast_to_float32(affinity)
    different, same, foreground = check_affinity_loss(affinity, labels, weights, counts)
    sums: Tensor = _ops.affinity_loss(affinity, labels, different, same, foreground, counts)
    return sums


@torch.library.register_fake("afa_ext::affinity_from_attention")
def _(
    attention: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, radius: int | None, windowed: bool
) -> Tensor:
    batch, _, nodes, _ = attention.shape
    return attention.new_empty(batch, nodes, _pairs(nodes, radius, windowed))


@torch.library.register_fake("afa_ext::affinity_from_attention_backward_attention")
def _(grad: Tensor, affinity: Tensor, weight: Tensor, *settings: Any) -> Tensor:
    batch, nodes, _ = affinity.shape
    return affinity.new_empty(batch, weight.shape[0], nodes, nodes)


@torch.library.register_fake("afa_ext::affinity_from_attention_backward_weight")
def _(grad: Tensor, affinity: Tensor, attention: Tensor, *settings: Any) -> Tensor:
    return attention.new_empty(attention.shape[1] + 1, dtype=_sum_type(attention))


@torch.library.register_fake("afa_ext::affinity_labels")
def _(tokens: Tensor, radius: int, ignore_index: int, windowed: bool, background: int | None) -> Tensor:
    batch, height, width = tokens.shape
    nodes = height * width
    return tokens.new_empty(batch, nodes, _pairs(nodes, radius, windowed), dtype=torch.uint8)


@torch.library.register_fake("afa_ext::affinity_loss")
def _(affinity: Tensor, labels: Tensor, *settings: Any) -> Tensor:
    return affinity.new_empty(10, dtype=_sum_type(affinity))


@torch.library.register_fake("afa_ext::affinity_loss_backward")
def _(grad: Tensor, sums: Tensor, labels: Tensor) -> Tensor:
    return grad.new_empty(labels.shape)


def _pairs(nodes: int, radius: int | None, windowed: bool) -> int:
    return (2 * radius + 1) ** 2 if windowed and radius is not None else nodes


def _sum_type(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _affinity_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    attention, weight, _, *ctx.settings = inputs
    learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(attention if learns else None, weight, output)


def _affinity_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    attention, weight, affinity = ctx.saved_tensors
    grad_attention = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_attention = _ops.affinity_from_attention_backward_attention(grad, affinity, weight, *ctx.settings)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        sums = _ops.affinity_from_attention_backward_weight(grad, affinity, attention, *ctx.settings)
        grad_weight, grad_bias = sums.to(weight.dtype).split([weight.shape[0], 1])
    return grad_attention, grad_weight, grad_bias, *[None] * len(ctx.settings)


def _loss_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    affinity, labels, *ctx.settings = inputs
    ctx.dtype = affinity.dtype
    ctx.save_for_backward(output, labels)


def _loss_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sums, labels = ctx.saved_tensors
    return _ops.affinity_loss_backward(grad, sums, labels).to(ctx.dtype), None, *[None] * len(ctx.settings)


register_derivatives("affinity_from_attention", backward=_affinity_backward, setup_context=_affinity_context)
register_derivatives("affinity_from_attention_backward_attention", linear=("grad",))
register_derivatives("affinity_from_attention_backward_weight", linear=("grad",))
register_derivatives("affinity_loss", backward=_loss_backward, setup_context=_loss_context)
register_derivatives("affinity_loss_backward", linear=("grad",))
