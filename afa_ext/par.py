"""Pixel-adaptive refinement: score maps are smoothed along the colours of their image.

"Learning Affinity from Attention" (AFA), CVPR 2022, section 3.3. Every pixel takes, ``num_iter`` times, a
weighted mean of its 8 neighbours at each dilation; the weights come from the image alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _native  # noqa: F401  (registers the operators)
from ._autocast import autocast_to_float32
from ._checks import check_no_grad, check_par_affinity, check_par_propagate, check_par_refine

DILATIONS = (1, 2, 4, 8, 12, 24)
_ops = torch.ops.afa_ext


def par_affinity(
    images: Tensor,
    *,
    dilations: Sequence[int] = DILATIONS,
    w1: float = 0.3,
    w2: float = 0.01,
) -> Tensor:
    """The weights PAR propagates with: one softmax over the neighbours of every pixel.

    ``softmax_n(mean_c -(|I_n,c - I_c| / ((sigma_c + 1e-8) w1))^2) + w2 softmax_n(-(p_n / ((sigma_p + 1e-8) w1))^2)``
    with sigma_c the unbiased standard deviation of channel c over the neighbours, p_n the distance to neighbour
    n (its dilation, times sqrt(2) at the corners) and sigma_p the same deviation of the distances. Neighbours
    beyond the border are the border's pixels. Logits and sums are formed in float32 (float64 for float64).

    Args:
        images: [B, 3, H, W], any range (unchanged by an affine change of a channel); any number of channels.
        dilations: 1 to 32 distances in pixels, each at least 1; they may exceed the image.
        w1: scale of both logits, greater than 0.
        w2: share of the position term; weights sum to 1 + w2.

    Returns:
        [B, 8*len(dilations), H, W] in the type of ``images``; dilation by dilation, each ring row by row.

    Raises:
        TypeError, ValueError: an argument is not as stated, or ``images`` requires grad (there is none for it).
    """
    (images,) = autocast_to_float32(images)
    offsets = check_par_affinity(images, dilations, w1, w2)
    check_no_grad("images", images)
    weights: Tensor = _ops.par_affinity(images, offsets, float(w1), float(w2))
    return weights


def par_propagate(
    weights: Tensor,
    masks: Tensor,
    *,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    class_mask: Tensor | None = None,
) -> Tensor:
    """``num_iter`` times: mask(x) <- sum_n weight_n(x) mask(neighbour n of x).

    Linear in the masks, so one affinity serves any number of classes and thresholds. Differentiable in ``masks``
    and ``weights`` (the latter keeps every iteration's masks in its backward pass). Besides the result it needs
    two buffers of the masks' size.

    Args:
        weights: [B, 8*len(dilations), H, W] from :func:`par_affinity` with the same ``dilations``.
        masks: [B, C, H, W], of the type of ``weights``.
        num_iter: at least 0; 0 returns the masks.
        class_mask: bool [B, C]; classes marked False come out 0 and are not computed.

    Returns:
        [B, C, H, W] in the type of ``masks``; sums are formed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    weights, masks = autocast_to_float32(weights, masks)
    offsets = check_par_propagate(weights, masks, dilations, num_iter, class_mask)
    if num_iter == 0:
        return masks.clone() if class_mask is None else masks.masked_fill(~class_mask[:, :, None, None], 0)
    refined: Tensor = _ops.par_propagate(weights, masks, offsets, num_iter, class_mask)
    return refined


def par_refine(
    images: Tensor,
    masks: Tensor,
    *,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    w1: float = 0.3,
    w2: float = 0.01,
    class_mask: Tensor | None = None,
    resize: str = "mask_to_image",
) -> Tensor:
    """Refines masks along the colours of their images: :func:`par_affinity`, then :func:`par_propagate`.

    Soft output grows by (1 + w2)**num_iter, as published: compare or normalise, don't threshold.

    Args:
        images: [B, 3, H, W].
        masks: [B, C, Hm, Wm]; differentiable. If the type differs from that of ``images``, both are promoted.
        resize: where the sizes differ, ``"mask_to_image"`` (AFA) or ``"image_to_mask"`` (WeCLIP family),
            bilinear with align_corners=True.
        dilations, num_iter, w1, w2, class_mask: as in the two steps.

    Returns:
        [B, C, H, W], or [B, C, Hm, Wm] with ``resize="image_to_mask"``.

    Raises:
        TypeError, ValueError: an argument is not as stated, or ``images`` requires grad.
    """
    images, masks = autocast_to_float32(images, masks)
    check_par_refine(images, masks, class_mask, resize)
    check_no_grad("images", images)
    if images.shape[2:] != masks.shape[2:]:
        if resize == "mask_to_image":
            masks = F.interpolate(masks, size=images.shape[2:], mode="bilinear", align_corners=True)
        else:
            images = F.interpolate(images, size=masks.shape[2:], mode="bilinear", align_corners=True)
    dtype = torch.promote_types(images.dtype, masks.dtype)
    weights = par_affinity(images, dilations=dilations, w1=w1, w2=w2).to(dtype)
    return par_propagate(weights, masks.to(dtype), dilations=dilations, num_iter=num_iter, class_mask=class_mask)


class PAR(nn.Module):
    """Takes the place of the module of this name in AFA and the codebases that copied it.

    Same constructor and forward arguments. It holds no state: checkpoints that store the published module's
    buffers under its name load, and those entries are ignored.
    """

    def __init__(self, dilations: Sequence[int], num_iter: int) -> None:
        super().__init__()
        self.dilations = tuple(dilations)
        self.num_iter = num_iter
        self.w1 = 0.3
        self.w2 = 0.01

    def forward(self, imgs: Tensor, masks: Tensor) -> Tensor:
        """imgs [B, 3, H, W], masks [B, C, Hm, Wm] -> [B, C, H, W]; see :func:`par_refine`."""
        return par_refine(imgs, masks, dilations=self.dilations, num_iter=self.num_iter, w1=self.w1, w2=self.w2)

    def extra_repr(self) -> str:
        return f"dilations={self.dilations}, num_iter={self.num_iter}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Accepts whatever a checkpoint stores for this module: its buffers were constants of the dilations."""


@torch.library.register_fake("afa_ext::par_affinity")
def _(images: Tensor, dilations: Sequence[int], w1: float, w2: float) -> Tensor:
    batch, _, height, width = images.shape
    return images.new_empty(batch, 8 * len(dilations), height, width)


@torch.library.register_fake("afa_ext::par_propagate")
def _(weights: Tensor, masks: Tensor, dilations: Sequence[int], num_iter: int, class_mask: Tensor | None) -> Tensor:
    return masks.new_empty(masks.shape)


@torch.library.register_fake("afa_ext::par_propagate_backward_masks")
def _(grad: Tensor, weights: Tensor, dilations: Sequence[int], num_iter: int, class_mask: Tensor | None) -> Tensor:
    return grad.new_empty(grad.shape)


@torch.library.register_fake("afa_ext::par_propagate_backward_weights")
def _(
    grad: Tensor,
    weights: Tensor,
    masks: Tensor,
    dilations: Sequence[int],
    num_iter: int,
    class_mask: Tensor | None,
) -> Tensor:
    return weights.new_empty(weights.shape)


def _propagate_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, masks, ctx.dilations, ctx.num_iter, class_mask = inputs
    ctx.save_for_backward(weights, masks, class_mask)


def _propagate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, masks, class_mask = ctx.saved_tensors
    settings = (ctx.dilations, ctx.num_iter, class_mask)
    grad_weights = grad_masks = None
    if ctx.needs_input_grad[0]:
        grad_weights = _ops.par_propagate_backward_weights(grad, weights, masks, *settings)
    if ctx.needs_input_grad[1]:
        grad_masks = _ops.par_propagate_backward_masks(grad, weights, *settings)
    return grad_weights, grad_masks, None, None, None


torch.library.register_autograd("afa_ext::par_propagate", _propagate_backward, setup_context=_propagate_context)
