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
import shutil
import sys
from collections.abc import Collection
from pathlib import Path

import torch

from afa import distributed
from afa.config import Config, load_config, to_dict
from afa.errors import UserError
from afa.files import atomic_path, flush, sha256, write_json
from afa.model.backbone import one_line
from afa.model.network import save_checkpoint_weights
from afa.training.trainer import Trainer

FREE = (
    *("data.root", "data.workers", "train.log_every", "train.eval_every", "train.checkpoint_every"),
    *("train.keep_checkpoints", "train.tensorboard"),
)
"""Settings that a resumed run may have otherwise; and all of eval."""
SUMS = "sha256.json"


def save_checkpoint(run: Path, trainer: Trainer, classes: Collection[str], iteration: int) -> None:
    """Write checkpoints/<iteration>, which takes its name once whole; then delete all but the newest few."""
    folder = run / "checkpoints"
    temporary = folder / f".{iteration:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_checkpoint_weights(temporary / "model.safetensors", trainer.model, trainer.config, classes)
    if trainer.ema is not None:
        save_checkpoint_weights(temporary / "ema.safetensors", trainer.ema, trainer.config, classes)
    with atomic_path(temporary / "state.pt") as path:
        state = {"iteration": iteration, "optimizer": trainer.optimizer.state_dict()}
        torch.save({**state, "scaler": trainer.scaler.state_dict()}, path)
    write_json(temporary / SUMS, {path.name: sha256(path) for path in sorted(temporary.iterdir())})
    final = folder / f"{iteration:08d}"
    # There is one already where a damaged one was passed over.
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    flush(folder)  # so that a power cut keeps the new name
    kept = sorted(_checkpoints(run))[-trainer.config.train.keep_checkpoints :]
    for other in folder.iterdir():
        if other not in kept:
            shutil.rmtree(other, ignore_errors=True)


def find_checkpoint(run: Path, config: Config) -> Path:
    """The newest whole checkpoint of a run of this configuration. A damaged one is named on stderr and passed over.

    Rank 0 looks, and all processes get its answer. UserError when there is none, or when a setting that the weights
    depend on is not the one the run was begun with.
    """
    found: Path | None = None
    problem: UserError | None = None
    if distributed.is_main():
        try:
            found = _find(run, config)
        except UserError as error:
            problem = error
    found, problem = distributed.broadcast((found, problem))
    if problem is not None:
        raise problem
    assert found is not None
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
            f"the checkpoint {folder} can't be read ({one_line(error)}); delete it, or train without --resume"
        ) from error
    return int(state["iteration"])


def _find(run: Path, config: Config) -> Path:
    newest_first = sorted(_checkpoints(run), reverse=True)
    if not newest_first:
        done = " (that run is finished)" if (run / "model.safetensors").is_file() else ""
        raise UserError(f"there is no checkpoint in {run / 'checkpoints'} to resume from{done}; train without --resume")
    _check_same(run, config)
    problems: list[str] = []
    for folder in newest_first:
        problem = _damage(folder)
        if problem is None:
            for line in problems:
                print(f"afa: warning: {line}; going on from {folder.name}", file=sys.stderr)
            return folder
        problems.append(f"the checkpoint {folder} is damaged: {problem}")
    raise UserError("; ".join(problems) + "; no whole one is left: train without --resume")


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


def _check_same(run: Path, config: Config) -> None:
    before, now = to_dict(load_config(run / "config.yaml")), to_dict(config)
    for section, values in now.items():
        for name, value in values.items():
            key = f"{section}.{name}"
            old = before.get(section, {}).get(name)
            if value != old and key not in FREE and section != "eval":
                raise UserError(
                    f"{key} is {value!r}, but the run in {run} was begun with {old!r}; set it back, or train without "
                    "--resume"
                )
