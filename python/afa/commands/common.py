"""What the commands share: what they print, the device and the processes they run on, and the data of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from afa import distributed
from afa.config import Config
from afa.data import TaggedDataset
from afa.data.synthetic import make_dataset
from afa.errors import UserError, did_you_mean, printable
from afa.run import CONFIG, MODEL


def say(what: str, text: str) -> None:
    """A line of output under a short heading."""
    print(f"{what:<8} {printable(text)}", flush=True)


def hush(what: str, text: str) -> None:
    """`say` in all processes of a run but the first."""


def colored() -> bool:
    """Whether the output is a terminal that should show colors."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


@contextmanager
def processes(name: str | None) -> Iterator[tuple[torch.device, bool]]:
    """This process's device, joined with the others that torchrun started if it did, and whether it is the first."""
    if not distributed.launched():
        yield choose_device(name), True
        return
    try:
        yield distributed.setup(name), distributed.is_main()
    finally:
        distributed.teardown()


@contextmanager
def first_alone(first: bool) -> Iterator[None]:
    """The first process goes through the block before the others do: what it makes there, they find."""
    if not first:
        distributed.barrier()
    yield
    if first:
        distributed.barrier()


def choose_device(name: str | None) -> torch.device:
    """The device of --device; None: the first GPU, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device must be cpu, cuda or cuda:N, got '{name}'") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} usable GPUs; use --device cpu")
    return device


def need_run(run: Path) -> None:
    """UserError unless the folder holds a finished run."""
    if not run.is_dir():
        others = sorted(str(path.parent) for path in run.parent.glob(f"*/{CONFIG}"))
        raise UserError(f"there is no run {run}; give a folder that `afa train` wrote{did_you_mean(str(run), others)}")
    if not (run / MODEL).is_file():
        raise UserError(
            f"the run {run} has no model.safetensors, so its training has not ended; "
            f"finish it with `afa train {run} --resume`"
        )


def need_classes(run: Path, classes: list[str], config: Config, dataset: TaggedDataset) -> None:
    """UserError unless the data has the classes of the run's model."""
    if classes != dataset.classes:
        raise UserError(
            f"the run {run} knows the classes {', '.join(classes)}, but {config.data.root} has "
            f"{', '.join(dataset.classes)}; set data.root to the data it was trained for"
        )


def to_be_made(config: Config) -> bool:
    """Whether the embedded data set is wanted and does not exist yet."""
    return config.data.embedded and not Path(config.data.root).exists()


def make_data(config: Config, progress: bool) -> None:
    """Make the embedded data set if it is wanted and does not exist yet."""
    if to_be_made(config):
        root = Path(config.data.root)
        say("data", f"making the embedded data set in {root}")
        make_dataset(root, progress=progress)


def say_skipped(dataset: TaggedDataset) -> None:
    """List the images that were dropped, without the advice, which has been taken."""
    for reason in dataset.skipped[:10]:
        say("skipped", reason.rpartition(";")[0])
    if len(dataset.skipped) > 10:
        say("skipped", f"and {len(dataset.skipped) - 10:,} more of '{dataset.split}'")
