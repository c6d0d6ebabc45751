"""Cross-compiles the CPU library for Arm Linux (aarch64), with warnings as errors, and links it with an Arm torch.

    apt-get install g++-aarch64-linux-gnu
    python tools/arm_check.py                          # compile and link only
    python tools/arm_check.py --python /path/to/python # also compute the recorded cases, with an Arm interpreter

The interpreter can be a script that runs an Arm Python under qemu. It needs the Python version of this one, torch of at
least 2.10, and numpy. Python's own headers are those of this machine: they are the same on both.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "arm"
COMPILER = "aarch64-linux-gnu-g++"
TORCH = "2.10.0"  # the oldest supported version; its wheel for Arm contains no CUDA


def arm_torch() -> Path:
    """The folder of torch from its wheel for Arm, downloaded once."""
    folder = BUILD / "site"
    if not (folder / "torch" / "lib" / "libtorch_cpu.so").exists():
        wheels = BUILD / "wheels"
        download = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q", "--no-deps"]
        platform = ["--only-binary=:all:", "--platform", "manylinux_2_28_aarch64", "-d", str(wheels)]
        subprocess.run([*download, *platform, f"torch=={TORCH}"], check=True)
        with zipfile.ZipFile(next(wheels.glob("torch-*.whl"))) as wheel:
            wheel.extractall(folder)
    return folder / "torch"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--python", type=Path, help="Arm interpreter that computes the recorded cases")
    options = parser.parse_args()
    if shutil.which(COMPILER) is None:
        sys.exit(f"{COMPILER} was not found; on Debian and Ubuntu it is in the package g++-aarch64-linux-gnu")
    torch = arm_torch()
    name = f"_C.{sys.implementation.cache_tag}-aarch64-linux-gnu.so"
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "AFA_EXT_CUDA": "off",
        "AFA_EXT_WERROR": "ON",
        "AFA_EXT_TORCH_VERSION": TORCH,
        "AFA_EXT_TORCH_INCLUDE_DIRS": f"{torch / 'include'};{torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
        "AFA_EXT_TORCH_LIBRARY_DIRS": torch / "lib",
        "AFA_EXT_OUTPUT_NAME": name,
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": sysconfig.get_path("include"),
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    native = BUILD / "native"
    configure = ["cmake", "-S", str(ROOT), "-B", str(native), "-G", "Ninja"]
    configure += [f"-D{key}={value}" for key, value in settings.items()]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", native], check=True)
    print(f"compiled and linked for Arm with torch {TORCH}: {(native / name).relative_to(ROOT)}")
    if options.python:
        options_of_check = ["--python", options.python, "--library", native / name]
        subprocess.run([sys.executable, ROOT / "tools" / "abi_check.py", *options_of_check], check=True)


if __name__ == "__main__":
    main()
