"""Builds the native library from setuptools with CMake; all build settings are in CMakeLists.txt."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures and builds with CMake and Ninja, then moves the library to where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import numpy  # noqa: F401  (torch warns while importing without it)
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "AFA_EXT_CUDA": os.environ.get("AFA_EXT_CUDA", "auto"),
            "AFA_EXT_TORCH_VERSION": torch.__version__,
            "AFA_EXT_TORCH_CUDA": torch.version.cuda or "",
            "AFA_EXT_TORCH_INCLUDE_DIRS": ";".join(include_paths()),
            "AFA_EXT_TORCH_LIBRARY_DIRS": ";".join(library_paths()),
            "AFA_EXT_OUTPUT_NAME": target.name,
            "Python_EXECUTABLE": sys.executable,
            "Python_INCLUDE_DIR": sysconfig.get_path("include"),
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        # One folder per Python version, kept between builds: a second install compiles nothing. Different settings (an
        # isolated build has its own temporary cmake, ninja and torch) start with a new cache.
        build = Path(
            os.environ.get("AFA_EXT_BUILD_DIR") or ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        ).resolve()
        build.mkdir(parents=True, exist_ok=True)
        arguments = [f"-D{key}={value}" for key, value in settings.items()]
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        stamp = build / "settings.txt"
        wanted = "\n".join([*arguments, os.environ.get("TORCH_CUDA_ARCH_LIST", "")])
        known = stamp.exists() and stamp.read_text() == wanted
        stamp.unlink(missing_ok=True)
        configure = ["cmake", *([] if known else ["--fresh"]), "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += arguments
        # The cmake and ninja installed by pip are next to its Python, which need not be on PATH.
        env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
        subprocess.run(configure, check=True, env=env)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(len(os.sched_getaffinity(0)))
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True, env=env)
        stamp.write_text(wanted)
        # Copied, not built there: in an editable install, the target's folder has a new temporary name each time, and a
        # setting with that name would start a new cache.
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build / target.name, target)


setup(
    packages=find_packages(include=["afa_ext", "afa_ext.*"]) + find_packages("python", include=["afa", "afa.*"]),
    package_dir={"afa": "python/afa"},
    ext_modules=[Extension("afa_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
