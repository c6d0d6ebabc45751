"""Training: three phases from image tags alone (AFA, CVPR 2022).

    afa train demo                                             # the embedded data set
    afa train voc --run runs/voc train.batch_size=8
    afa train voc --run runs/voc --resume
    torchrun --nproc-per-node=4 -m afa train voc               # a process a GPU

Until train.classify_until only the classifier learns. Then the segmentation learns from PAR labels and the affinity
from the same; after train.par_until the segmentation learns from walk labels. The parts are in `afa.training`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from afa import distributed
from afa.config import Config, to_yaml
from afa.data import open_dataset, train_loader
from afa.data.dataset import Sample
from afa.errors import UserError
from afa.evaluate import evaluate
from afa.files import check_space, write_text
from afa.model.network import build_model
from afa.paths import with_absolute_paths
from afa.results import RESULTS
from afa.run_folder import bring_back, lock_run, put_aside
from afa.snapshots import FOLDER as SNAPSHOTS
from afa.snapshots import snapshot
from afa.training.board import PICTURES, open_board
from afa.training.checkpoint import find_checkpoint, finish, is_finished, load_checkpoint, save_checkpoint
from afa.training.log import Record, RunLog, summary, trim_log
from afa.training.schedule import PHASES, learning_rate_factor, parameter_groups, phase_of
from afa.training.stopping import Stopped, StopRequest
from afa.training.trainer import Trainer

OWN_FILES = ("checkpoints", "log.jsonl", "tensorboard", SNAPSHOTS, "config.yaml")
RESULT_FILES = ("model.safetensors", "evaluation", *RESULTS)
"""What a run writes into its folder. The model says that it is finished, the checkpoints that it can be resumed."""

__all__ = ["PHASES", "Stopped", "Trainer", "learning_rate_factor", "parameter_groups", "phase_of", "train"]


def train(
    config: Config,
    run: str | Path,
    *,
    resume: bool = False,
    on_log: Callable[[Record], None] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> bool:
    """Train into the folder `run`: config.yaml, log.jsonl, checkpoints/, and model.safetensors once done.

    resume: go on from the newest whole checkpoint in `run`; on one machine the weights come out as if never stopped. A
    finished run stays as it is, or is extended by a larger train.iterations; its old model and results then move to
    run/previous. Without it, what an earlier run left in `run` is moved to run/previous/<number>. on_log: called with
    every record of log.jsonl.

    Under torchrun every process calls this with the same arguments: each takes its share of every batch, and rank 0
    alone writes. `run` and the data must be on a disk that all of them see.

    UserError for anything the configuration or the data has wrong, before the first iteration, for a folder that
    another process is working in, and for a loss that is not finite. Stopped after SIGTERM or Ctrl-C, once a checkpoint
    is written. Returns False when the run was finished already and nothing was to be done.
    """
    device = distributed.setup(device)
    with lock_run(run) if distributed.is_main() else nullcontext():
        return _train(with_absolute_paths(config), Path(run), resume, on_log, device, progress)


def _train(
    config: Config,
    run: Path,
    resume: bool,
    on_log: Callable[[Record], None] | None,
    device: torch.device,
    progress: bool,
) -> bool:
    processes, main = distributed.world_size(), distributed.is_main()
    progress = progress and main
    settings = config.train
    data = config.data
    _check_division(config)
    dataset = open_dataset(data, data.train_split, train=True, with_mask=False, progress=progress)
    validation = None
    if settings.eval_every < settings.iterations:
        validation = open_dataset(data, data.val_split, train=False, with_mask=True, progress=progress)
    torch.manual_seed(settings.seed)
    if resume and main:
        bring_back(run)
    checkpoint = find_checkpoint(run, config, dataset.classes) if resume else None
    if resume and checkpoint is None:
        return False
    # A resumed run's weights come from its checkpoint.
    model = build_model(config.model, len(dataset.classes))
    trainer = Trainer(model, config, device)
    start = 0
    if checkpoint is not None:
        start = load_checkpoint(checkpoint, trainer)
    distributed.barrier()
    if main:
        if checkpoint is not None:
            trim_log(run / "log.jsonl", start)
            if is_finished(run):  # and now extended
                put_aside(run, RESULT_FILES)
        else:
            put_aside(run, [*OWN_FILES, *RESULT_FILES])
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        # Weights and both of Adam's moments, for each that is kept, for the one being written, and the model.
        copies = (4 if trainer.ema is not None else 3) * (settings.keep_checkpoints + 1) + 1
        check_space(run, copies * size, "the checkpoints")
        write_text(run / "config.yaml", to_yaml(config))
    board = open_board(settings.tensorboard, run, start) if main else None
    listeners = [on_log] if on_log is not None else []
    log = RunLog(run / "log.jsonl", config, device, [*listeners, board.record] if board is not None else listeners)

    batches = train_loader(
        dataset,
        settings.batch_size // processes,
        seed=settings.seed,
        start_iteration=start,
        workers=data.workers,
        rank=distributed.rank(),
        world_size=processes,
    )
    phase_ends = {settings.classify_until, settings.par_until, settings.iterations}
    bar = tqdm(
        total=settings.iterations, initial=start, unit="it", disable=not progress, dynamic_ncols=True, smoothing=0.05
    )
    with bar, StopRequest() as stop:
        for iteration in range(start, settings.iterations):
            bar.set_description(phase_of(settings, iteration), refresh=False)
            before = batches.wait_seconds
            batch: Sample | None = None
            try:
                batch = next(batches)
            except (RuntimeError, OSError):
                # A cluster may end the loader's workers along with this process.
                if not stop.requested:
                    raise
            if iteration == start:
                stop.hold_loader()
            if stop.agreed():
                log.check()
                if main:
                    save_checkpoint(run, trainer, dataset.classes, iteration)
                distributed.barrier()
                raise Stopped(iteration, stop.signal)
            assert batch is not None
            step = trainer.step(batch, iteration)
            log.add(iteration, step, trainer, batches.wait_seconds - before)
            done = iteration + 1
            bar.update()
            if done % settings.log_every == 0 or done == settings.iterations:
                bar.set_postfix_str(summary(log.write()))
            if done in phase_ends:
                log.check()
                if main:
                    with log.paused():
                        snapshot(trainer.measured, dataset, config, run, done)
            saving = done % settings.checkpoint_every == 0 and done < settings.iterations
            measuring = validation is not None and done % settings.eval_every == 0 and done < settings.iterations
            if not (saving or measuring):
                continue
            log.check()
            with log.paused():
                if saving and main:
                    save_checkpoint(run, trainer, dataset.classes, done)
                if measuring and validation is not None:
                    keep = min(PICTURES, len(validation)) if settings.tensorboard is not False else 0
                    result = evaluate(trainer.measured, validation, config, progress=progress, keep=keep)
                    scores = {f"val_{row}_miou": getattr(result, row)["miou"] for row in ("cam", "walk", "par", "seg")}
                    log.append({"iteration": done, **scores})
                    if board is not None:
                        board.pictures(result.samples, done)
    if board is not None:
        board.close()
    if main:
        finish(run, trainer, dataset.classes)
    distributed.barrier()
    return True


def _check_division(config: Config) -> None:
    processes, pieces = distributed.world_size(), config.train.accumulate
    if config.train.batch_size % (processes * pieces):
        parts = " x ".join(
            [*([f"{processes} processes"] if processes > 1 else []), *([f"{pieces} pieces"] if pieces > 1 else [])]
        )
        raise UserError(
            f"train.batch_size is {config.train.batch_size} images for all processes together, and can't be divided "
            f"evenly among {parts}; set it to a multiple of {processes * pieces}"
        )
