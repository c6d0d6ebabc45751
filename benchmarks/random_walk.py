"""Times the random walks against the published steps in plain PyTorch: mask, power, normalize, square, multiply.

    python benchmarks/random_walk.py                            # some minutes on 2 cores: IRN squares 11,750 x 11,750
    python benchmarks/random_walk.py --quick                    # the same rows on small grids, some seconds
    python benchmarks/random_walk.py --row AFA --device cuda    # some rows; IRN's dense version needs 2 GB

Every row is compared with plain PyTorch before it is timed. IRN's dense version runs once, at full size, in a separate
process; so does ours for its memory, the peak that is added to the process (CUDA: to the allocator). Denormal numbers
are flushed to 0 for the benefit of the dense versions: squaring produces many of them, which makes it several times
slower. The limit is the time to read the walk's inputs at the rate of a copy of that size, or its multiply-adds at the
rate of a float32 matrix product, whichever is longer. On CUDA both rates are those of large tensors.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from par_kernel import validate
from timing import RESULTS, Timing, limits, print_table, time_candidates, write_results
from torch import Tensor

import afa_ext
from afa_ext import reference
from afa_ext.reference.walk import dense_affinity, window_mask

TOLERANCE = 1e-4
MATRIX = 1024
DISC = {"radius": 5, "window": "disc"}


@dataclass(frozen=True)
class Row:
    """One walk: batch x maps x height x width, the window, and the number of steps."""

    name: str
    size: tuple[int, int, int, int]
    radius: int
    window: str
    steps: int
    channels: int = 0  # of the features that an affinity is computed from

    def offsets(self) -> list[tuple[int, int]]:
        return afa_ext.window_offsets(self.radius, self.window)

    def pairs(self) -> int:
        """Pairs of nodes in the window and in the grid, in all images."""
        batch, _, height, width = self.size
        inside = sum(max(0, height - abs(dy)) * max(0, width - abs(dx)) for dy, dx in self.offsets())
        return batch * inside

    def multiply_adds(self) -> int:
        return self.pairs() * (self.size[1] * self.steps + self.channels)


STANDARD = [
    Row("IRN", (1, 4, 94, 125), 5, "disc", 256),
    Row("AFA", (1, 21, 48, 48), 8, "square", 1),
    Row("AFA training", (4, 4, 32, 32), 8, "square", 1),
    Row("PSA", (1, 21, 47, 63), 5, "disc", 256, channels=448),
]
ON_CUDA = [Row("AFA, batch 8", (8, 21, 48, 48), 8, "square", 1)]
QUICK = [
    Row("IRN", (1, 4, 24, 31), 5, "disc", 256),
    Row("AFA", (1, 21, 24, 24), 8, "square", 1),
    Row("AFA training", (4, 4, 16, 16), 8, "square", 1),
    Row("PSA", (1, 21, 12, 16), 5, "disc", 256, channels=448),
]


def smooth(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """[B, C, h, w] between 0 and 1, with about one bump every eight pixels."""
    coarse = torch.rand(*shape[:2], max(2, shape[2] // 8), max(2, shape[3] // 8), generator=generator)
    return F.interpolate(coarse, size=shape[2:], mode="bicubic").clamp(0, 1)


def inputs(row: Row, device: torch.device) -> tuple[Tensor, Tensor]:
    """The scores, and the source of the affinity: a boundary map, features, or a dense affinity."""
    generator = torch.Generator().manual_seed(0)
    batch, _, height, width = row.size
    scores = smooth(row.size, generator)
    if row.name == "IRN":
        source = smooth((batch, 1, height, width), generator) ** 2
    elif row.channels:
        source = smooth((batch, row.channels, height, width), generator)
    else:
        source = torch.rand(batch, height * width, height * width, generator=generator)
    return scores.to(device), source.to(device)


def squared_walk(scores: Tensor, windowed: Tensor, row: Row, power: float) -> Tensor:
    """Published: the dense transition matrix, squared; two matrices of that size at a time."""
    p = dense_affinity(windowed, (scores.shape[2], scores.shape[3]), row.radius, row.window) ** power
    p /= p.sum(dim=1, keepdim=True)
    for _ in range(row.steps.bit_length() - 1):
        p = p @ p
    return (scores.flatten(2) @ p).view_as(scores)


def candidates(row: Row, scores: Tensor, source: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ours first, then plain PyTorch."""
    grid = (scores.shape[2], scores.shape[3])
    if row.name == "IRN":
        return {
            "afa_ext.propagate_to_edge": lambda: afa_ext.propagate_to_edge(scores, source),
            "plain PyTorch, dense": lambda: squared_walk(
                scores * (1 - source), reference.edge_affinity(source, row.radius), row, 10
            ),
        }
    if row.channels:
        options: dict[str, Any] = {"grid": grid, "power": 8, "steps": row.steps, "eps": 0.0, **DISC}
        return {
            "afa_ext.random_walk": lambda: afa_ext.random_walk(
                scores, afa_ext.feature_affinity(source, row.radius), **options
            ),
            "plain PyTorch, dense": lambda: squared_walk(
                scores, reference.feature_affinity(source, row.radius), row, 8
            ),
        }
    inside = window_mask(grid, row.radius, row.window, scores.device).to(source.dtype)

    def plain(scores: Tensor, affinity: Tensor) -> Tensor:
        p = (affinity * inside) ** 2
        p = p / (p.sum(dim=1, keepdim=True) + 1e-4)
        return (scores.flatten(2) @ p).view_as(scores)

    return {
        "afa_ext.random_walk": lambda: afa_ext.random_walk(scores, source, grid=grid, radius=row.radius),
        "plain PyTorch": lambda: plain(scores, source),
    }


