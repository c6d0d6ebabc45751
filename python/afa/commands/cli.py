"""The `afa` command: options, help and errors.

Each subcommand is a module of this package. It is imported only when it runs, so --help is fast and works without
torch.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from afa.errors import UserError, did_you_mean, printable

ABOUT = """\
Weakly-supervised semantic segmentation: learn masks from image-level tags
(AFA, CVPR 2022).

  afa train demo                    train and evaluate on the generated demo data
  afa prepare voc FOLDER            prepare a downloaded PASCAL VOC 2012
  afa train voc data.root=FOLDER    train on it with the recipe of the paper
  afa train own data.root=photos    train on your own images (tags.csv, or one folder per class)
  afa predict runs/demo photo.jpg   segment your own images
"""

PREPARE = """\
Prepare a data set for training. Missing files are listed with their download locations. Existing files are kept, so you
can run the command again after an interruption or after downloading more.

  voc    PASCAL VOC 2012: write the list train_aug (VOC and SBD, without val) and tags from the annotations
  coco   COCO 2014: write lists, tags and validation masks from the instance annotations
  own    your own images: check the folder and print classes, split, masks and bad files; writes nothing

examples:
  afa prepare voc /data/VOCdevkit --sbd /data/benchmark_RELEASE
  afa prepare coco /data/coco2014
  afa prepare own photos
"""

TRAIN = """\
Check the settings and the data, train, evaluate on the validation split, and write to the run's
folder: model.safetensors, metrics.json, report.html, log.jsonl and config.yaml.

CONFIG is a built-in configuration ({ready}) or the path of a YAML file. Override any
setting on the command line with section.key=value.

examples:
  afa train demo
  afa train voc data.root=/data/VOCdevkit/VOC2012 train.batch_size=8
  afa train voc --run runs/voc_small data.crop_size=320 labels.cam_scales=1,0.5
  afa train runs/voc_small --resume                          resume an interrupted run
  torchrun --nproc-per-node=4 -m afa train voc --run-dir X   one process per GPU; train.batch_size images in total
"""

EVALUATE = """\
Evaluate a trained run and rewrite its metrics.json, metrics.csv (IoU per class), images.csv (IoU per image),
confusion.csv and report.html. An interrupted evaluation resumes. For a split without masks, only the classifier's F1 is
computed.

examples:
  afa evaluate runs/voc
  afa evaluate runs/voc eval.longer_side=512 eval.scales=1,0.5,0.75 eval.flip=true eval.crf=true   as published
  afa evaluate runs/voc eval.scales=1,0.5,1.5 eval.flip=true eval.fusion=mean
  afa evaluate runs/voc data.root=/elsewhere/VOC2012 data.val_split=val
  torchrun --nproc-per-node 4 -m afa evaluate runs/voc                      on four GPUs
"""

PREDICT = """\
Segment images given as files, folders (searched recursively) and quoted glob patterns. Writes to --out:
  masks/NAME.png       class indices in PASCAL VOC's palette, or another --format:
                         index     NAME.png, gray, with the class indices as values
                         coco      coco.json, with run-length codes (needs pip install 'afa-ext[coco]')
                         labelme   NAME.json, with polygons
  overlays/NAME.png    the classes drawn over the image
  cams/NAME.png        heat map of where the classifier looked

examples:
  afa predict runs/demo photo.jpg
  afa predict runs/voc holiday/ 'more/*.png' --out results
  afa predict runs/voc holiday/ --format labelme --out holiday-labels
  afa predict runs/voc photo.jpg --scales 1,0.5,1.5 --flip --crf     slower, with more precise borders
"""

PSEUDO = """\
Write pseudo labels for a training set, to train a second segmentation network. For each image, --out gets a NAME.png of
the same size with class indices in PASCAL VOC's palette (0 background, 255 ignored). All sources use image-level tags:
  seg   the segmentation, restricted to background and the image's tags; no ignored pixels (default)
  walk  the CAM after the random walk, refined by PAR: the target of the last training phase
  par   the CAM refined by PAR: the target of the phase before
  cam   the CAM, thresholded at the two background scores
Existing labels are kept, so an interrupted export resumes. Use torchrun or --shard to split the work. If there are
masks, the labels' mIoU is printed.

examples:
  afa pseudo-labels runs/voc --out labels
  afa pseudo-labels runs/voc --out labels eval.scales=1,0.5,0.75 eval.flip=true eval.crf=true
  afa pseudo-labels runs/voc --out walk --source walk --split train --cams
  afa pseudo-labels runs/voc --out labels --shard 2/8                           the second of eight machines
  torchrun --nproc-per-node 4 -m afa pseudo-labels runs/voc --out labels    on four GPUs
