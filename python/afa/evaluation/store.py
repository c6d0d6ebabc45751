"""Label maps of a running evaluation, one small PNG per image, so that an interrupted evaluation can resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from afa.config import Config, to_dict
from afa.evaluation.diagnostics import ImageCounts
from afa.files import atomic_path, remove_tree, sha256

_FORMAT = 2
_IRRELEVANT = ("batch_size", "report_images")


class EvalStore:
    """Folder of one evaluation. Files of other models or settings are deleted.

    Each PNG contains the label maps of all rows, stacked vertically, and a text chunk with the names of the rows, the
    predicted classes and the counts of the diagnostics.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder = Path(folder) / key

    def done(self) -> set[str]:
        """Names of the images with complete files."""
        if self.folder.parent.is_dir():
            for other in self.folder.parent.iterdir():
                if other != self.folder:
                    remove_tree(other)
        # A name can contain folders.
        files = (path for path in self.folder.rglob("*.png") if not path.name.startswith("."))
        names = {path.relative_to(self.folder).as_posix()[: -len(".png")] for path in files}
        return {name for name in names if self._whole(name)}

    def save(
        self,
        name: str,
        planes: Mapping[str, NDArray[np.uint8]],
        found: Sequence[int],
        counts: ImageCounts | None = None,
    ) -> None:
        """Save an image's label maps [H, W] by row, the class indices that the classifier predicted, and the counts of
        its diagnostics."""
        about = PngInfo()
        content = {"rows": list(planes), "found": list(found), "counts": counts}
        about.add_text("afa", json.dumps(content), zip=True)
        with atomic_path(self.folder / f"{name}.png") as temporary:
            Image.fromarray(np.concatenate(list(planes.values()))).save(temporary, pnginfo=about)

    def load(self, name: str) -> tuple[dict[str, NDArray[np.uint8]], list[int], ImageCounts | None]:
        """Return the arguments of `save`."""
        with Image.open(self.folder / f"{name}.png") as image:
            image.load()
            about = json.loads(image.info["afa"])
            planes = np.split(np.array(image), len(about["rows"]))
        return dict(zip(about["rows"], planes, strict=True)), about["found"], about["counts"]

    def clear(self) -> None:
        """Delete everything after a complete evaluation, so that the next one starts from scratch."""
        remove_tree(self.folder.parent)

    def _whole(self, name: str) -> bool:
        try:
            self.load(name)
        except (OSError, ValueError, KeyError, SyntaxError):
            return False
        return True


def evaluation_key(model: str | Path, config: Config) -> str:
    """Hash of everything the results depend on: weights, data and settings."""
    content = to_dict(config)
    settings = {
        "format": _FORMAT,
        "data": [str(Path(config.data.root).resolve()), config.data.val_split, config.data.largest_side],
        "labels": content["labels"],
        "eval": {name: value for name, value in content["eval"].items() if name not in _IRRELEVANT},
        "precision": config.train.precision,
    }
    return hashlib.sha256(json.dumps([settings, weights_id(model)], sort_keys=True).encode()).hexdigest()[:16]


def weights_id(model: str | Path) -> str:
    """Identifier of a model file, computed from its content."""
    return sha256(model)[:16]
