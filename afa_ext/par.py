"""Pixel-adaptive refinement: smooths score maps within regions of similar image color.

PAR is from "Learning Affinity from Attention" (AFA), CVPR 2022, section 3.3; its predecessor PAMR is from "Single-Stage
Semantic Segmentation from Image Labels" (1-stage-wseg), CVPR 2020, section 3.3. Both replace every pixel, ``num_iter``
times, by a weighted mean of its 8 neighbors at each dilation. The weights depend only on the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _native  # noqa: F401  (registers the operators)
from ._autocast import autocast_to_float32
from ._autograd import check_no_tangent, register_derivatives
from ._checks import (
    check_choice,
    check_dilations,
    check_int,
    check_no_grad,
    check_pamr_affinity,
    check_par_affinity,
    check_par_propagate,
    check_par_refine,
)

DILATIONS = (1, 2, 4, 8, 12, 24)
_ops = torch.ops.afa_ext


def par_affinity(
    images: Tensor,
    *,
    dilations: Sequence[int] = DILATIONS,
    w1: float = 0.3,
    w2: float = 0.01,
) -> Tensor:
    """PAR's propagation weights: one softmax over the neighbors of every pixel.

    ``softmax_n(mean_c -(|I_n,c - I_c| / ((sigma_c + 1e-8) w1))^2) + w2 softmax_n(-(p_n / ((sigma_p + 1e-8) w1))^2)``
    where sigma_c is the unbiased standard deviation of channel c over the neighbors, p_n the distance to neighbor n
    (its dilation, times sqrt(2) at the corners) and sigma_p the standard deviation of the distances. Borders are
    replicated. Logits and sums are computed in float32 (float64 for float64).

    Args:
        images: [B, 3, H, W], any range (the result is invariant to affine changes of a channel); any number of
            channels.
        dilations: 1 to 32 distances in pixels, each at least 1; they may exceed the image size.
        w1: scale of both logits, greater than 0.
        w2: weight of the position term; the weights sum to 1 + w2.

    Returns:
        [B, 8*len(dilations), H, W] in the dtype of ``images``; ordered by dilation, each ring in row-major order.

    Raises:
        TypeError, ValueError: an argument is invalid, or ``images`` requires grad (it has no gradient).
    """
    (images,) = autocast_to_float32(images)
    offsets = check_par_affinity(images, dilations, w1, w2)
    check_no_grad("images", images)
    check_no_tangent("images", images)
    weights: Tensor = _ops.par_affinity(images, offsets, float(w1), float(w2))
    return weights


def pamr_affinity(images: Tensor, *, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """PAMR's propagation weights: one softmax over the neighbors of every pixel.

    ``softmax_n(mean_c -|I_n,c - I_c| / (1e-8 + 0.1 sigma_c))`` where sigma_c is the unbiased standard deviation of
    channel c over the neighbors and the pixel itself, which counts once per dilation. The weights sum to 1. Logits and
    sums are computed in float32 (float64 for float64).

    Arguments, return value and errors are those of `par_affinity`, without ``w1`` and ``w2``.
    """
    (images,) = autocast_to_float32(images)
    offsets = check_pamr_affinity(images, dilations)
    check_no_grad("images", images)
    check_no_tangent("images", images)
    weights: Tensor = _ops.pamr_affinity(images, offsets)
    return weights


def par_propagate(
    weights: Tensor,
    masks: Tensor,
    *,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    class_mask: Tensor | None = None,
) -> Tensor:
    """``num_iter`` times: mask(x) <- sum_n weight_n(x) mask(neighbor n of x).

    Linear in the masks, so one affinity can be used for any number of classes and thresholds. Differentiable with
    respect to ``masks`` and ``weights`` (the gradient of ``weights`` needs the masks of every iteration). Needs two
    temporary buffers of the masks' size, with borders on the CPU.

    Args:
        weights: [B, 8*len(dilations), H, W] from `par_affinity` or `pamr_affinity` with the same
            ``dilations``.
        masks: [B, C, H, W], same dtype as ``weights``.
        num_iter: at least 0; 0 returns the masks.
        class_mask: bool [B, C]; classes marked False are not computed, and their result is 0.

    Returns:
        [B, C, H, W] in the dtype of ``masks``; sums are accumulated in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument is invalid.
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
    """Refines masks by the colors of their images: `par_affinity`, then `par_propagate`.

    As published, soft output is scaled by (1 + w2)**num_iter: compare or normalize it, don't threshold it. Extra memory
    on the CPU: the weights, ``B*8*len(dilations)*H*W`` floats, and two buffers of the masks selected by ``class_mask``,
    whose rows have borders of the largest dilation on both sides.

    Args:
        images: [B, 3, H, W].
        masks: [B, C, Hm, Wm]; differentiable. If its dtype differs from that of ``images``, both are promoted.
        resize: if the sizes differ, ``"mask_to_image"`` (AFA) or ``"image_to_mask"`` (WeCLIP family),
            bilinear with align_corners=True.
        dilations, num_iter, w1, w2, class_mask: as in the two steps.

    Returns:
        [B, C, H, W], or [B, C, Hm, Wm] with ``resize="image_to_mask"``.

    Raises:
        TypeError, ValueError: an argument is invalid, or ``images`` requires grad.
    """
    images, masks = _prepare(images, masks, class_mask, resize)
    weights = par_affinity(images, dilations=dilations, w1=w1, w2=w2)
    return _propagate(weights, masks, dilations, num_iter, class_mask)


