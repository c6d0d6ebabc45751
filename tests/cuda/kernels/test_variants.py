"""Every variant of each CUDA kernel, run on the CPU and compared with the CPU kernels; tiles don't divide the sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from afa_ext import _native

from .test_kernels import D6, DTYPES, LIMITS, NATIVE

VARIANTS = _native._C.kernel_variants()
Calls = list[tuple[str, tuple[Any, ...]]]


def stencil_calls(dtype: torch.dtype) -> Calls:
    """Steps and both backward passes of walks, and of PAR with non-default dilations: small and odd sizes, few and many
    classes, some of them inactive."""
    calls: Calls = []
    for shape in ((1, 1, 1, 1), (2, 5, 9, 37), (1, 23, 35, 5), (3, 9, 17, 13)):
        batch, classes, height, width = shape
        keep = torch.rand(batch, classes) > 0.4
        planes, grad = (t.to(dtype) for t in torch.rand(2, *shape))
        for size, *rest in ((9, 2, "disc", 2, keep), (49, 3, "square", 1, None), (16, [3, 40], 3, keep)):
            weights = torch.softmax(torch.rand(batch, size, height, width), 1).to(dtype)
            if size == 16:
                calls.append(("par_propagate", (weights, planes, *rest)))
                calls.append(("par_propagate_backward_masks", (grad, weights, *rest)))
                calls.append(("par_propagate_backward_weights", (grad, weights, planes, *rest)))
            else:
                calls.append(("walk_propagate", (planes, weights, *rest)))
                calls.append(("walk_propagate_backward_scores", (grad, weights, *rest)))
                calls.append(("walk_propagate_backward_transition", (grad, planes, weights, *rest)))
    return calls


def ring_calls(dtype: torch.dtype) -> Calls:
    """Steps of PAR with its default dilations: aligned and unaligned rows, several tiles per image."""
    calls: Calls = []
    for shape, steps, some in (((1, 1, 1, 1), 1, False), ((2, 3, 9, 37), 3, True), ((1, 2, 35, 36), 2, False)):
        batch, classes, height, width = shape
        keep = torch.arange(batch * classes).view(batch, classes) % 3 != 1 if some else None
        masks = torch.rand(*shape).to(dtype)
        weights = torch.softmax(torch.rand(batch, 48, height, width), 1).to(dtype)
        calls.append(("par_propagate", (weights, masks, D6, steps, keep)))
    return calls


def walk_step_calls(dtype: torch.dtype) -> Calls:
    """walk_step on grids whose width is or isn't a multiple of four, narrow or wider than a block's tile; more classes
    than one pass processes; windows larger than the grid, disc rows of different lengths; every layout and power."""
    calls: Calls = []
    settings: list[tuple[Any, ...]] = [
        ((8, 12), 21, 3, "square", 2.0, True),
        ((5, 70), 5, 4, "disc", 1.0, True),
        ((3, 68), 34, 5, "disc", 3.0, False),
        ((7, 9), 3, 8, "square", 1.5, True),
        ((4, 3), 8, 13, "disc", 2.0, True),
        ((1, 1), 1, 2, "square", 1.0, True),
        ((2, 17), 2, 40, "square", 2.0, False),
    ]
    for grid, classes, radius, window, power, normalize in settings:
        nodes, out = grid[0] * grid[1], torch.float64 if dtype == torch.float64 else torch.float32
        args = (radius, window, 1.0, False, 0.0)
        offsets = NATIVE.walk_transition(torch.rand(1, nodes, nodes), *grid, *args).shape[1]
        scores, keep = torch.rand(2, classes, *grid, dtype=out), torch.rand(2, classes) > 0.4
        windowed = torch.rand(2, nodes, offsets).to(dtype)
        for affinity in (torch.rand(2, nodes, nodes).to(dtype), windowed, windowed.mT.contiguous().mT):
            for mask in (None, keep):
                calls.append(("walk_step", (scores, affinity, radius, window, power, normalize, 0.01, mask)))
    return calls


def affinity_calls(dtype: torch.dtype) -> Calls:
    """affinity_from_attention with row lengths that are, and that are not, multiples of the vector length."""
    calls: Calls = []
    for grid, maps in (((1, 1), 3), ((5, 7), 5), ((6, 8), 16), ((3, 24), 7)):
        nodes = grid[0] * grid[1]
        attention = torch.randn(2, maps, nodes, nodes).to(dtype)
        weight, bias = (torch.randn(maps) / 4).to(dtype), torch.randn(1).to(dtype)
        for layout in ((None, False), (2, True), (2, False)):
            calls.append(("affinity_from_attention", (attention, weight, bias, *grid, *layout)))
    return calls


# Kernel -> calls that launch it: operator and arguments.
CALLS: dict[str, Callable[[torch.dtype], Calls]] = {
    "par_ring": ring_calls,
    "stencil": stencil_calls,
    "walk_step": walk_step_calls,
    "affinity": affinity_calls,
}


def test_every_kernel_with_variants_has_calls():
    assert {entry["kernel"] for entry in VARIANTS} == set(CALLS)


@DTYPES
@pytest.mark.parametrize(
    ("kernel", "variant"), [(entry["kernel"], variant) for entry in VARIANTS for variant in entry["variants"]]
)
def test_variant(kernel, variant, dtype, kernels, assert_relative):
    for operator, arguments in CALLS[kernel](dtype):
        expected = getattr(NATIVE, operator)(*arguments)
        with kernels.forced(kernel, variant):
            actual = getattr(kernels, operator)(*arguments)
        assert actual.dtype == expected.dtype
        assert_relative(actual, expected, LIMITS[dtype])


def test_an_unknown_variant_cannot_be_forced(kernels):
    with (
        pytest.raises(ValueError, match="variant must be one of"),
        kernels.forced(VARIANTS[0]["kernel"], "no_such_variant"),
    ):
        pass
