"""Helpers shared by the commands: output, device, processes, and the data of a run."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from afa import distributed
from afa.config import Config
from afa.data import TaggedDataset
from afa.data.synthetic import make_dataset
from afa.errors import UserError, did_you_mean, printable
from afa.files import check_writable
from afa.model import hub
from afa.report.results import duration
from afa.run import CONFIG, MODEL


def say(what: str, text: str) -> None:
    """Print one line of output after a short heading."""
    print(f"{what:<8} {printable(text)}", flush=True)


def hush(what: str, text: str) -> None:
    """Replacement for `say` in all processes except the first: prints nothing."""


class Clock:
    """The time since its creation, and how much of it named parts of the work took."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure the block as a part."""
        begin = time.perf_counter()
        yield
        self._parts[name] = time.perf_counter() - begin

    def seconds(self) -> float:
        """Seconds since the creation."""
        return time.perf_counter() - self.started

    def summary(self) -> str:
        """'9 min 2 s: data 31 s, training 8 min 1 s, evaluation 20 s, other 10 s'."""
        total = self.seconds()
        parts = {**self._parts, "other": total - sum(self._parts.values())}
        return f"{duration(total)}: " + ", ".join(f"{name} {duration(value)}" for name, value in parts.items())


def colored() -> bool:
    """Whether to print colors: stdout is a terminal and NO_COLOR is not set."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


@contextmanager
def processes(name: str | None) -> Iterator[tuple[torch.device, bool]]:
    """Yield this process's device and whether it is rank 0. Under torchrun, join the process group for the block."""
    if not distributed.launched():
        yield choose_device(name), True
        return
    try:
        yield distributed.setup(name), distributed.is_main()
    finally:
        distributed.teardown()


@contextmanager
def first_alone(first: bool) -> Iterator[None]:
    """Run the block in the first process before the others, so that they find the files it writes."""
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


def check_largest_side(pixels: int) -> None:
    """UserError for a --largest-side that is too small."""
    if pixels < 32:
        raise UserError(f"--largest-side must be at least 32 pixels, got {pixels}")


def need_run(run: Path | str, *, writable: bool = False) -> Path:
    """The folder of a finished run or of a model of the Hugging Face Hub, which is downloaded; UserError for others.

    writable: the folder will get new files. A model of the Hub is then copied to runs/NAME.
    """
    if isinstance(run, str):
        folder = hub.download(run)
        if not writable:
            return folder
        copied = Path("runs") / hub.short_name(run)
        check_writable(copied, "the run's folder")
        shutil.copytree(folder, copied, dirs_exist_ok=True)
        return copied
    if not run.is_dir():
        others = sorted(str(path.parent) for path in run.parent.glob(f"*/{CONFIG}"))
        raise UserError(f"no such run: {run}; give a folder that `afa train` wrote{did_you_mean(str(run), others)}")
    if not (run / MODEL).is_file():
        raise UserError(
            f"the run {run} has no model.safetensors, so its training is not finished; "
            f"finish it with `afa train {run} --resume`"
        )
    return run


def need_classes(run: Path, classes: list[str], config: Config, dataset: TaggedDataset) -> None:
    """UserError unless the data has the classes of the run's model."""
    if classes != dataset.classes:
        raise UserError(
            f"the run {run} was trained on the classes {', '.join(classes)}, but {config.data.root} has "
            f"{', '.join(dataset.classes)}; set data.root to data with the same classes"
        )


def needs_generated_data(config: Config) -> bool:
    """Whether the configuration uses the generated demo data and it does not exist yet."""
    return config.data.embedded and not Path(config.data.root).exists()


def make_data(config: Config, progress: bool) -> None:
    """Generate the demo data if the configuration uses it and it does not exist yet."""
    if needs_generated_data(config):
        root = Path(config.data.root)
        say("data", f"generating the demo data set in {root}")
        make_dataset(root, progress=progress)


def say_skipped(dataset: TaggedDataset) -> None:
    """List the skipped images with the reasons, without the advice that follows the last semicolon."""
    for reason in dataset.skipped[:10]:
        say("skipped", reason.rpartition(";")[0])
    if len(dataset.skipped) > 10:
        say("skipped", f"and {len(dataset.skipped) - 10:,} more of '{dataset.split}'")
