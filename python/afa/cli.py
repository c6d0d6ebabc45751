"""The `afa` command: prepare, train, evaluate, predict, report."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.errors import UserError, did_you_mean, printable

# torch and all that needs it are imported by the commands, so that --help answers at once.
if TYPE_CHECKING:
    import torch

    from afa.config import Config
    from afa.data import TaggedDataset
    from afa.eval_store import EvalStore
    from afa.evaluate import EvalResult

ABOUT = """\
Weakly-supervised semantic segmentation: learn masks from image tags alone
(AFA, CVPR 2022).

  afa train demo                    train on the embedded data set and measure
  afa prepare voc FOLDER            make the downloaded PASCAL VOC 2012 ready
  afa train voc data.root=FOLDER    the published recipe on it
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
confusion.csv and report.html. A measurement that was stopped goes on where it was. Of a split without masks only
the classifier's F1 is measured.

examples:
  afa evaluate runs/voc
  afa evaluate runs/voc eval.scales=1,0.5,0.75 eval.flip=true eval.crf=true     as published
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
  afa predict runs/voc photo.jpg --scales 1,0.5,1.5 --flip --crf     slower, and borders closer to the colours
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

EXTRAS = frozenset({"PIL", "filelock", "safetensors", "scipy", "skimage", "sklearn", "timm", "tqdm", "yaml"})
"""Packages that `pip install afa-ext` leaves out."""
NAMES = {"cam": "CAM", "walk": "walk", "par": "PAR label", "seg": "segmentation", "crf": "+ dense CRF"}


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
                raise UserError(f"'{arguments[0]}' is no command; the commands are {', '.join(commands)}{hint}")
            parser.parse_args(arguments)
            parser.print_help()
            return 0
        # Intermixed, as `afa train voc --run X train.lr=1e-4` has values on both sides of an option; argparse can't do
        # that through its own sub-commands.
        options = commands[arguments[0]].parse_intermixed_args(arguments[1:])
        command: Callable[[argparse.Namespace], None] = options.command
        command(options)
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

    def add(name: str, summary: str, text: str, command: Callable[[argparse.Namespace], None]) -> Any:
        sub = subparsers.add_parser(name, help=summary, description=text, formatter_class=raw)
        sub.set_defaults(command=command)
        return sub

    def common(sub: Any, overrides: str) -> None:
        if overrides:
            sub.add_argument("overrides", nargs="*", metavar="section.key=value", help=overrides)
        sub.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, else the CPU)")
        sub.add_argument("--quiet", action="store_true", help="no progress bars")

    prepare = add("prepare", "make a data set ready to train on", PREPARE, _prepare)
    prepare.add_argument("kind", metavar="KIND", help="voc, coco or own")
    prepare.add_argument("folder", type=_path, metavar="FOLDER", help="where it was unpacked, or your pictures")
    prepare.add_argument(
        "--sbd", type=_path, metavar="DIR", help="voc: where SBD is (default: looked for beside FOLDER)"
    )
    prepare.add_argument(
        "--train-masks", action="store_true", help="also write masks of training images, which training never opens"
    )
    prepare.add_argument("--quiet", action="store_true", help="no progress bars")

    train = add("train", "train, measure and report", TRAIN.format(ready=", ".join(ready_names())), _train)
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

    evaluate = add("evaluate", "measure a trained run again", EVALUATE, _evaluate)
    evaluate.add_argument("run", type=_path, metavar="RUN", help="folder that `afa train` wrote")
    common(evaluate, "settings that differ from the run's, such as eval.flip=true")

    predict = add("predict", "segment pictures with a trained run", PREDICT, _predict)
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
    predict.add_argument("--crf", action="store_true", help="draw borders along colours by a dense CRF")
    common(predict, "")

    pseudo = add("pseudo-labels", "write a training set's pseudo labels", PSEUDO, _pseudo_labels)
    pseudo.add_argument("run", type=_path, metavar="RUN", help="folder that `afa train` wrote")
    pseudo.add_argument("--out", type=_path, metavar="DIR", required=True, help="folder to write to")
    pseudo.add_argument("--split", metavar="NAME", help="split list to label (default: the run's data.train_split)")
    pseudo.add_argument("--source", metavar="SOURCE", default="seg", help="seg (default), walk, par or cam")
    pseudo.add_argument("--no-ignore", action="store_true", help="one background score, labels.cam_threshold, not two")
    pseudo.add_argument("--cams", action="store_true", help="also write cams/NAME.npz (classes, cams)")
    pseudo.add_argument("--shard", metavar="I/N", default="1/1", help="write the I-th of N parts, I from 1")
    common(pseudo, "settings that differ from the run's, such as eval.crf=true")

    report = add("report", "write a run's report.html anew", REPORT, _report)
    report.add_argument("run", type=_path, metavar="RUN", help="folder that `afa train` wrote")
    return parser, {
        "prepare": prepare,
        "train": train,
        "evaluate": evaluate,
        "predict": predict,
        "pseudo-labels": pseudo,
        "report": report,
    }


