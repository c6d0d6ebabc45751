"""Runs every operator, backward passes included, on the stand-in GPU: on each device, on a side stream, while device 0
is current. Prints, as JSON, the launches of each; ends with an error where one has none or a wrong one.

Run by test_shipped.py, with the shipped library and with the host-compiled kernels; kernels are not executed.
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


def launches_on(place: int, name: str) -> list[dict[str, Any]]:
    stream = torch.cuda.Stream(place)
    result: list[dict[str, Any]] = []
    for arguments in CASES[name](lambda *shape: torch.rand(*shape, device=f"cuda:{place}")):
        given = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
        with torch.cuda.stream(stream):
            torch.cuda.set_device(0)  # the side stream stays device `place`'s current one
            stream.wait_stream(torch.cuda.default_stream(place))
            with device.recorded() as recording:
                out = getattr(torch.ops.afa_ext, name)(*given)
        assert out.device.index == place
        assert torch.cuda.current_device() == 0
        assert recording.launches, f"{name} launches nothing"
        assert recording.synchronizations == 0, f"{name} waits for the device"
        for launch in recording.launches:
            assert launch["device"] == place, launch
            assert launch["stream"] == stream.cuda_stream, launch
        result += recording.launches
    torch.cuda.synchronize(place)
    faults = device.faults()
    assert not faults, faults
    return result


def main() -> None:
    with device.kernels_skipped():
        print(json.dumps({name: [launches_on(place, name) for place in (0, 1)] for name in sorted(CASES)}))


if __name__ == "__main__":
    main()
