"""All that needs a GPU, in one command of at most eight minutes: build, tests, sanitizers, benchmarks.

    python tools/gpu_check.py                    # everything
    python tools/gpu_check.py --only tests       # some stages; --list names them
    python tools/gpu_check.py --skip build       # all but some

The build is in place, against the torch that is installed (2.10 or later), for this machine's GPU alone unless
TORCH_CUDA_ARCH_LIST says otherwise, and fetches nothing. The benchmarks write their files to benchmarks/results. Every
stage runs whatever became of the others; the exit status is 1 if one failed or ran past its time, or if there is no
GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SANITIZED = [f"tests/test_{name}.py" for name in ("par", "walk", "affinity", "labels", "refine_labels")]


@dataclass(frozen=True)
class Stage:
    name: str
    command: Sequence[str]
    limit: float  # seconds
    needs: str | None = None  # a program without which the stage is left out


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _sanitizer(tool: str) -> list[str]:
    pytest = _python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", "-k", "golden", *SANITIZED)
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *pytest]


def _benchmark(name: str, *arguments: str) -> list[str]:
    return _python(f"benchmarks/{name}.py", "--device", "cuda", *arguments)


STAGES = [
    Stage("build", _python("setup.py", "-q", "build_ext", "--inplace"), 120),
    Stage("tests", _python("-m", "pytest", "-q", "-m", "cuda"), 90),
    Stage("memcheck", _sanitizer("memcheck"), 40, "compute-sanitizer"),
    Stage("racecheck", _sanitizer("racecheck"), 40, "compute-sanitizer"),
    Stage(
        "par_kernel",
        _benchmark("par_kernel", "--seconds", "0.5", "--no-compile", "--size", "8x21x320x320", "--size", "8x3x160x160"),
        50,
    ),
    Stage("random_walk", _benchmark("random_walk", "--seconds", "0.5", "--no-compile"), 60),
    Stage("affinity", _benchmark("affinity", "--seconds", "0.5", "--size", "8x16x32x32"), 30),
    Stage("pseudo_labels", _benchmark("pseudo_labels", "--seconds", "0.5", "--size", "8x20x512x512"), 40),
]
"""In order; their limits add up to under eight minutes."""


@dataclass(frozen=True)
class Outcome:
    stage: str
    result: str
    seconds: float
    failed: bool


def run_stage(stage: Stage, environment: Mapping[str, str]) -> Outcome:
    """Runs one stage within its limit, its output going where this process's goes."""
    if stage.needs and shutil.which(stage.needs, path=environment.get("PATH")) is None:
        return Outcome(stage.name, f"left out: {stage.needs} is not on PATH", 0.0, False)
    print(f"\n==== {stage.name} (at most {stage.limit:.0f} s)", flush=True)
    begin = time.monotonic()
    try:
        # In a session of its own, so that what it starts ends with it.
        process = subprocess.Popen(stage.command, cwd=ROOT, env=dict(environment), start_new_session=True)
    except OSError as error:
        return Outcome(stage.name, f"did not start: {error}", 0.0, True)
    try:
        status = process.wait(timeout=stage.limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return Outcome(stage.name, f"ended at its limit of {stage.limit:.0f} s", time.monotonic() - begin, True)
    result = "passed" if status == 0 else f"failed with status {status}"
    return Outcome(stage.name, result, time.monotonic() - begin, status != 0)


def summary(outcomes: Sequence[Outcome], files: Sequence[Path]) -> str:
    """One line a stage, then one for each thing that the benchmarks compared."""
    width = max((len(o.stage) for o in outcomes), default=0)
    lines = [f"{o.stage.ljust(width)}  {o.seconds:6.1f} s  {o.result}" for o in outcomes]
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        lines.append(f"{file.name}: {content['machine']['device']}, torch {content['machine']['torch']}")
        for row in content["rows"]:
            times = "" if row.get("times_ours") is None else f", {row['times_ours']:.1f} times ours"
            lines.append(f"  {row['candidate']}, {row['size']} {row['dtype']}: {row['median_ms']:.3f} ms{times}")
    return "\n".join(lines)


def gpu() -> tuple[str, str]:
    """Name and architecture (9.0) of the GPU; exits in one sentence where there is none."""
    try:
        import torch
    except ImportError:
        sys.exit("torch is not installed, so no GPU can be used and nothing was run.")
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no GPU on this machine, so nothing was run.")
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}.{minor}"


def main(arguments: Sequence[str] | None = None) -> int:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", action="append", choices=names, help="run this stage (may be repeated)")
    parser.add_argument("--skip", action="append", choices=names, default=[], help="leave this stage out")
    parser.add_argument("--list", action="store_true", help="name the stages and their limits, and run nothing")
    options = parser.parse_args(arguments)
    chosen = [s for s in STAGES if s.name in (options.only or names) and s.name not in options.skip]
    if options.list:
        print("\n".join(f"{stage.name}: at most {stage.limit:.0f} s" for stage in chosen))
        return 0
    name, architecture = gpu()
    print(f"{name}, compute capability {architecture}", flush=True)
    path = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {
        "TORCH_CUDA_ARCH_LIST": architecture,
        "AFA_EXT_CUDA": "on",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
    }
    begin = time.time()
    outcomes = [run_stage(stage, environment) for stage in chosen]
    files = sorted(file for file in RESULTS.glob("*.json") if file.stat().st_mtime >= begin)
    print(f"\n{summary(outcomes, files)}")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
