"""Affinities between a node and the nodes of its window, from boundaries (IRN) or from features (PSA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native  # noqa: F401  (registers the operators)
from ._autocast import autocast_to_float32
from ._autograd import check_no_tangent, register_derivatives
from ._checks import check_edge_affinity, check_feature_affinity, check_no_grad
from .window import window_offsets

__all__ = ["edge_affinity", "feature_affinity"]

_ops = torch.ops.afa_ext


def edge_affinity(edge: Tensor, radius: int) -> Tensor:
    """IRN's affinity: 1 - the largest boundary value on the straight path between two nodes.

    "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR 2019, section 4.3. The path
    consists of all grid points (including both ends) in the bounding box of the segment whose distance to its line is
    less than 1. Symmetric; 1 on the diagonal. There is no gradient with respect to ``edge``
    (`afa_ext.reference.edge_affinity` has one).

    Args:
        edge: [B, h, w] or [B, 1, h, w], boundary probabilities.
        radius: radius of the disc dy*dy + dx*dx < radius*radius, 1 to 63.

    Returns:
        [B, N, window] for `afa_ext.random_walk` with ``window="disc"``, in the dtype of ``edge``; 0 if the
        neighbor is outside the grid. A view in which the entries of one offset are contiguous; random_walk reads it
        without a copy.

    Raises:
        TypeError, ValueError: an argument is invalid, or ``edge`` requires grad.
    """
    (edge,) = autocast_to_float32(edge)
    check_edge_affinity(edge, radius)
    check_no_grad("edge", edge)
    check_no_tangent("edge", edge)
    planes: Tensor = _ops.edge_affinity(edge.flatten(0, -3), radius)
    return planes.flatten(2).mT


def feature_affinity(features: Tensor, radius: int) -> Tensor:
    """PSA's affinity: exp(-mean over channels of the absolute difference of two nodes' features).

    "Learning Pixel-level Semantic Affinity with Image-level Supervision", CVPR 2018, section 3.2; SEAM uses it, too.
    Symmetric; 1 on the diagonal. All pairs in the grid are included (the published code omits pairs whose upper node is
    within radius - 1 of the left, right or lower border). Differentiable with respect to ``features``.

    Args:
        features: [B, C, h, w].
        radius: radius of the disc dy*dy + dx*dx < radius*radius, 1 to 63.

    Returns:
        [B, N, window] for `afa_ext.random_walk` with ``window="disc"``, in the dtype of ``features``; 0 if the
        neighbor is outside the grid. A view in which the entries of one offset are contiguous; random_walk reads it
        without a copy.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    (features,) = autocast_to_float32(features)
    check_feature_affinity(features, radius)
    planes: Tensor = _ops.feature_affinity(features, radius)
    return planes.flatten(2).mT


@torch.library.register_fake("afa_ext::edge_affinity")
def _(edge: Tensor, radius: int) -> Tensor:
    batch, height, width = edge.shape
    return edge.new_empty(batch, len(window_offsets(radius, "disc")), height, width)


@torch.library.register_fake("afa_ext::feature_affinity")
def _(features: Tensor, radius: int) -> Tensor:
    batch, _, height, width = features.shape
    return features.new_empty(batch, len(window_offsets(radius, "disc")), height, width)


@torch.library.register_fake("afa_ext::feature_affinity_backward")
def _(grad: Tensor, features: Tensor, affinity: Tensor, radius: int) -> Tensor:
    return features.new_empty(features.shape)


def _features_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, ctx.radius = inputs
    ctx.save_for_backward(features, output)


def _features_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    features, affinity = ctx.saved_tensors
    return _ops.feature_affinity_backward(grad, features, affinity, ctx.radius), None


register_derivatives("edge_affinity")
register_derivatives("feature_affinity", backward=_features_backward, setup_context=_features_context)
register_derivatives("feature_affinity_backward", linear=("grad",))
