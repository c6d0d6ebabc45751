"""`afa predict`: write masks, overlays and heat maps of images."""

from __future__ import annotations

import argparse
import glob
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from afa.commands.common import check_largest_side, choose_device, colored, need_run, say
from afa.config import Config, with_overrides
from afa.data.label_formats import MASK_FORMATS, MaskWriter
from afa.data.listing import IMAGE_SUFFIXES, visible_files
from afa.data.transforms import read_image
from afa.data.visualize import SCREEN_COLORS, class_shares, heat, overlay, save_picture, share_text
from afa.errors import UserError, did_you_mean, printable
from afa.files import check_writable, is_output, mark_output
from afa.labeling.cam import pack_classes
from afa.labeling.crf import crf_probabilities
from afa.labeling.inference import ScaleOutputs, found_classes, infer
from afa.labeling.upsample import upsampled_labels
from afa.model import AFANet, load_model
from afa.run import MODEL


def run(options: argparse.Namespace) -> None:
    """Run `afa predict` with its parsed options."""
    options.run = need_run(options.run)
    check_largest_side(options.largest_side)
    if options.format not in MASK_FORMATS:
        raise UserError(
            f"--format must be {', '.join(MASK_FORMATS)}, got '{options.format}'"
            + did_you_mean(options.format, MASK_FORMATS)
        )
    images = find_images(options.paths)
    check_writable(options.out, "--out")
    model, classes, config = load_model(options.run / MODEL, choose_device(options.device))
    overrides = [f"eval.scales={options.scales}"] if options.scales is not None else []
    overrides += ["eval.flip=true"] * options.flip + ["eval.crf=true"] * options.crf
    overrides += [f"eval.batch_size={options.batch_size}"] if options.batch_size is not None else []
    config = with_overrides(config, overrides)
    names = ["background", *classes]

    bad: list[str] = []
    results = predict(
        model,
        classes,
        config,
        images,
        options.out,
        mask_format=options.format,
        largest_side=options.largest_side,
        progress=not options.quiet,
        bad=bad.append,
    )

    width = min(max(map(len, images)), 40)
    done, begin = 0, time.perf_counter()
    for result in results:
        done += 1
        found = ", ".join(f"{_square(i)}{names[i]} {share_text(share)}" for i, share in result.shares.items())
        # tqdm.write prints above the progress bar.
        tqdm.write(f"{printable(result.name):<{width}}  {found or 'only background'}")
    plural = "" if done == 1 else "s"
    speed = f"{done / (time.perf_counter() - begin):.2g} images/s, files included"
    say("written", f"{done} image{plural} to {options.out}/masks, overlays and cams ({speed})")
    for reason in bad:
        say("skipped", reason.rpartition(";")[0])
    if bad:
        raise UserError(f"{len(bad):,} of {len(images):,} images can't be read (listed above); fix or remove them")


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
    mask_format: str = "palette",
    largest_side: int = 1024,
    progress: bool = True,
    bad: Callable[[str], None],
) -> Iterator[Prediction]:
    """Write the class maps to out/masks, out/overlays/<name>.png and out/cams/<name>.png; yields each prediction.

    The configuration's eval section (scales, flip, fusion, crf) defines the segmentation; up to eval.batch_size
    consecutive images of equal size share a forward pass. The heat map shows the maximum CAM over the classes that the
    classifier or the mask contains. Images whose longer side exceeds `largest_side` pixels are resized for inference;
    the scores are resized back. An image that can't be read is skipped, and `bad` is called with the reason.

    mask_format: 'palette' (PNG with VOC's palette), 'index' (gray PNG of class indices), 'coco' (one coco.json) or
    'labelme' (one JSON per image).

    Raises UserError if `out` can't be written, or if one of its three folders has files that this function did not
    write.
    """
    out = _claim(Path(out))
    device = next(model.parameters()).device
    writer = MaskWriter(out / "masks", mask_format, ["background", *classes])
    with tqdm(total=len(images), desc="predicting", unit="img", disable=not progress, leave=False) as bar:
        for batch in _batches(images, largest_side, config.eval.batch_size, bad, bar.update):
            pixels = torch.from_numpy(np.stack([np.array(one.small) for one in batch]).transpose(0, 3, 1, 2).copy())
            pixels = pixels.to(device)
            found = infer(model, pixels, config, {"class", "cam", "seg"})
            assert found.seg_logits is not None
            scores = found.seg_logits
            if config.eval.crf:
                scores = crf_probabilities(pixels, scores, config.eval)
            for one, own, cam in zip(batch, scores, _shown_cams(found.outputs, scores), strict=True):
                image = one.image
                labels = upsampled_labels(own, image.height, image.width)
                picture = np.asarray(image)
                writer.write(one.name, one.path, labels)
                save_picture(out / "overlays" / f"{one.name}.png", overlay(picture, labels))
                warm = np.asarray(Image.fromarray(cam).resize(image.size, Image.Resampling.BILINEAR))
                save_picture(out / "cams" / f"{one.name}.png", heat(picture, warm))
                bar.update()
                yield Prediction(one.path, one.name, class_shares(labels, len(classes)))
    writer.finish()


@dataclass
class _Loaded:
    name: str
    path: Path
    image: Image.Image
    small: Image.Image
    """The image, with its longer side limited."""


def _batches(
    images: dict[str, Path], largest_side: int, batch_size: int, bad: Callable[[str], None], skip: Callable[[], Any]
) -> Iterator[list[_Loaded]]:
    """Consecutive images of equal size in batches. Calls `bad` and `skip` for an image that can't be read."""
    batch: list[_Loaded] = []
    for name, path in images.items():
        try:
            image = read_image(path)
        except UserError as error:
            bad(str(error))
            skip()
            continue
        small = image.copy()
        small.thumbnail((largest_side, largest_side), Image.Resampling.BILINEAR)
        if batch and (len(batch) == batch_size or batch[0].small.size != small.size):
            yield batch
            batch = []
        batch.append(_Loaded(name, path, image, small))
    if batch:
        yield batch


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
def _shown_cams(outputs: ScaleOutputs, scores: Tensor) -> np.ndarray:
    """Maximum CAMs over the classes that the classifier or the segmentation predicts: float32 [B, H, W] in [0, 1].

    scores: segmentation logits or probabilities [B, C+1, H, W].
    """
    assert outputs.class_logits is not None
    classes = pack_classes(found_classes(outputs.class_logits, scores))
    cams: np.ndarray = outputs.class_activation_maps(classes).amax(1).cpu().numpy()
    return cams
