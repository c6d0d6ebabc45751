"""Numeric precision of a forward pass: autocast, and TF32 on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def precision(device: torch.device, name: str) -> Iterator[None]:
    """Context manager that computes in train.precision `name`: fp32, tf32, bf16 or fp16."""
    half = HALF.get(name)
    if half is not None:
        with torch.autocast(device.type, half):
            yield
        return
    with tf32(name == "tf32" and device.type == "cuda"):
        yield


def inference_precision(device: torch.device, name: str) -> AbstractContextManager[None]:
    """The precision for evaluating a model trained in `name`: the same one, except float32 instead of float16."""
    return precision(device, "fp32" if name == "fp16" else name)


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Use TF32 for float32 matrix products and convolutions on a GPU, if enabled; restore the settings afterwards."""
    if not enabled:
        yield
        return
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
