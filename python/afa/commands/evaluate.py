"""`afa evaluate`: evaluate a trained run and rewrite its results."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from afa.commands.common import colored, first_alone, make_data, need_classes, need_run, processes, say, say_skipped
from afa.config import Config, load_config, with_absolute_paths
from afa.data import TaggedDataset, check_dataset, open_dataset
from afa.distributed import is_main
from afa.evaluation.calibration import with_background_score
from afa.evaluation.diagnostics import Diagnosis
from afa.evaluation.evaluate import evaluate
from afa.evaluation.result import EvalResult
from afa.evaluation.store import EvalStore, evaluation_key
from afa.model import AFANet, load_model
from afa.report.results import environment, load_result, save_result
from afa.run import CONFIG, EVALUATION, METRICS, MODEL, check_run, lock_run

NAMES = {"cam": "CAM", "walk": "walk", "par": "PAR label", "seg": "segmentation", "crf": "+ dense CRF"}


def run(options: argparse.Namespace) -> None:
    """Run `afa evaluate` with its parsed options."""
    options.run = need_run(options.run, writable=True)
    config = with_absolute_paths(load_config(options.run / CONFIG, options.overrides))
    kept = training_facts(options.run)
    with processes(options.device) as (device, first):
        progress = first and not options.quiet
        with first_alone(first):
            if first:
                check_run(options.run)
            make_data(config, progress)
            val_set = open_dataset(config.data, config.data.val_split, train=False, with_mask=True, progress=progress)
            if first:
                say_skipped(val_set)
                check_dataset(val_set, progress)
        with lock_run(options.run) if first else nullcontext():
            model, classes, _ = load_model(options.run / MODEL, device)
            need_classes(options.run, classes, config, val_set)
            if config.labels.cam_threshold == "auto":
                train_set = open_dataset(config.data, config.data.train_split, train=True, with_mask=False)
                config = calibrated(config, model, train_set)
            store = EvalStore(options.run / EVALUATION, evaluation_key(options.run / MODEL, config))
            score_and_report(config, options.run, model, val_set, device, progress, kept, None, store)


def training_facts(run: Path) -> dict[str, Any]:
    """The training entries of metrics.json, which later evaluations keep."""
    if not (run / METRICS).is_file():
        return {}
    before = load_result(run)[2]
    return {key: before[key] for key in ("config", "seconds", "train_seconds") if key in before}


def calibrated(config: Config, model: AFANet, train_set: TaggedDataset) -> Config:
    """`with_background_score`, and a line of output if it chose a score."""
    found = with_background_score(config, model, train_set)
    if found is not config and is_main():
        say("score", f"labels.cam_threshold: {found.labels.cam_threshold}, from the tags of training images")
    return found


def score_and_report(
    config: Config,
    run: Path,
    model: AFANet,
    val_set: TaggedDataset,
    device: torch.device,
    progress: bool,
    facts: dict[str, Any],
    started: float | None,
    store: EvalStore | None = None,
) -> None:
    """Evaluate the model, write all results to the run's folder, and print the scores.

    facts: additional entries of metrics.json. started: a `time.perf_counter` value; if given, the seconds since then
    are added.
    """
    result = evaluate(
        model,
        val_set,
        config,
        progress=progress,
        keep=config.eval.report_images,
        store=store,
        on_resume=lambda done: say("resumed", f"{done:,} of {len(val_set):,} images were already evaluated"),
    )
    if not is_main():
        return
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    facts = {**facts, "date": now, "environment": environment(device)}
    if started is not None:
        facts["seconds"] = time.perf_counter() - started
    page = save_result(run, result, val_set.classes, config, facts)
    if val_set.has_masks:
        print(_table(result, len(val_set)))
    else:
        say("measured", f"tag F1 {result.f1:.3f} on {len(val_set):,} images; {no_masks(config, val_set)}")
    say("report", str(page))


def no_masks(config: Config, val_set: TaggedDataset) -> str:
    """The note for a validation split without masks."""
    return (
        f"the split '{config.data.val_split}' has no masks in {val_set.mask_folder}, so the segmentation and the "
        "labels can't be evaluated"
    )


def _table(result: EvalResult, images: int) -> str:
    """The scores as a text table with bars."""
    full, empty = ("█", "░") if (sys.stdout.encoding or "").lower().startswith("utf") else ("#", ".")
    lines = ["", f"{'on ' + format(images, ',') + ' images':<16}{'mIoU':>7}  {'':24}{'pixels':>8}{'classes':>9}"]
    for row, scores in result.rows.items():
        name = NAMES[row]
        filled = round(24 * scores["miou"]) if scores["miou"] == scores["miou"] else 0
        bar = full * filled + empty * (24 - filled)
        line = f"{name:<16}{scores['miou']:>7.3f}  {bar}{scores['pixel_acc']:>8.3f}{scores['mean_acc']:>9.3f}"
        lines.append(f"\033[1m{line}\033[0m" if row == list(result.rows)[-1] and colored() else line)
    lines += _diagnosis(result.diagnosis)
    lines += [f"note: {note}" for note in result.notes]
    return "\n".join([*lines, f"tag F1 {result.f1:.3f}", ""])


def _diagnosis(found: Diagnosis | None) -> list[str]:
    if found is None:
        return []
    miou, affinity = found.miou, found.affinity
    best = [f"{NAMES[row]} {found.best(row)[1]:.3f} at {found.best(row)[0]:.2f}" for row in found.curves]
    return [
        f"on {found.images:,} of them: CAM {miou['cam']:.3f}, walk {miou['walk']:.3f} (identity "
        f"{miou['walk_identity']:.3f}, oracle {miou['walk_oracle']:.3f}), PAR {miou['par']:.3f}, walk + PAR "
        f"{miou['walk_par']:.3f}",
        f"affinity: object {affinity['object']:.2f}, background {affinity['background']:.2f}, different "
        f"{affinity['different']:.2f}, AUC of objects {affinity['auc']:.2f}",
        f"best background scores: {', '.join(best)}",
    ]
