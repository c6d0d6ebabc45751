"""What every reader gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class TaggedPictures:
    """The pictures of one split with their tags, and all masks of the folder. Nothing has been decoded."""

    classes: list[str]
    """Foreground classes in the order of their numbers: class i of a mask is `classes[i - 1]`."""
    names: list[str]
    paths: list[Path]
    tags: Tensor
    """float32 [len(names), len(classes)], 1 where the picture shows the class."""
    masks: Mapping[str, Path]
    """Name -> mask, also of pictures outside the split."""
    mask_folder: Path
    """Where masks are looked for first."""
    notes: list[str] = field(default_factory=list)
    """What a user should know of the folder, one sentence each."""
