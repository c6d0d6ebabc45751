"""Runs the operators' own tests on the CUDA kernels, compiled for the CPU (tests/cuda_on_host/README.md).

    python tools/kernels_on_host.py                              # all of them, with each memory access checked
    python tools/kernels_on_host.py --sanitize                   # part of them, and tests/cuda_on_host's, under
                                                                 # AddressSanitizer
    python tools/kernels_on_host.py tests/test_par.py -k golden  # these alone

A copy of the package is made under build/, whose operators on CPU tensors are the CUDA kernels, and imported from
there. One process a core. torch.compile is left to the plain run of the tests: it sees no kernel.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

NOT_OPERATORS = ("build", "cuda", "docs", "tools", "tune", "tuning")
FILES = [
    path
    for path in sorted((ROOT / "tests").glob("test_*.py"))
    if path.stem.removeprefix("test_") not in NOT_OPERATORS and "afa_ext" in path.read_text(encoding="utf-8")
]
CHECK = "import afa_ext; print(afa_ext.__file__, 'cuda_on_host' in afa_ext.build_info())"
# Under AddressSanitizer: the recorded cases, empty and strided tensors, types, and each operator on its own.
SANITIZED = "not compile and not subprocess and (golden or empty or strided or contiguous or dtype or half or opcheck)"


def environment(sanitize: bool) -> dict[str, str]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    if sanitize:
        settings["AFA_CUDA_ON_HOST_SANITIZE"] = "1"  # for tests/cuda_on_host, which builds a library of its own
        import sanitize as sanitizers

        runtimes = sanitizers.environment()
        settings |= {name: runtimes[name] for name in ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS")}
    return settings


def run(arguments: list[str], env: dict[str, str]) -> tuple[int, str, float]:
    """The exit code, what pytest printed, and the seconds it took."""
    pytest = [str(Path(sys.executable).parent / "pytest"), "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    start = time.monotonic()
    result = subprocess.run(
        [*pytest, "--capture=sys", *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true", help="under AddressSanitizer")
    options, chosen = parser.parse_known_args()

    from cuda_on_host import build

    if build.cuda_headers() is None:
        print("not run: the CUDA toolkit's headers (cuda_fp16.h) are not installed")
        return 0
    start = time.monotonic()
    package = build.build_package(options.sanitize)
    outside = environment(options.sanitize)
    env = {**outside, "PYTHONPATH": os.pathsep.join([str(package), str(ROOT)])}
    if options.sanitize:
        build.build_library(sanitize=True)
    print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    result = subprocess.run(
        [sys.executable, "-P", "-c", CHECK], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert result.stdout.split()[-1] == "True", f"another afa_ext was imported: {result.stdout}"
    if chosen:
        code, text, _ = run(chosen, env)
        print(text)
        return code

    select = ["-k", SANITIZED if options.sanitize else "not compile"]
    # The longest first. The comparisons of tests/cuda_on_host need the CPU kernels too: the package as it is installed.
    runs = [(path, [str(path), *select], env) for path in sorted(FILES, key=lambda path: -path.stat().st_size)]
    if options.sanitize:
        runs += [(path, [str(path)], outside) for path in (ROOT / "tests/cuda_on_host").glob("test_[!h]*.py")]
    start = time.monotonic()
    passed, failed = 0, False
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = pool.map(lambda planned: run(*planned[1:]), runs)
        for (path, *_), (code, text, seconds) in zip(runs, results, strict=True):
            bad = code not in (0, 5)  # 5: none of its tests was chosen
            failed |= bad
            passed += sum(int(count) for count in re.findall(r"(\d+) passed", text))
            if bad:
                print(text)
            print(f"{path.relative_to(ROOT)}: {text.strip().splitlines()[-1]} ({seconds:.0f} s)", flush=True)
    print(f"{passed} tests passed on the CUDA kernels in {time.monotonic() - start:.0f} s")
    return 1 if failed or passed == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
