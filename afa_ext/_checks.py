"""Argument checks shared by the native operators' wrappers and the reference implementations.

Every error message has the argument's name, the expected value and the actual value, so that a user can fix the call
without reading this package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
MAX_DILATIONS = 32
MAX_RADIUS = 63
MAX_EXP_TIMES = 30


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


def check_float_tensor(name: str, value: Tensor, layout: str) -> None:
    """``layout`` is the documented shape, such as ``"[B, C, H, W]"``; the rank is its number of commas plus one."""
    ndim = layout.count(",") + 1
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a floating-point tensor {layout}, got {_describe(value)}")
    if value.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions {layout}, got {_describe(value)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float32, float16, bfloat16 or float64, got {_describe(value)}; "
            f"convert it with {name}.float()"
        )


def check_images(images: Tensor) -> None:
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        raise TypeError(f"images must be floating-point, got {_describe(images)}; pass images.float() / 255")
    check_float_tensor("images", images, "[B, 3, H, W]")
    if images.shape[1] < 1:
        raise ValueError(f"images must have at least one color channel, got shape {tuple(images.shape)}")


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {value.device}")


def check_same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must have the type of {other_name} ({other.dtype}), got {value.dtype}")


def check_size(name: str, value: Tensor, dim: int, expected: int, reason: str) -> None:
    if value.shape[dim] != expected:
        raise ValueError(
            f"{name} must have size {expected} in dimension {dim} ({reason}), got shape {tuple(value.shape)}"
        )


def check_int(name: str, value: int, minimum: int, maximum: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {_describe(value)}")
    if value < minimum or (maximum is not None and value > maximum):
        bound = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
        raise ValueError(f"{name} must be {bound}, got {value}")


def check_positive(name: str, value: float, *, allow_zero: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {_describe(value)}")
    if not (value > 0 or (allow_zero and value == 0)):  # also catches NaN
        raise ValueError(f"{name} must be {'0 or more' if allow_zero else 'greater than 0'}, got {value}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_dilations(dilations: Sequence[int]) -> list[int]:
    if isinstance(dilations, (str, bytes, Tensor)) or not isinstance(dilations, Sequence):
        raise TypeError(f"dilations must be a sequence of integers, got {_describe(dilations)}")
    if not 1 <= len(dilations) <= MAX_DILATIONS:
        raise ValueError(f"dilations must have 1 to {MAX_DILATIONS} integers, got {len(dilations)}")
    for dilation in dilations:
        check_int("dilations' entries", dilation, 1, 2**30)
    return list(dilations)


def check_class_mask(class_mask: Tensor | None, masks: Tensor) -> None:
    if class_mask is None:
        return
    if not isinstance(class_mask, Tensor) or class_mask.dtype != torch.bool:
        raise TypeError(f"class_mask must be a bool tensor [B, C], got {_describe(class_mask)}")
    if class_mask.shape != masks.shape[:2]:
        raise ValueError(
            f"class_mask must have shape {tuple(masks.shape[:2])} (the batch and classes of masks), "
            f"got {tuple(class_mask.shape)}"
        )
    check_same_device("class_mask", class_mask, "masks", masks)


def check_no_grad(name: str, value: Tensor) -> None:
    """Raise ValueError for a gradient that would otherwise be dropped silently."""
    if torch.is_grad_enabled() and value.requires_grad:
        raise ValueError(
            f"{name} requires grad, but this operator has no gradient with respect to {name}; "
            f"pass {name}.detach(), or use the reference implementation in afa_ext.reference"
        )


def check_par_affinity(images: Tensor, dilations: Sequence[int], w1: float, w2: float) -> list[int]:
    check_images(images)
    check_positive("w1", w1)
    check_positive("w2", w2, allow_zero=True)
    return check_dilations(dilations)


def check_pamr_affinity(images: Tensor, dilations: Sequence[int]) -> list[int]:
    check_images(images)
    return check_dilations(dilations)


def check_par_propagate(
    weights: Tensor, masks: Tensor, dilations: Sequence[int], num_iter: int, class_mask: Tensor | None
) -> list[int]:
    check_float_tensor("weights", weights, "[B, 8*len(dilations), H, W]")
    check_float_tensor("masks", masks, "[B, C, H, W]")
    offsets = check_dilations(dilations)
    check_size("weights", weights, 1, 8 * len(offsets), "8 neighbors per dilation")
    for dim, what in ((0, "batch"), (2, "height"), (3, "width")):
        check_size("masks", masks, dim, weights.shape[dim], f"the {what} of weights")
    check_same_dtype("masks", masks, "weights", weights)
    check_same_device("masks", masks, "weights", weights)
    check_int("num_iter", num_iter, 0)
    check_class_mask(class_mask, masks)
    return offsets


def check_par_refine(images: Tensor, masks: Tensor, class_mask: Tensor | None, resize: str) -> None:
    check_images(images)
    check_float_tensor("masks", masks, "[B, C, Hm, Wm]")
    check_size("masks", masks, 0, images.shape[0], "the batch of images")
    check_same_device("masks", masks, "images", images)
    check_class_mask(class_mask, masks)
    check_choice("resize", resize, ("mask_to_image", "image_to_mask"))
    empty_masks, empty_images = 0 in masks.shape[2:], 0 in images.shape[2:]
    if masks.shape[2:] != images.shape[2:] and (empty_masks or empty_images):
        raise ValueError(
            "masks and images must both have at least one pixel to be resized to each other, "
            f"got shapes {tuple(masks.shape)} and {tuple(images.shape)}"
        )


def check_grid(grid: tuple[int, int]) -> None:
    if not isinstance(grid, (tuple, list, torch.Size)) or len(grid) != 2:
        raise TypeError(f"grid must be the two sizes (h, w), got {_describe(grid)}")


def check_window(radius: int, window: str) -> None:
    check_choice("window", window, ("square", "disc"))
    check_int("radius", radius, 1 if window == "disc" else 0, MAX_RADIUS)


def _window_size(radius: int, window: str) -> int:
    """The number of offsets in a random walk's window."""
    check_window(radius, window)
    if window == "square":
        return (2 * radius + 1) ** 2
    return sum(2 * math.isqrt(radius * radius - dy * dy - 1) + 1 for dy in range(1 - radius, radius))


