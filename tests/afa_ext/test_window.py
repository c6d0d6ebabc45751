from __future__ import annotations

import pytest

import afa_ext
from afa_ext import _checks, reference


def test_window_offsets():
    assert afa_ext.window_offsets(1) == [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    assert afa_ext.window_offsets(0) == [(0, 0)]
    assert afa_ext.window_offsets(2, "disc") == [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    disc = afa_ext.window_offsets(5, "disc")
    assert len(disc) == 69
    assert disc[0] == (-4, -2)
    assert disc == sorted(disc)


@pytest.mark.parametrize("window", ["square", "disc"])
@pytest.mark.parametrize("radius", [1, 2, 5, 8, 63])
def test_matches_reference(window, radius):
    offsets = afa_ext.window_offsets(radius, window)
    assert offsets == reference.window_offsets(radius, window)
    assert _checks._window_size(radius, window) == len(offsets)
