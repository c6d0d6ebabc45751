"""Builds the stand-in GPU: its runtime, the bridge to torch, and the package with kernels compiled by g++.

Only changed files are compiled. The output is in build/cuda_stand_in, which is locked: one process builds at a time.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
RUNTIME, KERNELS, BRIDGE = HERE / "runtime", HERE / "kernels", HERE / "bridge"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
# For the .cu files in the checked build: inserts calls to the functions of memory_check.cpp before each access.
CHECKED = ["-fsanitize=thread,alignment,bounds"]
# For csrc's host code: launch arguments are searched for pointers, and uninitialized parts of a struct must not look
# like pointers. Not for the .cu files: with -fsanitize=thread, GCC 12 then zeroes a variable that is set.
ZEROED = ["-ftrivial-auto-var-init=zero"]
HARNESS = [KERNELS / name for name in ("cuda_on_host.cpp", "memory_check.cpp", "async_copy.cpp")]
TORCH_LIBRARIES = ("libc10_cuda.so", "libtorch_cuda.so", "libtorch_python.so", "libtorch_cuda_linalg.so")
# Functions that torch imports and that may do nothing: the host does not depend on their results.
SUCCEED = ("cudaProfilerStart", "cudaProfilerStop")

P = ParamSpec("P")
T = TypeVar("T")
_holds_lock = False


def one_at_a_time(function: Callable[P, T]) -> Callable[P, T]:
    """Holds a lock on the build folder during a call, because pytest-xdist's workers build concurrently. Reentrant."""

    @wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        global _holds_lock
        if _holds_lock:
            return function(*args, **kwargs)
        target_folder = ROOT / "build" / "cuda_stand_in"
        target_folder.mkdir(parents=True, exist_ok=True)
        with open(target_folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _holds_lock = True
            try:
                return function(*args, **kwargs)
            finally:
                _holds_lock = False

    return locked


@cache
def cuda_headers() -> Path | None:
    """The toolkit's include folder: that of the nvcc in use, or the default location."""
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


def why_not() -> str | None:
    """Why the stand-in can't be built on this machine; None if it can."""
    import torch

    if cuda_headers() is None:
        return "the CUDA toolkit's headers (cuda_fp16.h) are not installed"
    if torch.version.cuda is None:
        return "torch is a CPU build; the stand-in GPU needs a CUDA build of torch, not a GPU"
    return None


def torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


def torch_includes() -> list[str]:
    include = torch_folder() / "include"
    return [f"-isystem{path}" for path in (include, include / "torch" / "csrc" / "api" / "include")]


def folder(sanitize: bool) -> Path:
    import torch

    return ROOT / "build" / "cuda_stand_in" / f"torch{torch.__version__}-{'sanitized' if sanitize else 'checked'}"


def newer(target: Path, *sources: Path) -> bool:
    return target.exists() and target.stat().st_mtime > max(path.stat().st_mtime for path in sources)


def compile_objects(sources: Sequence[Path], target_folder: Path, flags: Sequence[str]) -> list[str]:
    """Compiles changed files; returns the paths of all object files."""
    headers = cuda_headers()
    assert headers is not None
    target_folder.mkdir(parents=True, exist_ok=True)
    common = ["g++", "-std=c++17", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror"]
    common += ["-Wno-unknown-pragmas", f"-I{CSRC}", f"-I{KERNELS}", f"-I{HERE}"]
    common += [f"-isystem{path}" for path in (headers, headers / "cccl")]

    def build(source: Path) -> str:
        target = target_folder / (source.relative_to(ROOT).as_posix().replace("/", "-") + ".o")
        depends = target.with_suffix(".d")
        unfinished, known = target.with_suffix(".new"), target.with_suffix(".command")
        command = [*common, "-O2", *flags]
        if source.suffix == ".cpp" and CSRC in source.parents:
            command += ZEROED
        if source.suffix == ".cu":
            command += ["-DAFA_CUDA_ON_HOST"]
            command += CHECKED if not set(SANITIZE) & set(flags) else []
        command += ["-MMD", "-MF", str(depends), "-x", "c++", "-c", str(source), "-o", str(unfinished)]
        if target.exists() and depends.exists() and known.exists() and known.read_text() == " ".join(command):
            paths = depends.read_text().replace("\\\n", " ").split()[1:]
            if all(os.path.exists(path) for path in paths) and newer(target, *map(Path, paths)):
                return str(target)
        subprocess.run(command, check=True)
        known.write_text(" ".join(command))
        if source.suffix == ".cu":  # its only zero-initialized variables are in shared memory
            subprocess.run(["objcopy", "--rename-section", ".bss=afa_shared", str(unfinished)], check=True)
        unfinished.rename(target)
        return str(target)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(build, sources))


def link(objects: Sequence[str], target: Path, *flags: str) -> Path:
    if not newer(target, *map(Path, objects)):
        subprocess.run(["g++", *objects, *flags, "-o", str(target)], check=True)
    return target


# ---- the runtime ----


def symbols(library: Path, option: str) -> set[str]:
    output = subprocess.run(["nm", "-D", option, str(library)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in output.splitlines() if line.strip()}


@one_at_a_time
def build_runtime() -> Path:
    """Builds libstand_in_cudart.so, which is preloaded, and libcuda.so.1; returns their folder."""
    target_folder = folder(sanitize=False) / "runtime"
    objects = compile_objects(sorted(set(RUNTIME.glob("*.cpp")) - {RUNTIME / "driver.cpp"}), target_folder, [])
    library = target_folder / "libstand_in_cudart.so"
    if not newer(library, *map(Path, objects)):
        known = link(objects, target_folder / "known.so", "-shared", "-ldl")
        wanted = set[str]()
        for name in TORCH_LIBRARIES:
            path = torch_folder() / "lib" / name
            wanted |= {s for s in symbols(path, "--undefined-only") if s.startswith(("cuda", "__cuda"))}
        missing = target_folder / "not_implemented.cpp"
        lines = [
            '#include "runtime/runtime.h"',
            "",
            "// Functions of the CUDA runtime that torch imports and that the stand-in does not implement.",
        ]
        for name in sorted(wanted - symbols(known, "--defined-only")):
            body = "" if name in SUCCEED else f' stand_in::fault(cudaErrorNotSupported, "{name} is not implemented");'
            result = "cudaSuccess" if name in SUCCEED else "cudaErrorNotSupported"
            lines.append(f'extern "C" __attribute__((visibility("default"))) int {name}_() __asm__("{name}");')
            lines.append(f"int {name}_() {{{body} return {result}; }}")
        missing.write_text("\n".join(lines) + "\n")
        subprocess.run(
            ["g++", "-std=c++17", "-fPIC", "-shared", f"-I{HERE}", f"-isystem{cuda_headers()}", str(missing), *objects]
            + ["-ldl", f"-Wl,-soname,{library.name}", "-o", str(library)],
            check=True,
        )
    driver = compile_objects([RUNTIME / "driver.cpp"], target_folder, [])
    link(driver, target_folder / "libcuda.so.1", "-shared", "-Wl,-soname,libcuda.so.1")
    return target_folder


def runtime_link_flags() -> list[str]:
    path = build_runtime()
    return [f"-L{path}", "-lstand_in_cudart", f"-Wl,-rpath,{path}"]


@one_at_a_time
def build_bridge() -> Path:
    """Builds the library that reports torch's state to the runtime and computes torch's own operators."""
    target_folder = folder(sanitize=False) / "bridge"
    flags = ["-std=c++20", *torch_includes()]
    objects = compile_objects(sorted(BRIDGE.glob("*.cpp")), target_folder, flags)
    libraries = [f"-L{torch_folder() / 'lib'}", "-ltorch_cpu", "-lc10", "-lc10_cuda"]
    return link(objects, target_folder / "bridge.so", "-shared", *libraries, *runtime_link_flags())


# ---- the package ----


@one_at_a_time
def build_package(sanitize: bool = False) -> Path:
    """Builds a copy of the package afa_ext with kernels compiled by g++; returns the folder that contains it."""
    import pybind11
    import torch

    extra = SANITIZE if sanitize else []
    flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DAFA_SIMD=baseline", "-DAFA_WITH_CUDA", *extra]
    flags.append("-DAFA_LABEL_SCRATCH_BYTES=65536")
    flags += [*torch_includes(), f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    flags += [
        '-DAFA_BUILD_COMPILER="GNU 0.0 (CUDA kernels on the CPU)"',
        '-DAFA_BUILD_TYPE="test"',
        f'-DAFA_BUILD_TORCH="{torch.__version__}"',
        f'-DAFA_BUILD_CUDA="{torch.version.cuda}"',
        '-DAFA_BUILD_CUDA_ARCHITECTURES="host"',
    ]
    target_folder = folder(sanitize)
    objects = compile_objects(sorted({*CSRC.rglob("*.cpp"), *CSRC.rglob("*.cu"), *HARNESS}), target_folder, flags)
    libraries = [f"-L{torch_folder() / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    libraries += ["-ltorch_cpu", "-lc10", *runtime_link_flags()]
    library = link(objects, target_folder / "_C.so", "-shared", *extra, "-Wl,-Bsymbolic", *libraries)
    return copy_package(target_folder / "lib", library)


def copy_package(target_folder: Path, library: Path) -> Path:
    """Creates a copy of the package afa_ext with this library; returns the folder that contains it."""
    package = target_folder / "afa_ext"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "afa_ext", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy2(library, package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
    return target_folder


# ---- the shipped library ----


def native_folder() -> Path:
    """The build folder of setup.py."""
    default = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
    return Path(os.environ.get("AFA_EXT_BUILD_DIR") or default).resolve()


def link_command() -> list[str]:
    """CMake's link command for `_C`."""
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    output = subprocess.run(
        [str(ninja), "-C", str(native_folder()), "-t", "commands", "_C"], capture_output=True, text=True, check=True
    ).stdout
    return shlex.split(output.splitlines()[-1].removeprefix(": && ").removesuffix(" && :"))


def why_not_shipped() -> str | None:
    """Why the shipped library can't be linked to the stand-in runtime; None if it can."""
    if not (native_folder() / "build.ninja").exists():
        return f"the library was not built on this machine: {native_folder()} does not exist"
    command = link_command()
    if not any("cudart_static" in word for word in command):
        return "the library was built without CUDA"
    missing = [word for word in command if word.endswith(".o") and not (native_folder() / word).exists()]
    return f"an object file of the library does not exist: {missing[0]}" if missing else None


@one_at_a_time
def build_shipped_package(linked_to_torch: bool) -> Path:
    """Creates a copy of the package with the shipped library, linked by CMake's command except for the runtime. Returns
    the folder that contains it. Without `linked_to_torch`, libtorch.so is not linked either, so the library can't find
    torch's CUDA functions."""
    target_folder = folder(sanitize=False) / ("shipped" if linked_to_torch else "shipped_without_torch")
    target_folder.mkdir(parents=True, exist_ok=True)
    command = link_command()
    library = target_folder / "_C.so"
    command[command.index("-o") + 1] = str(library)
    removed = ["cudart_static"] + ([] if linked_to_torch else ["libtorch.so"])
    command = [word for word in command if not any(name in word for name in removed)]
    subprocess.run([*command, *runtime_link_flags()], check=True, cwd=native_folder())
    return copy_package(target_folder / "lib", library)


@one_at_a_time
def build_planted_faults() -> Path:
    """Builds the library of planted_faults.cu."""
    target_folder = folder(sanitize=False) / "planted_faults"
    sources = [HERE / "planted_faults.cu", CSRC / "common" / "device.cpp", *HARNESS]
    objects = compile_objects(sources, target_folder, ["-DAFA_WITH_CUDA"])
    flags = ["-shared", "-Wl,-Bsymbolic", *runtime_link_flags(), "-ldl"]
    return link(objects, target_folder / "planted_faults.so", *flags)


@one_at_a_time
def build_program(source: Path, sanitize: bool) -> Path:
    """Builds a program from one .cu file with a main function."""
    extra = SANITIZE if sanitize else []
    target_folder = folder(sanitize) / source.stem
    device = CSRC / "common" / "device.cpp"
    objects = compile_objects([source, device, *HARNESS], target_folder, ["-DAFA_WITH_CUDA", *extra])
    return link(objects, target_folder / source.stem, *runtime_link_flags(), "-ldl", *extra)


if __name__ == "__main__":
    print(build_runtime(), build_bridge(), build_package("--sanitize" in sys.argv))
