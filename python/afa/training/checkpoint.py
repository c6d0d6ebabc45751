"""Checkpoints, written atomically and verified before use.

checkpoints/<completed iterations>/model.safetensors   the weights
                                   ema.safetensors     their moving average, with train.ema
                                   state.pt            optimizer and loss scale; read by torch.load(weights_only=True)
                                   sha256.json         checksums of the other files

Schedule, data order and random numbers depend only on the seed and the iteration, so they need not be saved.
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
"""Settings that can change when resuming, in addition to all of eval."""
SUMS = "sha256.json"
EMA = "ema.safetensors"


def save_checkpoint(run: Path, step: TrainStep, classes: Collection[str], iteration: int) -> None:
    """Atomically write checkpoints/<iteration>; then delete all but the newest train.keep_checkpoints."""
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
        with open(path, "wb") as file:  # torch reports a full disk as a RuntimeError without a reason if given a path
            torch.save({**state, "scaler": step.scaler.state_dict()}, file)
    write_json(temporary / SUMS, {path.name: sha256(path) for path in sorted(temporary.iterdir())})
    final = folder / f"{iteration:08d}"
    # A damaged checkpoint that was skipped may have the same name.
    remove_tree(final)
    with writing(final):
        os.replace(temporary, final)
        flush(folder)  # so that the new name survives a power failure
    _keep(run, step.config.train.keep_checkpoints)


def finish(run: Path, step: TrainStep, classes: Collection[str]) -> None:
    """Write model.safetensors, which marks the run as finished: the best weights with train.keep_best, else the last.

    The checkpoint of the last iteration is kept, so that the run can be extended; the others are deleted.
    """
    save_checkpoint(run, step, classes, step.config.train.iterations)
    best = best_model(run)
    if best is not None:
        step.eval_model.load_state_dict(load_file(best[0]))
    save_model(run / MODEL, step.eval_model, step.config, classes)
    _keep(run, 1)


def save_if_best(run: Path, step: TrainStep, classes: Collection[str], iteration: int, score: float) -> None:
    """Save the evaluated model if its score is higher than in all earlier calls."""
    best = best_model(run)
    if best is not None and not score > best[2]:
        return
    # The file name contains iteration and score, so that an interruption leaves either the old or the new file.
    save_model(run / BEST / f"{iteration:08d}_{score:.6f}.safetensors", step.eval_model, step.config, classes)
    if best is not None:
        remove_tree(best[0])


def best_model(run: Path) -> tuple[Path, int, float] | None:
    """File, iteration and score of the best model saved by `save_if_best`, or None."""
    found = []
    for path in (run / BEST).glob("[0-9]*_*.safetensors"):
        iteration, _, score = path.stem.partition("_")
        found.append((path, int(iteration), float(score)))
    return max(found, key=lambda entry: entry[2], default=None)


def forget_later_best(run: Path, iteration: int) -> None:
    """Delete a best model from iterations that a resumed run will repeat."""
    for path in (run / BEST).glob("[0-9]*_*.safetensors"):
        if int(path.stem.partition("_")[0]) > iteration:
            remove_tree(path)


def is_finished(run: Path) -> bool:
    """Whether training is finished, that is, the model exists. Extending a run moves its model away first."""
    return (run / MODEL).is_file()


def _keep(run: Path, count: int) -> None:
    kept = sorted(_checkpoints(run))[-count:]
    for other in (run / CHECKPOINTS).iterdir():
        if other not in kept:
            remove_tree(other)


def find_checkpoint(run: Path, config: Config, classes: Sequence[str]) -> Path | None:
    """The newest valid checkpoint of a run, or None if the run is finished and not extended.

    Damaged checkpoints are reported on stderr and skipped. A larger train.iterations extends a finished run. Rank 0
    searches, and all processes get the result. Raises UserError if there is no checkpoint, or if the classes or a
    setting that affects the weights differ from those of the run.
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
    """Load model, moving average and optimizer from a checkpoint; returns the number of completed iterations."""
    try:
        step.model.load_state_dict(load_file(folder / MODEL))
        if step.ema is not None:
            step.eval_model.load_state_dict(load_file(folder / EMA))
        state = torch.load(folder / "state.pt", map_location=step.device, weights_only=True)
        step.optimizer.load_state_dict(state["optimizer"])
        step.scaler.load_state_dict(state["scaler"])
    except Exception as error:  # safetensors, torch.load and the model raise different exceptions
        raise UserError(
            f"the checkpoint {folder} can't be read ({one_line(error)}); move it out of the folder to resume from "
            "the previous one, or start a new run in another folder (--run)"
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
            f"the run in {run} is finished, but there is no valid checkpoint to extend it from; its model is "
            "unchanged: start a new run in another folder (--run)"
        )
    raise UserError("; ".join(problems) + "; there is no valid checkpoint: start a new run in another folder (--run)")


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
    """Describe the damage to a checkpoint's files; None if they are valid."""
    try:
        sums: dict[str, str] = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        names = list(sums)
    except (OSError, ValueError, TypeError) as error:
        return f"{SUMS} can't be read ({one_line(error)})"
    for name in names:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != sums[name]:
            return f"{name} has a wrong checksum"
    return None


def _check_same(run: Path, config: Config, checkpoints: Sequence[Path]) -> bool:
    """Whether the configuration extends a run that has completed all its iterations; UserError for any other difference
    from the run's settings."""
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
                f"{key} is {value!r}, but the run in {run} was started with {old!r}; restore it, or start a new run "
                "in another folder (--run)"
            )
    return extended
