"""Masks, overlays and heat maps for pictures of one's own: `afa predict`."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from afa.cam import multi_scale_cam
from afa.config import Config
from afa.crf import dense_crf
from afa.data.listing import IMAGE_SUFFIXES, visible_files
from afa.data.transforms import read_image
from afa.errors import UserError
from afa.evaluate import crf_settings, segment
from afa.files import check_writable, is_output, mark_output
from afa.model import AFANet, normalize
from afa.upsample import upsampled_labels
from afa.visualize import heat, overlay, save_mask, save_picture


@dataclass
class Prediction:
    """What was found in one picture."""

    path: Path
    name: str
    shares: dict[int, float]
    """Class -> its share of the picture; background (0) left out, largest first."""


def find_images(arguments: Sequence[str]) -> dict[str, Path]:
    """Output name -> picture, of files, folders (searched to the bottom) and glob patterns, in order.

    UserError names an argument that leads to no picture, and two pictures that would get one output name.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        for name, path in _expand(argument):
            other = found.get(name)
            if other is not None and other.resolve() != path.resolve():
                raise UserError(
                    f"{other} and {path} would both be written as '{name}'; predict them one by one into different "
                    "folders (--out)"
                )
            found[name] = path
    return found


def _expand(argument: str) -> Iterator[tuple[str, Path]]:
    path = Path(argument).expanduser()
    if path.is_dir():
        inside = list(visible_files(path, IMAGE_SUFFIXES))
        if not inside:
            raise UserError(f"the folder {path} holds no picture ({', '.join(IMAGE_SUFFIXES)})")
        yield from ((file.relative_to(path).with_suffix("").as_posix(), file) for file in inside)
    elif path.is_file():
        yield path.stem, path
    else:
        matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True)) if Path(match).is_file()]
        if not matches:
            raise UserError(f"'{argument}' is neither a file nor a folder and matches nothing; give pictures")
        yield from ((match.stem, match) for match in matches)


def predict(
    model: AFANet,
    classes: Sequence[str],
    config: Config,
    images: dict[str, Path],
    out: str | Path,
    *,
    largest_side: int = 1024,
    progress: bool = True,
    bad: Callable[[str], None],
) -> Iterator[Prediction]:
    """Write out/masks/<name>.png (VOC palette), out/overlays/<name>.png and out/cams/<name>.png; yields as it goes.

    The segmentation is that of the configuration's eval section (scales, flip, fusion, crf). The CAM shown is the
    largest over the classes that the classifier or the mask finds. Pictures longer than `largest_side` pixels are
    computed at that size and the scores are brought back to the picture's. A picture that can't be read is left out,
    and `bad` is told why.

    UserError when `out` can't be written, or holds pictures in one of its three folders that this did not write.
    """
    out = _claim(Path(out))
    device = next(model.parameters()).device
    for name, path in tqdm(images.items(), desc="predicting", unit="img", disable=not progress, leave=False):
        try:
            image = read_image(path)
        except UserError as error:
            bad(str(error))
            continue
        small = image.copy()
        small.thumbnail((largest_side, largest_side), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(small).transpose(2, 0, 1)[None].copy()).to(device)
        logits = segment(model, pixels, config)[0]
        if config.eval.crf:
            probabilities = logits.softmax(0).cpu().numpy()
            logits = torch.from_numpy(dense_crf(np.array(small), probabilities, crf_settings(config.eval)))
        mask = logits.argmax(0).to(torch.uint8).cpu().numpy()
        cam = _cam(model, pixels, mask, config)
        labels = upsampled_labels(logits, image.height, image.width)
        picture = np.asarray(image)
        save_mask(out / "masks" / f"{name}.png", labels)
        save_picture(out / "overlays" / f"{name}.png", overlay(picture, labels))
        warm = np.asarray(Image.fromarray(cam).resize(image.size, Image.Resampling.BILINEAR))
        save_picture(out / "cams" / f"{name}.png", heat(picture, warm))
        counts = np.bincount(labels.reshape(-1), minlength=len(classes) + 1) / labels.size
        order = [int(index) for index in np.argsort(-counts) if index and counts[index] > 0]
        yield Prediction(path, name, {index: float(counts[index]) for index in order})


def _claim(out: Path) -> Path:
    """Make the folder and mark those inside as output, so that no command takes them for input."""
    check_writable(out, "--out")
    for folder in (out / "masks", out / "overlays", out / "cams"):
        if not is_output(folder) and folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} holds files that `afa predict` did not write; give another --out")
        check_writable(folder, "--out")
        mark_output(folder)
    return out


@torch.inference_mode()
def _cam(model: AFANet, pixels: torch.Tensor, mask: np.ndarray, config: Config) -> np.ndarray:
    """float32 [H,W] in [0,1]: the largest CAM over the classes found in uint8 pixels [1,3,H,W]."""
    inputs = normalize(pixels)
    logits = model(inputs, want=("class",)).class_logits
    assert logits is not None
    present = (logits > 0).float()
    drawn = np.bincount(mask.reshape(-1), minlength=present.shape[1] + 1)[1:] > 0
    present[0, torch.from_numpy(drawn).to(present.device)] = 1
    cams = multi_scale_cam(model, inputs, present, config.labels.cam_scales).cams
    return cams[0].amax(0).float().cpu().numpy()
