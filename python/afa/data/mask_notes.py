"""Warnings about validation masks that make the scores misleading."""

from __future__ import annotations

from collections.abc import Sequence

MOSTLY = 0.5
"""Warn if the share of ignored pixels is above this."""


def mask_notes(pixels: Sequence[int], ignored: int, classes: Sequence[str]) -> list[str]:
    """Return one sentence per problem that makes the scores misleading.

    pixels: counts of background and of each class, over all masks. ignored: number of pixels with value 255.
    """
    total = sum(pixels) + ignored
    if total == 0:
        return []
    notes = []
    absent = [name for name, count in zip(classes, pixels[1:], strict=True) if count == 0]
    if len(absent) == len(classes):
        hint = (
            f", and {ignored / total:.0%} of the pixels are 255, which means ignored: in a black-and-white mask, use "
            "the class index (1) instead of 255"
            if ignored
            else ""
        )
        notes.append(f"no mask contains any class, so the scores are for the background only{hint}")
    elif absent:
        shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        notes.append(f"no mask contains {shown}: the scores leave {'them' if len(absent) > 1 else 'it'} out")
    if ignored / total > MOSTLY and len(absent) < len(classes):
        notes.append(f"{ignored / total:.0%} of the mask pixels are 255 (ignored): the scores use only the rest")
    return notes
