"""The pytest plugin of `python -m tests.cuda.run`: attaches the stand-in GPU, and fails tests that cause a fault."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from . import device

device.attach(Path(os.environ["AFA_STAND_IN_BRIDGE"]))
# Inductor compiles with Triton, whose kernels can't run here. This backend traces the function, creates the backward
# graph, and runs both operator by operator.
torch.compile = functools.partial(torch.compile, backend="aot_eager")


@pytest.fixture(autouse=True)
def _no_faults() -> Iterator[None]:
    """Fails a test after a fault, even if the caller ignored the error."""
    device.faults()
    yield
    for number in range(torch.cuda.device_count()):
        torch.cuda.synchronize(number)
    assert device.faults() == []
