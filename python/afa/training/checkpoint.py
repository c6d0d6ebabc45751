"""Checkpoints: what a run goes on from, written whole or not at all, and checked before it is used.

checkpoints/<iterations done>/model.safetensors   the weights that training goes on with
                              ema.safetensors     their average, with train.ema
                              state.pt            optimizer and loss scale; read by torch.load(weights_only=True)
                              sha256.json         of the files beside it

Schedule, order of the data and random numbers are functions of the seed and the iteration, so the number says them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from afa import distributed
from afa.config import Config, load_config, to_dict
from afa.data.class_names import difference
from afa.errors import UserError, one_line
from afa.files import atomic_path, flush, remove_tree, sha256, write_json, writing
from afa.model.network import load_classes, save_model
from afa.run import BEST, CHECKPOINTS, CONFIG, MODEL
from afa.training.step import TrainStep

FREE = (
    *("data.root", "data.workers", "train.log_every", "train.eval_every", "train.checkpoint_every"),
    *("train.keep_checkpoints", "train.keep_best", "train.tensorboard"),
)
"""Settings that a resumed run may have otherwise; and all of eval."""
SUMS = "sha256.json"
EMA = "ema.safetensors"


def save_checkpoint(run: Path, step: TrainStep, classes: Collection[str], iteration: int) -> None:
    """Write checkpoints/<iteration>, which takes its name once whole; then delete all but the newest few."""
    folder = run / CHECKPOINTS
    temporary = folder / f".{iteration:08d}.tmp"
    remove_tree(temporary)
    with writing(temporary):
        temporary.mkdir(parents=True)
    save_model(temporary / MODEL, step.model, step.config, classes)
    if step.ema is not None:
        save_model(temporary / EMA, step.eval_model, step.config, classes)
    with atomic_path(temporary / "state.pt") as path:
        state = {"iteration": iteration, "optimizer": step.optimizer.state_dict()}
        with open(path, "wb") as file:  # torch's own writer reports a full disk as a RuntimeError without a reason
            torch.save({**state, "scaler": step.scaler.state_dict()}, file)
    write_json(temporary / SUMS, {path.name: sha256(path) for path in sorted(temporary.iterdir())})
    final = folder / f"{iteration:08d}"
    # There is one already where a damaged one was passed over.
    remove_tree(final)
    with writing(final):
        os.replace(temporary, final)
        flush(folder)  # so that a power cut keeps the new name
    _keep(run, step.config.train.keep_checkpoints)


def finish(run: Path, step: TrainStep, classes: Collection[str]) -> None:
    """Write model.safetensors, which tells that the run is finished: the best weights with train.keep_best, else the
    last. The checkpoint of its last iteration stays, so that the run can be extended; the others are deleted."""
    save_checkpoint(run, step, classes, step.config.train.iterations)
    best = best_model(run)
    if best is not None:
        step.eval_model.load_state_dict(load_file(best[0]))
    save_model(run / MODEL, step.eval_model, step.config, classes)
    _keep(run, 1)


def save_if_best(run: Path, step: TrainStep, classes: Collection[str], iteration: int, score: float) -> None:
    """Keep the model that would be evaluated now if its score is higher than that of every earlier call."""
    best = best_model(run)
    if best is not None and not score > best[2]:
        return
    # One name holds all of it, so that a stop on the way leaves the old or the new one.
    save_model(run / BEST / f"{iteration:08d}_{score:.6f}.safetensors", step.eval_model, step.config, classes)
    if best is not None:
        remove_tree(best[0])


def best_model(run: Path) -> tuple[Path, int, float] | None:
    """File, iteration and score of the best model kept by `save_if_best`, if there is one."""
    found = []
    for path in (run / BEST).glob("[0-9]*_*.safetensors"):
        iteration, _, score = path.stem.partition("_")
        found.append((path, int(iteration), float(score)))
    return max(found, key=lambda entry: entry[2], default=None)


def forget_later_best(run: Path, iteration: int) -> None:
    """Remove a best model of iterations that a resumed run will repeat."""
    for path in (run / BEST).glob("[0-9]*_*.safetensors"):
        if int(path.stem.partition("_")[0]) > iteration:
            remove_tree(path)


def is_finished(run: Path) -> bool:
    """Whether training has ended: the model is there. What an extension starts from is moved aside first."""
    return (run / MODEL).is_file()


def _keep(run: Path, count: int) -> None:
    kept = sorted(_checkpoints(run))[-count:]
    for other in (run / CHECKPOINTS).iterdir():
        if other not in kept:
            remove_tree(other)


def find_checkpoint(run: Path, config: Config, classes: Sequence[str]) -> Path | None:
    """The newest whole checkpoint of a run of this configuration and these classes, or None when the run is finished
    and no iteration is left. A damaged one is reported on stderr and passed over.

    A finished run is extended by a larger train.iterations. Rank 0 looks, and all processes get its answer. UserError
    when there is no checkpoint, or when a setting that the weights depend on is not the one the run was started with.
    """
    found: Path | None = None
    problem: UserError | None = None
    if distributed.is_main():
        try:
            found = _find(run, config, classes)
        except UserError as error:
            problem = error
    found, problem = distributed.broadcast((found, problem))
    if problem is not None:
        raise problem
    return found


def load_checkpoint(folder: Path, step: TrainStep) -> int:
    """Fill model, average and optimizer from a checkpoint; returns the iterations done."""
    try:
        step.model.load_state_dict(load_file(folder / MODEL))
        if step.ema is not None:
            step.eval_model.load_state_dict(load_file(folder / EMA))
        state = torch.load(folder / "state.pt", map_location=step.device, weights_only=True)
        step.optimizer.load_state_dict(state["optimizer"])
        step.scaler.load_state_dict(state["scaler"])
    except Exception as error:  # whatever safetensors, torch.load or the model say of tensors that don't fit
        raise UserError(
            f"the checkpoint {folder} can't be read ({one_line(error)}); move it out of the folder to resume from "
            "the one before, or start a new run in another folder (--run)"
        ) from error
    return int(state["iteration"])


def _find(run: Path, config: Config, classes: Sequence[str]) -> Path | None:
    newest_first = sorted(_checkpoints(run), reverse=True)
    finished = is_finished(run)
    if not newest_first and not finished:
        raise UserError(
            f"there is no checkpoint in {run / 'checkpoints'} to resume from; start the run without --resume"
        )
    extended = _check_same(run, config, newest_first)
    if finished:
        _check_classes(run, run / MODEL, classes)
        if not extended:
            return None
    problems: list[str] = []
    for folder in newest_first:
        problem = _damage(folder)
        if problem is None:
            _check_classes(run, folder / MODEL, classes)
            for line in problems:
                print(f"afa: warning: {line}; resuming from {folder.name}", file=sys.stderr)
            return folder
        problems.append(f"the checkpoint {folder} is damaged: {problem}")
    if finished:
        raise UserError(
            f"the run in {run} is finished, and no whole checkpoint is left to extend it from; its model stays as it "
            "is: start a new run in another folder (--run)"
        )
    raise UserError("; ".join(problems) + "; no whole one is left: start a new run in another folder (--run)")


def _check_classes(run: Path, model: Path, classes: Sequence[str]) -> None:
    before = load_classes(model)
    changed = difference(before, classes)
    if changed is not None:
        raise UserError(
            f"the run in {run} was started with the classes {', '.join(before)}, but {changed}; restore the data, or "
            "start a new run in another folder (--run)"
        )


def _checkpoints(run: Path) -> list[Path]:
    return [path for path in (run / CHECKPOINTS).glob("[0-9]*") if path.is_dir()]


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, if anything."""
    try:
        sums: dict[str, str] = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        names = list(sums)
    except (OSError, ValueError, TypeError) as error:
        return f"{SUMS} can't be read ({one_line(error)})"
    for name in names:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != sums[name]:
            return f"{name} is not what was written"
    return None


def _check_same(run: Path, config: Config, checkpoints: Sequence[Path]) -> bool:
    """Whether the configuration extends a run that is finished, or has made all its iterations; UserError when it
    differs otherwise from the run's own."""
    before, now = to_dict(load_config(run / CONFIG)), to_dict(config)
    complete = is_finished(run) or any(int(path.name) == before["train"]["iterations"] for path in checkpoints)
    extended = False
    for section, values in now.items():
        for name, value in values.items():
            key = f"{section}.{name}"
            old = before.get(section, {}).get(name)
            if value == old or key in FREE or section == "eval":
                continue
            if key == "train.iterations" and complete and value > old:
                extended = True
                continue
            raise UserError(
                f"{key} is {value!r}, but the run in {run} was started with {old!r}; set it back, or start a new run "
                "in another folder (--run)"
            )
    return extended
