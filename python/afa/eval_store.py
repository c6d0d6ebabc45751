"""Label maps of an evaluation under way, one small PNG an image, so that a killed evaluation goes on where it was."""

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
from afa.files import atomic_path, remove_tree, sha256

_FORMAT = 1
_IRRELEVANT = ("batch_size", "report_images", "crf_workers")


class EvalStore:
    """Folder of one evaluation: what another model or other settings left there is thrown away.

    A file holds the rows' label maps one below the other, and as text the rows' names and the classes found.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder = Path(folder) / key

    def done(self) -> set[str]:
        """Names of the images that are whole."""
        if self.folder.parent.is_dir():
            for other in self.folder.parent.iterdir():
                if other != self.folder:
                    remove_tree(other)
        # A name may have folders in it.
        files = (path for path in self.folder.rglob("*.png") if not path.name.startswith("."))
        names = {path.relative_to(self.folder).as_posix()[: -len(".png")] for path in files}
        return {name for name in names if self._whole(name)}

    def save(self, name: str, planes: Mapping[str, NDArray[np.uint8]], found: Sequence[int]) -> None:
        """Keep an image's label maps [H, W] by row, and the class numbers its classifier found."""
        about = PngInfo()
        about.add_text("afa", json.dumps({"rows": list(planes), "found": list(found)}))
        with atomic_path(self.folder / f"{name}.png") as temporary:
            Image.fromarray(np.concatenate(list(planes.values()))).save(temporary, pnginfo=about)

    def load(self, name: str) -> tuple[dict[str, NDArray[np.uint8]], list[int]]:
        """What `save` was given."""
        with Image.open(self.folder / f"{name}.png") as image:
            image.load()
            about = json.loads(image.info["afa"])
            planes = np.split(np.array(image), len(about["rows"]))
        return dict(zip(about["rows"], planes, strict=True)), about["found"]

    def clear(self) -> None:
        """Remove everything: the evaluation is complete, and a later one measures anew."""
        remove_tree(self.folder.parent)

    def _whole(self, name: str) -> bool:
        try:
            self.load(name)
        except (OSError, ValueError, KeyError, SyntaxError):
            return False
        return True


def evaluation_key(model: str | Path, config: Config) -> str:
    """Names an evaluation by all that its results depend on: the weights, the data and the settings."""
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
    """Tells one model file from another by its content."""
    return sha256(model)[:16]
