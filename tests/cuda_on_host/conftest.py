from __future__ import annotations

import ctypes
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

    def __init__(self, set_order: Any, operators: Any) -> None:
        self.set_order, self.operators = set_order, operators

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self.operators, name)

        def call(*arguments: Any) -> Tensor:
            results = []
            for order in ORDERS:
                self.set_order(order.encode())
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
    library = build.build_library()
    torch.ops.load_library(str(library))
    return Kernels(ctypes.CDLL(str(library)).cuda_on_host_order, torch.ops.afa_ext_cuda_on_host)
