"""Compiles the project's .cu files with g++ (see cuda_on_host.h), plain or for AddressSanitizer and
UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_on_host"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
# For the .cu files where nothing is sanitized: calls before each access, to the functions of memory_check.cpp.
CHECKED = ["-fsanitize=thread,alignment,bounds"]
LIBRARY = "-DAFA_CUDA_ON_HOST_LIBRARY"
RUNTIME = [HERE / "cuda_on_host.cpp", HERE / "memory_check.cpp", HERE / "async_copy.cpp"]


@cache
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


def compile_objects(sources: Sequence[Path], folder: Path, flags: Sequence[str]) -> list[str]:
    """Compiles what changed; the objects' paths."""
    headers = cuda_headers()
    if headers is None:
        raise SystemExit("the CUDA toolkit's headers (cuda_fp16.h) are not installed")
    folder.mkdir(parents=True, exist_ok=True)
    common = ["g++", "-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror"]
    common += ["-Wno-unknown-pragmas", f"-I{CSRC}", f"-I{HERE}"]
    common += [f"-isystem{path}" for path in (headers, headers / "cccl")]
    shared_by_all = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *HERE.glob("*.h"), Path(__file__)]
    newest = max(path.stat().st_mtime for path in shared_by_all)

    def build(source: Path) -> str:
        target = folder / (source.relative_to(ROOT).as_posix().replace("/", "-") + ".o")
        if target.exists() and target.stat().st_mtime > max(newest, source.stat().st_mtime):
            return str(target)
        unfinished = target.with_suffix(".new")
        checked = CHECKED if source.suffix == ".cu" and not set(SANITIZE) & set(flags) else []
        if source.stem.endswith("_cpu"):  # named by the host code, never called
            checked = ["-O0", "-fno-sanitize=all"]
        command = [*common, *flags, *checked, "-x", "c++", "-c", str(source), "-o", str(unfinished)]
        subprocess.run(command, check=True)
        if source.suffix == ".cu":  # whose only variables that start as zeros are in shared memory
            subprocess.run(["objcopy", "--rename-section", ".bss=afa_shared", str(unfinished)], check=True)
        unfinished.rename(target)
        return str(target)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(build, sources))


def link(objects: Sequence[str], target: Path, *flags: str) -> Path:
    if not target.exists() or target.stat().st_mtime <= max(Path(path).stat().st_mtime for path in objects):
        subprocess.run(["g++", *objects, *flags, "-o", str(target)], check=True)
    return target


def compile_operators(sanitize: bool, registration: Sequence[str]) -> tuple[list[str], Path, list[str]]:
    """The objects of every operator's host functions and CUDA kernels, with ops.cpp compiled by the flags
    `registration`; the folder they lie in, and the flags to link them with."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    folder = BUILD / f"torch{torch.__version__}-{'sanitized' if sanitize else 'plain'}"
    extra = SANITIZE if sanitize else []
    flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DAFA_SIMD=baseline", *extra]
    flags += [f"-isystem{path}" for path in include_paths()]
    registering = [CSRC / "ops.cpp", CSRC / "module.cpp"]
    sources = sorted({*CSRC.rglob("*.cpp"), *CSRC.rglob("*.cu"), *RUNTIME} - {*registering})
    flags.append("-DAFA_CUDA_ON_HOST")
    objects = compile_objects(sources, folder, flags)
    kind = folder / ("library" if LIBRARY in registration else "module")
    objects += compile_objects(registering, kind, [*flags, *registration])
    folders = [f"-L{path}" for path in library_paths()]
    return objects, kind, ["-shared", *extra, "-Wl,-Bsymbolic", *folders, "-ltorch_cpu", "-lc10"]


def build_library(sanitize: bool = False) -> Path:
    """A library that registers torch.ops.afa_ext_cuda_on_host: every operator, computed by the CUDA kernels on CPU
    tensors."""
    objects, folder, flags = compile_operators(sanitize, [LIBRARY])
    return link(objects, folder / "afa_cuda_on_host.so", *flags)


def build_package(sanitize: bool = False) -> Path:
    """A folder with a copy of the package afa_ext whose operators are computed by the CUDA kernels on CPU tensors."""
    import pybind11
    import torch

    registration = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    registration += [
        '-DAFA_BUILD_COMPILER="GNU 0.0 (CUDA kernels on the CPU)"',
        '-DAFA_BUILD_TYPE="test"',
        f'-DAFA_BUILD_TORCH="{torch.__version__}"',
    ]
    objects, folder, flags = compile_operators(sanitize, registration)
    package = folder / "lib" / "afa_ext"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "afa_ext", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    library = link(objects, folder / "_C.so", *flags)
    shutil.copy2(library, package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
    return package.parent


def build_program(source: Path, sanitize: bool) -> Path:
    """A program of one .cu file with a main."""
    extra = SANITIZE if sanitize else []
    folder = BUILD / f"{source.stem}-{'sanitized' if sanitize else 'plain'}"
    objects = compile_objects([source, *RUNTIME], folder, ["-DAFA_CUDA_ON_HOST", *extra])
    return link(objects, folder / source.stem, "-ldl", *extra)
