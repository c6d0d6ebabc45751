"""The result type of all readers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class TaggedPictures:
    """The images of one split with their tags, and all masks of the folder. No file has been decoded."""

    classes: list[str]
    """Foreground classes in index order: class i of a mask is `classes[i - 1]`."""
    names: list[str]
    paths: list[Path]
    tags: Tensor
    """float32 [len(names), len(classes)], 1 if the image has the tag."""
    masks: Mapping[str, Path]
    """Name -> mask, including images outside the split."""
    mask_folder: Path
    """The primary folder of masks."""
    notes: list[str] = field(default_factory=list)
    """Notes about the folder for the user, one sentence each."""