def check_random_walk(
    scores: Tensor,
    affinity: Tensor,
    grid: tuple[int, int],
    radius: int | None,
    window: str,
    power: float,
    steps: int,
    normalize: str | None,
    eps: float,
    direction: str = "columns",
    boxes: Tensor | None = None,
    scores_name: str = "scores",
) -> None:
    check_float_tensor(scores_name, scores, "[B, C, h, w]")
    check_float_tensor("affinity", affinity, "[B, N, N or window]")
    check_grid(grid)
    if tuple(scores.shape[2:]) != tuple(grid):
        raise ValueError(f"{scores_name} must have spatial size {tuple(grid)} (grid), got shape {tuple(scores.shape)}")
    check_size("affinity", affinity, 0, scores.shape[0], f"the batch of {scores_name}")
    nodes = grid[0] * grid[1]
    check_size("affinity", affinity, 1, nodes, "h*w of grid")
    check_positive("power", power)
    check_int("steps", steps, 0)
    check_choice("normalize", normalize, ("column", "row", "sinkhorn", None))
    check_positive("eps", eps, allow_zero=True)
    check_same_dtype("affinity", affinity, scores_name, scores)
    check_same_device("affinity", affinity, scores_name, scores)
    check_choice("window", window, ("square", "disc"))
    check_choice("direction", direction, ("columns", "rows"))
    check_boxes(boxes, scores)
    if radius is None:
        check_size("affinity", affinity, 2, nodes, "h*w of grid; a windowed affinity needs radius")
        return
    window_size = _window_size(radius, window)
    if affinity.shape[2] != nodes and affinity.shape[2] != window_size:
        raise ValueError(
            f"affinity must have size {nodes} (dense, h*w) or {window_size} (the {window} window of radius "
            f"{radius}) in dimension 2, got shape {tuple(affinity.shape)}"
        )


