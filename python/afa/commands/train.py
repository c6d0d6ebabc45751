"""`afa train`: check settings and data, train, evaluate, and write the report."""

from __future__ import annotations

import argparse
import signal
from contextlib import nullcontext
from pathlib import Path

import torch

from afa import distributed
from afa.commands.common import Clock, hush, make_data, needs_generated_data, processes, say, say_skipped
from afa.commands.evaluate import calibrated, no_masks, score_and_report, training_facts
from afa.config import Config, load_config, resolve, with_absolute_paths
from afa.data import check_dataset
from afa.data.synthetic import CLASSES
from afa.errors import UserError
from afa.model import AFANet, build_model, load_model
from afa.report.results import duration
from afa.run import CHECKPOINTS, CONFIG, MODEL, check_run, lock_run
from afa.training.estimate import estimate
from afa.training.loop import Splits, open_splits, train
from afa.training.stopping import Stopped

SHOWN = {
    "classify": "tags",
    "par": "labels from CAM and PAR",
    "walk": "labels from walk and PAR",
    "evaluate": "evaluation",
}


def run(options: argparse.Namespace) -> None:
    """Run `afa train` with its parsed options."""
    clock = Clock()
    config = with_absolute_paths(load_config(options.config, options.overrides))
    path = resolve(options.config)
    # The settings of every run are called config.yaml, so a run is named after its folder.
    of_run = path.name == CONFIG
    name = path.parent.name if of_run else path.stem
    folder = options.run or (path.parent if of_run else Path("runs") / name)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--run {folder} is a file; give a folder")
    with processes(options.device) as (device, main):
        say_if_main = say if main else hush
        progress = not options.quiet and main
        if main:
            check_run(folder)
        # Cheap checks first: lists and tags, then the model. Demo data is generated only after that.
        splits = None if needs_generated_data(config) else open_splits(config.data, progress)
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, len(CLASSES if splits is None else splits.train.classes))
        _check_crop(config, model)
        say_if_main("model", _describe(config, model))
        if main:
            with clock.part("data"):
                make_data(config, progress)
        distributed.barrier()
        splits = splits or open_splits(config.data, progress)
        say_if_main(
            "data",
            f"{config.data.root}: {len(splits.train):,} images to train on, {len(splits.val):,} for validation, "
            f"{len(splits.train.classes)} classes",
        )
        say_if_main("classes", splits.train.class_counts())
        if main:
            _check_data(config, splits, progress)
        distributed.barrier()
        where = f"{distributed.world_size()} processes on {device.type}" if distributed.world_size() > 1 else device
        crops = f"{config.train.iterations:,} iterations of {config.train.batch_size} crops"
        say_if_main("run", f"{folder}: {crops} on {where}")
        for note in config.notes():
            say_if_main("note", note)
        if _worth_an_estimate(config, device, options):
            say("time", _expected(estimate(model, config, splits.train, splits.val)))
        try:
            with clock.part("training"):
                trained = train(
                    config,
                    folder,
                    resume=options.resume,
                    device=device,
                    progress=progress,
                    splits=splits,
                    model=model,
                )
        except KeyboardInterrupt:
            if (folder / CHECKPOINTS).is_dir():
                say_if_main("stopped", f"resume with: afa train {folder} --resume")
            raise
        except Stopped as stopped:
            say_if_main(
                "stopped",
                f"by {'Ctrl-C' if stopped.signal == signal.SIGINT else 'SIGTERM'}; saved the checkpoint of iteration "
                f"{stopped.iteration:,}, resume with: afa train {folder} --resume",
            )
            # The exit status that shells report for a process killed by the signal.
            raise SystemExit(128 + stopped.signal) from None
        if trained is None:
            say_if_main("finished", f"{folder} is already trained; to extend it, increase train.iterations")
            facts, since = training_facts(folder), None
            trained, _, _ = load_model(folder / MODEL, device)
        else:
            facts, since = {"config": name, "train_seconds": clock.seconds()}, clock.started
        with lock_run(folder) if main else nullcontext(), clock.part("evaluation"):
            config = calibrated(config, trained, splits.train)
            score_and_report(config, folder, trained, splits.val, device, progress, facts, since)
        say_if_main("time", clock.summary())


def _worth_an_estimate(config: Config, device: torch.device, options: argparse.Namespace) -> bool:
    """Whether an estimate of the time helps and is possible: on a CPU, in one process, from the first iteration."""
    first = not options.resume and not distributed.launched() and not config.train.compile
    return device.type == "cpu" and first and not options.quiet and config.train.iterations >= 100


def _expected(seconds: dict[str, float]) -> str:
    parts = [f"{SHOWN[part]} {duration(value)}" for part, value in seconds.items()]
    return f"about {duration(sum(seconds.values()))} on this machine: {', '.join(parts)}"


def _describe(config: Config, model: AFANet) -> str:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad) / 1e6
    size = f"{millions:.1f} million parameters" + (f" ({frozen:.1f} million frozen)" if frozen else "")
    return f"{config.model.backbone}, {size}, {config.model.weights or 'random'} weights"


def _check_crop(config: Config, model: AFANet) -> None:
    if config.data.crop_size % model.stride:
        raise UserError(
            f"data.crop_size must be a multiple of the stride of {config.model.backbone} ({model.stride}), "
            f"got {config.data.crop_size}"
        )


def _check_data(config: Config, splits: Splits, progress: bool) -> None:
    """Decode every image and mask, and print notes about them."""
    for dataset in (splits.train, splits.val):
        say_skipped(dataset)
    if not splits.val.has_masks:
        say("note", no_masks(config, splits.val) + "; only the classifier's F1 will be computed")
    for dataset in (splits.train, splits.val):
        check_dataset(dataset, progress)
    for note in [*splits.val.notes, *splits.val.mask_notes()]:
        say("note", note)
