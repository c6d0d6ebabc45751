"""Runs tests on the stand-in GPU (README.md): builds what changed, then pytest where torch finds its two devices.

    python -m tests.cuda.run                              # every test that needs a GPU, each access checked
    python -m tests.cuda.run --sanitize                   # part of them, under AddressSanitizer
    python -m tests.cuda.run tests/test_par.py -k golden  # these only
    python -m tests.cuda.run --python script.py           # a script in place of pytest
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from . import build

ROOT = Path(__file__).resolve().parent.parent.parent


def sanitizer_runtimes() -> list[str]:
    return [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]


def environment(sanitize: bool = False) -> dict[str, str]:
    """That of a process which sees the stand-in's devices and imports the package with the host-compiled kernels."""
    runtime, bridge, package = build.build_runtime(), build.build_bridge(), build.build_package(sanitize)
    preload = [str(runtime / "libstand_in_cudart.so")]
    settings = {
        **os.environ,
        "AFA_STAND_IN": "1",
        "AFA_STAND_IN_BRIDGE": str(bridge),
        "LD_LIBRARY_PATH": str(runtime),
        "PYTHONPATH": os.pathsep.join([str(package), str(ROOT), str(ROOT / "python")]),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    if sanitize:
        preload = [*sanitizer_runtimes(), *preload]
        settings["AFA_STAND_IN_SANITIZE"] = "1"
        settings["ASAN_OPTIONS"] = "detect_leaks=0:abort_on_error=1"  # Python itself leaks at exit
        settings["UBSAN_OPTIONS"] = "print_stacktrace=1:halt_on_error=1"
    settings["LD_PRELOAD"] = " ".join(preload)
    return settings


def main(arguments: list[str]) -> int:
    reason = build.why_not()
    if reason is not None:
        print(f"not run: {reason}")
        return 0
    sanitize = "--sanitize" in arguments
    arguments = [a for a in arguments if a != "--sanitize"]
    start = time.monotonic()
    env = environment(sanitize)
    print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    if arguments[:1] == ["--python"]:
        command = [sys.executable, *arguments[1:]]
    else:
        command = [sys.executable, "-P", "-m", "pytest", "-p", "tests.cuda.plugin", "-p", "no:cacheprovider"]
        command += ["-p", "no:faulthandler", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
