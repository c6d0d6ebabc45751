"""Runs everything that needs a GPU in one command of at most eight minutes: build, tests, sanitizers, benchmarks.

    python -m tools.gpu_check                    # everything
    python -m tools.gpu_check --tune             # also time all variants of the kernels: two more minutes
    python -m tools.gpu_check --compile          # also time PAR against torch.compile, which compiles for minutes
    python -m tools.gpu_check --only tests       # only these stages; --list shows all
    python -m tools.gpu_check --skip build       # all stages except these

The build is in place, with the installed torch (2.10 or later), by default only for this machine's GPU (see
TORCH_CUDA_ARCH_LIST), and downloads nothing. The benchmarks write their files to benchmarks/results. Their rows, with
shares of the limit and the predictions of docs/kernels.md, and the targets that were met and missed are written to
benchmarks/results/<gpu>.json. A failed stage does not stop the others; the exit status is 1 if a stage failed or timed
out, or if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools import kernel_report
from tools.kernel_report import RESULTS, ROOT

BENCHMARKS = ["par_kernel", "random_walk", "affinity", "pseudo_labels", "dense_crf"]
SANITIZED = [f"tests/afa_ext/test_{name}.py" for name in ("par", "walk", "affinity", "labels", "refine_labels")]


@dataclass(frozen=True)
class Stage:
    name: str
    command: Sequence[str]
    limit: float  # seconds
    needs: str | None = None  # a required program; without it the stage is skipped


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _sanitizer(tool: str) -> list[str]:
    pytest = _python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", "-k", "golden", *SANITIZED)
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *pytest]


def _benchmark(name: str, *arguments: str) -> list[str]:
    return _python(f"benchmarks/{name}.py", "--device", "cuda", *arguments)


PAR = "8x21x320x320"
PAR_SIZES = ["--size", PAR, "--size", "8x3x160x160"]
STAGES = [
    Stage("build", _python("setup.py", "-q", "build_ext", "--inplace"), 90),
    Stage("tests", _python("-m", "pytest", "-q", "-m", "cuda", "-n", "6", "--dist", "loadfile"), 150),
    Stage("memcheck", _sanitizer("memcheck"), 30, "compute-sanitizer"),
    Stage("racecheck", _sanitizer("racecheck"), 30, "compute-sanitizer"),
    Stage("par_kernel", _benchmark("par_kernel", "--seconds", "0.5", "--no-compile", *PAR_SIZES), 40),
    Stage("random_walk", _benchmark("random_walk", "--seconds", "0.5", "--no-compile"), 40),
    Stage("affinity", _benchmark("affinity", "--seconds", "0.5", "--size", "8x16x32x32"), 25),
    Stage("pseudo_labels", _benchmark("pseudo_labels", "--seconds", "0.5", "--size", "8x20x512x512"), 25),
    Stage("dense_crf", _benchmark("dense_crf", "--seconds", "0.5", "--size", "1x21x375x500"), 40),
]
"""In order; the sum of their limits is below eight minutes."""
TUNE = Stage("tune", _python("benchmarks/tune.py", "--seconds", "0.1"), 120)
"""With --tune, after the tests."""
COMPILED = Stage("par_kernel", _benchmark("par_kernel", "--seconds", "0.5", *PAR_SIZES, "--compile-at", PAR), 400)
"""With --compile, in place of the stage of this name."""


@dataclass(frozen=True)
class Outcome:
    stage: str
    result: str
    seconds: float
    failed: bool


def run_stage(stage: Stage, environment: Mapping[str, str]) -> Outcome:
    """Runs one stage within its time limit; it inherits this process's output."""
    if stage.needs and shutil.which(stage.needs, path=environment.get("PATH")) is None:
        return Outcome(stage.name, f"skipped: {stage.needs} is not on PATH", 0.0, False)
    print(f"\n==== {stage.name} (at most {stage.limit:.0f} s)", flush=True)
    begin = time.monotonic()
    try:
        # In a new session, so that its child processes can be stopped with it.
        process = subprocess.Popen(stage.command, cwd=ROOT, env=dict(environment), start_new_session=True)
    except OSError as error:
        return Outcome(stage.name, f"did not start: {error}", 0.0, True)
    try:
        status = process.wait(timeout=stage.limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return Outcome(stage.name, f"stopped at its limit of {stage.limit:.0f} s", time.monotonic() - begin, True)
    result = "passed" if status == 0 else f"failed with status {status}"
    return Outcome(stage.name, result, time.monotonic() - begin, status != 0)


@dataclass(frozen=True)
class Target:
    """A target for one row of a benchmark: a bound on one of its values."""

    benchmark: str
    size: str
    candidate: str
    figure: str  # "median_ms" at most, "times_ours" or "share_of_limit" at least
    bound: float

    def met(self, row: Mapping[str, Any]) -> bool:
        return row[self.figure] <= self.bound if self.figure == "median_ms" else row[self.figure] >= self.bound


OURS = "afa_ext.par_refine"
TARGETS = [
    Target("par_kernel", PAR, OURS, "median_ms", 2.0),
    Target("par_kernel", PAR, "plain PyTorch", "times_ours", 50),
    Target("par_kernel", PAR, "torch.compile", "times_ours", 6),
    Target("par_kernel", "8x3x160x160", "in a CUDA graph", "median_ms", 0.15),
    Target("random_walk", "1x4x94x125", "plain PyTorch, dense", "times_ours", 20),
    Target("random_walk", "8x21x48x48", "afa_ext.random_walk", "share_of_limit", 0.5),
    Target("affinity", "8x16x32x32", "forward only, in a CUDA graph", "share_of_limit", 0.5),
    Target("pseudo_labels", "8x20x512x512", "afa_ext.pseudo_labels", "median_ms", 3.0),
    Target("dense_crf", "1x21x375x500", "afa_ext.dense_crf", "median_ms", 2.0),
]
"""For an H200 or a similar GPU, in float32."""
PREDICTED = {row: name for name, row in kernel_report.BENCHMARKED.items()}
"""Rows with a prediction in docs/kernels.md, in float32: (benchmark, size, candidate) -> name of the target."""


def prediction(name: str, device: str) -> float | None:
    """Milliseconds that tools/kernel_report.py predicts for its target on this GPU; None for a GPU whose data sheet it
    doesn't have, or if docs/kernels.md lacks one of the target's kernels."""
    gpus = [gpu for gpu in kernel_report.GPUS if gpu.name in device]
    (target,) = (target for target in kernel_report.TARGETS if target.name == name)
    counts = kernel_report.recorded_for_an_access(kernel_report.PAGE)
    if not gpus or any(stage.code not in counts for stage in target.stages):
        return None
    return kernel_report.estimate(target, gpus[0], counts).predicted * 1e3


def collected(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The benchmarks' rows, each with its `benchmark`, and `predicted_ms` where there is a prediction."""
    rows = []
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        for row in content["rows"]:
            name = PREDICTED.get((content["benchmark"], row["size"], row["candidate"]))
            known = name is not None and row["dtype"] == "float32"
            predicted = prediction(str(name), content["machine"]["device"]) if known else None
            rows.append({"benchmark": content["benchmark"], **row, "predicted_ms": predicted})
    return rows


def describe(row: Mapping[str, Any]) -> str:
    parts = [f"{row['median_ms']:.3f} ms"]
    if row.get("times_ours") is not None:
        parts.append(f"{row['times_ours']:.1f} times ours")
    if row.get("share_of_limit") is not None:
        parts.append(f"{row['share_of_limit']:.0%} of the limit")
    if row["predicted_ms"] is not None:
        ratio = row["median_ms"] / row["predicted_ms"]
        parts.append(f"predicted {row['predicted_ms']:.3f} ms, {ratio:.2f} times that")
    return f"{row['candidate']}, {row['size']} {row['dtype']}: {', '.join(parts)}"


def judged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The targets with their measured values and whether they are met (None if not measured)."""
    judgements = []
    for target in TARGETS:
        wanted = (target.benchmark, target.size, target.candidate, "float32")
        found = [r for r in rows if (r["benchmark"], r["size"], r["candidate"], r["dtype"]) == wanted]
        measured = found[0][target.figure] if found else None
        met = None if measured is None else target.met(found[0])
        judgements.append({**asdict(target), "measured": measured, "met": met})
    return judgements


def describe_target(judgement: Mapping[str, Any]) -> str:
    sign = "at most" if judgement["figure"] == "median_ms" else "at least"
    word = {None: "not measured", True: "met", False: "MISSED"}[judgement["met"]]
    got = "" if judgement["measured"] is None else f", {judgement['measured']:.3g}"
    what = f"{judgement['benchmark']} {judgement['size']}, {judgement['candidate']}"
    return f"{what}: {judgement['figure']} {sign} {judgement['bound']:g}: {word}{got}"


def summary(outcomes: Sequence[Outcome], rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per stage, per compared candidate of the benchmarks, and per target."""
    width = max((len(o.stage) for o in outcomes), default=0)
    lines = [f"{o.stage.ljust(width)}  {o.seconds:6.1f} s  {o.result}" for o in outcomes]
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        lines.append(f"{name}:")
        lines += [f"  {describe(row)}" for row in rows if row["benchmark"] == name]
    if rows:
        lines.append("targets for an H200:")
        lines += [f"  {describe_target(judgement)}" for judgement in judged(rows)]
    return "\n".join(lines)


def write_report(machine: Mapping[str, Any], outcomes: Sequence[Outcome], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes <gpu>.json to the results atomically."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    path = RESULTS / f"{slug}.json"
    partial = path.with_suffix(".partial")
    content = {
        "machine": dict(machine),
        "stages": [asdict(outcome) for outcome in outcomes],
        "rows": list(rows),
        "targets": judged(rows),
    }
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def gpu() -> tuple[str, str]:
    """Name and compute capability (such as 9.0) of the GPU; exits with a message if there is none."""
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
    parser.add_argument("--skip", action="append", choices=names, default=[], help="skip this stage")
    parser.add_argument("--tune", action="store_true", help="time all variants of the kernels too")
    parser.add_argument("--compile", action="store_true", help="time PAR against torch.compile too")
    parser.add_argument("--list", action="store_true", help="list the stages and their limits without running them")
    options = parser.parse_args(arguments)
    chosen = [s for s in STAGES if s.name in (options.only or names) and s.name not in options.skip]
    if options.compile:
        chosen = [COMPILED if stage.name == COMPILED.name else stage for stage in chosen]
    if options.tune:  # before the first benchmark
        chosen.insert(sum(stage.name not in BENCHMARKS for stage in chosen), TUNE)
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
    found = (file for benchmark in BENCHMARKS for file in sorted(RESULTS.glob(f"{benchmark}-*.json")))
    files = [file for file in found if file.stat().st_mtime >= begin]
    rows = collected(files)
    print(f"\n{summary(outcomes, rows)}")
    if files:
        machine = json.loads(files[0].read_text(encoding="utf-8"))["machine"]
        print(f"written to {write_report(machine, outcomes, rows)}")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
