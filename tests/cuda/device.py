"""Python interface to the stand-in GPU: faults, counts and settings of the runtime (runtime/api.h), through ctypes.

Available in processes started by `python -m tests.cuda.run`, where `active` is true.
"""

from __future__ import annotations

import ctypes
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

active = "AFA_STAND_IN" in os.environ
NOT_REFUSED, NOT_AN_ATTRIBUTE, TOO_LARGE = 0, 1, 2


_COUNTED = (
    *("launches", "torch_operations", "synchronizations"),
    *("device_allocations", "allocations", "allocated_bytes"),
)


class Counts(ctypes.Structure):
    """stand_in_counts of runtime/api.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in _COUNTED]


def _load() -> Any:
    library = ctypes.CDLL(None)
    for name in ("stand_in_launches", "stand_in_faults"):
        getattr(library, name).restype = ctypes.c_char_p
    library.stand_in_live_bytes.restype = ctypes.c_size_t
    return library


_runtime: Any = _load() if active else None


def attach(bridge: Path) -> None:
    """Connects the runtime to torch's allocator and streams, and overrides torch's own operators."""
    import torch

    torch.cuda.init()
    library = ctypes.CDLL(str(bridge))
    library.stand_in_attach()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel.*")
        library.stand_in_override_operators()
    torch.backends.cudnn.enabled = False  # its convolutions have no CPU kernel of the same name


def faults() -> list[str]:
    """The faults since the last call."""
    return _runtime.stand_in_faults().decode().splitlines()


def counts() -> Counts:
    result = Counts()
    _runtime.stand_in_get_counts(ctypes.byref(result))
    return result


def live_bytes(device: int) -> int:
    """Bytes in live blocks of the caching allocator."""
    return int(_runtime.stand_in_live_bytes(device))


@dataclass
class Recording:
    """The launches inside `recorded()`, each as a dictionary (see runtime/launches.cpp), and counts of other calls."""

    launches: list[dict[str, Any]] = field(default_factory=list)
    torch_operations: int = 0
    """torch's own operators on CUDA tensors; most are one launch."""
    synchronizations: int = 0
    device_allocations: int = 0
    """Number of cudaMalloc calls."""
    allocations: int = 0
    """Number of blocks allocated by the caching allocator."""
    allocated_bytes: int = 0


@contextmanager
def recorded() -> Iterator[Recording]:
    result, before = Recording(), counts()
    _runtime.stand_in_record_launches(True)
    try:
        yield result
    finally:
        _runtime.stand_in_record_launches(False)
        result.launches = [json.loads(line) for line in _runtime.stand_in_launches().decode().splitlines()]
        after = counts()
        for name in _COUNTED[1:]:
            setattr(result, name, getattr(after, name) - getattr(before, name))


@contextmanager
def never_waits() -> Iterator[None]:
    """Makes each synchronization, device-to-host read and cudaMalloc a fault."""
    _runtime.stand_in_forbid_waiting(True)
    try:
        yield
    finally:
        _runtime.stand_in_forbid_waiting(False)


@contextmanager
def stream_order(name: str) -> Iterator[None]:
    """Sets the order of streams that no event orders: "latest", or a number that seeds a random order."""
    _runtime.stand_in_set_order(name.encode())
    try:
        yield
    finally:
        _runtime.stand_in_set_order(b"latest")


@contextmanager
def kernels_skipped() -> Iterator[None]:
    """Checks and counts kernels without running them, for sizes that would take too long."""
    _runtime.stand_in_skip_kernels(True)
    try:
        yield
    finally:
        _runtime.stand_in_skip_kernels(False)


@contextmanager
def refused_cooperative_launches(how: int) -> Iterator[None]:
    """Refuses cooperative launches, as MPS can: the device attribute is 0, or each launch fails as too large."""
    _runtime.stand_in_refuse_cooperative(how)
    try:
        yield
    finally:
        _runtime.stand_in_refuse_cooperative(NOT_REFUSED)