def check_boxes(boxes: Tensor | None, scores: Tensor) -> None:
    if boxes is None:
        return
    if not isinstance(boxes, Tensor) or boxes.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"boxes must be an int64 or int32 tensor [B, C, 4] or [B, C, M, 4], got {_describe(boxes)}")
    if boxes.dim() not in (3, 4) or boxes.shape[:2] != scores.shape[:2] or boxes.shape[-1] != 4:
        batch, classes = scores.shape[:2]
        raise ValueError(
            f"boxes must have shape ({batch}, {classes}, 4) or ({batch}, {classes}, M, 4) (the batch and classes of "
            f"scores), got {tuple(boxes.shape)}"
        )
    check_same_device("boxes", boxes, "scores", scores)


def check_edge_affinity(edge: Tensor, radius: int) -> None:
    if isinstance(edge, Tensor) and edge.dim() == 4:
        check_float_tensor("edge", edge, "[B, 1, h, w]")
        check_size("edge", edge, 1, 1, "one boundary map per image")
    else:
        check_float_tensor("edge", edge, "[B, h, w]")
    check_int("radius", radius, 1, MAX_RADIUS)


def check_feature_affinity(features: Tensor, radius: int) -> None:
    check_float_tensor("features", features, "[B, C, h, w]")
    if features.shape[1] < 1:
        raise ValueError(f"features must have at least one channel, got shape {tuple(features.shape)}")
    check_int("radius", radius, 1, MAX_RADIUS)


def check_propagate_to_edge(x: Tensor, edge: Tensor, radius: int, beta: float, exp_times: int) -> None:
    if isinstance(edge, Tensor) and edge.dim() == 4:
        check_float_tensor("edge", edge, "[B, 1, h, w]")
        check_size("edge", edge, 1, 1, "one boundary map per image")
        check_float_tensor("x", x, "[B, C, h, w]")
        check_size("x", x, 0, edge.shape[0], "the batch of edge")
    else:
        check_float_tensor("edge", edge, "[1, h, w]")
        check_size("edge", edge, 0, 1, "one boundary map; a batch of them is [B, 1, h, w]")
        check_float_tensor("x", x, "[C, 1, h, w]" if isinstance(x, Tensor) and x.dim() == 4 else "[C, h, w]")
    for dim, what in ((-2, "height"), (-1, "width")):
        check_size("x", x, dim, edge.shape[dim], f"the {what} of edge")
    check_same_dtype("edge", edge, "x", x)
    check_same_device("edge", edge, "x", x)
    check_int("radius", radius, 1, MAX_RADIUS)
    check_positive("beta", beta)
    check_int("exp_times", exp_times, 0, MAX_EXP_TIMES)


def check_propagate_cams(cams: Tensor, class_labels: Tensor, background: float) -> None:
    check_float_tensor("cams", cams, "[B, C, h, w]")
    check_class_labels(class_labels, cams.shape[:2], "cams", cams)
    if isinstance(background, bool) or not isinstance(background, (int, float)):
        raise TypeError(f"background must be a number, got {_describe(background)}")


def check_class_labels(class_labels: Tensor, shape: Sequence[int], scores_name: str, scores: Tensor) -> None:
    if not isinstance(class_labels, Tensor) or class_labels.shape != torch.Size(shape):
        raise ValueError(
            f"class_labels must be a tensor of shape {tuple(shape)} (batch and classes of {scores_name}; "
            f"nonzero where the class is present), got {_describe(class_labels)}"
        )
    check_same_device("class_labels", class_labels, scores_name, scores)


