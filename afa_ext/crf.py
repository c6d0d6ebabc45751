"""Dense CRF, bilateral filter and dense energy loss on the permutohedral lattice.

"Fast High-Dimensional Filtering Using the Permutohedral Lattice" (Adams, Baek and Davis, 2010), "Efficient Inference in
Fully Connected CRFs with Gaussian Edge Potentials" (Krähenbühl and Koltun, 2011), "On Regularized Losses for
Weakly-supervised CNN Segmentation" (Tang et al., 2018). The filter computes
``out_i = sum_j exp(-|f_i - f_j|^2 / 2) values_j``, approximately and in time linear in the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _native  # noqa: F401  (registers the operators)
from ._autocast import autocast_to_float32
from ._autograd import check_no_tangent, register_derivatives
from ._checks import check_bilateral_filter, check_dense_crf, check_dense_energy_loss

_ops = torch.ops.afa_ext

CRF_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "afa": {"num_iter": 10, "gaussian": (3, 3), "bilateral": (64, 5, 4)},
    "toco": {"num_iter": 10, "gaussian": (1, 1), "bilateral": (121, 5, 4)},
    "dupl": {"num_iter": 10, "gaussian": (1, 1), "bilateral": (121, 5, 4)},
    "excel": {"num_iter": 10, "gaussian": (1, 3), "bilateral": (67, 3, 4)},
    "psa": {"num_iter": 10, "gaussian": (3, 3), "bilateral": (80, 13, 10)},
    "irn": {"num_iter": 10, "gaussian": (3, 3), "bilateral": (50, 5, 10)},
}
"""Published settings as keyword arguments of `dense_crf`: those of the evaluation scripts (SeCo's are ToCo's,
MoRe's are ExCEL's), and for "psa" and "irn" those of the refinement of CAMs."""


def _position_features(height: int, width: int, sigma_xy: float, like: Tensor) -> Tensor:
    """[1, 2, H, W]: x / sigma_xy, y / sigma_xy."""
    # A tensor divides exactly; CUDA would multiply by the reciprocal of a Python number.
    sigma = torch.full((), sigma_xy, dtype=torch.float32, device=like.device)
    x = torch.arange(width, dtype=torch.float32, device=like.device) / sigma
    y = torch.arange(height, dtype=torch.float32, device=like.device) / sigma
    return torch.stack((x.expand(height, width), y.unsqueeze(1).expand(height, width))).unsqueeze(0)


def _image_features(images: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
    """[B, 5, H, W]: x, y and the colors over their standard deviations."""
    batch, _, height, width = images.shape
    sigma = torch.full((), sigma_rgb, dtype=torch.float32, device=images.device)
    positions = _position_features(height, width, sigma_xy, images)
    return torch.cat((positions.expand(batch, -1, -1, -1), images.detach().float() / sigma), dim=1)


def bilateral_filter(
    values: Tensor,
    features: Tensor | None = None,
    *,
    images: Tensor | None = None,
    sigma_xy: float | None = None,
    sigma_rgb: float | None = None,
    normalize: str | None = None,
) -> Tensor:
    """Sums ``values`` of all pixels, weighted by ``exp(-|f_i - f_j|^2 / 2)`` of the distance of their features.

    On the permutohedral lattice, an approximation of the sum that pydensecrf and rloss compute the same way. The
    lattice is built once per image and used for all channels and for the backward pass. Differentiable in ``values``.

    Args:
        values: [B, C, H, W], any C. float16 and bfloat16 are summed in float32, float64 in float64.
        features: [B, D, H, W], D from 1 to 6, each divided by its standard deviation; read as float32.
        images: in place of ``features``: uint8 or floating-point [B, 3, H, W]. Features are then the position over
            ``sigma_xy`` (pixels) and the colors over ``sigma_rgb``, in the range of ``images``.
        sigma_xy, sigma_rgb: standard deviations, greater than 0; needed with ``images``.
        normalize: with n = filter(1), the weights' sum: "after" returns filter(values) / n, a mean;
            "before" filter(values / n); "symmetric" filter(values / sqrt(n)) / sqrt(n), as pydensecrf; None the sum.

    Returns:
        [B, C, H, W] in the type of ``values``.

    Raises:
        TypeError, ValueError: an argument is not as stated, or ``features`` or ``images`` require grad.
        RuntimeError: features are not finite or too far from 0 (on CUDA they are clamped instead).
    """
    check_bilateral_filter(values, features, images, sigma_xy, sigma_rgb, normalize)
    (values,) = autocast_to_float32(values)
    if features is None:
        assert images is not None and sigma_xy is not None and sigma_rgb is not None
        check_no_tangent("images", images)
        features = _image_features(images, float(sigma_xy), float(sigma_rgb))
    else:
        check_no_tangent("features", features)
    lattice = _ops.lattice_build(features.detach().float())
    out: Tensor = _ops.lattice_filter(values, lattice, features.shape[1], normalize or "none", False)
    return out


def dense_crf(
    images: Tensor,
    probabilities: Tensor | None = None,
    *,
    unaries: Tensor | None = None,
    num_iter: int = 10,
    gaussian: Sequence[float] = (3, 3),
    bilateral: Sequence[float] = (64, 5, 4),
    compat: str | Tensor = "potts",
    class_mask: Tensor | None = None,
) -> Tensor:
    """Mean-field inference of a fully connected CRF, as pydensecrf computes it, for a whole batch.

    ``Q <- softmax(-U + w_g G Q + w_b B Q)``, ``num_iter`` times from ``Q = softmax(-U)``: G filters by position, B by
    position and color, both with pydensecrf's symmetric normalization. No gradient flows to any argument.

    Args:
        images: [B, 3, H, W], uint8, or floating-point in 0 to 255.
        probabilities: [B, C, H, W], of which the unary is ``-log(max(p, 1e-5))``.
        unaries: [B, C, H, W], the energies U themselves, in place of ``probabilities``.
        num_iter: at least 0.
        gaussian: (sigma_xy, weight): standard deviation in pixels, and weight; 0 leaves the kernel out.
        bilateral: (sigma_xy, sigma_rgb, weight).
        compat: "potts", or a floating-point tensor [C, C]: the energy is then raised by ``weight * compat @ Q``
            filtered, so that minus the identity is "potts", as in pydensecrf. Used as its symmetric part.
        class_mask: bool [B, C]; classes that are False take no part and have probability 0.

    Returns:
        float32 [B, C, H, W], the probabilities Q.

    Raises:
        TypeError, ValueError: an argument is not as stated, or requires grad.
        RuntimeError: a standard deviation is so small that features are out of range (on CUDA they are clamped).
    """
    scores, matrix = check_dense_crf(images, probabilities, unaries, num_iter, gaussian, bilateral, compat, class_mask)
    check_no_tangent("images", images)
    check_no_tangent("unaries" if probabilities is None else "probabilities", scores)
    if matrix is not None:
        check_no_tangent("compat", matrix)
    scores = scores.detach()
    positions = _position_features(scores.shape[2], scores.shape[3], float(gaussian[0]), scores)
    colors = _image_features(images, float(bilateral[0]), float(bilateral[1]))
    out: Tensor = _ops.mean_field(
        scores,
        _ops.lattice_build(positions),
        _ops.lattice_build(colors),
        float(gaussian[1]),
        float(bilateral[2]),
        None if matrix is None else matrix.detach().float(),
        class_mask,
        probabilities is not None,
        num_iter,
    )
    return out


def dense_energy_loss(
    images: Tensor,
    probabilities: Tensor,
    *,
    sigma_rgb: float = 15,
    sigma_xy: float = 100,
    weight: float,
    regions: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """``-weight / B * sum_c S_c^T (gate * K S_c)`` with S = regions * probabilities and the bilateral filter K.

    Low where pixels that are near and of similar color have the same class. The gradient is the published one,
    ``-2 weight / B * regions * gate * K S``: exact for a symmetric K, which the lattice's is but for the order of its
    blurs, and taking ``gate`` as constant. It needs no filtering in the backward pass.

    Args:
        images: [B, 3, H, W], uint8, or floating-point in the range of ``sigma_rgb`` (0 to 255 as published).
        probabilities: [B, C, H, W].
        sigma_rgb, sigma_xy: standard deviations of color and position (pixels).
        weight: factor of the loss.
        regions: [B, H, W], 1 where the loss applies; None: everywhere.
        gate: [B, H, W], a factor of each pixel's term; None: 1.

    Returns:
        A scalar, float32 (float64 for float64 ``probabilities``).

    Raises:
        TypeError, ValueError: an argument is not as stated, or ``images`` requires grad.
    """
    check_dense_energy_loss(images, probabilities, sigma_rgb, sigma_xy, weight, regions, gate)
    check_no_tangent("images", images)
    wide = probabilities if probabilities.dtype == torch.float64 else probabilities.float()
    if regions is not None:
        wide = wide * regions.detach().to(wide.dtype).unsqueeze(1)
    lattice = _ops.lattice_build(_image_features(images, float(sigma_xy), float(sigma_rgb)))
    filtered = _ops.lattice_filter(wide.detach(), lattice, 5, "none", False)
    if gate is not None:
        filtered = filtered * gate.detach().to(wide.dtype).unsqueeze(1)
    # The value of S * filtered, with the derivative 2 * filtered.
    return -(weight / max(images.shape[0], 1)) * ((2 * wide - wide.detach()) * filtered).sum()


class DenseEnergyLoss(nn.Module):
    """rloss's module, with the constructor and forward pass that AFA, ToCo, SeCo and CoSA use.

    Images and regions are resized by nearest neighbors, probabilities bilinearly (align_corners=False), both by
    ``scale_factor``; ``sigma_xy`` is scaled with them.

    Args:
        weight, sigma_rgb, sigma_xy: as in `dense_energy_loss`.
        scale_factor: of the resizing, greater than 0.
    """

    def __init__(self, weight: float, sigma_rgb: float, sigma_xy: float, scale_factor: float) -> None:
        super().__init__()
        self.weight = weight
        self.sigma_rgb = sigma_rgb
        self.sigma_xy = sigma_xy
        self.scale_factor = scale_factor

    def forward(self, images: Tensor, segmentations: Tensor, ROIs: Tensor, seg_label: Tensor | None = None) -> Tensor:
        """
        Args:
            images: [B, 3, H, W], colors in 0 to 255.
            segmentations: [B, C, H, W], probabilities.
            ROIs: [B, H, W], 1 where the loss applies.
            seg_label: [B, 1, H, W], labels, 255 where there is none. With it, a labeled pixel's term is multiplied by
                ``max(ROI - max_c S, 0)`` (AFA and later); without, every term counts in full (rloss).

        Returns:
            [1], float32 (float64 for float64 ``segmentations``), as the published module returns it.
        """

        def resized(t: Tensor, mode: str = "nearest") -> Tensor:
            align = False if mode == "bilinear" else None
            return F.interpolate(
                t, scale_factor=self.scale_factor, mode=mode, align_corners=align, recompute_scale_factor=True
            )

        images = resized(images.float())
        segmentations = resized(segmentations, "bilinear")
        regions = resized(ROIs.unsqueeze(1).to(segmentations.dtype)).squeeze(1)
        gate = None
        if seg_label is not None:
            unlabeled = resized(seg_label.float()).long().squeeze(1) == 255
            gate = (regions - segmentations.detach().amax(dim=1)).masked_fill(unlabeled, 1).clamp(min=0)
        loss = dense_energy_loss(
            images,
            segmentations,
            sigma_rgb=self.sigma_rgb,
            sigma_xy=self.sigma_xy * self.scale_factor,
            weight=self.weight,
            regions=regions,
            gate=gate,
        )
        return loss.reshape(1)

    def extra_repr(self) -> str:
        return (
            f"weight={self.weight}, sigma_rgb={self.sigma_rgb}, sigma_xy={self.sigma_xy}, "
            f"scale_factor={self.scale_factor}"
        )


@torch.library.register_fake("afa_ext::lattice_build")
def _(features: Tensor) -> Tensor:
    batch, dims, height, width = features.shape
    pixels, corners = height * width, dims + 1
    entries = pixels * corners
    words = 16 + pixels + 4 * entries + (entries + 31) // 32 + 2 * corners * entries + 2  # LatticeLayout::words
    return features.new_empty(batch, words, dtype=torch.int32)


@torch.library.register_fake("afa_ext::lattice_filter")
def _(values: Tensor, *settings: Any) -> Tensor:
    return values.new_empty(values.shape)


@torch.library.register_fake("afa_ext::mean_field")
def _(scores: Tensor, *settings: Any) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.float32)


_ADJOINT = {"none": "none", "symmetric": "symmetric", "before": "after", "after": "before"}


def _filter_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, lattice, ctx.dims, ctx.normalize, ctx.reverse = inputs
    ctx.save_for_backward(lattice)


def _filter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (lattice,) = ctx.saved_tensors
    back = _ops.lattice_filter(grad, lattice, ctx.dims, _ADJOINT[ctx.normalize], not ctx.reverse)
    return back, None, None, None, None


register_derivatives("lattice_build")
register_derivatives("lattice_filter", linear=("values",), backward=_filter_backward, setup_context=_filter_context)
register_derivatives("mean_field")
