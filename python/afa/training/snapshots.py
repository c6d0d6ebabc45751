"""Snapshots of the labels of a few training images at the end of each phase, for the report."""

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
from afa.files import atomic_path
from afa.labeling.cam import pack_host_tags
from afa.labeling.inference import infer
from afa.labeling.label_maker import LabelMaker
from afa.model.network import AFANet
from afa.run import SNAPSHOTS
from afa.training.schedule import phase_of

_LONGEST = 320
"""Maximum longer side of a saved image in pixels, as shown in the report."""
_ABOUT = ("name", "tags", "phase")
_ARRAYS = ("image", "cam", "par", "walk", "prediction")

Snapshot = dict[str, Any]


@torch.no_grad()
def snapshot(
    model: AFANet, dataset: TaggedDataset, config: Config, run: str | Path, iteration: int, *, count: int = 4
) -> Path:
    """Write run/snapshots/<iteration>.npz and return its path.

    The file contains image, CAM, PAR label, walk label and segmentation of `count` evenly spaced images of `dataset`.
    No masks are read. Uses no random numbers and restores the mode of the model, so training is not affected. Images
    that can't be read are skipped.
    """
    device = next(model.parameters()).device
    maker = LabelMaker.for_training(config)
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
            found = infer(model, pixels, config, {"cam", "seg"}, affinity_scale=maker.walk_scale)
            assert found.seg_logits is not None
            classes = pack_host_tags(dataset.tags[number][None], device)
            labels, cams = maker.from_outputs(pixels, found.outputs, classes, ("par", "walk"))
            maps = {
                "image": picture,
                "cam": (255 * cams[0].amax(0)).cpu().numpy(),
                "par": labels["par"][0].cpu().numpy(),
                "walk": labels["walk"][0].cpu().numpy(),
                "prediction": found.seg_logits[0].argmax(0).cpu().numpy(),
            }
            for key, values in maps.items():
                arrays[f"{len(about)}_{key}"] = _small(values.astype(np.uint8), smooth=key in ("image", "cam"))
            tags = [dataset.classes[index] for index in dataset.tags[number].nonzero()[:, 0].tolist()]
            about.append({"name": dataset.names[number], "tags": tags, "phase": phase})
    finally:
        model.train(was_training)
    path = Path(run) / SNAPSHOTS / f"{iteration:08d}.npz"
    with atomic_path(path) as temporary:
        arrays["about"] = np.array(json.dumps(about))
        np.savez_compressed(temporary, allow_pickle=False, **arrays)
    return path


def load_snapshots(run: str | Path) -> dict[int, list[Snapshot]]:
    """Load the snapshots of a run: iteration -> images in order.

    Each has name, tags, phase (the one that ended), image uint8 [H,W,3], cam float [H,W], par, walk and prediction
    uint8 [H,W]. Empty if the run has none; damaged files are skipped.
    """
    found: dict[int, list[Snapshot]] = {}
    for path in sorted((Path(run) / SNAPSHOTS).glob("[0-9]*.npz")):
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
