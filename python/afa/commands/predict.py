"""`afa predict`: write masks, overlays and heat maps of images."""

from __future__ import annotations

import argparse
import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from afa.commands.common import choose_device, colored, need_run, say
from afa.config import Config, with_overrides
from afa.data.listing import IMAGE_SUFFIXES, visible_files
from afa.data.transforms import read_image
from afa.data.visualize import SCREEN_COLORS, heat, overlay, save_mask, save_picture
from afa.errors import UserError, printable
from afa.files import check_writable, is_output, mark_output
from afa.labeling.cam import pack_classes
from afa.labeling.crf import crf_probabilities
from afa.labeling.inference import ScaleOutputs, infer
from afa.labeling.upsample import upsampled_labels
from afa.model import AFANet, load_model
from afa.run import MODEL


def run(options: argparse.Namespace) -> None:
    """Run `afa predict` with its parsed options."""
    options.run = need_run(options.run)
    if options.largest_side < 32:
        raise UserError(f"--largest-side must be at least 32 pixels, got {options.largest_side}")
    images = find_images(options.paths)
    check_writable(options.out, "--out")
    model, classes, config = load_model(options.run / MODEL, choose_device(options.device))
    overrides = [f"eval.scales={options.scales}"] if options.scales is not None else []
    overrides += ["eval.flip=true"] * options.flip + ["eval.crf=true"] * options.crf
    config = with_overrides(config, overrides)
    names = ["background", *classes]

    bad: list[str] = []
    results = predict(
        model,
        classes,
        config,
        images,
        options.out,
        largest_side=options.largest_side,
        progress=not options.quiet,
        bad=bad.append,
    )

    width = min(max(map(len, images)), 40)
    done = 0
    for result in results:
        done += 1
        found = ", ".join(f"{_square(i)}{names[i]} {_share(share)}" for i, share in result.shares.items())
        # tqdm.write prints above the progress bar.
        tqdm.write(f"{printable(result.name):<{width}}  {found or 'only background'}")
    plural = "" if done == 1 else "s"
    say("written", f"{done} image{plural} to {options.out}/masks, overlays and cams")
    for reason in bad:
        say("skipped", reason.rpartition(";")[0])
    if bad:
        raise UserError(f"{len(bad):,} of {len(images):,} images can't be read (listed above); fix or remove them")


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "<1%"


def _square(index: int) -> str:
    """A square in the color of the class; empty without a color terminal."""
    if not colored():
        return ""
    red, green, blue = SCREEN_COLORS[index].tolist()
    return f"\033[38;2;{red};{green};{blue}m■\033[0m "


@dataclass
class Prediction:
    """The classes predicted in one image."""

    path: Path
    name: str
    shares: dict[int, float]
    """Class index -> share of the image's pixels, without background (0), largest first."""


def find_images(arguments: Sequence[str]) -> dict[str, Path]:
    """Map output names to images, for files, folders (searched recursively) and glob patterns, in order.

    Raises UserError for an argument without images, and for two images with the same output name.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        for name, path in _expand(argument):
            other = found.get(name)
            if other is not None and other.resolve() != path.resolve():
                raise UserError(
                    f"{other} and {path} have the same output name '{name}'; predict them separately with different "
                    "--out folders"
                )
            found[name] = path
    return found


def _expand(argument: str) -> Iterator[tuple[str, Path]]:
    path = Path(argument).expanduser()
    if path.is_dir():
        inside = list(visible_files(path, IMAGE_SUFFIXES))
        if not inside:
            raise UserError(f"no images in the folder {path} (expected {', '.join(IMAGE_SUFFIXES)})")
        yield from ((file.relative_to(path).with_suffix("").as_posix(), file) for file in inside)
    elif path.is_file():
        yield path.stem, path
    else:
        matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True)) if Path(match).is_file()]
        if not matches:
            raise UserError(f"no such file, folder or matching pattern: '{argument}'")
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
    """Write out/masks/<name>.png (VOC palette), out/overlays/<name>.png and out/cams/<name>.png; yields each
    prediction.

    The configuration's eval section (scales, flip, fusion, crf) defines the segmentation. The heat map shows the
    maximum CAM over the classes that the classifier or the mask contains. Images whose longer side exceeds
    `largest_side` pixels are resized for inference; the scores are resized back. An image that can't be read is
    skipped, and `bad` is called with the reason.

    Raises UserError if `out` can't be written, or if one of its three folders has files that this function did not
    write.
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
        found = infer(model, pixels, config, {"class", "cam", "seg"})
        assert found.seg_logits is not None
        scores = found.seg_logits
        if config.eval.crf:
            scores = crf_probabilities(pixels, scores, config.eval)
        cam = _shown_cam(found.outputs, scores[0])
        labels = upsampled_labels(scores[0], image.height, image.width)
        picture = np.asarray(image)
        save_mask(out / "masks" / f"{name}.png", labels)
        save_picture(out / "overlays" / f"{name}.png", overlay(picture, labels))
        warm = np.asarray(Image.fromarray(cam).resize(image.size, Image.Resampling.BILINEAR))
        save_picture(out / "cams" / f"{name}.png", heat(picture, warm))
        counts = np.bincount(labels.reshape(-1), minlength=len(classes) + 1) / labels.size
        order = [int(index) for index in np.argsort(-counts) if index and counts[index] > 0]
        yield Prediction(path, name, {index: float(counts[index]) for index in order})


def _claim(out: Path) -> Path:
    """Create the output folders and mark them as output, so that no command uses them as input."""
    check_writable(out, "--out")
    for folder in (out / "masks", out / "overlays", out / "cams"):
        if not is_output(folder) and folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} contains files that `afa predict` did not write; choose another --out")
        check_writable(folder, "--out")
        mark_output(folder)
    return out


@torch.inference_mode()
def _shown_cam(outputs: ScaleOutputs, scores: Tensor) -> np.ndarray:
    """Maximum CAM over the classes that the classifier or the segmentation predicts: float32 [H, W] in [0, 1].

    outputs: of one image. scores: its segmentation logits or probabilities [C+1, H, W].
    """
    assert outputs.class_logits is not None
    present = (outputs.class_logits > 0).float()
    segmented = scores.argmax(0).unique()
    present[0, segmented[segmented > 0] - 1] = 1
    return outputs.class_activation_maps(pack_classes(present))[0].amax(0).cpu().numpy()
