"""`afa export`: a run's model as a program or as a model folder for other software."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afa.commands.common import need_run, say
from afa.config import Config
from afa.errors import UserError, did_you_mean
from afa.files import check_writable, write_json, write_text
from afa.model import AFANet, load_model
from afa.model.export import OPSET, TOLERANCE, Exporter
from afa.report.model_card import model_card
from afa.run import CONFIG, MODEL

KINDS = {"onnx": "model.onnx", "torch-export": "model.pt2", "huggingface": "huggingface"}
"""Value of --to -> file or folder in the run's folder."""


def run(options: argparse.Namespace) -> None:
    """Run `afa export` with its parsed options."""
    if options.to not in KINDS:
        raise UserError(f"--to must be {', '.join(KINDS)}, got '{options.to}'{did_you_mean(options.to, KINDS)}")
    folder = need_run(options.run)
    out = options.out or folder / KINDS[options.to]
    if options.to == "huggingface":
        write_model_folder(folder, out)
        say("written", f"{out}; upload it with: hf upload OWNER/NAME {out}")
        return
    check_writable(out.parent, "--out")
    model, classes, config = load_model(folder / MODEL)
    exporter = Exporter(model, classes, config.eval.longer_side)
    say("export", "tracing the model and comparing it on three sizes; takes about a minute")
    difference = exporter.to_onnx(out) if options.to == "onnx" else exporter.to_torch(out)
    version = f", opset {OPSET}" if options.to == "onnx" else ""
    size = f"{out.stat().st_size / 1e6:.0f} MB{version}"
    say(
        "written",
        f"{out} ({size}); scores differ by at most {difference:.1g} from the model's (allowed: {TOLERANCE:g})",
    )


def write_model_folder(run: Path, out: Path) -> None:
    """Write the folder of a Hugging Face model. `afa` commands accept it as a run."""
    if out.exists() and any(out.iterdir()) and not (out / MODEL).is_file():
        raise UserError(f"{out} contains other files; choose another --out")
    check_writable(out, "--out")
    model, classes, config = load_model(run / MODEL)
    for name in (MODEL, CONFIG):
        shutil.copyfile(run / name, out / name)
    write_json(out / "config.json", _config(model, classes, config))
    write_json(out / "preprocessor_config.json", _preprocessor_config(model))
    write_text(out / "README.md", model_card(classes, config, run))


def _config(model: AFANet, classes: Sequence[str], config: Config) -> dict[str, Any]:
    """config.json: the class names as `id2label`, and the architecture."""
    names = dict(enumerate(["background", *classes]))
    return {
        "model_type": "afa",
        "architectures": [type(model).__name__],
        "library_name": "afa-ext",
        "backbone": config.model.backbone,
        "output_stride": config.model.output_stride,
        "id2label": {str(index): name for index, name in names.items()},
        "label2id": {name: index for index, name in names.items()},
    }


def _preprocessor_config(model: AFANet) -> dict[str, Any]:
    """preprocessor_config.json: what to do with 8-bit RGB images of any size."""
    return {
        "do_resize": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.normalization.mean),
        "image_std": list(model.normalization.std),
    }
