from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from . import build

ORDERS = ("forward", "backward", "1", "2")


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8) if t.numel() > 0 else t


class Kernels:
    """Every operator, computed by the CUDA kernels on CPU tensors: in several orders of threads and blocks, which
    must give the same result to the last bit."""

    def __init__(self, library: Any, operators: Any) -> None:
        self.library, self.operators = library, operators

    @contextmanager
    def forced(self, kernel: str, variant: str) -> Iterator[None]:
        """Launches this variant of the kernel, whatever the plan. Fails if the kernel is never launched."""
        force, times_chosen = self.library.cuda_on_host_force, self.library.cuda_on_host_times_chosen
        force.restype, times_chosen.restype = ctypes.c_bool, ctypes.c_int64
        before = times_chosen(kernel.encode())
        assert force(kernel.encode(), variant.encode())
        try:
            yield
        finally:
            assert force(kernel.encode(), None)
        assert times_chosen(kernel.encode()) > before, f"nothing here launches {kernel}"

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self.operators, name)

        def call(*arguments: Any) -> Tensor:
            results = []
            for order in ORDERS:
                self.library.cuda_on_host_order(order.encode())
                results.append(operator(*arguments))
            for order, result in zip(ORDERS[1:], results[1:], strict=True):
                same = torch.equal(bits(result), bits(results[0]))
                assert same, f"{name}: the order {order} of threads and blocks gives another result than {ORDERS[0]}"
            return results[0]

        return call


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    if build.cuda_headers() is None:
        pytest.skip("the CUDA toolkit's headers (cuda_fp16.h) are not installed")
    library = build.build_library(sanitize=bool(os.environ.get("AFA_CUDA_ON_HOST_SANITIZE")))
    torch.ops.load_library(str(library))
    return Kernels(ctypes.CDLL(str(library)), torch.ops.afa_ext_cuda_on_host)
