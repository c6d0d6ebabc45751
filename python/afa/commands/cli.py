"""The `afa` command: its options, help and errors. Each subcommand is a module of this package, imported only when it
runs, so that --help answers at once and without torch."""

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

  afa train demo                    train on the embedded data set and measure
  afa prepare voc FOLDER            make the downloaded PASCAL VOC 2012 ready
  afa train voc data.root=FOLDER    the recipe of the paper on it
  afa train own data.root=photos    your own pictures, tagged or in one folder a class
  afa predict runs/demo photo.jpg   masks for pictures of your own
"""

PREPARE = """\
Make a data set ready to train on. What is missing is named, with the place to get it. Only what is not there yet is
written: after a stop, or when more has been downloaded, run it again.

  voc    PASCAL VOC 2012: the list train_aug (VOC and SBD, without val) and tags from the annotations
  coco   COCO 2014: lists, tags and validation masks from the instance annotations
  own    your own pictures: look at what was found (classes, split, masks, bad files); writes nothing

examples:
  afa prepare voc /data/VOCdevkit --sbd /data/benchmark_RELEASE
  afa prepare coco /data/coco2014
  afa prepare own photos
"""

TRAIN = """\
Check everything, train, measure on the validation split, and write into the run's folder:
model.safetensors, metrics.json, report.html, log.jsonl and config.yaml.

CONFIG is a ready configuration ({ready}) or the path of a YAML file. Any key of it can be
set on the command line as section.key=value.

examples:
  afa train demo
  afa train voc data.root=/data/VOCdevkit/VOC2012 train.batch_size=8
  afa train voc --run runs/voc_small data.crop_size=320 labels.cam_scales=1,0.5
  afa train runs/voc_small --resume                          go on after a stop
  torchrun --nproc-per-node=4 -m afa train voc --run-dir X   a process a GPU; train.batch_size images in all
"""

EVALUATE = """\
Measure a trained run again and rewrite its metrics.json, metrics.csv (IoU by class), images.csv (IoU by image),
confusion.csv and report.html. An evaluation that was stopped resumes where it was. Without masks, a split only
gets the classifier's F1.

examples:
  afa evaluate runs/voc
  afa evaluate runs/voc eval.longer_side=512 eval.scales=1,0.5,0.75 eval.flip=true eval.crf=true   as published
  afa evaluate runs/voc eval.scales=1,0.5,1.5 eval.flip=true eval.fusion=mean
  afa evaluate runs/voc data.root=/elsewhere/VOC2012 data.val_split=val
  torchrun --nproc-per-node 4 -m afa evaluate runs/voc                      on four GPUs
"""

PREDICT = """\
Segment pictures: files, folders (searched to the bottom) and quoted glob patterns. Writes into --out
  masks/NAME.png       class numbers in PASCAL VOC's palette
  overlays/NAME.png    the classes laid over the picture
  cams/NAME.png        where the classifier looked

examples:
  afa predict runs/demo photo.jpg
  afa predict runs/voc holiday/ 'more/*.png' --out results
  afa predict runs/voc photo.jpg --scales 1,0.5,1.5 --flip --crf     slower, and borders closer to the colors
"""

PSEUDO = """\
Write a training set's pseudo labels, to train a second segmentor on: in --out, NAME.png of the image's own size with
class numbers in PASCAL VOC's palette, 0 background, 255 ignored. Every source is told the image's tags:
  seg   the segmentation, among background and the image's tags; nothing is ignored (default)
  walk  the CAM walked by the affinity, then PAR: what the last phase of training learns from
  par   the CAM refined by PAR: what the phase before learns from
  cam   the CAM against the two background scores
What is written already is kept, so a stopped export goes on; torchrun or --shard share it out. Where there are masks,
the labels' mIoU against them is told.

examples:
  afa pseudo-labels runs/voc --out labels
  afa pseudo-labels runs/voc --out labels eval.scales=1,0.5,0.75 eval.flip=true eval.crf=true
  afa pseudo-labels runs/voc --out walk --source walk --split train --cams
  afa pseudo-labels runs/voc --out labels --shard 2/8                           the second of eight machines
  torchrun --nproc-per-node 4 -m afa pseudo-labels runs/voc --out labels    on four GPUs
"""

REPORT = """\
Write report.html of a measured run anew from its files, without the data or the model.

example:
  afa report runs/demo
"""

CONFIGURATION = """\
Print every setting of a configuration as YAML, or the JSON schema of the YAML files, with the meaning and the range of
every setting, for editors that complete and check them.

examples:
  afa config show voc train.batch_size=8
  afa config show runs/voc
  afa config schema > afa.schema.json
