"""Graceful stop on SIGTERM, which clusters send before preemption, and Ctrl-C: a checkpoint is saved between two
steps.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch

from afa import distributed


class Stopped(Exception):
    """Training was stopped early by a signal; a checkpoint was saved after `iteration` iterations."""

    def __init__(self, iteration: int, number: int = signal.SIGTERM) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after iteration {iteration}")
        self.iteration = iteration
        self.signal = number


class StopRequest:
    """Context in which SIGTERM and SIGINT set `requested` instead of ending the process. A second signal ends it.

    `signal` is the received signal.
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
        """Disable torch's SIGCHLD handler, which raises at an arbitrary point when a loader worker exits, possibly
        during an update or while writing a checkpoint. Call it after the workers have started. Fetching the next batch
        then fails instead."""
        self._handle(signal.SIGCHLD, signal.SIG_DFL)

    def _handle(self, number: int, handler: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before.setdefault(number, signal.signal(number, handler))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # A forked loader worker inherits this handler and must exit.
        if self.requested or os.getpid() != self._owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested, self.signal = True, number
        if number == signal.SIGINT:
            # Not print: the signal may have interrupted a print.
            os.write(
                2, b"\nafa: stopping after this iteration and saving a checkpoint; press Ctrl-C again to stop now\n"
            )

    def agreed(self) -> bool:
        """Whether any process received a stop request. All processes must call this at the same point."""
        if distributed.world_size() == 1:
            return self.requested
        return bool(distributed.all_reduce_sum_(torch.tensor([int(self.requested)])).item())