# ---- commands


def _prepare(options: argparse.Namespace) -> None:
    from afa.data import prepare
    from afa.files import check_writable

    folder, masks, progress = options.folder, options.train_masks, not options.quiet
    kinds = ("voc", "coco", "own")
    if options.kind not in kinds:
        raise UserError(
            f"afa prepare knows {', '.join(kinds)}, not '{options.kind}'{did_you_mean(options.kind, kinds)}"
        )
    if options.sbd is not None and options.kind != "voc":
        raise UserError(f"--sbd belongs to `afa prepare voc`, not to {options.kind}")
    try:
        if options.kind != "own" and folder.is_dir():
            check_writable(folder, "the data folder")
        if options.kind == "voc":
            root = prepare.prepare_voc(folder, sbd=options.sbd, train_masks=masks, progress=progress, say=_say)
        elif options.kind == "coco":
            root = prepare.prepare_coco(folder, train_masks=masks, progress=progress, say=_say)
        else:
            root = prepare.prepare_own(folder, progress=progress, say=_say)
    except KeyboardInterrupt:
        _say("stopped", "what is written is whole; run the same command again to go on")
        raise
    _say("next", f"afa train {options.kind} data.root={root}")


def _train(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    from afa.config import load_config, resolve
    from afa.paths import with_absolute_paths
    from afa.run_folder import check_run, lock_run

    config = with_absolute_paths(load_config(options.config, options.overrides))
    path = resolve(options.config)
    # The settings of an earlier run are all called config.yaml: its folder is their name, and where it goes on.
    of_run = path.name == "config.yaml"
    name = path.parent.name if of_run else path.stem
    run = options.run or (path.parent if of_run else Path("runs") / name)
    if run.exists() and not run.is_dir():
        raise UserError(f"--run {run} is a file; give a folder")
    from afa import distributed

    with _processes(options.device) as (device, main):
        say = _say if main else _hush
        progress = not options.quiet and main
        if main:
            check_run(run)
        # What costs least is checked first: lists and tags, then the model, then, when they are made here, the images.
        if not _to_be_made(config):
            _datasets(config, progress)
        say("model", _describe_model(config))
        if main:
            _make_data(config, progress)
        distributed.barrier()
        train_set, val_set = _datasets(config, progress)
        say(
            "data",
            f"{config.data.root}: {len(train_set):,} images to train on, {len(val_set):,} to measure, "
            f"{len(train_set.classes)} classes",
        )
        say("classes", train_set.class_counts())
        from afa.data import check_dataset
        from afa.train import Stopped, train

        if main:
            _say_skipped(train_set)
            _say_skipped(val_set)
            if not val_set.has_masks:
                say("note", _no_masks(config, val_set) + ": only the classifier's F1 will be")
            check_dataset(train_set, progress)
            check_dataset(val_set, progress)
            for note in [*val_set.notes, *val_set.mask_notes()]:
                say("note", note)
        distributed.barrier()
        where = f"{distributed.world_size()} processes on {device.type}" if distributed.world_size() > 1 else device
        say("run", f"{run}: {config.train.iterations:,} iterations of {config.train.batch_size} crops on {where}")
        if config.train.par_until >= config.train.iterations:
            say("note", _no_walk_phase(config))
        try:
            new = train(config, run, resume=options.resume, device=device, progress=progress)
        except KeyboardInterrupt:
            if (run / "checkpoints").is_dir():
                say("stopped", f"go on with: afa train {run} --resume")
            raise
        except Stopped as stopped:
            say(
                "stopped",
                f"by {'Ctrl-C' if stopped.signal == signal.SIGINT else 'SIGTERM'}; the checkpoint of iteration "
                f"{stopped.iteration:,} is written, resume with: afa train {run} --resume",
            )
            # As the shell reports a process that the signal itself ended.
            raise SystemExit(128 + stopped.signal) from None
        facts = {"config": name, "train_seconds": time.perf_counter() - started} if new else _training_facts(run)
        if not new:
            say("finished", f"{run} was trained before; extend it by a larger train.iterations")
        with lock_run(run) if main else nullcontext():
            _measure(config, run, val_set, device, progress, facts, started if new else None)


def _no_walk_phase(config: Config) -> str:
    return (
        f"there is no walk phase, because train.par_until ({config.train.par_until}) is not below train.iterations "
        f"({config.train.iterations}): the segmentation learns only from PAR labels"
    )


def _evaluate(options: argparse.Namespace) -> None:
    from afa.config import load_config
    from afa.crf import check_installed
    from afa.data import check_dataset, open_dataset
    from afa.eval_store import EvalStore, evaluation_key
    from afa.paths import with_absolute_paths
    from afa.run_folder import check_run, lock_run

    _need_run(options.run)
    config = with_absolute_paths(load_config(options.run / "config.yaml", options.overrides))
    if config.eval.crf:
        check_installed()
    kept = _training_facts(options.run)
    with _processes(options.device) as (device, first):
        progress = first and not options.quiet
        with _first_alone(first):
            if first:
                check_run(options.run)
            _make_data(config, progress)
            val_set = open_dataset(config.data, config.data.val_split, train=False, with_mask=True, progress=progress)
            if first:
                _say_skipped(val_set)
                check_dataset(val_set, progress)
        with lock_run(options.run) if first else nullcontext():
            store = EvalStore(options.run / "evaluation", evaluation_key(options.run / "model.safetensors", config))
            _measure(config, options.run, val_set, device, progress, kept, None, store)


def _training_facts(run: Path) -> dict[str, Any]:
    """What training took, which stays true however often the run is measured."""
    if not (run / "metrics.json").is_file():
        return {}
    from afa.results import load_result

    before = load_result(run)[2]
    return {key: before[key] for key in ("config", "seconds", "train_seconds") if key in before}


@contextmanager
def _processes(name: str | None) -> Iterator[tuple[torch.device, bool]]:
    """This process's device, joined with the others that torchrun started if it did, and whether it is the first."""
    from afa import distributed

    if not distributed.launched():
        yield _device(name), True
        return
    try:
        yield distributed.setup(name), distributed.is_main()
    finally:
        distributed.teardown()


@contextmanager
def _first_alone(first: bool) -> Iterator[None]:
    """The first process goes through the block before the others do: what it makes there, they find."""
    from afa import distributed

    if not first:
        distributed.barrier()
    yield
    if first:
        distributed.barrier()


def _predict(options: argparse.Namespace) -> None:
    from afa.config import apply_override, validate
    from afa.crf import check_installed
    from afa.files import check_writable
    from afa.model import load_model
    from afa.predict import find_images, predict

    _need_run(options.run)
    if options.largest_side < 32:
        raise UserError(f"--largest-side must be at least 32 pixels, got {options.largest_side}")
    images = find_images(options.paths)
    check_writable(options.out, "--out")
    model, classes, config = load_model(options.run / "model.safetensors", _device(options.device))
    if options.scales is not None:
        apply_override(config, f"eval.scales={options.scales}")
    config.eval.flip |= options.flip
    config.eval.crf |= options.crf
    validate(config)
    if config.eval.crf:
        check_installed()
    names = ["background", *classes]
    from tqdm import tqdm

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
        # Above the bar and not through it.
        tqdm.write(f"{printable(result.name):<{width}}  {found or 'only background'}")
    plural = "" if done == 1 else "s"
    _say("written", f"{done} picture{plural} to {options.out}/masks, overlays and cams")
    for reason in bad:
        _say("skipped", reason.rpartition(";")[0])
    if bad:
        raise UserError(f"{len(bad):,} of {len(images):,} pictures can't be read, as listed above; fix or remove them")


def _pseudo_labels(options: argparse.Namespace) -> None:
    _need_run(options.run)
    shard = _shard(options.shard)
    from afa.pseudo_labels import SOURCES

    if options.source not in SOURCES:
        hint = did_you_mean(options.source, SOURCES)
        raise UserError(f"--source must be one of {', '.join(SOURCES)}, got '{options.source}'{hint}")
    from afa.config import load_config
    from afa.crf import check_installed
    from afa.data import open_dataset
    from afa.eval_store import weights_id
    from afa.files import check_writable
    from afa.model import load_model
    from afa.paths import with_absolute_paths
    from afa.pseudo_labels import export_labels

    config = with_absolute_paths(load_config(options.run / "config.yaml", options.overrides))
    if config.eval.crf and options.source == "seg":
        check_installed()
    check_writable(options.out, "--out")
    split = options.split or config.data.train_split
    with _processes(options.device) as (device, first):
        progress = first and not options.quiet
        with _first_alone(first):
            _make_data(config, progress)
        dataset = open_dataset(config.data, split, train=False, with_mask=False, progress=progress)
        path = options.run / "model.safetensors"
        model, classes, _ = load_model(path, device)
        _need_classes(options.run, classes, config, dataset)
        done = export_labels(
            model,
            dataset,
            config,
            options.out,
            source=options.source,
            ignore=not options.no_ignore,
            cams=options.cams,
            shard=shard,
            weights_id=weights_id(path),
            progress=progress,
        )
    if not first:
        return
    _say_skipped(dataset)
    rate = f", {done.written / done.seconds:.1f} images a second" if done.written else ""
    _say("written", f"{done.written:,} labels of '{split}' to {options.out} ({done.skipped:,} were there){rate}")
    if done.scores is None:
        _say("note", f"the split '{split}' has no masks, so the labels can't be measured")
        return
    _say(
        "measured",
        f"mIoU {done.scores['miou']:.3f} on {done.measured:,} images with masks, over the "
        f"{done.scores['labelled']:.1%} of their pixels that are labelled",
    )


def _shard(text: str) -> tuple[int, int]:
    """'2/8' -> (1, 8)."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise UserError(f"--shard must be I/N with 1 <= I <= N, such as 2/8, got '{text}'")
    return int(number) - 1, int(count)


def _report(options: argparse.Namespace) -> None:
    from afa.results import make_report

    if not options.run.is_dir():
        raise UserError(f"there is no run {options.run}; give a folder that `afa train` wrote")
    _say("report", str(make_report(options.run)))


# ---- their parts


def _need_run(run: Path) -> None:
    if not run.is_dir():
        others = sorted(str(path.parent) for path in run.parent.glob("*/config.yaml"))
        raise UserError(f"there is no run {run}; give a folder that `afa train` wrote{did_you_mean(str(run), others)}")
    if not (run / "model.safetensors").is_file():
        raise UserError(
            f"the run {run} has no model.safetensors, so its training has not ended; "
            f"finish it with `afa train {run} --resume`"
        )


def _need_classes(run: Path, classes: list[str], config: Config, dataset: TaggedDataset) -> None:
    if classes != dataset.classes:
        raise UserError(
            f"the run {run} knows the classes {', '.join(classes)}, but {config.data.root} has "
            f"{', '.join(dataset.classes)}; set data.root to the data it was trained for"
        )


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device must be cpu, cuda or cuda:N, got '{name}'") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} usable GPUs; use --device cpu")
    return device


def _describe_model(config: Config) -> str:
    """Build the model once before any long work: a wrong name, weights file or argument ends here."""
    from afa.model import build_model

    model = build_model(config.model, 1)
    if config.data.crop_size % model.stride:
        raise UserError(
            f"data.crop_size must be a multiple of the stride of {config.model.backbone} ({model.stride}), "
            f"got {config.data.crop_size}"
        )
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    start = config.model.weights or "random"
    return f"{config.model.backbone}, {millions:.1f} million parameters, {start} weights"


def _to_be_made(config: Config) -> bool:
    return config.data.embedded and not Path(config.data.root).exists()


def _make_data(config: Config, progress: bool) -> None:
    if _to_be_made(config):
        from afa.data.synthetic import make_dataset

        root = Path(config.data.root)
        _say("data", f"making the embedded data set in {root}")
        make_dataset(root, progress=progress)


def _datasets(config: Config, progress: bool) -> tuple[TaggedDataset, TaggedDataset]:
    from afa.data import open_dataset

    data = config.data
    train_set = open_dataset(data, data.train_split, train=True, with_mask=False, progress=progress)
    return train_set, open_dataset(data, data.val_split, train=False, with_mask=True, progress=progress)


def _say_skipped(dataset: TaggedDataset) -> None:
    for reason in dataset.skipped[:10]:
        _say("skipped", reason.rpartition(";")[0])  # without the advice, which has been taken
    if len(dataset.skipped) > 10:
        _say("skipped", f"and {len(dataset.skipped) - 10:,} more of '{dataset.split}'")


def _measure(
    config: Config,
    run: Path,
    val_set: TaggedDataset,
    device: torch.device,
    progress: bool,
    facts: dict[str, Any],
    started: float | None,
    store: EvalStore | None = None,
) -> None:
    from afa.distributed import is_main
    from afa.evaluate import evaluate
    from afa.model import load_model
    from afa.results import environment, save_result

    model, classes, _ = load_model(run / "model.safetensors", device)
    _need_classes(run, classes, config, val_set)
    result = evaluate(
        model,
        val_set,
        config,
        progress=progress,
        keep=config.eval.report_images,
        store=store,
        on_resume=lambda done: _say("resumed", f"{done:,} of {len(val_set):,} images were measured before the stop"),
    )
    if not is_main():
        return
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    facts = {**facts, "date": now, "environment": environment(device)}
    if started is not None:
        facts["seconds"] = time.perf_counter() - started
    page = save_result(run, result, classes, config, facts)
    if val_set.has_masks:
        print(_table(result, len(val_set)))
    else:
        _say("measured", f"F1 of the tags {result.f1:.3f} on {len(val_set):,} images; {_no_masks(config, val_set)}")
    _say("report", str(page))


def _no_masks(config: Config, val_set: TaggedDataset) -> str:
    return (
        f"the split '{config.data.val_split}' has no masks in {val_set.mask_folder}, so neither the "
        "segmentation nor the labels can be measured against the truth"
    )


def _table(result: EvalResult, images: int) -> str:
    """The rows as text, with bars."""
    full, empty = ("█", "░") if (sys.stdout.encoding or "").lower().startswith("utf") else ("#", ".")
    lines = ["", f"{'on ' + format(images, ',') + ' images':<16}{'mIoU':>7}  {'':24}{'pixels':>8}{'classes':>9}"]
    for row, scores in result.rows.items():
        name = NAMES[row]
        filled = round(24 * scores["miou"]) if scores["miou"] == scores["miou"] else 0
        bar = full * filled + empty * (24 - filled)
        line = f"{name:<16}{scores['miou']:>7.3f}  {bar}{scores['pixel_acc']:>8.3f}{scores['mean_acc']:>9.3f}"
        lines.append(f"\033[1m{line}\033[0m" if row == list(result.rows)[-1] and _coloured() else line)
    lines += [f"note: {note}" for note in result.notes]
    return "\n".join([*lines, f"F1 of the tags {result.f1:.3f}", ""])


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "<1%"


def _coloured() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _square(index: int) -> str:
    """A square in the colour of the class, on a terminal."""
    if not _coloured():
        return ""
    from afa.visualize import SCREEN_COLOURS

    red, green, blue = SCREEN_COLOURS[index].tolist()
    return f"\033[38;2;{red};{green};{blue}m■\033[0m "


def _path(text: str) -> Path:
    """A path given on the command line; the shell leaves the ~ of --run=~/x as it is."""
    return Path(text).expanduser()


def _hush(what: str, text: str) -> None:
    """`_say` in all processes of a run but the first."""


def _say(what: str, text: str) -> None:
    print(f"{what:<8} {printable(text)}", flush=True)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"afa {version('afa-ext')}"
    except PackageNotFoundError:
        return "afa (not installed)"


if __name__ == "__main__":
    sys.exit(main())
