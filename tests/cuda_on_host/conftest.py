from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_on_host"
# The SIMD files are never called in this build, but the host code names them.
CPU_SOURCES = sorted(str(path.relative_to(CSRC)) for path in CSRC.rglob("*.cpp"))
CUDA_SOURCES = sorted(str(path.relative_to(CSRC)) for path in CSRC.rglob("*.cu"))


def cuda_headers() -> Path | None:
    """The toolkit's include folder: where the nvcc in use says it lies, or the usual place."""
    nvcc = shutil.which("nvcc")
    candidates = [Path("/usr/local/cuda/include")]
    if nvcc:
        listing = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False
        )
        for line in listing.stderr.splitlines():
            if line.startswith("#$ TOP="):
                candidates.insert(0, Path(line.removeprefix("#$ TOP=").strip()) / "include")
    return next((path for path in candidates if (path / "cuda_fp16.h").exists()), None)


def compile_all(headers: Path) -> Path:
    """Compiles what changed and links it into one library."""
    BUILD.mkdir(parents=True, exist_ok=True)
    inputs = [*CSRC.rglob("*"), HERE / "cuda_on_host.h", Path(__file__)]
    newest = max(path.stat().st_mtime for path in inputs if path.is_file())
    library = BUILD / f"afa_cuda_on_host-torch{torch.__version__}.so"
    if library.exists() and library.stat().st_mtime > newest:
        return library
    common = [
        "g++",
        "-std=c++17",
        "-O1",
        "-g",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-DAFA_CUDA_ON_HOST",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DAFA_SIMD=baseline",
        f"-I{CSRC}",
        f"-I{HERE}",
    ]
    common += [f"-isystem{path}" for path in [headers, headers / "cccl", *include_paths()]]

    def build(source: str) -> str:
        target = str(BUILD / (source.replace("/", "-") + ".o"))
        subprocess.run([*common, "-x", "c++", "-c", str(CSRC / source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, [*CPU_SOURCES, *CUDA_SOURCES]))
    folders = [f"-L{path}" for path in library_paths()]
    subprocess.run(["g++", "-shared", *objects, *folders, "-ltorch_cpu", "-lc10", "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="session")
def kernels() -> Any:
    """torch.ops.afa_ext_cuda_on_host: every operator, computed by the CUDA kernels on CPU tensors."""
    headers = cuda_headers()
    if headers is None:
        pytest.skip("the CUDA toolkit's headers (cuda_fp16.h) are not installed")
    torch.ops.load_library(str(compile_all(headers)))
    return torch.ops.afa_ext_cuda_on_host
