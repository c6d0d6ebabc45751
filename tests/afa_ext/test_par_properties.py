"""What holds for PAR and PAMR whatever the image: checked on images and masks drawn by hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import afa_ext

FAST = settings(derandomize=True, max_examples=25, deadline=None)
KINDS = pytest.mark.parametrize("kind", ["par", "pamr"])
DILATIONS = st.lists(st.integers(1, 30), min_size=1, max_size=4)


def affinity(kind, images, dilations):
    return getattr(afa_ext, f"{kind}_affinity")(images, dilations=dilations)


@st.composite
def images(draw, dtype=torch.float64, flat=True):
    """[B, C, H, W] of any small size, in [0, 1], in part flat where `flat`."""
    shape = [draw(st.integers(1, most)) for most in (2, 4, 9, 37)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.rand(*shape, dtype=torch.float64, generator=generator)
    levels = draw(st.sampled_from([2, 5, 256, 10**9] if flat else [10**9]))
    return ((values * levels).floor() / levels).to(dtype)


@FAST
@given(images(torch.float32), DILATIONS, st.sampled_from([0.0, 0.01, 0.3]))
def test_weights_sum_to_one_plus_w2(device, image, dilations, w2):
    image = image.to(device)
    weights = afa_ext.par_affinity(image, dilations=dilations, w2=w2)
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(1), torch.full_like(weights[:, 0], 1 + w2), rtol=3e-6, atol=0)


@FAST
@given(images(torch.float32), DILATIONS)
def test_weights_of_pamr_sum_to_one(device, image, dilations):
    image = image.to(device)
    weights = afa_ext.pamr_affinity(image, dilations=dilations)
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]), rtol=3e-6, atol=0)


@KINDS
@FAST
@given(
    # Where the neighbours of one pixel are all equal and it is not, logits of 1e15 leave no digits to compare.
    image=images(flat=False),
    dilations=DILATIONS,
    gain=st.floats(0.1, 10).flatmap(lambda g: st.sampled_from([g, -g])),
    offset=st.floats(-5, 5),
)
def test_affine_change_of_a_channel_changes_nothing(device, kind, image, dilations, gain, offset):
    image = image.to(device)
    changed = image.clone()
    changed[:, 0] = changed[:, 0] * gain + offset
    # The epsilon beside sigma, 1e-8, is no longer the same share of it, nor is the rounding: sigma is over 1e-3.
    torch.testing.assert_close(
        affinity(kind, changed, dilations), affinity(kind, image, dilations), rtol=2e-3, atol=1e-12
    )


@KINDS
@FAST
@given(image=images(), dilations=DILATIONS, a=st.floats(-3, 3), b=st.floats(-3, 3), steps=st.integers(0, 4))
def test_linear_in_the_masks(device, kind, image, dilations, a, b, steps):
    image = image.to(device)
    weights = affinity(kind, image, dilations)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, *image.shape, dtype=image.dtype, generator=generator).to(device)

    def propagate(masks):
        return afa_ext.par_propagate(weights, masks, dilations=dilations, num_iter=steps)

    torch.testing.assert_close(
        propagate(a * first + b * second), a * propagate(first) + b * propagate(second), rtol=1e-9, atol=1e-9
    )


@FAST
@given(images(), DILATIONS, st.integers(0, 12), st.floats(0, 0.2), st.floats(-2, 2))
def test_a_constant_grows_by_one_plus_w2_an_iteration(device, image, dilations, steps, w2, value):
    image = image.to(device)
    masks = torch.full_like(image[:, :1], value)
    out = afa_ext.par_refine(image, masks, dilations=dilations, num_iter=steps, w2=w2)
    torch.testing.assert_close(out, masks * (1 + w2) ** steps, rtol=1e-12, atol=1e-12)


@FAST
@given(images(), DILATIONS, st.integers(0, 12), st.floats(-2, 2))
def test_pamr_keeps_a_constant(device, image, dilations, steps, value):
    image = image.to(device)
    masks = torch.full_like(image[:, :1], value)
    out = afa_ext.pamr_refine(image, masks, dilations=dilations, num_iter=steps)
    torch.testing.assert_close(out, masks, rtol=1e-12, atol=1e-12)


@FAST
@given(images(), DILATIONS, st.integers(1, 6))
def test_pamr_keeps_the_range_of_the_masks(device, image, dilations, steps):
    image = image.to(device)
    masks = torch.rand(image.shape, dtype=image.dtype, generator=torch.Generator().manual_seed(0)).to(device)
    out = afa_ext.pamr_refine(image, masks, dilations=dilations, num_iter=steps)
    assert float(out.max()) <= float(masks.max()) + 1e-12
    assert float(out.min()) >= float(masks.min()) - 1e-12


@KINDS
@FAST
@given(
    colours=st.lists(st.floats(0, 255, width=32), min_size=1, max_size=4),
    size=st.tuples(st.integers(1, 9), st.integers(1, 37)),
    dilations=DILATIONS,
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_flat_neighbourhood_gives_uniform_colour_weights(device, kind, colours, size, dilations, dtype):
    image = torch.tensor(colours, dtype=dtype, device=device)[None, :, None, None].expand(1, -1, *size)
    settings = {"w2": 0.0} if kind == "par" else {}
    weights = getattr(afa_ext, f"{kind}_affinity")(image, dilations=dilations, **settings)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / weights.shape[1]), rtol=1e-6, atol=0)


@KINDS
@FAST
@given(image=images(), dilations=DILATIONS)
def test_mirroring_the_image_mirrors_the_result(device, kind, image, dilations):
    image = image.to(device)
    masks = torch.rand(image.shape, dtype=image.dtype, generator=torch.Generator().manual_seed(0)).to(device)
    refine = getattr(afa_ext, f"{kind}_refine")
    for dims in ([2], [3], [2, 3]):
        mirrored = refine(image.flip(dims), masks.flip(dims), dilations=dilations, num_iter=2)
        expected = refine(image, masks, dilations=dilations, num_iter=2).flip(dims)
        torch.testing.assert_close(mirrored, expected, rtol=1e-9, atol=1e-9)