def check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {_describe(value)}")
    if not -float("inf") < value < float("inf"):  # also catches NaN
        raise ValueError(f"{name} must be finite, got {value}")


def check_int_tensor(name: str, value: Tensor, shape: tuple[int, ...], what: str) -> None:
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be an int64 or int32 tensor {what}, got {_describe(value)}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)} {what}, got {tuple(value.shape)}")


def _check_label_images(images: Tensor) -> None:
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        if images.dim() != 4:
            raise ValueError(f"images must have 4 dimensions [B, 3, H, W], got {_describe(images)}")
    elif isinstance(images, Tensor) and images.dtype not in FLOAT_DTYPES:
        raise TypeError(f"images must be uint8 or floating-point, got {_describe(images)}")
    else:
        check_float_tensor("images", images, "[B, 3, H, W]")
    if images.shape[1] < 1:
        raise ValueError(f"images must have at least one color channel, got shape {tuple(images.shape)}")


def _check_label_settings(
    images: Tensor,
    scores: Tensor,
    scores_name: str,
    num_classes: int,
    box: Tensor | None,
    weights: Tensor | None,
    class_index: Tensor | None,
    max_classes: int | None,
    downscale: int,
    dilations: Sequence[int],
    num_iter: int,
    w1: float,
    w2: float,
    ignore_index: int,
) -> list[int]:
    batch = scores.shape[0]
    if box is not None:
        check_int_tensor("box", box, (batch, 4), "[B, 4] of y0, y1, x0, x1")
        check_same_device("box", box, scores_name, scores)
    check_int("ignore_index", ignore_index, -(2**31), 2**31 - 1)
    if class_index is not None:
        check_int_tensor("class_index", class_index, (batch, num_classes), "[B, C]")
        check_same_device("class_index", class_index, scores_name, scores)
    elif 0 <= ignore_index <= num_classes:
        raise ValueError(f"ignore_index must differ from the labels 0 to {num_classes}, got {ignore_index}")
    if max_classes is not None:
        check_int("max_classes", max_classes, 1)
    check_int("downscale", downscale, 1)
    check_int("num_iter", num_iter, 0)
    check_positive("w1", w1)
    check_positive("w2", w2, allow_zero=True)
    offsets = check_dilations(dilations)
    if weights is not None:
        check_float_tensor("weights", weights, "[B, 8*len(dilations), h, w]")
        check_size("weights", weights, 0, batch, f"the batch of {scores_name}")
        check_size("weights", weights, 1, 8 * len(offsets), "8 neighbors per dilation")
        for dim, what in ((2, "height"), (3, "width")):
            small = max(1, images.shape[dim] // downscale)
            check_size("weights", weights, dim, small, f"the {what} of images over downscale")
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        if weights.dtype != wide:
            raise TypeError(
                f"weights must be {wide} for {scores_name} of {scores.dtype}, got {weights.dtype}; "
                f"make them from images of {wide}"
            )
        check_same_device("weights", weights, scores_name, scores)
    return offsets


def check_pseudo_labels(
    images: Tensor, cams: Tensor, class_labels: Tensor, low: float, high: float, *settings: Any
) -> list[int]:
    """``settings``: box and what follows it in `_check_label_settings`."""
    _check_label_images(images)
    check_float_tensor("cams", cams, "[B, C, H, W]")
    for dim, what in ((0, "batch"), (2, "height"), (3, "width")):
        check_size("images", images, dim, cams.shape[dim], f"the {what} of cams")
    check_same_device("images", images, "cams", cams)
    check_class_labels(class_labels, cams.shape[:2], "cams", cams)
    check_number("low", low)
    check_number("high", high)
    if high < low:
        raise ValueError(f"high must be at least low ({low}), got {high}")
    return _check_label_settings(images, cams, "cams", cams.shape[1], *settings)


def check_refine_labels(
    images: Tensor,
    scores: Tensor,
    class_labels: Tensor,
    low_scores: Tensor | None,
    box: Tensor | None,
    weights: Tensor | None,
    *settings: Any,
) -> list[int]:
    """``settings``: class_index and what follows it in `_check_label_settings`."""
    _check_label_images(images)
    check_float_tensor("scores", scores, "[B, C+1, h, w]")
    check_size("images", images, 0, scores.shape[0], "the batch of scores")
    if scores.shape[1] < 1:
        raise ValueError(f"scores must include the background map, got shape {tuple(scores.shape)}")
    if 0 in scores.shape[2:] and 0 not in images.shape[2:]:
        raise ValueError(f"scores must have at least one position, got shape {tuple(scores.shape)}")
    check_same_device("images", images, "scores", scores)
    if low_scores is not None:
        check_float_tensor("low_scores", low_scores, "[B, C+1, h, w]")
        if low_scores.shape != scores.shape:
            raise ValueError(
                f"low_scores must have shape {tuple(scores.shape)} (that of scores), got {tuple(low_scores.shape)}"
            )
        check_same_dtype("low_scores", low_scores, "scores", scores)
        check_same_device("low_scores", low_scores, "scores", scores)
    num_classes = scores.shape[1] - 1
    check_class_labels(class_labels, (scores.shape[0], num_classes), "scores", scores)
    if weights is not None and box is not None:
        raise ValueError("weights must be None if box is given: each box has its own weights")
    return _check_label_settings(images, scores, "scores", num_classes, box, weights, *settings)


def check_affinity_from_attention(
    attention: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int] | None, radius: int | None
) -> tuple[int, int]:
    """Returns the grid; without one, a grid of one row with all nodes."""
    check_float_tensor("attention", attention, "[B, K, N, N]")
    _, maps, nodes, columns = attention.shape
    if nodes != columns:
        raise ValueError(
            f"attention must be square in its last two dimensions [B, K, N, N], got shape {tuple(attention.shape)}"
        )
    if maps < 1:
        raise ValueError(f"attention must have at least one map, got shape {tuple(attention.shape)}")
    for name, value, shapes, layout in (
        ("weight", weight, ((maps,), (1, maps, 1, 1)), "[K] or [1, K, 1, 1]"),
        ("bias", bias, ((1,), ()), "[1] or []"),
    ):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor {layout}, got {_describe(value)}")
        if tuple(value.shape) not in shapes:
            raise ValueError(f"{name} must have shape {layout} with K = {maps}, got {_describe(value)}")
        check_same_dtype(name, value, "attention", attention)
        check_same_device(name, value, "attention", attention)
    if grid is None:
        if radius is not None:
            raise ValueError("radius needs grid, the two sizes (h, w) of the token grid, got None")
        return 1, nodes
    check_grid(grid)
    for size in grid:
        check_int("grid's sizes", size, 0)
    if grid[0] * grid[1] != nodes:
        raise ValueError(f"grid must have h*w = {nodes} (N of attention), got {tuple(grid)}")
    if radius is not None:
        check_int("radius", radius, 0, MAX_RADIUS)
    return grid[0], grid[1]