"""

REPORT = """\
Rewrite report.html of an evaluated run from the run's files. Needs neither the data nor the model.

example:
  afa report runs/demo
"""

CONFIGURATION = """\
Print every setting of a configuration as YAML, or the JSON schema of the YAML files, which gives editors the
description and range of every setting.

examples:
  afa config show voc train.batch_size=8
  afa config show runs/voc
  afa config schema > afa.schema.json
"""

EXPORT = """\
Write a run's model for other software:
  onnx           RUN/model.onnx: for onnxruntime and others (needs pip install 'afa-ext[export]')
  torch-export   RUN/model.pt2: for PyTorch without this package and timm
  huggingface    RUN/huggingface: a model folder with a model card; afa predict and afa evaluate accept it as RUN
The first two contain the preprocessing, take images of any size, and are compared with the model on three sizes. They
segment at one scale, without flips and CRF.

examples:
  afa export runs/demo --to onnx
  afa export runs/demo --to huggingface --out demo
"""

APP = """\
Open a page in the browser to try a model: drop in a photograph, see its mask, the CAM of each class and the CAM after
the random walk, change the background score and the PAR iterations, download the mask.
Needs pip install 'afa-ext[app]'.

examples:
  afa app runs/demo
  afa app runs/voc --largest-side 800 eval.crf=true
