"""The shipped library on the stand-in GPU: nvcc's object files, linked like `_C` except for the runtime.

Checks that each operator reaches its launches. The kernels themselves don't run here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import build, run

Launches = dict[str, list[list[dict[str, Any]]]]


def launch_all(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "tests.cuda.launch_all"],
        capture_output=True,
        text=True,
        check=False,
        cwd=build.ROOT,
        env=env,
    )


def parsed(result: subprocess.CompletedProcess[str]) -> Launches:
    assert result.returncode == 0, result.stderr
    launches: Launches = json.loads(result.stdout)
    return launches


@pytest.fixture(scope="module")
def compiled_by_gcc() -> Launches:
    reason = build.why_not() or build.why_not_shipped()
    if reason is not None:
        pytest.skip(reason)
    return parsed(launch_all(run.environment()))


@pytest.fixture(scope="module")
def parameters(compiled_by_gcc: Launches, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes the sizes of each kernel's parameters to a file; nvcc's code does not report them to the runtime."""
    path: Path = tmp_path_factory.mktemp("shipped") / "parameters"
    every = [launch for devices in compiled_by_gcc.values() for launches in devices for launch in launches]
    sizes = {launch["kernel"]: " ".join(map(str, launch["parameters"])) for launch in every}
    path.write_text("".join(f"{kernel} {text}\n" for kernel, text in sizes.items()))
    return path


def environment(parameters: Path, linked_to_torch: bool) -> dict[str, str]:
    package = build.build_shipped_package(linked_to_torch)
    env = run.settings(build.build_runtime(), build.build_bridge(), package)
    return {**env, "AFA_STAND_IN_PARAMETERS": str(parameters)}


def family(kernel: str) -> str:
    """The kernel's name; stencil_kernel for stencil_kept_kernel, which falls back to it if the grid is too small, as
    for the kernels compiled by gcc."""
    return "stencil_kernel" if kernel == "stencil_kept_kernel" else kernel


def test_every_operator_reaches_its_launches(compiled_by_gcc, parameters):
    shipped = parsed(launch_all(environment(parameters, linked_to_torch=True)))
    assert shipped.keys() == compiled_by_gcc.keys()
    for name, devices in shipped.items():
        for launches, expected in zip(devices, compiled_by_gcc[name], strict=True):
            kernels, known = ({family(launch["kernel"]) for launch in given} for given in (launches, expected))
            assert kernels == known, name


def test_a_library_without_torch_cuda_fails(parameters):
    """Without a dependency on libtorch.so, the library can't find torch's current stream, and every CUDA call fails."""
    result = launch_all(environment(parameters, linked_to_torch=False))
    assert result.returncode != 0
    assert "RuntimeError: this torch has no CUDA support" in result.stderr