def check_affinity_labels(
    label_map: Tensor,
    stride: int,
    radius: int,
    ignore_index: int,
    windowed: bool,
    offset: int,
    background: int | None,
) -> None:
    if not isinstance(label_map, Tensor):
        raise TypeError(f"label_map must be an integer tensor [B, H, W], got {_describe(label_map)}")
    if label_map.dim() != 3:
        raise ValueError(f"label_map must have 3 dimensions [B, H, W], got {_describe(label_map)}")
    if label_map.dtype not in LABEL_DTYPES:
        raise TypeError(f"label_map must be uint8, int16, int32 or int64, got {_describe(label_map)}")
    check_int("stride", stride, 1)
    check_int("radius", radius, 0, MAX_RADIUS)
    check_int("ignore_index", ignore_index, -(2**63), 2**63 - 1)
    if not isinstance(windowed, bool):
        raise TypeError(f"windowed must be True or False, got {_describe(windowed)}")
    check_int("offset", offset, 0, stride - 1)
    if background is not None:
        check_int("background", background, -(2**63), 2**63 - 1)


def check_affinity_loss(
    affinity: Tensor, labels: Tensor, weights: Sequence[float], counts: Tensor | None
) -> tuple[float, float, float]:
    """The three weights as numbers."""
    if not isinstance(affinity, Tensor) or affinity.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"affinity must be a float32, float16, bfloat16 or float64 tensor of any shape, got {_describe(affinity)}"
        )
    if not isinstance(labels, Tensor) or labels.dtype != torch.uint8:
        raise TypeError(f"labels must be a uint8 tensor of the shape of affinity, got {_describe(labels)}")
    if labels.shape != affinity.shape:
        raise ValueError(f"labels must have the shape of affinity {tuple(affinity.shape)}, got {tuple(labels.shape)}")
    check_same_device("labels", labels, "affinity", affinity)
    if counts is not None:
        if not isinstance(counts, Tensor) or counts.dtype != torch.int64:
            raise TypeError(f"counts must be an int64 tensor [3], got {_describe(counts)}")
        if counts.shape != (3,):
            raise ValueError(f"counts must have shape [3], got {tuple(counts.shape)}")
        check_same_device("counts", counts, "affinity", affinity)
    if isinstance(weights, str | Tensor) or not isinstance(weights, Sequence) or len(weights) != 3:
        raise ValueError(f"weights must be three numbers (different, same, same foreground), got {weights!r}")
    for weight in weights:
        check_number("weights", weight)
    different, same, foreground = (float(weight) for weight in weights)
    if min(different, same, foreground) < 0:
        raise ValueError(f"weights must be at least 0, got {weights!r}")
    return different, same, foreground


