"""Faults in host code around a launch: a correct and a faulty version of each, and what detects it (see README.md)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from . import build, device

pytestmark = pytest.mark.skipif(not device.active, reason="runs on the stand-in GPU: python -m tests.cuda.run")
COUNT = 700  # more than the stand-in's largest grid


class Planted:
    """The library of planted_faults.cu, called with pointers and stream handles. Launch errors raise RuntimeError."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(build.build_planted_faults()))

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self.library, f"planted_{name}")
        function.restype = ctypes.c_char_p

        def call(source: Tensor | int, target: Tensor | int, stream: int | None = None, *flags: bool) -> None:
            pointers = [t.data_ptr() if isinstance(t, Tensor) else t for t in (source, target)]
            handle = torch.cuda.current_stream().cuda_stream if stream is None else stream
            error = function(*map(ctypes.c_void_p, pointers), ctypes.c_int64(COUNT), ctypes.c_void_p(handle), *flags)
            if error is not None:
                raise RuntimeError(error.decode())

        return call


@pytest.fixture(scope="session")
def planted() -> Planted:
    return Planted()


def values(name: str = "cuda:0") -> tuple[Tensor, Tensor]:
    """An input, and an output for its double."""
    source = torch.arange(COUNT, dtype=torch.float32).to(name)
    target = torch.zeros(COUNT, device=name)
    torch.cuda.synchronize(name)
    return source, target


def missing_device_guard(planted: Any, wrong: bool) -> Tensor:
    source, target = values("cuda:1")
    with torch.cuda.device(0 if wrong else 1):
        planted.double(source, target, torch.cuda.Stream(1).cuda_stream if wrong else None)
    return target


def pointer_of_another_device(planted: Any, wrong: bool) -> Tensor:
    source, target = values("cuda:1")
    with torch.cuda.device(0 if wrong else 1):
        planted.double(source, target)
    return target


def default_stream_instead_of_the_current(planted: Any, wrong: bool) -> Tensor:
    source, target = values()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        planted.double(source, target, 0 if wrong else None)
    side.synchronize()
    return target


def stream_id_as_handle(planted: Any, wrong: bool) -> Tensor:
    source, target = values()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        planted.double(source, target, side.stream_id if wrong else None)
    side.synchronize()
    return target


def pointer_to_host_memory(planted: Any, wrong: bool) -> Tensor:
    source, target = values()
    on_host = torch.zeros(COUNT + 1)[1:]  # the lowest byte of its address is not 0
    planted.double(on_host if wrong else source, target)
    return target


def freed_block(planted: Any, wrong: bool) -> Tensor:
    source, target = values()
    scratch = torch.empty(COUNT, device="cuda")
    planted.double(source, scratch)
    at = scratch.data_ptr()
    if wrong:
        del scratch
    planted.double(at, target)
    return target / 2


def scratch_freed_under_another_stream(planted: Any, wrong: bool) -> Tensor:
    source, target = values()
    scratch = torch.empty(COUNT, device="cuda")  # on the default stream
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        planted.double(source, scratch)
        planted.double(scratch, target)
    if not wrong:
        scratch.record_stream(side)
    del scratch
    side.synchronize()
    return target / 2


def missing_wait_between_streams(planted: Any, wrong: bool) -> Tensor:
    source, target = values()
    between = torch.zeros(COUNT, device="cuda")
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        planted.double(source, between)
    with torch.cuda.stream(second):
        if not wrong:
            second.wait_stream(first)
        planted.double(between, target)
    second.synchronize()
    torch.cuda.synchronize()
    return target / 2


def missing_wait_for_torch(planted: Any, wrong: bool) -> Tensor:
    """The same for an operator of torch."""
    source, target = values()
    between = torch.zeros(COUNT, device="cuda")
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        between.add_(source)
    with torch.cuda.stream(second):
        if not wrong:
            second.wait_stream(first)
        planted.double(between, target)
    second.synchronize()
    torch.cuda.synchronize()
    return target


def wait_for_the_device_in_the_hot_path(planted: Any, wrong: bool) -> Tensor:
    source, target = values()
    with device.never_waits():
        planted.double(source, target)
        if wrong:
            torch.cuda.current_stream().synchronize()
    return target


def value_read_in_the_hot_path(planted: Any, wrong: bool) -> Tensor:
    source, target = values()
    with device.never_waits():
        planted.double(source, target)
        if wrong:
            target[3].item()
    return target