def pamr_refine(
    images: Tensor,
    masks: Tensor,
    *,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    class_mask: Tensor | None = None,
    resize: str = "mask_to_image",
) -> Tensor:
    """Refines masks by the colors of their images: `pamr_affinity`, then `par_propagate`.

    Arguments, return value and errors are those of `par_refine`, without ``w1`` and ``w2``; soft output is not
    scaled.
    """
    images, masks = _prepare(images, masks, class_mask, resize)
    weights = pamr_affinity(images, dilations=dilations)
    return _propagate(weights, masks, dilations, num_iter, class_mask)


def _prepare(images: Tensor, masks: Tensor, class_mask: Tensor | None, resize: str) -> tuple[Tensor, Tensor]:
    """Check the inputs, resize them to one size, and convert them to float32 under autocast."""
    images, masks = autocast_to_float32(images, masks)
    check_par_refine(images, masks, class_mask, resize)
    check_no_grad("images", images)
    check_no_tangent("images", images)
    if images.shape[2:] != masks.shape[2:]:
        if resize == "mask_to_image":
            masks = F.interpolate(masks, size=images.shape[2:], mode="bilinear", align_corners=True)
        else:
            images = F.interpolate(images, size=masks.shape[2:], mode="bilinear", align_corners=True)
    return images, masks


def _propagate(
    weights: Tensor, masks: Tensor, dilations: Sequence[int], num_iter: int, class_mask: Tensor | None
) -> Tensor:
    dtype = torch.promote_types(weights.dtype, masks.dtype)
    weights, masks = weights.to(dtype), masks.to(dtype)
    return par_propagate(weights, masks, dilations=dilations, num_iter=num_iter, class_mask=class_mask)


class _Refinement(nn.Module):
    """Base class of PAR and PAMR. It has no state: the published modules' buffers are constants."""

    published_buffers: ClassVar[frozenset[str]]

    def __init__(self, dilations: Sequence[int], num_iter: int, resize: str) -> None:
        super().__init__()
        check_int("num_iter", num_iter, 0)
        check_choice("resize", resize, ("mask_to_image", "image_to_mask"))
        self.dilations = tuple(check_dilations(dilations))
        self.num_iter = num_iter
        self.resize = resize

    def extra_repr(self) -> str:
        return f"dilations={self.dilations}, num_iter={self.num_iter}, resize={self.resize!r}"

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Ignores the buffers that a checkpoint of the published module stores; other keys are unexpected."""
        known = {prefix + name for name in self.published_buffers}
        if strict:
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)


class PAR(_Refinement):
    """Drop-in replacement for the module of this name in AFA and the codebases that copied it (ToCo, DuPL, SeCo, ...).

    Same constructor and forward arguments. The module has no state: checkpoints with the published module's buffer can
    be loaded, and that entry is ignored. The PAR of WeCLIP, WeCLIP+ and ExCEL resizes the image to the mask; replace
    its import by ``PAR = functools.partial(afa_ext.PAR, resize="image_to_mask")``.

    Raises:
        TypeError, ValueError: ``dilations``, ``num_iter`` or ``resize`` is invalid, see `par_refine`.
    """

    published_buffers = frozenset({"kernel"})

    def __init__(self, dilations: Sequence[int], num_iter: int, *, resize: str = "mask_to_image") -> None:
        super().__init__(dilations, num_iter, resize)
        self.w1 = 0.3
        self.w2 = 0.01

    def forward(self, imgs: Tensor, masks: Tensor) -> Tensor:
        """imgs [B, 3, H, W], masks [B, C, Hm, Wm] -> [B, C, H, W]; see `par_refine`."""
        return par_refine(
            imgs,
            masks,
            dilations=self.dilations,
            num_iter=self.num_iter,
            w1=self.w1,
            w2=self.w2,
            resize=self.resize,
        )


class PAMR(_Refinement):
    """Drop-in replacement for the module of this name in 1-stage-wseg and the codebases that copied it.

    Same constructor and forward arguments (``num_iter`` comes first; the published settings are 10 and
    ``[1, 2, 4, 8, 12, 24]``). The module has no state: checkpoints with the published module's buffers can be loaded,
    and those entries are ignored.

    Raises:
        TypeError, ValueError: ``num_iter``, ``dilations`` or ``resize`` is invalid, see `pamr_refine`.
    """

    published_buffers = frozenset({"aff_x.kernel", "aff_m.kernel", "aff_std.kernel"})

    def __init__(self, num_iter: int = 1, dilations: Sequence[int] = (1,), *, resize: str = "mask_to_image") -> None:
        super().__init__(dilations, num_iter, resize)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, 3, H, W], mask [B, C, Hm, Wm] -> [B, C, H, W]; see `pamr_refine`."""
        return pamr_refine(x, mask, dilations=self.dilations, num_iter=self.num_iter, resize=self.resize)


@torch.library.register_fake("afa_ext::par_affinity")
def _(images: Tensor, dilations: Sequence[int], w1: float, w2: float) -> Tensor:
    return _affinity_fake(images, dilations)


@torch.library.register_fake("afa_ext::pamr_affinity")
def _(images: Tensor, dilations: Sequence[int]) -> Tensor:
    return _affinity_fake(images, dilations)


def _affinity_fake(images: Tensor, dilations: Sequence[int]) -> Tensor:
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


register_derivatives("par_affinity")
register_derivatives("pamr_affinity")
register_derivatives("par_propagate", linear=("masks",), backward=_propagate_backward, setup_context=_propagate_context)
register_derivatives("par_propagate_backward_masks", linear=("grad",))
register_derivatives("par_propagate_backward_weights", linear=("grad", "masks"))
