"""Shared by all benchmarks: timing on CPU and CUDA, the machine's description, tables and JSON.

Candidates are timed in turn in every round, so that a slowdown of the machine affects all of them equally. CUDA rounds
are timed with events, and the L2 cache is flushed before each; CPU rounds are timed with the wall clock.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import afa_ext
from afa.machine import processor_name

RESULTS = Path(__file__).parent / "results"
FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate: median and half the interquartile range."""

    median: float
    spread: float
    rounds: int


def _once(run: Callable[[], object], device: torch.device, flush: torch.Tensor | None) -> float:
    if flush is not None:
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def time_candidates(
    candidates: Mapping[str, Callable[[], object]], device: torch.device, seconds: float, max_rounds: int = 200
) -> dict[str, Timing]:
    """Times each candidate in turn for about ``seconds`` each, after a warm-up.

    At least 3 rounds; 2 for a candidate whose warm-up took more than 5 s.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    least = {}
    for name, run in candidates.items():  # warm-up: allocation, compilation, clocks
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        least[name] = 2 if time.perf_counter() - begin > 5 else 3
    while True:
        due = [
            name
            for name, taken in samples.items()
            if len(taken) < least[name] or (sum(taken) < seconds * 1e3 and len(taken) < max_rounds)
        ]
        if not due:
            break
        for name in due:
            samples[name].append(_once(candidates[name], device, flush))
    timings = {}
    for name, taken in samples.items():
        quartiles = statistics.quantiles(taken, n=4)
        timings[name] = Timing(statistics.median(taken), (quartiles[2] - quartiles[0]) / 2, len(taken))
    return timings


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """A function that replays run() as a CUDA graph, without host overhead. run() must have been called before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@dataclass(frozen=True)
class Limits:
    """Maximum rates of a device per second: bytes read or written, and float32 multiply-adds."""

    bytes_per_s: float
    multiply_adds_per_s: float

    def milliseconds(self, moved: float, multiply_adds: float = 0) -> float:
        return 1e3 * max(moved / self.bytes_per_s, multiply_adds / self.multiply_adds_per_s)


@cache
def limits(device: torch.device, values: int = 1 << 28, side: int = 8192) -> Limits:
    """Measured in plain PyTorch, once per process: a copy of `values` float32 values, and a product of two square
    matrices without TF32. For a GPU; a CPU's rate depends on the cache level, so each benchmark measures its own."""
    source, factor = torch.rand(values, device=device), torch.rand(side, side, device=device)
    target, product = torch.empty_like(source), torch.empty_like(factor)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        runs = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(factor, factor, out=product)}
        timings = time_candidates(runs, device, seconds=0.2)
    finally:
        torch.set_float32_matmul_precision(precision)
    seconds = {name: timing.median / 1e3 for name, timing in timings.items()}
    return Limits(2 * source.nbytes / seconds["copy"], side**3 / seconds["product"])


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: torch.device) -> dict[str, Any]:
    """The setup of a benchmark: device, torch, CUDA, commit, threads, instruction set."""
    info = afa_ext.build_info()
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "commit": _commit(),
        "threads": torch.get_num_threads(),
        "simd": None if cuda else info["simd"],
        "compiler": info["compiler"],
    }


def print_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Prints rows with equal keys as aligned columns: the first one left-aligned, the others right-aligned."""
    columns = list(rows[0])
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    print(f"\n{title}")
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        cells = [row[c].ljust(widths[c]) if c == columns[0] else row[c].rjust(widths[c]) for c in columns]
        print("  " + "  ".join(cells).rstrip())


def write_results(
    benchmark: str,
    device: torch.device,
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Writes <folder>/<benchmark>-<device>.json atomically: the machine, what else is in `about`, and the rows."""
    where = machine(device)
    slug = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}-{slug}.json"
    partial = path.with_suffix(".partial")
    content = {"benchmark": benchmark, "machine": where, **(about or {}), "rows": list(rows)}
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
    return path