def limit_ms(row: Row, device: torch.device) -> float:
    """Milliseconds at this machine's copy and multiplication rates: see the top of this file."""
    if device.type == "cuda":
        return limits(device).milliseconds(4 * row.steps * row.pairs(), row.multiply_adds())
    factor = torch.rand(MATRIX, MATRIX, device=device)
    entries = torch.rand(row.pairs(), device=device)
    copied = torch.empty_like(entries)

    def best(run: Callable[[], object]) -> float:
        return min(time_candidates({"": run}, device, seconds=0.05)[""].median for _ in range(8))

    read = row.steps * best(lambda: copied.copy_(entries)) / 2  # a copy moves each byte twice
    return max(read, row.multiply_adds() / MATRIX**3 * best(lambda: factor @ factor))


def run_once(row: Row, name: str, device: torch.device) -> tuple[Tensor, dict[str, float]]:
    """One candidate: its result, its time and its peak memory, after a run on a small grid."""
    with torch.no_grad():
        small = QUICK[[r.name for r in QUICK].index(row.name)]
        candidates(small, *inputs(small, device))[name]()
        run = candidates(row, *inputs(row, device))[name]
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        else:
            page = resource.getpagesize()
            before = int(Path("/proc/self/statm").read_text().split()[1]) * page
        begin = time.perf_counter()
        out = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated(device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return out.cpu(), {"ms": (time.perf_counter() - begin) * 1e3, "bytes": max(peak - before, 0)}


def run_alone(row: Row, quick: bool, name: str, device: torch.device) -> tuple[Tensor, dict[str, float]]:
    """:func:`run_once`; on a CPU in a separate process, so that only this run affects its peak memory."""
    if device.type == "cuda":
        return run_once(row, name, device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.pt"
        command = [sys.executable, __file__, "--alone", row.name, name, str(path), *(["--quick"] if quick else [])]
        figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        return torch.load(path), figures


def measure(row: Row, quick: bool, device: torch.device, seconds: float, compiled: bool) -> list[dict[str, Any]]:
    """Validates, times and prints one row; returns its candidates for the JSON."""
    memory: dict[str, float] = {}
    with torch.no_grad():
        runs = candidates(row, *inputs(row, device))
        ours, plain = runs
        if row.name == "IRN":
            expected, once = run_alone(row, quick, plain, device)
            _, own = run_alone(row, quick, ours, device)
            memory = {plain: once["bytes"], ours: own["bytes"]}
            del runs[plain]
        else:
            expected = runs[plain]().cpu()
        error = validate(f"{row.name}: {ours}", runs[ours]().cpu(), expected, TOLERANCE)
        if compiled and row.steps == 1:
            torch._dynamo.reset()
            runs["torch.compile"] = torch.compile(runs[plain])
        timings = time_candidates(runs, device, seconds)
        if row.name == "IRN":
            timings[plain] = Timing(once["ms"], 0.0, 1)
        limit = limit_ms(row, device)
    rows, table = [], []
    for name, timing in timings.items():
        rate = row.multiply_adds() / timing.median / 1e6 if name == ours else None
        rows.append(
            {
                "row": row.name,
                "candidate": name,
                "size": "x".join(map(str, row.size)),
                "dtype": "float32",
                "radius": row.radius,
                "steps": row.steps,
                "median_ms": timing.median,
                "spread_ms": timing.spread,
                "rounds": timing.rounds,
                "gfma_per_s": rate,
                "share_of_limit": limit / timing.median,
                "times_ours": timing.median / timings[ours].median,
                "peak_bytes": memory.get(name),
            }
        )
        table.append(
            {
                "": name,
                "median ms": f"{timing.median:.3f}",
                "± ms": f"{timing.spread:.3f}" if timing.rounds > 1 else "",
                "rounds": str(timing.rounds),
                "GFMA/s": f"{rate:.2f}" if rate else "",
                "of the limit": f"{limit / timing.median:.0%}" if name == ours else "",
                "time over ours": f"{timing.median / timings[ours].median:.1f}",
                **({"peak MB": f"{memory[name] / 1e6:.1f}"} if memory else {}),
            }
        )
    about = f"{'x'.join(map(str, row.size))}, {row.window} of {len(row.offsets())}, {row.steps} steps"
    print_table(f"{row.name} walk {about} on {device.type}; validated, relative error {error:.1e}", table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small grids and short rounds; no large dense matrices")
    parser.add_argument(
        "--row", action="append", choices=[row.name for row in STANDARD + ON_CUDA], help="only this one"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=None, help="time for each candidate")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile (its first run is slow)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--alone", nargs=3, metavar=("ROW", "CANDIDATE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_flush_denormal(True)  # before the first operator: its threads inherit it
    chosen = QUICK if options.quick else STANDARD + (ON_CUDA if device.type == "cuda" else [])
    if options.alone:
        name, candidate, path = options.alone
        (row,) = (row for row in chosen if row.name == name)
        out, figures = run_once(row, candidate, torch.device("cpu"))
        torch.save(out, path)
        print(json.dumps(figures))
        return
    seconds = options.seconds or (0.3 if options.quick else 2.0)
    rows = []
    for row in chosen:
        if options.row is None or row.name in options.row:
            rows += measure(row, options.quick, device, seconds, not options.no_compile)
    print(f"\nwritten to {write_results('random_walk', device, rows, options.out)}")


if __name__ == "__main__":
    main()
