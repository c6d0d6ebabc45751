"""The window of a random walk: the nodes of the grid that each node is paired with."""

from __future__ import annotations

from ._checks import check_window

__all__ = ["window_offsets"]


def window_offsets(radius: int, window: str = "square") -> list[tuple[int, int]]:
    """Offsets (dy, dx) of a random walk's window, in row-major order.

    ``"square"``: the (2*radius+1)**2 offsets within Chebyshev distance ``radius`` (AFA); ``"disc"``: the offsets with
    dy**2 + dx**2 < radius**2 (PSA, IRN). Entry [b, i, k] of a windowed affinity [B, N, window] is the affinity from
    node i to node i + offset k; entries whose target is outside the grid are never read.

    Raises:
        TypeError, ValueError: ``radius`` is not an integer in [0, 63] (disc: [1, 63]), or ``window`` is unknown.
    """
    check_window(radius, window)
    span = range(-radius, radius + 1)
    return [(dy, dx) for dy in span for dx in span if window == "square" or dy * dy + dx * dx < radius * radius]
