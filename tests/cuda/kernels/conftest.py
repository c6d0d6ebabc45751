from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from afa_ext import _native

from .. import device

ORDERS = ("forward", "backward", "1", "2")
C = _native._C


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8) if t.numel() > 0 else t


def to(device: str, value: Any) -> Any:
    """Copies tensors to another device. Keeps their strides, and the alignment of their first element."""
    if not isinstance(value, Tensor) or value.device.type == device:
        return value
    size = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    offset = value.storage_offset() % 16
    if value.numel() == 0:
        return value.to(device)
    whole = torch.empty(offset + size, dtype=value.dtype, device=device)
    return torch.as_strided(whole, value.shape, value.stride(), offset).copy_(value)


class Kernels:
    """Calls every operator on the stand-in GPU; arguments and results are on the CPU. Each call runs in several thread
    and block orders, whose results must be bitwise equal."""

    def __init__(self) -> None:
        self.set_order = ctypes.CDLL(C.__file__).cuda_on_host_order

    @contextmanager
    def forced(self, kernel: str, variant: str) -> Iterator[None]:
        """Launches this variant of the kernel instead of the rule's choice. Fails if the kernel is not launched."""

        def times_picked() -> int:
            return next(entry["times_picked"] for entry in C.kernel_variants() if entry["kernel"] == kernel)

        before = times_picked()
        C.force_variant(kernel, variant)
        try:
            yield
        finally:
            C.force_variant(kernel, None)
        assert times_picked() > before, f"{kernel} was not launched"

    def __getattr__(self, name: str) -> Any:
        operator = getattr(torch.ops.afa_ext, name)

        def call(*arguments: Any) -> Tensor:
            given = [to("cuda", value) for value in arguments]
            results = []
            for order in ORDERS:
                self.set_order(order.encode())
                results.append(operator(*given).cpu())
            self.set_order(b"any")
            for order, result in zip(ORDERS[1:], results[1:], strict=True):
                same = torch.equal(bits(result), bits(results[0]))
                assert same, f"{name}: thread and block order {order} changes the result of order {ORDERS[0]}"
            return results[0]

        return call


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    if not device.active:
        pytest.skip("runs on the stand-in GPU: python -m tests.cuda.run")
    return Kernels()