"""

RUN = "folder that `afa train` wrote, or hf://OWNER/NAME"

EXTRAS = {
    "train": [
        "PIL",
        "filelock",
        "jinja2",
        "pydantic",
        "safetensors",
        "scipy",
        "skimage",
        "sklearn",
        "timm",
        "tqdm",
        "yaml",
    ],
    "coco": ["pycocotools"],
    "export": ["onnx", "onnxruntime", "onnxscript"],
    "app": ["gradio"],
}
"""Extra -> packages that only it installs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 success, 2 bad input (one line on stderr), 130 interrupted."""
    # OpenMP's idle threads wait actively by default. If another process needs a core, that slows training down tenfold.
    # This takes effect because torch has not been imported yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        # A file name may contain characters that the terminal can't encode.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        parser, commands = _parsers()
        if not arguments or arguments[0] not in commands:
            if arguments and not arguments[0].startswith("-"):
                hint = did_you_mean(arguments[0], commands)
                raise UserError(f"unknown command '{arguments[0]}'; the commands are {', '.join(commands)}{hint}")
            parser.parse_args(arguments)
            parser.print_help()
            return 0
        # `afa train voc --run X train.lr=1e-4` has positional arguments before and after an option. argparse's own
        # subcommands don't support that.
        options = commands[arguments[0]].parse_intermixed_args(arguments[1:])
        command = import_module(f"afa.commands.{arguments[0].replace('-', '_')}")
        command.run(options)
        return 0
    except UserError as error:
        return _error(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        return _error(f"the package {package} is not installed; run pip install 'afa-ext[{extra}]'")
    except KeyboardInterrupt:
        print("afa: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has exited. Without this, Python prints another error at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # Fallback: code that handles the user's files raises more specific errors.
        name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return _error(f"{name}{error.strerror or error}")


def _error(sentence: str) -> int:
    line = " ".join(sentence.split())
    print(f"afa: error: {printable(line)}", file=sys.stderr)
    return 2


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    from afa.config import ready_names

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="afa", description=ABOUT, formatter_class=raw)
    parser.add_argument("--version", action="version", version=_version())
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, summary: str, text: str) -> Any:
        return subparsers.add_parser(name, help=summary, description=text, formatter_class=raw)

    def common(sub: Any, overrides: str) -> None:
        if overrides:
            sub.add_argument("overrides", nargs="*", metavar="section.key=value", help=overrides)
        sub.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, else the CPU)")
        sub.add_argument("--quiet", action="store_true", help="no progress bars")

    prepare = add("prepare", "prepare a data set for training", PREPARE)
    prepare.add_argument("kind", metavar="KIND", help="voc, coco or own")
    prepare.add_argument("folder", type=_path, metavar="FOLDER", help="the unpacked data set, or your images")
    prepare.add_argument("--sbd", type=_path, metavar="DIR", help="voc: folder of SBD (default: search next to FOLDER)")
    prepare.add_argument(
        "--train-masks", action="store_true", help="also write masks of training images; training never reads them"
    )
    prepare.add_argument("--quiet", action="store_true", help="no progress bars")

    train = add("train", "train, evaluate and report", TRAIN.format(ready=", ".join(ready_names())))
    train.add_argument("config", metavar="CONFIG", help="name of a built-in configuration, or a YAML file")
    train.add_argument(
        "--run",
        "--run-dir",  # torchrun parses --run as an abbreviation of one of its own options
        type=_path,
        metavar="DIR",
        help="output folder (default: runs/NAME, or the folder of the given run); use --run-dir with torchrun",
    )
    train.add_argument(
        "--resume", action="store_true", help="resume from the last checkpoint, or extend a finished run"
    )
    common(train, "settings that differ from CONFIG")

    evaluate = add("evaluate", "evaluate a trained run", EVALUATE)
    evaluate.add_argument("run", type=_run, metavar="RUN", help=RUN)
    common(evaluate, "settings that differ from the run's, such as eval.flip=true")

    predict = add("predict", "segment images with a trained run", PREDICT)
    predict.add_argument("run", type=_run, metavar="RUN", help=RUN)
    predict.add_argument("paths", nargs="+", metavar="PATH", help="image, folder or 'pattern*'")
    predict.add_argument(
        "--out",
        type=_path,
        metavar="DIR",
        default=Path("predictions"),
        help="folder to write to (default: predictions)",
    )
    predict.add_argument(
        "--format",
        metavar="FORMAT",
        default="palette",
        help="format of the masks: palette (default), index, coco or labelme",
    )
    predict.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="number of consecutive images of equal size per forward pass (default: the run's eval.batch_size)",
    )
    predict.add_argument(
        "--largest-side",
        type=int,
        default=1024,
        metavar="PIXELS",
        help="resize images whose longer side exceeds this before inference (default: 1024)",
    )
    predict.add_argument("--scales", metavar="S,S", help="scales to fuse, such as 1,0.5,1.5 (default: the run's)")
    predict.add_argument("--flip", action="store_true", help="average with the horizontally flipped image")
    predict.add_argument("--crf", action="store_true", help="refine borders with a dense CRF")
    common(predict, "")

    pseudo = add("pseudo-labels", "write pseudo labels for a training set", PSEUDO)
    pseudo.add_argument("run", type=_run, metavar="RUN", help=RUN)
    pseudo.add_argument("--out", type=_path, metavar="DIR", required=True, help="folder to write to")
    pseudo.add_argument("--split", metavar="NAME", help="split list to label (default: the run's data.train_split)")
    pseudo.add_argument("--source", metavar="SOURCE", default="seg", help="seg (default), walk, par or cam")
    pseudo.add_argument(
        "--no-ignore",
        action="store_true",
        help="use one background score (labels.cam_threshold; for walk labels.walk_threshold) instead of two",
    )
    pseudo.add_argument("--cams", action="store_true", help="also write cams/NAME.npz (classes, cams)")
    pseudo.add_argument("--shard", metavar="I/N", default="1/1", help="write part I of N (1 <= I <= N)")
    common(pseudo, "settings that differ from the run's, such as eval.crf=true")

    export = add("export", "write the model for other software", EXPORT)
    export.add_argument("run", type=_run, metavar="RUN", help=RUN)
    export.add_argument("--to", metavar="KIND", required=True, help="onnx, torch-export or huggingface")
    export.add_argument("--out", type=_path, metavar="PATH", help="file or folder to write (default: in RUN)")

    app = add("app", "try a model on photographs in the browser", APP)
    app.add_argument("run", type=_run, metavar="RUN", help=RUN)
    app.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the run's")
    app.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: 127.0.0.1)")
    app.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    app.add_argument(
        "--largest-side",
        type=int,
        default=512,
        metavar="PIXELS",
        help="resize images whose longer side exceeds this before inference (default: 512)",
    )
    app.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, else the CPU)")

    report = add("report", "rewrite a run's report.html", REPORT)
    report.add_argument("run", type=_path, metavar="RUN", help="folder that `afa train` wrote")
    config = add("config", "print settings, or their JSON schema", CONFIGURATION)
    config.add_argument("action", metavar="ACTION", help="show or schema")
    config.add_argument("config", nargs="?", metavar="CONFIG", help="built-in configuration, YAML file or run")
    config.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from CONFIG")
    return parser, {
        "prepare": prepare,
        "train": train,
        "evaluate": evaluate,
        "predict": predict,
        "pseudo-labels": pseudo,
        "export": export,
        "app": app,
        "report": report,
        "config": config,
    }


def _path(text: str) -> Path:
    """A path given on the command line; the shell does not expand the ~ in --run=~/x."""
    return Path(text).expanduser()


def _run(text: str) -> Path | str:
    """A run's folder, or the name of a model on the Hugging Face Hub."""
    return text if text.startswith("hf://") else _path(text)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"afa {version('afa-ext')}"
    except PackageNotFoundError:
        return "afa (not installed)"


if __name__ == "__main__":
    sys.exit(main())
