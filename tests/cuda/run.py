"""Runs tests on the stand-in GPU (README.md): builds changed files, then runs pytest with two simulated devices.

    python -m tests.cuda.run                              # every test that needs a GPU; all accesses are checked
    python -m tests.cuda.run --sanitize                   # part of them, under AddressSanitizer
    python -m tests.cuda.run tests/afa_ext/test_par.py -k golden  # only these tests
    python -m tests.cuda.run --python script.py           # a script instead of pytest

The tests of a file run in one process; there are as many processes as cores.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.sanitize import sanitized

from . import build

ROOT = Path(__file__).resolve().parent.parent.parent
PLUGIN = ["-m", "pytest", "-q", "-p", "tests.cuda.plugin", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
NO_GPU = ("build", "heuristics", "imports", "window")
"""Tests in tests/afa_ext without tensors on a device."""
# With AddressSanitizer: the recorded cases, empty and strided tensors, dtypes, and opcheck of each operator.
SANITIZED = "not compile and not subprocess and (golden or empty or strided or contiguous or dtype or half or opcheck)"


def environment(sanitize: bool = False) -> dict[str, str]:
    """The environment of a process with the stand-in's devices and the package with the host-compiled kernels."""
    runtime, bridge, package = build.build_runtime(), build.build_bridge(), build.build_package(sanitize)
    return settings(runtime, bridge, package, sanitize)


def settings(runtime: Path, bridge: Path, package: Path, sanitize: bool = False) -> dict[str, str]:
    preloaded = str(runtime / "libstand_in_cudart.so")
    return {
        **os.environ,
        "AFA_STAND_IN": "1",
        "AFA_STAND_IN_BRIDGE": str(bridge),
        "LD_LIBRARY_PATH": str(runtime),
        "PYTHONPATH": os.pathsep.join([str(package), str(ROOT), str(ROOT / "python")]),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        **(sanitized(preloaded) if sanitize else {"LD_PRELOAD": preloaded}),
    }


def run(arguments: list[str], env: dict[str, str]) -> tuple[int, str, float]:
    """Returns the exit code, the output, and the duration in seconds."""
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout, time.monotonic() - start


def run_files(sanitize: bool, env: dict[str, str]) -> int:
    files = (ROOT / "tests" / "afa_ext").glob("test_*.py")
    planned = [
        (path, ["-k", SANITIZED] if sanitize else [])
        for path in files
        if path.stem.removeprefix("test_") not in (*NO_GPU, *(["cuda"] if sanitize else []))
    ]
    # These two start their own processes; the normal test run includes them.
    elsewhere = ["test_harness", "test_shipped"]
    # test_faults only runs in the checked build. Its library is not sanitized, and an address in AddressSanitizer's
    # heap may look like an integer, so that host pointers are not detected.
    elsewhere += ["test_faults"] if sanitize else []
    planned += [(path, []) for path in Path(__file__).parent.rglob("test_*.py") if path.stem not in elsewhere]
    planned.sort(key=lambda plan: (plan[0].stem != "test_kernels", -plan[0].stat().st_size))
    start = time.monotonic()
    passed, failed = 0, False
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = pool.map(lambda plan: run([*PLUGIN, "--capture=sys", str(plan[0]), *plan[1]], env), planned)
        for (path, _), (code, text, seconds) in zip(planned, results, strict=True):
            bad = code not in (0, 5)  # 5: no tests were selected
            failed |= bad
            passed += sum(int(count) for count in re.findall(r"(\d+) passed", text))
            if bad:
                print(text)
            summary = text.strip().splitlines()[-1] if text.strip() else f"exit code {code}, no output"
            print(f"{path.relative_to(ROOT)}: {summary} ({seconds:.0f} s)", flush=True)
    print(f"{passed} tests passed on the stand-in GPU in {time.monotonic() - start:.0f} s")
    return 1 if failed or passed == 0 else 0


def main(arguments: list[str]) -> int:
    reason = build.why_not()
    if reason is not None:
        print(f"not run: {reason}")
        return 0
    sanitize = "--sanitize" in arguments
    arguments = [argument for argument in arguments if argument != "--sanitize"]
    start = time.monotonic()
    env = environment(sanitize)
    print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    if not arguments:
        return run_files(sanitize, env)
    command = arguments[1:] if arguments[0] == "--python" else [*PLUGIN, *arguments]
    return subprocess.run([sys.executable, "-P", *command], cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