def captured(work: Callable[[], None], target: Tensor) -> Tensor:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    assert not target.any()  # nothing has run yet
    graph.replay()
    return target


def synchronization_in_a_capture(planted: Any, wrong: bool) -> Tensor:
    source, target = values()

    def work() -> None:
        planted.double(source, target)
        if wrong:
            torch.cuda.current_stream().synchronize()

    return captured(work, target)


def allocation_in_a_capture(planted: Any, wrong: bool) -> Tensor:
    source, target = values()
    at = ctypes.c_void_p()

    def work() -> None:
        planted.double(source, target)
        if wrong:
            ctypes.CDLL(None).cudaMalloc(ctypes.byref(at), ctypes.c_size_t(512))

    return captured(work, target)


def unjoined_work_in_a_capture(planted: Any, wrong: bool) -> Tensor:
    source, target = values()
    side = torch.cuda.Stream()

    def work() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            planted.double(source, target)
        if not wrong:
            torch.cuda.current_stream().wait_stream(side)

    return captured(work, target)


def missing_wait_in_a_capture(planted: Any, wrong: bool) -> Tensor:
    source, target = values()
    between, side = torch.zeros(COUNT, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()

    def work() -> None:
        if wrong:
            side.wait_stream(torch.cuda.current_stream())
        planted.double(source, between)
        if not wrong:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            planted.double(between, target)
        torch.cuda.current_stream().wait_stream(side)

    return captured(work, target) / 2


def error_that_nobody_fetches(planted: Any, wrong: bool) -> Tensor:
    source, target = values()
    if wrong:
        planted.too_many_threads(source, target, None, False)
    else:
        with pytest.raises(RuntimeError, match="invalid configuration argument"):
            planted.too_many_threads(source, target, None, True)
    planted.double(source, target)
    return target


def error_left_by_a_fallback(planted: Any, wrong: bool) -> Tensor:
    source, target = values()
    with device.refused_cooperative_launches(device.TOO_LARGE):
        planted.fallback(source, target, None, not wrong)
    return target


# What detects each fault: an error or fault with this text, or wrong values.
VALUES = "wrong values"
FAULTS: dict[Callable[[Any, bool], Tensor], str] = {
    missing_device_guard: "launch of double_kernel on a stream of device 1 while device 0 is current",
    pointer_of_another_device: "launch of double_kernel on device 0 with a pointer to memory of device 1",
    default_stream_instead_of_the_current: "which is not torch's current stream of device 0",
    stream_id_as_handle: "is not a stream handle; is it a stream ID?",
    pointer_to_host_memory: "launch of double_kernel with host pointer",
    freed_block: "which is in a freed block of 2800 bytes",
    scratch_freed_under_another_stream: "was freed on its stream while a launch of double_kernel",
    missing_wait_between_streams: VALUES,
    missing_wait_for_torch: VALUES,
    wait_for_the_device_in_the_hot_path: "cudaStreamSynchronize where the host must not wait for the device",
    value_read_in_the_hot_path: "where the host must not wait for the device",
    synchronization_in_a_capture: "operation not permitted when stream is capturing: cudaStreamSynchronize",
    allocation_in_a_capture: "operation not permitted when stream is capturing: cudaMalloc",
    missing_wait_in_a_capture: VALUES,
    unjoined_work_in_a_capture: "the capture ended with work that its stream has not joined",
    error_that_nobody_fetches: "the error of the launch of double_kernel was never fetched",
    error_left_by_a_fallback: "the error of the launch of cooperative_kernel was never fetched",
}
every_fault = pytest.mark.parametrize("fault", list(FAULTS), ids=lambda fault: fault.__name__)


@every_fault
def test_correct_code_has_no_fault(fault, planted):
    result = fault(planted, False)
    assert torch.equal(result.cpu(), 2 * torch.arange(COUNT, dtype=torch.float32))
    assert device.faults() == []


@every_fault
def test_planted_fault_is_caught(fault, planted):
    raised = ""
    try:
        result = fault(planted, True).cpu()
    except RuntimeError as error:
        raised, result = str(error), None
    found = device.faults()
    if FAULTS[fault] == VALUES:
        assert found == []
        assert not torch.equal(result, 2 * torch.arange(COUNT, dtype=torch.float32))
    else:
        assert any(FAULTS[fault] in text for text in [raised, *found])
