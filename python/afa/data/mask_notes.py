"""What a user should know of the masks that an evaluation counts: a score that counts nothing looks perfect."""

from __future__ import annotations

from collections.abc import Sequence

MOSTLY = 0.5
"""Share of ignored pixels above which it is said."""


def mask_notes(pixels: Sequence[int], ignored: int, classes: Sequence[str]) -> list[str]:
    """One sentence for each thing that makes the scores say less than they seem to.

    pixels: of background and of each class, over all masks. ignored: pixels of value 255.
    """
    total = sum(pixels) + ignored
    if total == 0:
        return []
    notes = []
    absent = [name for name, count in zip(classes, pixels[1:], strict=True) if count == 0]
    if len(absent) == len(classes):
        hint = (
            f", and {ignored / total:.0%} of the pixels are 255, which means ignored and is never counted: in a mask "
            "of black and white, write the class number (1) in place of 255"
            if ignored
            else ""
        )
        notes.append(f"no mask holds any class, so the scores are those of the background only{hint}")
    elif absent:
        shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        notes.append(f"no mask holds {shown}: the scores don't count {'them' if len(absent) > 1 else 'it'}")
    if ignored / total > MOSTLY and len(absent) < len(classes):
        notes.append(f"{ignored / total:.0%} of the pixels of the masks are 255 (ignored): the scores count the rest")
    return notes