MAX_FEATURES = 6


def check_sigmas(sigma_xy: float, sigma_rgb: float) -> None:
    check_positive("sigma_xy", sigma_xy)
    check_positive("sigma_rgb", sigma_rgb)


def check_color_images(images: Tensor, name: str, values: Tensor) -> None:
    """uint8 or floating-point [B, 3, H, W], of the batch, size and device of ``values`` [B, C, H, W]."""
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise TypeError(f"images must be a tensor [B, 3, H, W], got {_describe(images)}")
    if images.dtype != torch.uint8 and images.dtype not in FLOAT_DTYPES:
        raise TypeError(f"images must be uint8 or floating-point, got {_describe(images)}")
    check_size("images", images, 1, 3, "red, green and blue")
    for dim, what in ((0, "batch"), (2, "height"), (3, "width")):
        check_size("images", images, dim, values.shape[dim], f"the {what} of {name}")
    check_same_device("images", images, name, values)


def check_bilateral_filter(
    values: Tensor,
    features: Tensor | None,
    images: Tensor | None,
    sigma_xy: float | None,
    sigma_rgb: float | None,
    normalize: str | None,
) -> None:
    check_float_tensor("values", values, "[B, C, H, W]")
    check_choice("normalize", normalize, (None, "symmetric", "before", "after"))
    if (features is None) == (images is None):
        raise TypeError("bilateral_filter takes either features or images, got both or neither")
    if images is not None:
        if sigma_xy is None or sigma_rgb is None:
            raise TypeError("images need sigma_xy and sigma_rgb")
        check_color_images(images, "values", values)
        check_sigmas(sigma_xy, sigma_rgb)
        check_no_grad("images", images)
        return
    if sigma_xy is not None or sigma_rgb is not None:
        raise TypeError("sigma_xy and sigma_rgb belong to images; divide features by their standard deviations")
    assert features is not None
    check_float_tensor("features", features, "[B, D, H, W]")
    if not 1 <= features.shape[1] <= MAX_FEATURES:
        raise ValueError(f"features must have 1 to {MAX_FEATURES} dimensions, got shape {tuple(features.shape)}")
    for dim, what in ((0, "batch"), (2, "height"), (3, "width")):
        check_size("features", features, dim, values.shape[dim], f"the {what} of values")
    check_same_device("features", features, "values", values)
    check_no_grad("features", features)