"""

EXTRAS = frozenset(
    {"PIL", "filelock", "jinja2", "pydantic", "safetensors", "scipy", "skimage", "sklearn", "timm", "tqdm", "yaml"}
)
"""Packages that `pip install afa-ext` leaves out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 bad input (one line on stderr), 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        # A file name may hold what the terminal's encoding does not.
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
        # Intermixed, as `afa train voc --run X train.lr=1e-4` has values on both sides of an option; argparse can't do
        # that through its own sub-commands.
        options = commands[arguments[0]].parse_intermixed_args(arguments[1:])
        command = import_module(f"afa.commands.{arguments[0].replace('-', '_')}")
        command.run(options)
        return 0
    except UserError as error:
        return _error(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _error(f"the package {package} is not installed: pip install 'afa-ext[train]'")
    except KeyboardInterrupt:
        print("afa: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) went away; without this Python complains once more while closing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # What reads or writes a file of the user's says more; this is for whatever is left.
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

    prepare = add("prepare", "make a data set ready to train on", PREPARE)
    prepare.add_argument("kind", metavar="KIND", help="voc, coco or own")
    prepare.add_argument("folder", type=_path, metavar="FOLDER", help="where it was unpacked, or your pictures")
    prepare.add_argument(
        "--sbd", type=_path, metavar="DIR", help="voc: where SBD is (default: looked for beside FOLDER)"
    )
    prepare.add_argument(
        "--train-masks", action="store_true", help="also write masks of training images, which training never opens"
    )
    prepare.add_argument("--quiet", action="store_true", help="no progress bars")

    train = add("train", "train, measure and report", TRAIN.format(ready=", ".join(ready_names())))
    train.add_argument("config", metavar="CONFIG", help="name of a ready configuration, or a YAML file")
    train.add_argument(
        "--run",
        "--run-dir",  # torchrun takes --run for one of its own options, shortened
        type=_path,
        metavar="DIR",
        help="folder to write to (default: runs/NAME, or the run given); say --run-dir under torchrun",
    )
    train.add_argument(
        "--resume", action="store_true", help="resume from the last checkpoint, or extend a finished run"
    )
    common(train, "settings that differ from CONFIG")

    evaluate = add("evaluate", "measure a trained run again", EVALUATE)
    evaluate.add_argument("run", type=_path, metavar="RUN", help="folder that `afa train` wrote")
    common(evaluate, "settings that differ from the run's, such as eval.flip=true")

    predict = add("predict", "segment pictures with a trained run", PREDICT)
    predict.add_argument("run", type=_path, metavar="RUN", help="folder that `afa train` wrote")
    predict.add_argument("paths", nargs="+", metavar="PATH", help="picture, folder or 'pattern*'")
    predict.add_argument(
        "--out",
        type=_path,
        metavar="DIR",
        default=Path("predictions"),
        help="folder to write to (default: predictions)",
    )
    predict.add_argument(
        "--largest-side",
        type=int,
        default=1024,
        metavar="PIXELS",
        help="compute longer pictures at this size (default: 1024)",
    )
    predict.add_argument("--scales", metavar="S,S", help="sizes to compute at, such as 1,0.5,1.5 (default: the run's)")
    predict.add_argument("--flip", action="store_true", help="also the mirrored picture")
    predict.add_argument("--crf", action="store_true", help="draw borders along colors by a dense CRF")
    common(predict, "")

    pseudo = add("pseudo-labels", "write a training set's pseudo labels", PSEUDO)
    pseudo.add_argument("run", type=_path, metavar="RUN", help="folder that `afa train` wrote")
    pseudo.add_argument("--out", type=_path, metavar="DIR", required=True, help="folder to write to")
    pseudo.add_argument("--split", metavar="NAME", help="split list to label (default: the run's data.train_split)")
    pseudo.add_argument("--source", metavar="SOURCE", default="seg", help="seg (default), walk, par or cam")
    pseudo.add_argument(
        "--no-ignore",
        action="store_true",
        help="one background score (labels.cam_threshold, for walk labels.walk_threshold), not two",
    )
    pseudo.add_argument("--cams", action="store_true", help="also write cams/NAME.npz (classes, cams)")
    pseudo.add_argument("--shard", metavar="I/N", default="1/1", help="write the I-th of N parts, I from 1")
    common(pseudo, "settings that differ from the run's, such as eval.crf=true")

    report = add("report", "write a run's report.html anew", REPORT)
    report.add_argument("run", type=_path, metavar="RUN", help="folder that `afa train` wrote")
    config = add("config", "print settings, or their JSON schema", CONFIGURATION)
    config.add_argument("action", metavar="ACTION", help="show or schema")
    config.add_argument("config", nargs="?", metavar="CONFIG", help="ready configuration, YAML file or run")
    config.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from CONFIG")
    return parser, {
        "prepare": prepare,
        "train": train,
        "evaluate": evaluate,
        "predict": predict,
        "pseudo-labels": pseudo,
        "report": report,
        "config": config,
    }


def _path(text: str) -> Path:
    """A path given on the command line; the shell leaves the ~ of --run=~/x as it is."""
    return Path(text).expanduser()


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"afa {version('afa-ext')}"
    except PackageNotFoundError:
        return "afa (not installed)"


if __name__ == "__main__":
    sys.exit(main())
