"""Labels of a few training images at the end of each phase: how pseudo labels and segmentation grow, for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from afa.config import Config
from afa.data import TaggedDataset
from afa.data.transforms import read_image
from afa.errors import UserError
from afa.evaluate import segment
from afa.files import atomic_path
from afa.model.network import AFANet
from afa.pseudo_labels import make_labels
from afa.training.schedule import phase_of

FOLDER = "snapshots"
_LONGEST = 320
"""Pixels of a kept picture's longer side: what the report shows."""
_ABOUT = ("name", "tags", "phase")
_ARRAYS = ("image", "cam", "par", "walk", "prediction")

Snapshot = dict[str, Any]


@torch.no_grad()
def snapshot(
    model: AFANet, dataset: TaggedDataset, config: Config, run: str | Path, iteration: int, *, count: int = 4
) -> Path:
    """Write run/snapshots/<iteration>.npz: image, CAM, PAR label, walk label and segmentation of `count` images spread
    evenly over `dataset` (a training set will do: no mask is opened). Returns its path.

    Draws no random number and leaves the model in the mode it was in, so training goes on as without it. An image that
    can't be read is left out.
    """
    device = next(model.parameters()).device
    phase = phase_of(config.train, iteration - 1)
    was_training = model.training
    model.eval()
    about: list[dict[str, Any]] = []
    arrays: dict[str, NDArray[Any]] = {}
    try:
        for number in sorted({round((i + 0.5) * len(dataset) / count - 0.5) for i in range(min(count, len(dataset)))}):
            try:
                picture = np.asarray(read_image(dataset.paths[number], dataset.largest_side))
            except UserError:
                continue
            pixels = torch.from_numpy(picture.transpose(2, 0, 1).copy())[None].to(device)
            labels = make_labels(model, pixels, dataset.tags[number][None], config, ("par", "walk"))
            maps = {
                "image": picture,
                "cam": (255 * labels.cams[0].amax(0)).cpu().numpy(),
                "par": labels.maps["par"][0].cpu().numpy(),
                "walk": labels.maps["walk"][0].cpu().numpy(),
                "prediction": segment(model, pixels, config)[0].argmax(0).cpu().numpy(),
            }
            for key, values in maps.items():
                arrays[f"{len(about)}_{key}"] = _small(values.astype(np.uint8), smooth=key in ("image", "cam"))
            tags = [dataset.classes[index] for index in dataset.tags[number].nonzero()[:, 0].tolist()]
            about.append({"name": dataset.names[number], "tags": tags, "phase": phase})
    finally:
        model.train(was_training)
    path = Path(run) / FOLDER / f"{iteration:08d}.npz"
    with atomic_path(path) as temporary:
        arrays["about"] = np.array(json.dumps(about))
        np.savez_compressed(temporary, allow_pickle=False, **arrays)
    return path


def load_snapshots(run: str | Path) -> dict[int, list[Snapshot]]:
    """Iteration -> its images in order: name, tags, phase (that the iteration ends), image uint8 [H,W,3], cam float
    [H,W], par, walk and prediction uint8 [H,W]. Empty when the run has none; a damaged file is passed over."""
    found: dict[int, list[Snapshot]] = {}
    for path in sorted((Path(run) / FOLDER).glob("[0-9]*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                items = [
                    {key: about[key] for key in _ABOUT} | {key: file[f"{i}_{key}"] for key in _ARRAYS}
                    for i, about in enumerate(json.loads(str(file["about"])))
                ]
        except (OSError, ValueError, KeyError):
            continue
        found[int(path.stem)] = [{**item, "cam": item["cam"] / 255} for item in items]
    return found


def _small(values: NDArray[np.uint8], *, smooth: bool) -> NDArray[np.uint8]:
    image = Image.fromarray(values)
    factor = _LONGEST / max(image.size)
    if factor >= 1:
        return values
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST))
