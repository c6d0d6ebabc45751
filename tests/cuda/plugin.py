"""The pytest plugin of `python -m tests.cuda.run`: attaches the stand-in GPU, and fails a test that made a fault."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import device

device.attach(Path(os.environ["AFA_STAND_IN_BRIDGE"]))


@pytest.fixture(autouse=True)
def _no_faults() -> Iterator[None]:
    """Faults are errors of the calls that made them; also where the caller ignored those."""
    import torch

    device.faults()
    yield
    for number in range(torch.cuda.device_count()):
        torch.cuda.synchronize(number)
    assert device.faults() == []
