"""Runs every operator, including backward passes, on the stand-in GPU: on each device, on a side stream, while device 0
is current. Prints the launches as JSON. Fails if an operator launches nothing or something wrong.

test_shipped.py runs this script with the shipped library and with the host-compiled kernels. Kernels are not executed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.cuda import device

device.attach(Path(os.environ["AFA_STAND_IN_BRIDGE"]))

import afa_ext  # noqa: E402, F401  (registers the operators; needs the devices)
from tests.afa_ext.test_ops_meta import CASES  # noqa: E402


def launches_on(index: int, name: str) -> list[dict[str, Any]]:
    stream = torch.cuda.Stream(index)
    result: list[dict[str, Any]] = []
    for arguments in CASES[name](lambda *shape: torch.rand(*shape, device=f"cuda:{index}")):
        given = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
        with torch.cuda.stream(stream):
            torch.cuda.set_device(0)  # `stream` remains the current stream of its device
            stream.wait_stream(torch.cuda.default_stream(index))
            with device.recorded() as recording:
                out = getattr(torch.ops.afa_ext, name)(*given)
        assert out.device.index == index
        assert torch.cuda.current_device() == 0
        assert recording.launches, f"{name} did not launch a kernel"
        assert recording.synchronizations == 0, f"{name} waited for the device"
        for launch in recording.launches:
            assert launch["device"] == index, launch
            assert launch["stream"] == stream.cuda_stream, launch
        result += recording.launches
    torch.cuda.synchronize(index)
    faults = device.faults()
    assert not faults, faults
    return result


def main() -> None:
    with device.kernels_skipped():
        print(json.dumps({name: [launches_on(index, name) for index in (0, 1)] for name in sorted(CASES)}))


if __name__ == "__main__":
    main()
