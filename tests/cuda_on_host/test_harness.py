"""The harness itself: threads of a block meet at barriers and share memory, and a missing barrier shows."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from .conftest import CSRC, HERE, cuda_headers

SOURCE = r"""
#include "common/cuda.cuh"
template <bool BARRIER>
__global__ void reverse(const float* in, float* out) {
  __shared__ float tile[64];
  tile[threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
  if (BARRIER) __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = tile[63 - threadIdx.x];
}
extern "C" void reverse_blocks(const float* in, float* out, int blocks, bool barrier) {
  if (barrier) {
    AFA_LAUNCH((reverse<true>), blocks, 64, nullptr, in, out);
  } else {
    AFA_LAUNCH((reverse<false>), blocks, 64, nullptr, in, out);
  }
}
"""


@pytest.mark.parametrize("barrier", [True, False])
def test_barrier(barrier: bool, tmp_path: Path) -> None:
    headers = cuda_headers()
    if headers is None:
        pytest.skip("the CUDA toolkit's headers (cuda_fp16.h) are not installed")
    (tmp_path / "reverse.cpp").write_text(SOURCE)
    library = tmp_path / "reverse.so"
    flags = [
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-DAFA_CUDA_ON_HOST",
        f"-I{CSRC}",
        f"-I{HERE}",
        f"-isystem{headers}",
        f"-isystem{headers / 'cccl'}",
    ]
    subprocess.run(["g++", *flags, str(tmp_path / "reverse.cpp"), "-o", str(library)], check=True)
    values = (ctypes.c_float * 128)(*range(128))
    out = (ctypes.c_float * 128)()
    ctypes.CDLL(str(library)).reverse_blocks(values, out, 2, barrier)
    expected = [*range(63, -1, -1), *range(127, 63, -1)]
    assert (list(out) == expected) == barrier
