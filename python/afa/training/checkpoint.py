"""Checkpoints: what a run goes on from, written whole or not at all, and checked before it is used.

checkpoints/<iterations done>/model.safetensors   the weights that training goes on with
                              ema.safetensors     their average, with train.ema
                              state.pt            optimiser and loss scale; read by torch.load(weights_only=True)
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

from afa import distributed
from afa.config import Config, load_config, to_dict
from afa.data.class_names import difference
from afa.errors import UserError
from afa.files import atomic_path, flush, remove_tree, sha256, write_json, writing
from afa.model.backbone import one_line
from afa.model.network import load_classes, save_checkpoint_weights
from afa.training.trainer import Trainer

FREE = (
    *("data.root", "data.workers", "train.log_every", "train.eval_every", "train.checkpoint_every"),
    *("train.keep_checkpoints", "train.tensorboard"),
)
"""Settings that a resumed run may have otherwise; and all of eval."""
SUMS = "sha256.json"
MODEL = "model.safetensors"


def save_checkpoint(run: Path, trainer: Trainer, classes: Collection[str], iteration: int) -> None:
    """Write checkpoints/<iteration>, which takes its name once whole; then delete all but the newest few."""
    folder = run / "checkpoints"
    temporary = folder / f".{iteration:08d}.tmp"
    remove_tree(temporary)
    with writing(temporary):
        temporary.mkdir(parents=True)
    save_checkpoint_weights(temporary / "model.safetensors", trainer.model, trainer.config, classes)
    if trainer.ema is not None:
        save_checkpoint_weights(temporary / "ema.safetensors", trainer.ema, trainer.config, classes)
    with atomic_path(temporary / "state.pt") as path:
        state = {"iteration": iteration, "optimizer": trainer.optimizer.state_dict()}
        with open(path, "wb") as file:  # torch's own writer reports a full disk as a RuntimeError without a reason
            torch.save({**state, "scaler": trainer.scaler.state_dict()}, file)
    write_json(temporary / SUMS, {path.name: sha256(path) for path in sorted(temporary.iterdir())})
    final = folder / f"{iteration:08d}"
    # There is one already where a damaged one was passed over.
    remove_tree(final)
    with writing(final):
        os.replace(temporary, final)
        flush(folder)  # so that a power cut keeps the new name
    _keep(run, trainer.config.train.keep_checkpoints)


def finish(run: Path, trainer: Trainer, classes: Collection[str]) -> None:
    """Write model.safetensors, which says that the run is finished. The checkpoint of its last iteration stays, so that
    the run can be extended; the others go."""
    save_checkpoint(run, trainer, classes, trainer.config.train.iterations)
    save_checkpoint_weights(run / MODEL, trainer.measured, trainer.config, classes)
    _keep(run, 1)


def is_finished(run: Path) -> bool:
    """Whether training has ended: the model is there. What an extension starts from is moved aside first."""
    return (run / MODEL).is_file()


def _keep(run: Path, count: int) -> None:
    kept = sorted(_checkpoints(run))[-count:]
    for other in (run / "checkpoints").iterdir():
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


def load_checkpoint(folder: Path, trainer: Trainer) -> int:
    """Fill the trainer from a checkpoint; returns the iterations done."""
    from safetensors.torch import load_file

    try:
        trainer.model.load_state_dict(load_file(folder / "model.safetensors"))
        if trainer.ema is not None:
            trainer.ema.load_state_dict(load_file(folder / "ema.safetensors"))
        state = torch.load(folder / "state.pt", map_location=trainer.device, weights_only=True)
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.scaler.load_state_dict(state["scaler"])
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
    return [path for path in (run / "checkpoints").glob("[0-9]*") if path.is_dir()]


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
    before, now = to_dict(load_config(run / "config.yaml")), to_dict(config)
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