def _check_kernel(name: str, value: Sequence[float], parts: Sequence[str]) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != len(parts):
        raise TypeError(f"{name} must be ({', '.join(parts)}), got {_describe(value)}")
    for part, number in zip(parts, value, strict=True):
        check_positive(f"{name}'s {part}", number, allow_zero=part == "weight")


def check_dense_crf(
    images: Tensor,
    probabilities: Tensor | None,
    unaries: Tensor | None,
    num_iter: int,
    gaussian: Sequence[float],
    bilateral: Sequence[float],
    compat: str | Tensor,
    class_mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The scores, and the compatibility matrix if there is one."""
    if (probabilities is None) == (unaries is None):
        raise TypeError("dense_crf takes either probabilities or unaries, got both or neither")
    name = "unaries" if probabilities is None else "probabilities"
    scores = unaries if probabilities is None else probabilities
    assert scores is not None
    check_float_tensor(name, scores, "[B, C, H, W]")
    check_color_images(images, name, scores)
    check_no_grad(name, scores)
    check_no_grad("images", images)
    check_int("num_iter", num_iter, 0)
    _check_kernel("gaussian", gaussian, ("sigma_xy", "weight"))
    _check_kernel("bilateral", bilateral, ("sigma_xy", "sigma_rgb", "weight"))
    if class_mask is not None:
        if not isinstance(class_mask, Tensor) or class_mask.dtype != torch.bool:
            raise TypeError(f"class_mask must be a bool tensor [B, C], got {_describe(class_mask)}")
        if class_mask.shape != scores.shape[:2]:
            raise ValueError(
                f"class_mask must have shape {tuple(scores.shape[:2])} (the batch and classes of {name}), "
                f"got {tuple(class_mask.shape)}"
            )
        check_same_device("class_mask", class_mask, name, scores)
    if isinstance(compat, str):
        check_choice("compat", compat, ("potts",))
        return scores, None
    if not isinstance(compat, Tensor) or not compat.is_floating_point():
        raise TypeError(f'compat must be "potts" or a floating-point tensor [C, C], got {_describe(compat)}')
    if tuple(compat.shape) != (scores.shape[1], scores.shape[1]):
        raise ValueError(
            f"compat must have shape {(scores.shape[1], scores.shape[1])} (classes of {name}), "
            f"got {tuple(compat.shape)}"
        )
    check_same_device("compat", compat, name, scores)
    check_no_grad("compat", compat)
    return scores, compat


def check_dense_energy_loss(
    images: Tensor,
    probabilities: Tensor,
    sigma_rgb: float,
    sigma_xy: float,
    weight: float,
    regions: Tensor | None,
    gate: Tensor | None,
) -> None:
    check_float_tensor("probabilities", probabilities, "[B, C, H, W]")
    check_color_images(images, "probabilities", probabilities)
    check_no_grad("images", images)
    check_sigmas(sigma_xy, sigma_rgb)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"weight must be a number, got {_describe(weight)}")
    batch, _, height, width = probabilities.shape
    for name, value in (("regions", regions), ("gate", gate)):
        if value is None:
            continue
        if not isinstance(value, Tensor) or tuple(value.shape) != (batch, height, width):
            raise ValueError(f"{name} must have shape {(batch, height, width)} [B, H, W], got {_describe(value)}")
        check_same_device(name, value, "probabilities", probabilities)
