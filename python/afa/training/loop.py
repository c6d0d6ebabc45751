"""Training: three phases from image-level tags (AFA, CVPR 2022).

    afa train demo                                             # the generated demo data
    afa train voc --run runs/voc train.batch_size=8
    afa train voc --run runs/voc --resume
    torchrun --nproc-per-node=4 -m afa train voc               # one process per GPU

Up to train.classify_until, only the classifier is trained. Then segmentation and affinity learn from PAR labels. After
train.par_until, the segmentation learns from walk labels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from afa import distributed
from afa.config import Config, DataConfig, to_yaml, with_absolute_paths
from afa.data import Batches, TaggedDataset, open_dataset, train_loader
from afa.data.dataset import Sample
from afa.errors import UserError
from afa.evaluation.calibration import with_background_score
from afa.evaluation.evaluate import evaluate
from afa.files import check_space, write_text
from afa.model.network import AFANet, build_model
from afa.run import CONFIG, LOG, RESULT_FILES, TRAINING_FILES, bring_back, lock_run, put_aside
from afa.training.board import PICTURES, Board, open_board
from afa.training.checkpoint import (
    find_checkpoint,
    finish,
    forget_later_best,
    is_finished,
    load_checkpoint,
    save_checkpoint,
    save_if_best,
)
from afa.training.log import Record, RunLog, summary, trim_log
from afa.training.schedule import ends_phase, phase_of
from afa.training.snapshots import snapshot
from afa.training.step import TrainStep
from afa.training.stopping import Stopped, StopRequest


@dataclass(frozen=True)
class Splits:
    """The training and validation sets of a run."""

    train: TaggedDataset
    val: TaggedDataset


def open_splits(data: DataConfig, progress: bool = True) -> Splits:
    """Open both splits of a configuration. UserError for lists or tags that can't be read."""
    return Splits(
        open_dataset(data, data.train_split, train=True, with_mask=False, progress=progress),
        open_dataset(data, data.val_split, train=False, with_mask=True, progress=progress),
    )


def train(
    config: Config,
    run: str | Path,
    *,
    resume: bool = False,
    on_log: Callable[[Record], None] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    splits: Splits | None = None,
    model: AFANet | None = None,
) -> AFANet | None:
    """Train and write config.yaml, log.jsonl, checkpoints/ and finally model.safetensors to the folder `run`.

    resume: continue from the newest valid checkpoint in `run`; on the same machine, the weights are the same as without
    interruption. A finished run is unchanged, or extended if train.iterations is larger; its old model and results are
    then moved to run/previous. Without resume, files of an earlier run are moved to run/previous/<number>.
    on_log: called with every record of log.jsonl.
    splits, model: those of the configuration, if already opened or built.

    With torchrun, every process must call this function with the same arguments. Each processes its share of every
    batch, and only rank 0 writes. `run` and the data must be on storage that all processes can access.

    Returns the saved model, or None if the run was already finished. Raises UserError for an invalid configuration or
    data, for a folder that another process is using, and for a non-finite loss. Raises Stopped after SIGTERM or Ctrl-C,
    once a checkpoint is written.
    """
    device = distributed.setup(device)
    with lock_run(run) if distributed.is_main() else nullcontext():
        run, config, main = Path(run), with_absolute_paths(config), distributed.is_main()
        progress = progress and main
        _check_division(config)
        splits = splits or open_splits(config.data, progress)
        if config.train.keep_best is not None and not splits.val.has_masks:
            raise UserError(
                f"train.keep_best is {config.train.keep_best}, but the split '{config.data.val_split}' has no masks "
                "to evaluate; set train.keep_best=null"
            )
        classes = splits.train.classes
        if resume and main:
            bring_back(run)
        checkpoint = find_checkpoint(run, config, classes) if resume else None
        if resume and checkpoint is None:
            return None
        if model is None:
            torch.manual_seed(config.train.seed)
            model = build_model(config.model, len(classes))
        step = TrainStep(model, config, device)
        start = load_checkpoint(checkpoint, step) if checkpoint is not None else 0
        distributed.barrier()
        if main:
            _prepare_folder(run, config, step, start, resumed=checkpoint is not None)
        board = open_board(config.train.tensorboard, run, start) if main else None
        listeners = [listen for listen in (on_log, board.record if board is not None else None) if listen is not None]
        log = RunLog(run / LOG, config, device, listeners)
        _loop(run, config, step, splits, start, log, board, progress)
        if board is not None:
            board.close()
        if main:
            finish(run, step, classes)
        distributed.barrier()
        if config.train.keep_best is not None:
            distributed.broadcast_model(step.eval_model)
        return step.eval_model.eval()


