"""Runs the operators' tests on CPU kernels built for AddressSanitizer and UndefinedBehaviorSanitizer (GCC).

    python tools/sanitize.py                       # all tests at the best SIMD level, the recorded cases at the others
    python tools/sanitize.py tests/afa_ext/test_par.py -k reference

The instrumented library is built separately in build/sanitize and imported from there. Tests that need a compiler or a
second process (torch.compile, subprocess tests) are skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "sanitize"
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")
TESTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "afa_ext").glob("test_*.py"))
NOT_OPERATORS = {f"tests/afa_ext/test_{name}.py" for name in ("build", "cuda", "heuristics", "imports", "ops_meta")}
PLAIN_ONLY = "not compile and not subprocess"
# The file imported, then the levels below the one in use.
CHECK = """
import afa_ext
info = afa_ext.build_info()
print(afa_ext.__file__, *info["simd_levels"][: info["simd_levels"].index(info["simd"])])
"""


def build() -> None:
    environment = {
        **os.environ,
        "AFA_EXT_CUDA": "off",
        "AFA_EXT_BUILD_DIR": str(FOLDER / "native"),
        "CMAKE_ARGS": "-DAFA_EXT_SANITIZE=ON",
    }
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(FOLDER),
        "--build-lib",
        str(FOLDER / "lib"),
    ]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


def sanitized(*preloaded: str) -> dict[str, str]:
    """Environment variables for loading an instrumented library into a Python without sanitizers; `preloaded`:
    libraries to preload after those of the sanitizers."""
    runtimes = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in RUNTIMES
    ]
    missing = [path for path in runtimes if not os.path.isabs(path)]
    if missing:
        raise SystemExit(f"gcc's sanitizer runtimes are not installed: {', '.join(missing)}")
    return {
        "LD_PRELOAD": " ".join([*runtimes, *preloaded]),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # Python itself leaks at exit
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def environment() -> dict[str, str]:
    """The environment of a process that loads the instrumented library instead of the installed one."""
    return {**os.environ, **sanitized(), "PYTHONPATH": str(FOLDER / "lib")}


def run(arguments: list[str], **settings: str) -> None:
    pytest = [
        str(Path(sys.executable).parent / "pytest"),
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
        "--capture=sys",
        *arguments,
    ]
    print("$", *(f"{k}={v}" for k, v in settings.items()), *pytest, flush=True)
    subprocess.run(pytest, check=True, cwd=ROOT, env={**environment(), **settings})


def main(arguments: list[str]) -> None:
    build()
    result = subprocess.run(
        [sys.executable, "-P", "-c", CHECK], check=True, cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    origin, *others = result.stdout.split()
    assert Path(origin).is_relative_to(FOLDER), f"another afa_ext was imported: {origin}"
    if arguments:
        run(arguments)
        return
    tests = [path for path in TESTS if path not in NOT_OPERATORS]
    run([*tests, "-k", PLAIN_ONLY])
    for level in others:
        run([*tests, "-k", "golden"], AFA_EXT_SIMD=level)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode or 1)
