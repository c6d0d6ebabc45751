"""Readers: each reads the images, tags and masks of one folder layout.

To add a layout, write a module with a function (root, split) -> TaggedPictures and call it in `read_tagged`.
"""

from pathlib import Path

from afa.data.readers.common import TaggedPictures
from afa.data.readers.own import is_own_folder, read_own_split
from afa.data.readers.voc import read_voc_split

__all__ = ["TaggedPictures", "is_own_folder", "read_tagged"]


def read_tagged(root: Path, split: str) -> TaggedPictures:
    """Read a split of a folder, detecting whether it is in VOC layout or contains the user's own images."""
    return read_own_split(root, split) if is_own_folder(root) else read_voc_split(root, split)