def _loop(
    run: Path,
    config: Config,
    step: TrainStep,
    splits: Splits,
    start: int,
    log: RunLog,
    board: Board | None,
    progress: bool,
) -> None:
    """Run all iterations from `start`, with logging, checkpoints and evaluations."""
    settings, classes, main = config.train, splits.train.classes, distributed.is_main()
    batches = _batches(config, splits.train, start)
    bar = tqdm(
        total=settings.iterations, initial=start, unit="it", disable=not progress, dynamic_ncols=True, smoothing=0.05
    )
    with bar, StopRequest() as stop:
        for iteration in range(start, settings.iterations):
            done, last = iteration + 1, iteration + 1 == settings.iterations
            bar.set_description(phase_of(settings, iteration), refresh=False)
            waited_before = batches.wait_seconds
            batch = _next(batches, stop)
            if iteration == start:
                stop.hold_loader()
            if stop.agreed():
                log.check()
                if main:
                    save_checkpoint(run, step, classes, iteration)
                distributed.barrier()
                raise Stopped(iteration, stop.signal)
            assert batch is not None
            result = step.update(batch, iteration)
            log.add(iteration, result, step.learning_rate, batches.wait_seconds - waited_before)
            bar.update()
            if done % settings.log_every == 0 or last:
                bar.set_postfix_str(summary(log.write()))
            if ends_phase(settings, iteration):
                log.check()
                if main:
                    with log.paused():
                        snapshot(step.eval_model, splits.train, config, run, done)
            if done % settings.checkpoint_every == 0 and not last:
                log.check()
                if main:
                    with log.paused():
                        save_checkpoint(run, step, classes, done)
            if (done % settings.eval_every == 0 and not last) or (last and settings.keep_best is not None):
                log.check()
                with log.paused():
                    _evaluate(run, config, step, splits, done, log, board, progress)


def _evaluate(
    run: Path,
    config: Config,
    step: TrainStep,
    splits: Splits,
    done: int,
    log: RunLog,
    board: Board | None,
    progress: bool,
) -> None:
    """Evaluate the model on the validation split for the log and, with train.keep_best, save it if it is the best."""
    settings = config.train
    keep = min(PICTURES, len(splits.val)) if settings.tensorboard is not False else 0
    config = with_background_score(config, step.eval_model, splits.train)
    result = evaluate(step.eval_model, splits.val, config, progress=progress, keep=keep, diagnose=False)
    scores = {f"val_{row}_miou": getattr(result, row)["miou"] for row in ("cam", "walk", "par", "seg")}
    log.append({"iteration": done, **scores})
    if board is not None:
        board.pictures(result.samples, done)
    if settings.keep_best is not None and distributed.is_main():
        save_if_best(run, step, splits.train.classes, done, scores[f"val_{settings.keep_best}_miou"])


def _prepare_folder(run: Path, config: Config, step: TrainStep, start: int, *, resumed: bool) -> None:
    """Move old files away, check the free disk space, and write config.yaml."""
    if resumed:
        trim_log(run / LOG, start)
        forget_later_best(run, start)
        if is_finished(run):  # the run is being extended
            put_aside(run, RESULT_FILES)
    else:
        put_aside(run, [*TRAINING_FILES, *RESULT_FILES])
    size = sum(tensor.nbytes for tensor in step.model.state_dict().values())
    # Weights and both Adam moments for each kept checkpoint and the one being written, and the model.
    copies = (4 if step.ema is not None else 3) * (config.train.keep_checkpoints + 1) + 1
    check_space(run, copies * size, "the checkpoints")
    write_text(run / CONFIG, to_yaml(config))


def _batches(config: Config, dataset: TaggedDataset, start: int) -> Batches:
    processes = distributed.world_size()
    return train_loader(
        dataset,
        config.train.batch_size // processes,
        seed=config.train.seed,
        start_iteration=start,
        workers=config.data.workers,
        rank=distributed.rank(),
        world_size=processes,
    )


def _next(batches: Batches, stop: StopRequest) -> Sample | None:
    """The next batch; None if the loader failed after a stop request."""
    try:
        return next(batches)
    except (RuntimeError, OSError):
        # A cluster may signal the loader's workers together with this process.
        if not stop.requested:
            raise
        return None


def _check_division(config: Config) -> None:
    processes, micro_batches = distributed.world_size(), config.train.accumulate
    if config.train.batch_size % (processes * micro_batches):
        parts = [f"{processes} processes"] * (processes > 1) + [f"{micro_batches} micro-batches"] * (micro_batches > 1)
        raise UserError(
            f"train.batch_size ({config.train.batch_size} images over all processes) can't be divided evenly among "
            f"{' x '.join(parts)}; set it to a multiple of {processes * micro_batches}"
        )
