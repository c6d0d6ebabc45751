"""SIGTERM, which clusters send before they take a machine away, and Ctrl-C: the run stops between two steps, and is
saved."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch

from afa import distributed


class Stopped(Exception):
    """Training ended early because it was asked to, with a checkpoint after `iteration` iterations."""

    def __init__(self, iteration: int, number: int = signal.SIGTERM) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after iteration {iteration}")
        self.iteration = iteration
        self.signal = number


class StopRequest:
    """While entered, SIGTERM and SIGINT set `requested` in place of ending the process. A second one ends it at once.

    `signal` is the one that came.
    """

    def __init__(self) -> None:
        self.requested = False
        self.signal: int = signal.SIGTERM
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handle(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold_loader(self) -> None:
        """Keep torch from raising wherever this process is when one of the loader's workers ends, which may be the
        middle of an update or of writing a checkpoint; to be called once the workers have started. The next batch then
        fails."""
        self._handle(signal.SIGCHLD, signal.SIG_DFL)

    def _handle(self, number: int, handler: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before.setdefault(number, signal.signal(number, handler))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # A loader's worker that was forked from this process has the handler too, and must end.
        if self.requested or os.getpid() != self._owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested, self.signal = True, number
        if number == signal.SIGINT:
            # Not print: it may have been interrupted itself.
            os.write(
                2, b"\nafa: stopping after this iteration, with a checkpoint; press Ctrl-C again to stop at once\n"
            )

    def agreed(self) -> bool:
        """Whether any process was asked to stop; to be called by all of them at the same place."""
        if distributed.world_size() == 1:
            return self.requested
        return bool(distributed.all_reduce_sum_(torch.tensor([int(self.requested)])).item())
